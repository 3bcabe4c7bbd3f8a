"""The feed-forward layer: what lies between its matrix products is done where they end.

Two products of the seven are Triton's: x w1^T, which goes on to the bias, GELU and dropout, and
grad_out w2, which goes on to their derivatives, the hidden activation once more (for the gradient
of w2) and the sums for the bias, one row of them per tile, so that the same inputs give the same
bits. The others are cuBLAS's. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, for GELU.

N rows, C model dim, F hidden dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments
from fastformer.kernels.launch import CachedLaunch, Launch, architecture, cast, cdiv, contiguous
from fastformer.kernels.product import (
    blocks,
    columns,
    descriptor_like,
    fits_tma,
    matrix,
    product,
    tile_of,
)

_unsafe_view = torch.ops.aten._unsafe_view.default

_LOG2_E = tl.constexpr(1.4426950408889634)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# sqrt(2 / pi) (x + 0.044715 x^3) is half of the argument of a sigmoid.
_TANH_LINEAR = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(0.07135481627260025)


# One instruction each: elsewhere the compiler adds three that scale denormal numbers, which are as
# good as zero here. The epilogue of a tile has hardly more time than its product.
@triton.jit
def _exp2(x):
    asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gelu_and_slope(x, TANH: tl.constexpr):
    square = x * x
    if TANH:
        u = x * (_TANH_LINEAR + _TANH_CUBIC * square)
        # Of -|u|, which cannot overflow; the slope of a sigmoid is e / (1 + e)^2 on both sides.
        e = _exp2(-_LOG2_E * tl.abs(u))
        r = _reciprocal(1.0 + e)
        tail = e * r
        share = tl.where(x < 0.0, tail, r)
        slope = share + x * (tail * r) * (_TANH_LINEAR + 3.0 * _TANH_CUBIC * square)
    else:
        # Half of erfc(|x| / sqrt 2), to 8e-8 (Abramowitz and Stegun, 7.1.26): unlike that of a
        # library it has no branches, and its exponential is the one of the slope.
        e = _exp2(-0.5 * _LOG2_E * square)
        t = _reciprocal(1.0 + 0.2316418882663604 * tl.abs(x))
        tail = ((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t
        tail = ((tail - 0.142248368) * t + 0.127414796) * t * e
        share = tl.where(x < 0.0, tail, 1.0 - tail)
        slope = share + x * (_INV_SQRT_2PI * e)
    return x * share, slope


# What is not specialised would compile a kernel anew for another batch size or dropout site.
@CachedLaunch
@triton.jit(do_not_specialize=["site", "threshold", "N"])
def _mlp_fwd_kernel(
    x,
    w1,
    b1_ptr,
    rng_ptr,
    pre_ptr,
    hidden_ptr,
    site,
    threshold,
    scale,
    N,
    C,
    F,
    stride_xn,
    stride_xc,
    stride_wf,
    stride_wc,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(F, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = product(
        x,
        w1,
        tile_m,
        tile_n,
        N,
        F,
        C,
        stride_xn,
        stride_xc,
        stride_wc,
        stride_wf,
        True,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask_m = (offs_m < N)[:, None]
    parts = columns(acc, BLOCK_M, BLOCK_N, PART)
    for i in tl.static_range(BLOCK_N // PART):
        first_n = tile_n * BLOCK_N + i * PART
        offs_n = first_n + tl.arange(0, PART)
        mask_n = offs_n < F
        pre = parts[i]
        if b1_ptr is not None:
            pre += tl.load(b1_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        offs, mask = offs_m[:, None] * F + offs_n[None, :], mask_m & mask_n[None, :]
        # The activation is that of the pre-activation as it is stored, which backward reads.
        pre = pre.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + offs, pre, mask=mask)
        hidden, _ = _gelu_and_slope(pre.to(tl.float32), TANH)
        if rng_ptr is not None:
            seed, stream = dropout_state(rng_ptr, site)
            keep = keep_mask(seed, stream, offs_m, threshold, first_n, PART)
            hidden = tl.where(keep, hidden * scale, 0.0)
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@CachedLaunch
@triton.jit(do_not_specialize=["site", "threshold", "N"])
def _mlp_bwd_kernel(
    grad_out,
    w2,
    pre_ptr,
    rng_ptr,
    grad_pre_ptr,
    hidden_ptr,
    partial_ptr,
    site,
    threshold,
    scale,
    N,
    C,
    F,
    stride_gn,
    stride_gc,
    stride_wc,
    stride_wf,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(F, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = product(
        grad_out,
        w2,
        tile_m,
        tile_n,
        N,
        F,
        C,
        stride_gn,
        stride_gc,
        stride_wc,
        stride_wf,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask_m = (offs_m < N)[:, None]
    partial_ptr += tile_m.to(tl.int64) * F
    parts = columns(acc, BLOCK_M, BLOCK_N, PART)
    for i in tl.static_range(BLOCK_N // PART):
        first_n = tile_n * BLOCK_N + i * PART
        offs_n = first_n + tl.arange(0, PART)
        mask_n = offs_n < F
        offs, mask = offs_m[:, None] * F + offs_n[None, :], mask_m & mask_n[None, :]
        pre = tl.load(pre_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        hidden, slope = _gelu_and_slope(pre, TANH)
        grad = parts[i] * slope
        if rng_ptr is not None:
            seed, stream = dropout_state(rng_ptr, site)
            keep = keep_mask(seed, stream, offs_m, threshold, first_n, PART)
            hidden = tl.where(keep, hidden * scale, 0.0)
            grad = tl.where(keep, grad * scale, 0.0)
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_pre_ptr + offs, grad.to(grad_pre_ptr.dtype.element_ty), mask=mask)
        # Rows beyond the last are zero in the product.
        tl.store(partial_ptr + offs_n, tl.sum(grad, 0), mask=mask_n)


@lru_cache(maxsize=64)
def _launch_options(dtype: torch.dtype, tma: bool) -> dict[str, Any]:
    """Two tiles fit into a multiprocessor: the epilogue of one hides behind the other's product.

    An epilogue takes PART columns at a time, as all of them would not fit into its registers.
    """
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
        return {**tile, "GROUP": 8, "PART": 32, "num_warps": 4, "num_stages": 3}
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": 8, "num_warps": 8, "maxnreg": 128}
    if tma:
        return {**tile, "BLOCK_K": 64, "PART": 32, "num_stages": 3}
    return {**tile, "BLOCK_K": 32, "PART": 16, "num_stages": 4}


@lru_cache(maxsize=1024)
def _launch(
    kernel: CachedLaunch,
    left: tuple[tuple[int, ...], tuple[int, ...]],
    right: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    arch: int,
    aligned: bool,
    tanh: bool,
    dropout: tuple[float, bool, int],
) -> Launch:
    """The launch of a kernel for operands of these shapes and strides; `aligned`: their addresses
    are multiples of 16."""
    is_forward = kernel is _mlp_fwd_kernel
    (N, C), F = left[0], right[0][0 if is_forward else 1]
    size = dtype.itemsize
    tma = arch >= 90 and aligned and fits_tma(*left, size) and fits_tma(*right, size)
    options = _launch_options(dtype, tma)
    if not is_forward and tanh and dropout[1] and size == 2 and arch >= 100:
        options = options | {"PART": 16}  # of more columns registers spill there
    tiles = cdiv(N, options["BLOCK_M"]) * cdiv(F, options["BLOCK_N"])
    numbers = *launch_arguments(*dropout), N, C, F, *left[1], *right[1]
    boxes: tuple[Any, ...] = ()
    if tma:
        of_left, of_right = blocks(options, transposed=is_forward)
        boxes = (
            descriptor_like(*left, dtype, of_left),
            descriptor_like(*right, dtype, of_right),
        )
    return Launch(kernel, (tiles,), numbers, {"TANH": tanh, **options}, boxes)


def mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    tanh: bool,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    rows, w1 = matrix(x), matrix(w1)
    operands = (rows.shape, rows.stride()), (w1.shape, w1.stride())
    aligned = (rows.data_ptr() | w1.data_ptr()) % 16 == 0
    settings = x.dtype, architecture(x), aligned, tanh, (dropout_p, rng is not None, site)
    launch = _launch(_mlp_fwd_kernel, *operands, *settings)
    pre = x.new_empty(rows.shape[0], w1.shape[0])
    hidden = torch.empty_like(pre)
    launch(rows, w1, contiguous(b1), contiguous(rng), pre, hidden)
    out = hidden @ w2.t() if b2 is None else torch.addmm(b2, hidden, w2.t())
    # Not view: the result of an op is a tensor of its own, which may be changed in place.
    return _unsafe_view(out, (*x.shape[:-1], w2.shape[0])), pre


def mlp_bwd(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    tanh: bool,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, grad, dense_w2 = x.reshape(-1, x.shape[-1]), matrix(grad_out), matrix(w2)
    operands = (grad.shape, grad.stride()), (dense_w2.shape, dense_w2.stride())
    aligned = (grad.data_ptr() | dense_w2.data_ptr()) % 16 == 0
    settings = x.dtype, architecture(x), aligned, tanh, (dropout_p, rng is not None, site)
    launch = _launch(_mlp_bwd_kernel, *operands, *settings)
    N, F = grad.shape[0], w2.shape[1]
    grad_pre = x.new_empty(N, F)
    hidden = torch.empty_like(grad_pre)
    partial = x.new_empty(cdiv(N, launch.options["BLOCK_M"]), F, dtype=torch.float32)
    launch(grad, dense_w2, contiguous(pre), contiguous(rng), grad_pre, hidden, partial)
    return (
        (grad_pre @ w1).view(x.shape),
        cast(grad_pre.t() @ rows, grad_dtype),
        cast(partial.sum(0), grad_dtype),
        cast(grad.t() @ hidden, grad_dtype),
        cast(grad.sum(0, dtype=torch.float32), grad_dtype),
    )
