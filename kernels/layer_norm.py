"""LayerNorm, alone and after dropout and the residual addition: whole rows in registers.

Every row is read once and written once per direction, each of which is one launch. A forward
program owns a tile of rows; a backward program walks over tiles, keeps its sums for weight and bias
in registers and leaves them in memory. The last program of each group to do so adds up its group's,
and the last of those the groups', in one order whoever comes last, so that the same inputs give the
same bits. That end takes 5 us at C = 768 and 14 at 8192, counted in bytes that one multiprocessor
reads; a second launch, which would add on all of them, takes 4 and as long again of the host's
time, for which small batches have to wait. Dropout masks are drawn again in
backward (`kernels/dropout.py`), never stored.

N rows, C model dim.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv, contiguous

MAX_C = 8192  # what the registers of sixteen warps hold in backward
_TILE = 1024  # elements of narrow rows that a program takes at a time
# Of backward, each with two rows of sums: what runs at a time on a large GPU. Not asked of the GPU,
# so that all of them add in the same order.
_MAX_PROGRAMS = 512
_LEAST_PROGRAMS = 128  # of wide rows, of which a multiprocessor holds but one
_TILES_PER_PROGRAM = 4
_GROUP = tl.constexpr(16)  # programs whose sums one of them adds up
_TICKETS = 1 + _MAX_PROGRAMS // _GROUP.value


# What is not specialised would compile a kernel anew for another batch size or dropout site.
@CachedLaunch
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


@triton.jit
def _comes_last(ticket_ptr, count):
    """Whether this program is the last of `count` to get here; it sees what the others stored."""
    tl.debug_barrier()  # all threads have stored theirs
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(ticket_ptr, 0)  # for the next launch
    return is_last


@triton.jit
def _add_rows(sums_ptr, first, end, step: tl.constexpr, C, offs_c, mask_c):
    """Sums for weight and bias over rows of sums, several of which are on their way at a time."""
    weight_sum = tl.zeros(offs_c.shape, tl.float32)
    bias_sum = tl.zeros(offs_c.shape, tl.float32)
    for row in tl.range(first, end, step, loop_unroll_factor=4):
        row_ptr = sums_ptr + tl.cast(row, tl.int64) * (2 * C) + offs_c
        weight_sum += tl.load(row_ptr, mask=mask_c, other=0.0)
        bias_sum += tl.load(row_ptr + C, mask=mask_c, other=0.0)
    return weight_sum, bias_sum


@CachedLaunch
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
    grad_weight_ptr,
    grad_bias_ptr,
    sums_ptr,
    tickets_ptr,
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
    # Rows of sums: those of weight, then those of bias.
    tl.store(sums_ptr + pid * (2 * C) + offs_c, tl.sum(grad_weight, 0), mask=mask_c)
    tl.store(sums_ptr + pid * (2 * C) + C + offs_c, tl.sum(grad_bias, 0), mask=mask_c)
    group = pid // _GROUP
    first = group * _GROUP
    end = tl.minimum(first + _GROUP, programs)
    if _comes_last(tickets_ptr + 1 + group, end - first):
        weight_sum, bias_sum = _add_rows(sums_ptr, first, end, 1, C, offs_c, mask_c)
        tl.store(sums_ptr + first * (2 * C) + offs_c, weight_sum, mask=mask_c)
        tl.store(sums_ptr + first * (2 * C) + C + offs_c, bias_sum, mask=mask_c)
        if _comes_last(tickets_ptr, tl.cdiv(programs, _GROUP)):
            weight_sum, bias_sum = _add_rows(sums_ptr, 0, programs, _GROUP, C, offs_c, mask_c)
            dtype: tl.constexpr = grad_weight_ptr.dtype.element_ty
            tl.store(grad_weight_ptr + offs_c, weight_sum.to(dtype), mask=mask_c)
            tl.store(grad_bias_ptr + offs_c, bias_sum.to(dtype), mask=mask_c)


def refuse(*args: Any) -> str | None:
    """Why these kernels cannot run a raw op of ops/layer_norm.py on `args`, or None."""
    C = args[0].shape[-1]
    if not 1 <= C <= MAX_C:
        return f"it holds a row in registers, at least 1 and at most {MAX_C} elements, got {C}"
    return None


@lru_cache(maxsize=64)
def _launch_options(C: int) -> dict[str, int]:
    block_c = max(16, triton.next_power_of_2(C))
    block_m = max(1, _TILE // block_c)
    warps = min(16, max(4, block_m * block_c // 256))  # 8 elements a thread: 16 bytes of bfloat16
    # Fused, a * a of this lane plus the rounded b * b of another is not what the other computes,
    # and the lanes that hold one row would disagree on its sum.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, **options}


@cache
def _kept_tickets(device: torch.device, stream: int) -> Tensor:
    # By another thread: this one may be allocating from the memory of a CUDA graph.
    with ThreadPoolExecutor(1) as thread:
        tickets = thread.submit(torch.empty, _TICKETS, dtype=torch.int32, device=device).result()
    return tickets.zero_()


def _tickets(x: Tensor) -> Tensor:
    """Counters at zero, which a launch leaves at zero.

    The launches of a stream come one after another and share theirs, so that none needs another
    that zeroes them. A CUDA graph may be replayed on any stream, beside launches on the one that it
    was captured on: its launches have their own counters, zeroed by a node of the graph.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(_TICKETS, dtype=torch.int32, device=x.device)
    return _kept_tickets(x.device, driver.active.get_current_stream(x.get_device()))


