"""The linear layer: one matrix product and a bias, with all three gradients in one backward op.

The products are those of PyTorch's libraries, which nobody beats by writing more code. What they
leave, the bias and its gradient, is one pass over rows as they lie in memory.

C input dim, C_out output dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import (
    autocast_dtype,
    check_float,
    check_same_dtype,
    distinct,
    needs_grad,
)
from fastformer.ops.weight_copies import cast, grad_dtype


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _bwd_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = weight.new_empty(weight.shape[0], dtype=grad_dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=grad_dtype), grad_bias


dispatch.define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=reference.linear_fwd,
    fake=_fwd_fake,
    native=("cpu",),
)
dispatch.define(
    "linear_bwd(Tensor grad_out, Tensor x, Tensor weight, ScalarType grad_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_bwd,
    fake=_bwd_fake,
    native=("cpu",),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.grad_dtype = grad_dtype(weight, x.dtype)
        _, weight, bias = _cast_weights(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return torch.ops.fastformer.linear_fwd.default(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = torch.ops.fastformer.linear_bwd.default(
            grad_out, *ctx.saved_tensors, ctx.grad_dtype
        )
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = None if bias_dtype is None else grad_bias.to(bias_dtype)
        return grad_x, grad_weight.to(weight_dtype), grad_bias


def _cast_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return x, cast(weight, x.dtype), cast(bias, x.dtype)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # the weights, of which there may be copies, follow in _cast_weights
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_float("linear", **tensors)
    if dtype is None:
        check_same_dtype("linear", **tensors)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: x must be (..., C) and weight (C_out, C),"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    return x, weight, bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias for `x` (..., C); return (..., C_out).

    weight (C_out, C) and bias (C_out,) as in torch.nn.functional.linear; one dtype for all. Under
    torch.autocast everything is cast to its dtype. Raises ValueError or TypeError on bad arguments.
    """
    args = _prepare(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _Linear.apply(*distinct(args))
    return torch.ops.fastformer.linear_fwd.default(*_cast_weights(*args))


@dispatch.explainer("linear")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _cast_weights(*_prepare(*args, **kwargs))
    return [("linear_fwd", raw), ("linear_bwd", raw)]
