"""Dropout whose mask is a pure function of (seed, offset, element), the same in every backend.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3)
is a counter-based generator: a kernel draws the numbers of any element without keeping a state,
so forward and backward agree whatever their tiling and nothing has to be stored between them.

A mask has `rows` x `cols` elements. The generator state `rng` is an int64 tensor (seed, offset)
on the device, and `site` tells apart the places of one model that share a state. For element
(row, col):

    key     = (low, high 32 bits of seed)
    counter = (col // 8, row, low, high 32 bits of offset + site)
    u       = the (col % 8)-th 16-bit lane of the four output words, low halves first
    keep    = u >= threshold, with threshold = min(65535, round(dropout_p * 65536))

Kept elements are scaled by 65536 / (65536 - threshold), so that the expectation is exact although
the probability is a multiple of 2**-16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer._dropout import dropout_scale
from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import check_dropout, check_float, needs_grad


def _mask_fake(rows: int, cols: int, p: float, rng: Tensor, site: int) -> Tensor:
    return rng.new_empty((rows, cols), dtype=torch.bool)


dispatch.define(
    "dropout_mask(SymInt rows, SymInt cols, float p, Tensor rng, int site) -> Tensor",
    reference=reference.dropout_mask,
    fake=_mask_fake,
    native=("cpu", "cuda"),
)
dispatch.add_triton("dropout_mask", "dropout")


def dropout_mask(rows: int, cols: int, dropout_p: float, rng: Tensor, site: int = 0) -> Tensor:
    """Return the boolean keep mask (rows, cols) that every op draws for this state and site.

    `rng` is an int64 tensor (seed, offset); the mask is on its device. See the module for the
    method.
    """
    checked = check_dropout("dropout_mask", dropout_p, rng, rng)
    if checked is None:
        return torch.ones(rows, cols, dtype=torch.bool, device=rng.device)
    if rows >= 2**32:
        raise ValueError(f"dropout_mask: rows must be below 2**32, got {rows}")
    return torch.ops.fastformer.dropout_mask.default(rows, cols, dropout_p, checked, site)


def _check(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor | None:
    check_float("dropout", x=x)
    if x.dim() == 0:
        raise ValueError(f"dropout: x must be (..., C), got shape {tuple(x.shape)}")
    return check_dropout("dropout", dropout_p, rng, x)


@dispatch.explainer("dropout")
def _explain(
    x: Tensor, dropout_p: float, *, rng: Tensor | None = None, site: int = 0
) -> list[tuple[str, tuple[Any, ...]]]:
    state = _check(x, dropout_p, rng)
    if state is None:
        return []
    cols = x.shape[-1]
    return [("dropout_mask", (x.numel() // max(cols, 1), cols, dropout_p, state, site))]


def _apply(x: Tensor, dropout_p: float, rng: Tensor, site: int) -> Tensor:
    cols = x.shape[-1]
    keep = dropout_mask(x.numel() // max(cols, 1), cols, dropout_p, rng, site)
    return torch.where(keep.view(x.shape), x * dropout_scale(dropout_p), 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_p: float, rng: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(rng)
        ctx.dropout_p, ctx.site = dropout_p, site
        return _apply(x, dropout_p, rng, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (rng,) = ctx.saved_tensors
        return _apply(grad_out, ctx.dropout_p, rng, ctx.site), None, None, None


def dropout(x: Tensor, dropout_p: float, *, rng: Tensor | None = None, site: int = 0) -> Tensor:
    """Zero elements of `x` (..., C) with probability `dropout_p` and scale the others up.

    The mask is that of `dropout_mask` with C columns. `rng` is an int64 tensor (seed, offset) on
    the device of `x`; without it a state is drawn from torch's default generator. Unlike
    torch.nn.functional.dropout the mask is the same on every device and is not stored for
    backward. Raises ValueError unless 0 <= dropout_p < 1 and `x` has a dimension.
    """
    state = _check(x, dropout_p, rng)
    if state is None:
        return x
    if needs_grad(x):
        return _Dropout.apply(x, dropout_p, state, site)
    return _apply(x, dropout_p, state, site)
