"""Attention over sequences of any length: scores and weights exist a tile at a time, in registers.

Forward walks over the keys of a block of queries with the online softmax of Dao,
"FlashAttention-2" (2023), section 3.1, and keeps the log-sum-exp of each row. Tiles that the
causal mask or the length of the keys do not cut are computed without a mask, tiles beyond them not
at all. `kernels/attention_long_bwd.py` has backward.

B sequences, T query tokens, S key tokens, H heads, D head dim, N query tokens of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels import attention_long_bwd
from fastformer.kernels.attention_blocks import (
    LN_2,
    LOG2_E,
    PRECISION,
    VARYING,
    aligned,
    head,
    head_block,
    is_aligned,
    is_hopper,
    load_rows,
    sequence,
    statistic_ptr,
    store_rows,
    strides,
)
from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv, contiguous


@CachedLaunch
@triton.jit(do_not_specialize=VARYING)
def _attention_long_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_lengths_ptr,
    rng_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    scale_log2,
    site,
    threshold,
    keep_scale,
    T,
    S,
    H,
    N,
    chunk,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CUT_STAGES: tl.constexpr,
):
    """T and S are the longest of packed sequences. A program sees `chunk` keys: program_id(1)
    tells which, and results of a chunk lie behind all of the one before."""
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    blocks = tl.cdiv(T, BLOCK_M)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = bh // H, bh % H
    if CAUSAL:
        block = blocks - 1 - block  # the blocks with the most keys first
    first_q, T = sequence(cu_seqlens_q_ptr, b, T)
    first_k, S = sequence(cu_seqlens_k_ptr, b, S)
    start_m = block * BLOCK_M
    if start_m >= T:  # of a packed sequence that is shorter than others
        return
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_ptr = head(q_ptr, b, h, first_q, stride_qb, stride_qt, stride_qh, PACKED)
    k_ptr = head(k_ptr, b, h, first_k, stride_kb, stride_kt, stride_kh, PACKED)
    v_ptr = head(v_ptr, b, h, first_k, stride_vb, stride_vt, stride_vh, PACKED)
    seed, stream = dropout_state(rng_ptr, site)
    mask_rows = (first_q + offs_m) * H + h

    # Keys from `begin` to `whole` are seen by all rows, from there to `end` by some.
    begin = tl.program_id(1) * chunk
    end = tl.minimum(S, begin + chunk)
    if key_lengths_ptr is not None:
        end = tl.minimum(end, tl.load(key_lengths_ptr + b))
    last_seen = offs_m + (S - T)  # of causal attention, the diagonal ends in the bottom right
    whole = end
    if CAUSAL:
        whole = tl.minimum(end, start_m + (S - T) + 1)
        end = tl.minimum(end, tl.minimum(start_m + BLOCK_M, T) + (S - T))
    whole = tl.maximum(whole, begin) // BLOCK_N * BLOCK_N

    q = load_rows(q_ptr, start_m, T, stride_qt, D, BLOCK_M, BLOCK_D)
    # The maximum is taken of what is not yet scaled, which needs a scale that is not negative.
    q = tl.where(scale_log2 < 0, -q, q)
    scale_log2 = tl.abs(scale_log2)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        first, last = whole if MASKED else begin, end if MASKED else whole
        for start_n in tl.range(first, last, BLOCK_N, num_stages=CUT_STAGES if MASKED else None):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, start_n, end, stride_kt, D, BLOCK_N, BLOCK_D, not MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASKED:
                seen = (offs_n < end)[None, :]
                if CAUSAL:
                    seen = seen & (offs_n[None, :] <= last_seen[:, None])
                s = tl.where(seen, s * scale_log2, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1))
                # Of a row that has seen no key yet.
                finite = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2(s - finite[:, None])
                decay = tl.exp2(row_max - finite)
            else:
                new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
                p = tl.exp2(s * scale_log2 - new_max[:, None])
                decay = tl.exp2(row_max - new_max)
            row_max, row_sum = new_max, row_sum * decay + tl.sum(p, 1)
            if rng_ptr is not None:
                keep = keep_mask(seed, stream, mask_rows, threshold, start_n, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_rows(v_ptr, start_n, end, stride_vt, D, BLOCK_N, BLOCK_D, not MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)

    chunk_rows = tl.program_id(1).to(tl.int64) * N * H
    lse_ptr = statistic_ptr(lse_ptr + chunk_rows, b, h, first_q, T, H, N, PACKED)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < T)
    # A row without keys has the sum 0 and the output 0.
    out = acc * (keep_scale / tl.where(row_sum == 0, 1.0, row_sum))[:, None]
    out_ptr += (chunk_rows + first_q * H + h) * D
    store_rows(out_ptr, out, start_m, T, H * (D // 8), D, BLOCK_M, BLOCK_D)


def launch_options(D: int, size: int, dropout: bool) -> dict[str, int]:
    """Tiles whose registers do not spill; `size` is that of an element, in bytes."""
    small = D <= 64
    if size == 4 and small:  # three products of tf32 for one, and twice the registers
        tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8 if dropout else 4}
    elif size == 4:
        tile = {"BLOCK_M": 16 if dropout else 32, "BLOCK_N": 32, "num_warps": 4}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}
    stages = 3 if small and size == 2 else 2
    return {"D": D, "BLOCK_D": head_block(D), **tile, "num_stages": stages}


@lru_cache(maxsize=1024)
def _forward_launch(
    shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    size: int,
    sizes: tuple[int, int, int],
    causal: bool,
    scale: float,
    dropout: tuple[float, bool, int],
    chunk: int,
    hopper: bool,
    options_of: Callable[[int, int, bool], dict[str, int]],
) -> tuple[bool, Launch]:
    """Whether the kernel can read such tensors, and its launch for them."""
    *tokens, H, D = shape
    B, T, S = sizes
    options: dict[str, Any] = {"CAUSAL": causal, **options_of(D, size, dropout[1])}
    grid = (B * H * cdiv(T, options["BLOCK_M"]), max(1, cdiv(S, chunk)))
    numbers = (
        *strides(q_stride),
        *strides(k_stride),
        *strides(v_stride),
        scale * LOG2_E.value,
        *launch_arguments(*dropout),
        T,
        S,
        H,
        math.prod(tokens),
        chunk,
    )
    # Of two pipelines in a row Hopper's ptxas runs the wgmma of both one by one.
    options["CUT_STAGES"] = 1 if hopper else None
    readable = (
        is_aligned(shape, q_stride)
        and is_aligned(k_shape, k_stride)
        and is_aligned(k_shape, v_stride)
    )
    return readable, Launch(_attention_long_fwd_kernel, grid, numbers, options)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    sizes: tuple[int, int, int],
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    *,
    chunk: int,
    options_of: Callable[[int, int, bool], dict[str, int]],
) -> None:
    """Fill `out` and `lse`, one of each per `chunk` keys. `sizes` are B and the longest T and S,
    `options_of` gives the kernel's options for a head dim, the bytes of an element and dropout."""
    settings = (
        q.element_size(),
        sizes,
        causal,
        scale,
        (dropout_p, rng is not None, site),
        chunk,
        is_hopper(q),
        options_of,
    )
    strides_of = q.stride(), k.stride(), v.stride()
    readable, launch = _forward_launch(q.shape, k.shape, *strides_of, *settings)
    if not readable:
        q, k, v = aligned(q), aligned(k), aligned(v)
        strides_of = q.stride(), k.stride(), v.stride()
        _, launch = _forward_launch(q.shape, k.shape, *strides_of, *settings)
    launch(
        q,
        k,
        v,
        out,
        lse,
        contiguous(cu_seqlens_q),
        contiguous(cu_seqlens_k),
        contiguous(key_lengths),
        contiguous(rng),
    )


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
    """out (B, T, H, D) and lse (B, H, T) of `ops.reference.attention_fwd`."""
    B, T, H, _ = q.shape
    S = k.shape[1]
    out = q.new_empty(*q.shape)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    launch_forward(
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        key_lengths,
        (B, T, S),
        causal,
        scale,
        dropout_p,
        rng,
        site,
        chunk=max(1, S),
        options_of=launch_options,
    )
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
    """Fill the gradients of `ops.reference.attention_bwd`, which may be views of a packed one."""
    B, T, *_ = q.shape
    attention_long_bwd.launch_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        key_lengths,
        (B, T, k.shape[1]),
        (grad_q, grad_k, grad_v),
        causal,
        scale,
        dropout_p,
        rng,
        site,
    )
