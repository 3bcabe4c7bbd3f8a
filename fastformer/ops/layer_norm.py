"""LayerNorm, alone and fused with the residual addition (and dropout) before it.

A transformer block adds a branch to the residual stream and normalises the sum. Doing both in one
pass reads and writes each row once where separate ops read it three times. Statistics are float32
whatever the inputs are (Ba et al., "Layer Normalization", 2016, section 3).

N rows, C model dim.
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
    check_dropout,
    check_float,
    distinct,
    needs_grad,
)


def _rows(x: Tensor) -> Tensor:
    # Not Size.numel(): it would make a dynamic size a constant.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=reference.accumulator(x.dtype))


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), _rows(x), _rows(x)


def _bwd_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _add_fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *dropout: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = residual.new_empty(residual.shape, dtype=out_dtype)
    return normed, residual.new_empty(residual.shape), _rows(residual), _rows(residual)


def _add_bwd_fake(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    *dropout: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = new_residual.shape
    grad_x = new_residual.new_empty(shape, dtype=x_dtype)
    grads = torch.empty_like(weight), torch.empty_like(weight)
    return grad_x, new_residual.new_empty(shape), *grads


_CUDA_MAX_COLS = 8192  # kLayerNormMaxCols of csrc/cuda/layer_norm.h


def _refuse_cuda(*args: Any) -> str | None:
    """Forward arguments also stand for a backward pass, as in an explanation."""
    if len(args) == 5:
        forward = isinstance(args[4], torch.dtype)
        rows = args[0] if forward else args[1]
        x, normed = rows.dtype, args[4] if forward else args[0].dtype
    elif isinstance(args[5], torch.dtype):
        rows, x, normed = args[1], args[0].dtype, args[5]
    else:
        rows, x = args[2], args[6]
        # Zeros for a result without a gradient have the dtype of the sum.
        normed = x if args[0].dtype == rows.dtype else args[0].dtype
    names = [str(dtype)[6:] for dtype in (x, rows.dtype, normed)]
    wide = (torch.float32, torch.bfloat16, torch.float16)
    same = x == normed and rows.dtype in (x, torch.float32)
    cast = x == rows.dtype == torch.float32
    if not {x, rows.dtype, normed}.issubset(wide) or not (same or cast):
        return (
            "it takes float32, bfloat16 and float16, a result of the dtype of x or lower and a"
            f" residual of that of x or float32, got x {names[0]}, residual {names[1]}, result"
            f" {names[2]}"
        )
    if rows.shape[-1] > _CUDA_MAX_COLS:
        return f"it takes rows of at most {_CUDA_MAX_COLS} elements, got {rows.shape[-1]}"
    return None


_DROPOUT = "float dropout_p, Tensor? rng, int site"

dispatch.define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_fwd,
    fake=_fwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
)
dispatch.define(
    "layer_norm_bwd(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_bwd,
    fake=_bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
)
dispatch.define(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps,"
    f" ScalarType out_dtype, {_DROPOUT}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_fwd,
    fake=_add_fwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
)
dispatch.define(
    "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_new_residual, Tensor new_residual,"
    f" Tensor weight, Tensor mean, Tensor rstd, ScalarType x_dtype, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_bwd,
    fake=_add_bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
)

for _op in ("layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd", "add_layer_norm_bwd"):
    dispatch.add_triton(_op, "layer_norm")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        out, mean, rstd = torch.ops.fastformer.layer_norm_fwd.default(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = torch.ops.fastformer.layer_norm_bwd.default(
            grad_out, *ctx.saved_tensors
        )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
    ) -> tuple[Tensor, Tensor]:
        normed, new_residual, mean, rstd = torch.ops.fastformer.add_layer_norm_fwd.default(
            x, residual, weight, bias, eps, dtype, dropout_p, rng, site
        )
        ctx.save_for_backward(new_residual, weight, mean, rstd, rng)
        ctx.has_bias, ctx.x_dtype = bias is not None, x.dtype
        ctx.dropout_p, ctx.site = dropout_p, site
        # The sum may end its life here, as in a post-norm block: then no gradient comes for it.
        ctx.set_materialize_grads(False)
        return normed, new_residual

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_new_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        new_residual, weight, mean, rstd, rng = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(new_residual)
        grad_x, grad_residual, grad_weight, grad_bias = (
            torch.ops.fastformer.add_layer_norm_bwd.default(
                grad_normed,
                grad_new_residual,
                new_residual,
                weight,
                mean,
                rstd,
                ctx.x_dtype,
                ctx.dropout_p,
                rng,
                ctx.site,
            )
        )
        grads = (grad_x, grad_residual, grad_weight, grad_bias if ctx.has_bias else None)
        return *grads, None, None, None, None, None


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_float(op, **tensors)
    for name, t in list(tensors.items())[1:]:
        if t.dim() != 1 or x.dim() == 0 or t.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{op}: {name} must have the size of the last dimension of x,"
                f" got {tuple(t.shape)} for x {tuple(x.shape)}"
            )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"{op}: weight and bias must have one dtype, got {weight.dtype}, {bias.dtype}"
        )
    if not eps > 0.0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    _check_affine("layer_norm", x, weight, bias, eps)
    return x, weight, bias, float(eps), autocast_dtype(x) or x.dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the rows of `x` (..., C) to mean 0 and variance 1, then scale and shift them.

    weight and bias (C,) may be float32 beside an `x` of lower precision. Returns the shape and
    dtype of `x`; under torch.autocast the autocast dtype, which equals torch's float32 result
    followed by the cast that the next matrix product makes. Raises ValueError or TypeError on bad
    arguments.
    """
    args = _prepare(x, weight, bias, eps)
    if needs_grad(x, weight, bias):
        return _LayerNorm.apply(*distinct(args))
    return torch.ops.fastformer.layer_norm_fwd.default(*args)[0]


def _prepare_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Any, ...]:
    op = "add_layer_norm"
    _check_affine(op, x, weight, bias, eps)
    check_float(op, x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"{op}: x and residual must have one shape,"
            f" got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    state = check_dropout(op, dropout_p, rng, x)
    dtype = autocast_dtype(x) or x.dtype
    return x, residual, weight, bias, float(eps), dtype, float(dropout_p), state, site


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(s), s) with s = residual + dropout(x), both (..., C), in one pass.

    The sum keeps the dtype of `residual` (a float32 stream beside bfloat16 branches); the
    normalised result has that of `x`, or the autocast dtype. `dropout_p`, `rng` and `site` are
    those of `fastformer.ops.dropout`. Raises ValueError or TypeError on bad arguments.
    """
    args = _prepare_add(x, residual, weight, bias, eps, dropout_p=dropout_p, rng=rng, site=site)
    if needs_grad(x, residual, weight, bias):
        return _AddLayerNorm.apply(*distinct(args))
    normed, new_residual, _, _ = torch.ops.fastformer.add_layer_norm_fwd.default(*args)
    return normed, new_residual


@dispatch.explainer("layer_norm")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _prepare(*args, **kwargs)
    return [("layer_norm_fwd", raw), ("layer_norm_bwd", raw)]


@dispatch.explainer("add_layer_norm")
def _explain_add(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _prepare_add(*args, **kwargs)
    return [("add_layer_norm_fwd", raw), ("add_layer_norm_bwd", raw)]
