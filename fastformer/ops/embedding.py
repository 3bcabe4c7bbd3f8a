"""Rows of a table by number, as the embeddings of tokens, with the table's gradient in one pass.

Looking rows up is left to PyTorch. The gradient is as large as the table and mostly zeros: on a CPU
the tokens are sorted by row (a counting sort), and then each row is written once, as zeros or as
the sum over its tokens in their order, the same for any number of threads.

V rows of the table, C model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import check_float, check_one_device, needs_grad


def _fake(grad_out: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    return grad_out.new_empty((vocabulary, grad_out.shape[-1]))


dispatch.define(
    "embedding_bwd(Tensor grad_out, Tensor ids, SymInt vocabulary) -> Tensor",
    reference=reference.embedding_bwd,
    fake=_fake,
    native=("cpu",),
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, torch.ops.fastformer.embedding_bwd.default(grad_out, ids, ctx.vocabulary)


def _check(ids: Tensor, weight: Tensor) -> None:
    check_float("embedding", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be (V, C), got {tuple(weight.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: ids must be int64 or int32, got {ids.dtype}")
    check_one_device("embedding", ids=ids, weight=weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return the rows `ids` (...) of `weight` (V, C), as a tensor (..., C).

    ids: int64 or int32 in [0, V). As torch.nn.functional.embedding without its options; the
    gradient is dense, summed in float32 and rounded once. Raises TypeError or ValueError on bad
    arguments, and on the CPU IndexError for an id out of range.
    """
    _check(ids, weight)
    if needs_grad(weight):
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


@dispatch.explainer("embedding")
def _explain(ids: Tensor, weight: Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    _check(ids, weight)
    return [("embedding_bwd", (weight, ids, weight.shape[0]))]
