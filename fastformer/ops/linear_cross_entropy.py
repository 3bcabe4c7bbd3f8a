"""The language-model head and its loss in one op, without the (N, V) matrix of logits.

Logits are made a chunk of rows at a time and turned into their own gradient at once (computing the
gradient in the forward pass is Liger-Kernel's idea; Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", 2024, keep less still). Rows with an ignored target need not be
multiplied: masked language models predict 15 % of their tokens. On a GPU, where the host does not
know their number, the caller says that they are many.

N rows, C model dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import (
    autocast_dtype,
    check_float,
    check_one_device,
    check_same_dtype,
    distinct,
    needs_grad,
)
from fastformer.ops.weight_copies import cast, grad_dtype

REDUCTIONS = ("mean", "sum")


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    mostly_ignored: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=reference.accumulator(x.dtype))
    if grad_dtype is None:
        return loss, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape, dtype=grad_dtype)
    grad_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape, dtype=grad_dtype)
    return loss, x.new_empty(x.shape), grad_weight, grad_bias


dispatch.define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor targets,"
    " int ignore_index, float label_smoothing, float z_loss, bool mean, bool mostly_ignored,"
    " ScalarType? grad_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_fwd,
    fake=_fwd_fake,
    native=("cpu",),
)
dispatch.add_triton("linear_cross_entropy_fwd", "linear_cross_entropy")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.settings_count = len(settings)
        loss, *grads = torch.ops.fastformer.linear_cross_entropy_fwd.default(
            *_cast_weights(x, weight, bias, *settings), grad_dtype(weight, x.dtype)
        )
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        finish = _as_it_is if _may_give_away(grad_loss) else _scaled
        grads = (
            None if dtype is None else finish(grad, grad_loss, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, *(None,) * ctx.settings_count


def _cast_weights(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return x, cast(weight, x.dtype), cast(bias, x.dtype), *rest


def _may_give_away(grad_loss: Tensor) -> bool:
    """Whether the gradients of the forward pass are those of this backward pass, and its last.

    They are as large as the vocabulary, and a copy would cost what the kernel saves. Once nobody
    else holds them the parameter takes them over as its `grad`, which is then changed in place.
    """
    if torch.compiler.is_compiling() or grad_loss.device.type != "cpu":
        return False  # on a GPU, to look at the number would wait for it
    return not torch._C._autograd._get_current_graph_task_keep_graph() and grad_loss.item() == 1.0


def _as_it_is(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype)


def _scaled(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    # In float32: a loss scale of 65536 is infinite in float16, and 1/3 is biased in bfloat16.
    if grad.device.type != "cpu" or torch.compiler.is_compiling():
        return (grad.to(grad_loss.dtype) * grad_loss).to(dtype)
    scale = grad_loss.item()  # a Python number is multiplied in float32 without a float32 copy
    return grad * scale if grad.dtype == dtype else grad.to(dtype).mul_(scale)


def _prepare(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    mostly_ignored: bool = False,
) -> tuple[Any, ...]:
    op = "linear_cross_entropy"
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # the weights, of which there may be copies, follow in _cast_weights
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_float(op, **tensors)
    if dtype is None:
        check_same_dtype(op, **tensors)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x must be (..., C) and weight (V, C),"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: targets must be int64 of shape {tuple(x.shape[:-1])},"
            f" got {targets.dtype} {tuple(targets.shape)}"
        )
    check_one_device(op, x=x, targets=targets)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss must not be negative, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', got {reduction!r}")
    settings = (
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        reduction == "mean",
        mostly_ignored,
    )
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is not known when C is 0
    return rows, weight, bias, targets.reshape(-1), *settings


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    mostly_ignored: bool = False,
) -> Tensor:
    """Return cross_entropy(x weight^T + bias, targets) as a float32 scalar.

    x (..., C), weight (V, C), bias (V,), targets (...) int64 in [0, V) or `ignore_index`; rows
    with the latter do not count. label_smoothing: as in torch. z_loss: adds
    z_loss * logsumexp(logits)**2 per row (PaLM, section 5), which keeps logits from drifting.
    reduction: "mean" over the counted rows, or "sum". mostly_ignored: a hint that most rows are
    ignored, as in a masked language model. It changes the speed alone: a GPU, whose host does not
    know how many rows count, then takes products in which the others cost nothing, as they always
    do on a CPU.

    With no counted row the result is 0, where torch's mean gives NaN: a batch without a masked
    token must not end a run. Gradients are computed in the forward pass and only scaled in the
    backward pass, so second derivatives are not available. Raises ValueError or TypeError on bad
    arguments, and on the CPU ValueError for a target out of range.
    """
    args = _prepare(
        x,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        mostly_ignored=mostly_ignored,
    )
    if needs_grad(x, weight, bias):
        return _LinearCrossEntropy.apply(*distinct(args))
    return torch.ops.fastformer.linear_cross_entropy_fwd.default(*_cast_weights(*args), None)[0]


@dispatch.explainer("linear_cross_entropy")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    args = _prepare(*args, **kwargs)
    wide = grad_dtype(args[1], args[0].dtype)
    return [("linear_cross_entropy_fwd", (*_cast_weights(*args), wide))]
