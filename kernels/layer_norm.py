"""LayerNorm, alone and after dropout and the residual addition: whole rows in registers.

Every row is read once and written once per direction. A forward program owns a tile of rows; a
backward program walks over tiles and keeps its sums for weight and bias in registers, which a
second kernel adds up in one order, so that the same inputs give the same bits. Dropout masks are
drawn again in backward (`kernels/dropout.py`), never stored.

N rows, C model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments

MAX_C = 8192  # what the registers of sixteen warps hold in backward
_TILE = 1024  # elements of narrow rows that a program takes at a time
_MAX_PROGRAMS = 512  # of backward: each writes two rows of partial sums
_TILES_PER_PROGRAM = 4


# What is not specialised would compile a kernel anew for another batch size or dropout site.
@triton.jit(do_not_specialize=["site", "threshold", "N"])
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    rng_ptr,
    out_ptr,
    new_residual_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    site,
    threshold,
    scale,
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < N, offs_c < C
    offs = offs_m[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            seed, stream = dropout_state(rng_ptr, site)
            keep = keep_mask(seed, stream, offs_m, threshold, 0, BLOCK_C)
            x = tl.where(keep, x * scale, 0.0)
        # The statistics are those of the sum as it is stored, which backward reads.
        total = (residual + x).to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + offs, total, mask=mask)
        x = total.to(tl.float32)
    # Rounded correctly: of equal elements the mean has to be that element.
    mean = tl.div_rn(tl.sum(x, 1), tl.cast(C, tl.float32))
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps))
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["site", "threshold", "N", "programs"])
def _layer_norm_bwd_kernel(
    grad_out_ptr,
    grad_new_residual_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    partial_ptr,
    site,
    threshold,
    scale,
    N,
    C,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    seed, stream = dropout_state(rng_ptr, site)
    grad_weight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(pid * BLOCK_M, N, programs * BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        offs = offs_m[:, None] * C + offs_c[None, :]
        mask = mask_m[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        weighted = grad_out * weight
        along = tl.sum(weighted * normed, 1)[:, None] / C
        grad = (weighted - tl.sum(weighted, 1)[:, None] / C - normed * along) * rstd
        grad_weight += grad_out * normed
        grad_bias += grad_out
        if grad_new_residual_ptr is not None:
            grad += tl.load(grad_new_residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if grad_residual_ptr is not None:
            stored = grad.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + offs, stored, mask=mask)
            if rng_ptr is not None:
                keep = keep_mask(seed, stream, offs_m, threshold, 0, BLOCK_C)
                grad = tl.where(keep, grad * scale, 0.0)
        tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    partial_ptr += pid * C + offs_c
    tl.store(partial_ptr, tl.sum(grad_weight, 0), mask=mask_c)
    partial_ptr += programs.to(tl.int64) * C
    tl.store(partial_ptr, tl.sum(grad_bias, 0), mask=mask_c)


@triton.jit(do_not_specialize=["programs"])
def _layer_norm_reduce_kernel(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    programs,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    partial_ptr += which.to(tl.int64) * programs * C
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        offs = offs_p[:, None].to(tl.int64) * C + offs_c[None, :]
        mask = (offs_p < programs)[:, None] & mask_c[None, :]
        sums += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    total = tl.sum(sums, 0).to(grad_weight_ptr.dtype.element_ty)
    if which == 0:
        tl.store(grad_weight_ptr + offs_c, total, mask=mask_c)
    else:
        tl.store(grad_bias_ptr + offs_c, total, mask=mask_c)


def refuse(*args: Any) -> str | None:
    """Why these kernels cannot run a raw op of ops/layer_norm.py on `args`, or None."""
    C = args[0].shape[-1]
    if not 1 <= C <= MAX_C:
        return f"it holds a row in registers, at least 1 and at most {MAX_C} elements, got {C}"
    return None


def _launch_options(C: int) -> dict[str, int]:
    block_c = max(16, triton.next_power_of_2(C))
    block_m = max(1, _TILE // block_c)
    warps = min(16, max(4, block_m * block_c // 256))  # 8 elements a thread: 16 bytes of bfloat16
    # Fused, a * a of this lane plus the rounded b * b of another is not what the other computes,
    # and the lanes that hold one row would disagree on its sum.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, **options}


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    C = x.shape[-1]
    N = x.numel() // C
    out = x.new_empty(x.shape, dtype=out_dtype)
    new_residual = None if residual is None else residual.new_empty(x.shape)
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    options = _launch_options(C)
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(N, options["BLOCK_M"]),)](
            x.contiguous(),
            _contiguous(residual),
            weight.contiguous(),
            _contiguous(bias),
            _contiguous(rng),
            out,
            new_residual,
            mean,
            rstd,
            eps,
            *launch_arguments(dropout_p, rng, site),
            N,
            C,
            **options,
        )
    return out, new_residual, mean, rstd


def _backward(
    grad_out: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Fill `grad_x` and `grad_residual`; return the gradients of weight and bias."""
    C = x.shape[-1]
    N = x.numel() // C
    options = _launch_options(C)
    # Not a matter of the device, so that every GPU adds in the same order.
    programs = min(_MAX_PROGRAMS, triton.cdiv(N, options["BLOCK_M"] * _TILES_PER_PROGRAM))
    partial = x.new_empty((2, programs, C), dtype=torch.float32)
    grad_weight, grad_bias = (weight.new_empty(C) for _ in range(2))
    with torch.cuda.device_of(x):
        _layer_norm_bwd_kernel[(programs,)](
            grad_out.contiguous(),
            _contiguous(grad_new_residual),
            x.contiguous(),
            weight.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            _contiguous(rng),
            grad_x,
            grad_residual,
            partial,
            *launch_arguments(dropout_p, rng, site),
            N,
            C,
            programs,
            **options,
        )
        _layer_norm_reduce_kernel[(triton.cdiv(C, 32), 2)](
            partial, grad_weight, grad_bias, programs, C, BLOCK_P=64, BLOCK_C=32
        )
    return grad_weight, grad_bias


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, mean, rstd = _forward(x, None, weight, bias, eps, out_dtype)
    return out, mean, rstd


def layer_norm_bwd(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    return grad_x, *_backward(grad_out, None, x, weight, mean, rstd, grad_x, None)


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps, out_dtype, dropout_p, rng, site)


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = new_residual.new_empty(new_residual.shape, dtype=x_dtype)
    grad_residual = new_residual.new_empty(new_residual.shape)
    grads = _backward(
        grad_normed,
        grad_new_residual,
        new_residual,
        weight,
        mean,
        rstd,
        grad_x,
        grad_residual,
        dropout_p,
        rng,
        site,
    )
    return grad_x, grad_residual, *grads
