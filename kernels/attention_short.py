"""Attention of short sequences, where a head's queries and keys are few enough for one program.

Backward is one launch: a program owns a head, holds a tile of queries with its gradient, and meets
each tile of keys once, so that five products are all that is computed and every tensor is read and
written once. Where there are several tiles of queries, each adds to float32 sums for keys and
values in order; nothing is atomic, and the same inputs give the same bits. Softmax is in base 2
(Dao et al., "FlashAttention", NeurIPS 2022, section 3.1 and appendix B).

B batch, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention_blocks import (
    LN_2,
    LOG2_E,
    aligned,
    head_block,
    is_aligned,
    is_hopper,
    strides,
)
from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv, contiguous

_MAX_STRIDE = 2**22  # of tokens: 512 of them have offsets of 32 bits inside a head

# Specialised, these would compile a kernel anew for another batch size, length or site. Strides are
# counted in eight elements, so that the compiler knows that 16 bytes are read at once.
_VARYING = ["site", "threshold", "T", "S", "H"] + [
    f"{name}_stride_{dim}" for name in ("q", "k", "grad_q", "grad_k") for dim in "bth"
]


@CachedLaunch
@triton.jit(do_not_specialize=_VARYING)
def _attention_short_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_lengths_ptr,
    rng_ptr,
    out_ptr,
    lse_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    scale,
    site,
    threshold,
    keep_scale,
    T,
    S,
    H,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    batch, h = head // H, head % H
    # Inside a head 32 bits are enough, see _MAX_STRIDE.
    q_ptr += (batch * q_stride_b + h * q_stride_h) * 8
    k_ptr += (batch * k_stride_b + h * k_stride_h) * 8
    v_ptr += (batch * k_stride_b + h * k_stride_h) * 8
    out_ptr += (batch * T * H + h) * D
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    mask_m = (offs_m < T)[:, None] & mask_d
    rows = offs_m[:, None]
    q = tl.load(q_ptr + rows * (q_stride_t * 8) + offs_d, mask=mask_m, other=0.0)
    length = S
    if key_lengths_ptr is not None:
        length = tl.minimum(S, tl.load(key_lengths_ptr + batch))
    end = length
    last_key = tl.full((BLOCK_M,), length - 1, tl.int32)
    if CAUSAL:
        end = tl.minimum(length, first + BLOCK_M + S - T)
        last_key = tl.minimum(last_key, offs_m + (S - T))
    seed, stream = dropout_state(rng_ptr, site)
    scale_log2 = scale * LOG2_E
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = mask_d
        if MASKED:
            mask_n = (offs_n < length)[:, None] & mask_d
        keys = offs_n[:, None] * (k_stride_t * 8) + offs_d
        k = tl.load(k_ptr + keys, mask=mask_n, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where(offs_n[None, :] <= last_key[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # A row that has seen no key has weights of 0, not exp2(-inf + inf).
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - finite[:, None])
        decay = tl.exp2(row_max - finite)
        row_max, row_sum = new_max, row_sum * decay + tl.sum(p, 1)
        if rng_ptr is not None:
            keep = keep_mask(seed, stream, (batch * T + offs_m) * H + h, threshold, start, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = tl.load(v_ptr + keys, mask=mask_n, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head * T + offs_m, lse, mask=offs_m < T)
    out = acc * (keep_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    tl.store(out_ptr + rows * (H * D) + offs_d, out.to(q.dtype), mask=mask_m)


@CachedLaunch
@triton.jit(do_not_specialize=_VARYING)
def _attention_short_bwd_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    key_lengths_ptr,
    rng_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    sums_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    grad_q_stride_b,
    grad_q_stride_t,
    grad_q_stride_h,
    grad_k_stride_b,
    grad_k_stride_t,
    grad_k_stride_h,
    scale,
    site,
    threshold,
    keep_scale,
    T,
    S,
    H,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    batch, h = head // H, head % H
    q_ptr += (batch * q_stride_b + h * q_stride_h) * 8
    k_ptr += (batch * k_stride_b + h * k_stride_h) * 8
    v_ptr += (batch * k_stride_b + h * k_stride_h) * 8
    grad_q_ptr += (batch * grad_q_stride_b + h * grad_q_stride_h) * 8
    grad_k_ptr += (batch * grad_k_stride_b + h * grad_k_stride_h) * 8
    grad_v_ptr += (batch * grad_k_stride_b + h * grad_k_stride_h) * 8
    grad_out_ptr += (batch * T * H + h) * D
    out_ptr += (batch * T * H + h) * D
    lse_ptr += head * T
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    length = S
    if key_lengths_ptr is not None:
        length = tl.minimum(S, tl.load(key_lengths_ptr + batch))
    seed, stream = dropout_state(rng_ptr, site)
    if sums_ptr is not None:
        sums_ptr += head * S * (2 * D)
    scale_log2 = scale * LOG2_E
    summed = 0  # the keys that have sums of earlier tiles of queries
    for first in range(0, tl.maximum(T, 1), BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < T)[:, None] & mask_d
        rows = offs_m[:, None]
        q = tl.load(q_ptr + rows * (q_stride_t * 8) + offs_d, mask=mask_m, other=0.0)
        grad_out = tl.load(grad_out_ptr + rows * (H * D) + offs_d, mask=mask_m, other=0.0)
        out = tl.load(out_ptr + rows * (H * D) + offs_d, mask=mask_m, other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
        # With +inf the weights are 0, in rows that see no key (-inf) as in those beyond T.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        is_last = first + BLOCK_M >= T
        end = length
        last_key = tl.full((BLOCK_M,), length - 1, tl.int32)
        if CAUSAL:
            end = tl.minimum(length, first + BLOCK_M + S - T)
            last_key = tl.minimum(last_key, offs_m + (S - T))
        # The last tile writes the gradients of all keys, of those that nothing sees too.
        for start in range(0, tl.where(is_last, S, end), BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = mask_d
            if MASKED:
                mask_n = (offs_n < length)[:, None] & mask_d
            keys = offs_n[:, None] * (k_stride_t * 8) + offs_d
            k = tl.load(k_ptr + keys, mask=mask_n, other=0.0)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse_log2[:, None])
            if MASKED:
                p = tl.where(offs_n[None, :] <= last_key[:, None], p, 0.0)
            v = tl.load(v_ptr + keys, mask=mask_n, other=0.0)
            grad_p = tl.dot(grad_out, v.T, input_precision=PRECISION)
            kept = p
            if rng_ptr is not None:
                row = (batch * T + offs_m) * H + h
                keep = keep_mask(seed, stream, row, threshold, start, BLOCK_N)
                kept = tl.where(keep, p, 0.0)
                grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(q.dtype)
            # Transposed, so that wgmma finds its 64 rows in D when there are but 32 keys.
            kept = kept.to(q.dtype)
            grad_v = tl.dot(grad_out.T, kept, input_precision=PRECISION).T * keep_scale
            grad_k = tl.dot(q.T, grad_s, input_precision=PRECISION).T * scale
            grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION)
            mask_s = (offs_n < S)[:, None] & mask_d
            if sums_ptr is not None:
                sums = sums_ptr + offs_n[:, None] * (2 * D) + offs_d
                before = mask_s & (start < summed)
                grad_k += tl.load(sums, mask=before, other=0.0)
                grad_v += tl.load(sums + D, mask=before, other=0.0)
                tl.store(sums, grad_k, mask=mask_s & (not is_last))
                tl.store(sums + D, grad_v, mask=mask_s & (not is_last))
                mask_s = mask_s & is_last
            grad_keys = offs_n[:, None] * (grad_k_stride_t * 8) + offs_d
            tl.store(grad_k_ptr + grad_keys, grad_k.to(q.dtype), mask=mask_s)
            tl.store(grad_v_ptr + grad_keys, grad_v.to(q.dtype), mask=mask_s)
        if sums_ptr is not None:
            summed = end
            tl.debug_barrier()  # other threads read the sums than have written them
        grad_q = (grad_q * scale).to(q.dtype)
        tl.store(grad_q_ptr + rows * (grad_q_stride_t * 8) + offs_d, grad_q, mask=mask_m)


def holds(T: int, S: int, H: int, D: int) -> bool:
    """Whether these kernels take T queries and S keys."""
    # A token has less than a third of _MAX_STRIDE, so that packed gradients obey it too.
    return max(T, S) <= (512 if D <= 64 else 256) and H * D <= 2**20


# Tiles are (BLOCK_M, BLOCK_N, num_warps, num_stages), the largest that registers hold. Those of
# Philox count: backward takes half the keys at a time where there is dropout.
def _fwd_tile(dtype: torch.dtype, T: int, D: int, has_dropout: bool) -> tuple[int, ...]:
    if dtype == torch.float32:
        return (64, 16 if has_dropout else 32, 4, 2) if D <= 64 else (16, 32, 4, 2)
    return (64, 64, 4, 2) if T <= 64 else (128, 64, 8, 2)


def _bwd_tile(
    is_hopper: bool, dtype: torch.dtype, T: int, D: int, has_dropout: bool
) -> tuple[int, ...]:
    if dtype == torch.float32:
        return (32, 16, 8 if has_dropout else 4, 1) if D <= 64 else (16, 16, 8, 1)
    if D > 64 and not is_hopper:
        return (32, 16, 4, 2) if T <= 64 else (64, 16, 8, 2)
    block_n = 16 if has_dropout else 32
    # Blocks that share a multiprocessor hide each other's loads, without a second stage.
    stages = 1 if is_hopper and D <= 64 and not has_dropout else 2
    if T <= 64:
        return 64, block_n, 4, stages
    if T <= 128:
        return 128, block_n, 8, stages
    return 256 if is_hopper and D <= 64 else 128, block_n, 8, 2


def _options(
    is_hopper: bool | None,
    dtype: torch.dtype,
    T: int,
    S: int,
    D: int,
    causal: bool,
    has_lengths: bool,
    has_dropout: bool,
) -> dict[str, Any]:
    """What a kernel is compiled with: backward, on Hopper or not, or forward, which is the same on
    all GPUs."""
    if is_hopper is None:
        tile = _fwd_tile(dtype, T, D, has_dropout)
    else:
        tile = _bwd_tile(is_hopper, dtype, T, D, has_dropout)
    block_m, block_n, num_warps, num_stages = tile
    return {
        "D": D,
        "CAUSAL": causal,
        "MASKED": causal or has_lengths or S % block_n != 0,
        # Of float32 the tensor cores take three parts, or else they would round it to 10 bits.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": head_block(D),
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": 128 if (block_m, num_stages) == (128, 1) else None,  # two such blocks
    }


@lru_cache(maxsize=1024)
def _launch(
    is_hopper: bool | None,
    shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    strides_of: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    has_lengths: bool,
    causal: bool,
    scale: float,
    dropout: tuple[float, bool, int],
) -> tuple[bool, Launch]:
    """Whether the kernels can read such tensors, and a launch for them, of those in `_options`.
    `strides_of` has those of q, k and v, and for backward of the gradients of q and k."""
    (B, T, H, D), S = shape, k_shape[1]
    q_stride, k_stride, v_stride, *of_grads = strides_of
    readable = (
        k_stride == v_stride
        and is_aligned(shape, q_stride, _MAX_STRIDE)
        and is_aligned(k_shape, k_stride, _MAX_STRIDE)
    )
    options = _options(is_hopper, dtype, T, S, D, causal, has_lengths, dropout[1])
    of_tensors = [n for stride in (q_stride, k_stride, *of_grads) for n in strides(stride)]
    numbers = *of_tensors, scale, *launch_arguments(*dropout), T, S, H
    if is_hopper is None:
        kernel, tiles = _attention_short_fwd_kernel, cdiv(T, options["BLOCK_M"])
    else:
        kernel, tiles = _attention_short_bwd_kernel, 1
    return readable, Launch(kernel, (B * H * tiles,), numbers, options)


def _all_aligned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Also, k and v have one set of strides."""
    q, k, v = aligned(q, _MAX_STRIDE), aligned(k, _MAX_STRIDE), aligned(v, _MAX_STRIDE)
    if k.stride() != v.stride():
        k, v = contiguous(k), contiguous(v)
    return q, k, v


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D) and lse (B, H, T), as `ops/reference.py` has them."""
    shape, k_shape = q.shape, k.shape
    B, T, H, _ = shape
    dropout = dropout_p, rng is not None, site
    settings = q.dtype, key_lengths is not None, causal, scale, dropout
    strides_of = q.stride(), k.stride(), v.stride()
    readable, launch = _launch(None, shape, k_shape, strides_of, *settings)
    if not readable:
        q, k, v = _all_aligned(q, k, v)
        strides_of = q.stride(), k.stride(), v.stride()
        _, launch = _launch(None, shape, k_shape, strides_of, *settings)
    out = q.new_empty(*shape)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    launch(q, k, v, contiguous(key_lengths), contiguous(rng), out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fill the gradients, whose last stride is 1; grad_k and grad_v have one set of strides."""
    shape, k_shape = q.shape, k.shape
    B, T, H, D = shape
    dropout = dropout_p, rng is not None, site
    settings = q.dtype, key_lengths is not None, causal, scale, dropout
    of_grads = grad_q.stride(), grad_k.stride()
    hopper = is_hopper(q)
    strides_of = (q.stride(), k.stride(), v.stride(), *of_grads)
    readable, launch = _launch(hopper, shape, k_shape, strides_of, *settings)
    if not readable:
        q, k, v = _all_aligned(q, k, v)
        strides_of = (q.stride(), k.stride(), v.stride(), *of_grads)
        _, launch = _launch(hopper, shape, k_shape, strides_of, *settings)
    sums = None
    if launch.options["BLOCK_M"] < T:
        sums = q.new_empty(B, H, k_shape[1], 2, D, dtype=torch.float32)
    launch(
        contiguous(grad_out),
        q,
        k,
        v,
        contiguous(out),
        contiguous(lse),
        contiguous(key_lengths),
        contiguous(rng),
        grad_q,
        grad_k,
        grad_v,
        sums,
    )
