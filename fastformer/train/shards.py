"""A model whose parameters are split over all processes (FSDP2), and its tensors in one piece."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fastformer.transformer import BERT, GPT, ViT


def shard(model: BERT | GPT | ViT) -> None:
    """Split every parameter over all processes: those of a block are gathered while it runs."""
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "hidden")


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, gathered from all processes if it is split over them."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, split over the processes in the way that `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