@lru_cache(maxsize=1024)
def _forward_launch(N: int, C: int, eps: float, dropout: tuple[float, bool, int]) -> Launch:
    options = _launch_options(C)
    numbers = eps, *launch_arguments(*dropout), N, C
    return Launch(_layer_norm_fwd_kernel, (cdiv(N, options["BLOCK_M"]),), numbers, options)


@lru_cache(maxsize=1024)
def _backward_launch(N: int, C: int, dropout: tuple[float, bool, int]) -> tuple[int, Launch]:
    """The number of programs, each of which leaves its sums, and their launch."""
    options = _launch_options(C)
    most = max(_LEAST_PROGRAMS, _MAX_PROGRAMS * _TILE // options["BLOCK_C"])
    programs = cdiv(N, options["BLOCK_M"] * _TILES_PER_PROGRAM)
    programs = min(_MAX_PROGRAMS, most, max(1, programs))  # one, if only to store zeros
    numbers = *launch_arguments(*dropout), N, C, programs
    return programs, Launch(_layer_norm_bwd_kernel, (programs,), numbers, options)


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
    shape = x.shape
    C = shape[-1]
    N = x.numel() // C
    out = x.new_empty(*shape, dtype=out_dtype)
    new_residual = None if residual is None else residual.new_empty(*shape)
    mean = x.new_empty(N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _forward_launch(N, C, eps, (dropout_p, rng is not None, site))(
        contiguous(x),
        contiguous(residual),
        contiguous(weight),
        contiguous(bias),
        contiguous(rng),
        out,
        new_residual,
        mean,
        rstd,
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
    programs, launch = _backward_launch(x.numel() // C, C, (dropout_p, rng is not None, site))
    sums = x.new_empty(programs, 2, C, dtype=torch.float32)
    grad_weight = weight.new_empty(C)
    grad_bias = torch.empty_like(grad_weight)
    launch(
        contiguous(grad_out),
        contiguous(grad_new_residual),
        contiguous(x),
        contiguous(weight),
        contiguous(mean),
        contiguous(rstd),
        contiguous(rng),
        grad_x,
        grad_residual,
        grad_weight,
        grad_bias,
        sums,
        _tickets(x),
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
    grad_x = x.new_empty(*x.shape)
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
    grad_x = new_residual.new_empty(*new_residual.shape, dtype=x_dtype)
    grad_residual = new_residual.new_empty(*new_residual.shape)
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
