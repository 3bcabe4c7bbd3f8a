"""Backward of `kernels/attention_long.py`: weights are computed again from the log-sum-exp.

Two launches, each of which writes its gradients once: a program of the first owns a block of
queries, their grad_q and the row sums `delta` of the softmax's derivative; one of the second a
block of keys, their grad_k and grad_v. Scores are computed twice for that, nothing is added in
memory, and the same inputs give the same bits (Dao, "FlashAttention-2", 2023, section 3.2, adds
grad_q with atomics).

B sequences, T query tokens, S key tokens, H heads, D head dim, N query tokens of all sequences.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention_blocks import (
    LOG2_E,
    PRECISION,
    VARYING,
    aligned,
    head,
    head_block,
    is_aligned,
    load_rows,
    sequence,
    statistic_ptr,
    store_rows,
    strides,
)
from fastformer.kernels.dropout import dropout_state, keep_mask, launch_arguments
from fastformer.kernels.launch import CachedLaunch, Launch, architecture, cdiv, contiguous


@triton.jit
def _padded(b, h, first_q, padded, PAD: tl.constexpr):
    """Where one number per query of a head is kept, each sequence from a multiple of PAD on: whole
    blocks are read without a mask. Row `first_q` is that of the sequence among all queries."""
    return h.to(tl.int64) * padded + (first_q + b * PAD) // PAD * PAD


@CachedLaunch
@triton.jit(do_not_specialize=VARYING)
def _attention_long_bwd_q_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lse_log2_ptr,
    delta_ptr,
    grad_q_ptr,
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
    stride_grad_qb,
    stride_grad_qt,
    stride_grad_qh,
    scale,
    scale_log2,
    site,
    threshold,
    keep_scale,
    T,
    S,
    H,
    N,
    padded,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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

    end = S
    if key_lengths_ptr is not None:
        end = tl.minimum(end, tl.load(key_lengths_ptr + b))
    last_seen = offs_m + (S - T)
    # Keys before `whole` are seen by all rows, from there to `end` by some.
    whole = end
    if CAUSAL:
        whole = tl.minimum(end, start_m + (S - T) + 1)
        end = tl.minimum(end, tl.minimum(start_m + BLOCK_M, T) + (S - T))
    whole = tl.maximum(whole, 0) // BLOCK_N * BLOCK_N

    q = load_rows(q_ptr, start_m, T, stride_qt, D, BLOCK_M, BLOCK_D)
    stride_t = H * (D // 8)
    offset = (first_q * H + h) * D
    grad_out = load_rows(grad_out_ptr + offset, start_m, T, stride_t, D, BLOCK_M, BLOCK_D)
    out = load_rows(out_ptr + offset, start_m, T, stride_t, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    lse_ptr = statistic_ptr(lse_ptr, b, h, first_q, T, H, N, PACKED)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("-inf"))
    # A row that sees no key, or is none, has weights of zero.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    offs_padded = _padded(b, h, first_q, padded, BLOCK_M) + offs_m
    tl.store(lse_log2_ptr + offs_padded, lse)
    tl.store(delta_ptr + offs_padded, delta)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        for start_n in range(whole if MASKED else 0, end if MASKED else whole, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, start_n, end, stride_kt, D, BLOCK_N, BLOCK_D, not MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse[:, None])
            if MASKED:
                seen = (offs_n < end)[None, :]
                if CAUSAL:
                    seen = seen & (offs_n[None, :] <= last_seen[:, None])
                p = tl.where(seen, p, 0.0)
            v = load_rows(v_ptr, start_n, end, stride_vt, D, BLOCK_N, BLOCK_D, not MASKED)
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if rng_ptr is not None:
                keep = keep_mask(seed, stream, mask_rows, threshold, start_n, BLOCK_N)
                grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION)

    grad_q_ptr = head(
        grad_q_ptr, b, h, first_q, stride_grad_qb, stride_grad_qt, stride_grad_qh, PACKED
    )
    store_rows(grad_q_ptr, grad_q * scale, start_m, T, stride_grad_qt, D, BLOCK_M, BLOCK_D)


@CachedLaunch
@triton.jit(do_not_specialize=VARYING)
def _attention_long_bwd_kv_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_log2_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
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
    stride_grad_kb,
    stride_grad_kt,
    stride_grad_kh,
    stride_grad_vb,
    stride_grad_vt,
    stride_grad_vh,
    scale,
    scale_log2,
    site,
    threshold,
    keep_scale,
    T,
    S,
    H,
    padded,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAD: tl.constexpr,
):
    """Tiles are transposed, keys by queries: rows of zeros beyond the last query add nothing."""
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    blocks = tl.cdiv(S, BLOCK_N)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = bh // H, bh % H
    first_q, T = sequence(cu_seqlens_q_ptr, b, T)
    first_k, S = sequence(cu_seqlens_k_ptr, b, S)
    start_n = block * BLOCK_N
    if start_n >= S:  # of a packed sequence that is shorter than others
        return
    offs_n = start_n + tl.arange(0, BLOCK_N)
    q_ptr = head(q_ptr, b, h, first_q, stride_qb, stride_qt, stride_qh, PACKED)
    k_ptr = head(k_ptr, b, h, first_k, stride_kb, stride_kt, stride_kh, PACKED)
    v_ptr = head(v_ptr, b, h, first_k, stride_vb, stride_vt, stride_vh, PACKED)
    grad_out_ptr += (first_q * H + h) * D
    tl.static_assert(PAD % BLOCK_M == 0)
    first_padded = _padded(b, h, first_q, padded, PAD)
    lse_log2_ptr += first_padded
    delta_ptr += first_padded
    seed, stream = dropout_state(rng_ptr, site)

    end = S
    if key_lengths_ptr is not None:
        end = tl.minimum(end, tl.load(key_lengths_ptr + b))
    last = tl.where(start_n < end, T, 0)  # a block beyond the last key is seen by no query
    # Queries from `begin` to `whole` see some of the keys, from there on all of them.
    begin, whole = 0, 0
    if CAUSAL:
        diagonal = start_n - (S - T)
        begin = tl.maximum(diagonal, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(diagonal + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M

    k = load_rows(k_ptr, start_n, end, stride_kt, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, start_n, end, stride_vt, D, BLOCK_N, BLOCK_D)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for WHOLE in tl.static_range(0 if CAUSAL else 1, 2):
        for start_m in range(
            whole if WHOLE else begin, last if WHOLE else tl.minimum(whole, last), BLOCK_M
        ):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr, start_m, T, stride_qt, D, BLOCK_M, BLOCK_D)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            s = s * scale_log2 - tl.load(lse_log2_ptr + offs_m)[None, :]
            if not WHOLE:
                s = tl.where(offs_n[:, None] <= offs_m[None, :] + (S - T), s, float("-inf"))
            p = tl.exp2(s)
            grad_out = load_rows(grad_out_ptr, start_m, T, H * (D // 8), D, BLOCK_M, BLOCK_D)
            grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            kept = p
            if rng_ptr is not None:
                rows = (first_q + offs_m) * H + h
                keep = tl.trans(keep_mask(seed, stream, rows, threshold, start_n, BLOCK_N))
                kept = tl.where(keep, p, 0.0)
                grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
            kept = kept.to(grad_out.dtype)
            grad_v = tl.dot(kept, grad_out, grad_v, input_precision=PRECISION)
            grad_s = (p * (grad_p - tl.load(delta_ptr + offs_m)[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION)

    inside = (offs_n < end)[:, None]
    grad_k = tl.where(inside, grad_k * scale, 0.0)
    grad_v = tl.where(inside, grad_v * keep_scale, 0.0)
    grad_k_ptr = head(
        grad_k_ptr, b, h, first_k, stride_grad_kb, stride_grad_kt, stride_grad_kh, PACKED
    )
    grad_v_ptr = head(
        grad_v_ptr, b, h, first_k, stride_grad_vb, stride_grad_vt, stride_grad_vh, PACKED
    )
    store_rows(grad_k_ptr, grad_k, start_n, S, stride_grad_kt, D, BLOCK_N, BLOCK_D)
    store_rows(grad_v_ptr, grad_v, start_n, S, stride_grad_vt, D, BLOCK_N, BLOCK_D)


def launch_options(
    arch: int, D: int, size: int, causal: bool, dropout: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles of the kernels for grad_q and for grad_k and grad_v whose registers do not spill;
    `size` is that of an element, in bytes."""
    small = D <= 64
    stages = 2
    if size == 4 and small:
        of_q = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8 if dropout else 4}
        of_kv = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8}
    elif size == 4:  # keys and values in registers, each as two numbers of tf32, nearly fill them
        of_q = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}
        of_kv = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8 if dropout else 4}
        stages = 1
    else:
        block_n = 64 if small and not dropout else 32
        of_q = {"BLOCK_M": 128, "BLOCK_N": block_n, "num_warps": 8}
        has_tensor_memory = 100 <= arch < 120  # where a thread of dropout is left 128 registers
        if small and not (dropout and has_tensor_memory):
            of_kv = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8}
        elif small or not dropout or has_tensor_memory:
            of_kv = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4}
        elif arch == 90:
            of_kv = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4}
        else:
            of_kv = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8}
        if dropout and arch == 90 and not causal:
            stages = 1  # with two, ptxas runs the wgmma of the loop one by one
    shared = {"D": D, "BLOCK_D": head_block(D)}
    return shared | of_q | {"num_stages": 2}, shared | of_kv | {"num_stages": stages}


@lru_cache(maxsize=1024)
def _backward_launches(
    shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    strides_of: tuple[tuple[int, ...], ...],
    arch: int,
    size: int,
    sizes: tuple[int, int, int],
    causal: bool,
    scale: float,
    dropout: tuple[float, bool, int],
) -> tuple[bool, tuple[int, ...], Launch, Launch]:
    """Whether the kernels can read such tensors, the shape of what the first launch leaves for the
    second, and both. `strides_of` has those of q, k, v and their gradients."""
    *tokens, H, D = shape
    B, T, S = sizes
    q_stride, k_stride, v_stride, *of_grads = strides_of
    readable = (
        is_aligned(shape, q_stride)
        and is_aligned(k_shape, k_stride)
        and is_aligned(k_shape, v_stride)
    )
    of_q, of_kv = launch_options(arch, D, size, causal, dropout[1])
    N, pad = math.prod(tokens), of_q["BLOCK_M"]
    padded = (N // pad + B) * pad
    inputs = (*strides(q_stride), *strides(k_stride), *strides(v_stride))
    grad_q, grad_k, grad_v = map(strides, of_grads)
    numbers = (scale, scale * LOG2_E.value, *launch_arguments(*dropout), T, S, H)
    for_q = Launch(
        _attention_long_bwd_q_kernel,
        (B * H * cdiv(T, pad),),
        (*inputs, *grad_q, *numbers, N, padded),
        {"CAUSAL": causal, **of_q},
    )
    for_kv = Launch(
        _attention_long_bwd_kv_kernel,
        (B * H * cdiv(S, of_kv["BLOCK_N"]),),
        (*inputs, *grad_k, *grad_v, *numbers, padded),
        {"CAUSAL": causal, "PAD": pad, **of_kv},
    )
    return readable, (2, H, padded), for_q, for_kv


def launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    sizes: tuple[int, int, int],
    grads: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> None:
    """Fill `grads`, those of q, k and v. `sizes` are B and the longest T and S."""
    grad_q, grad_k, grad_v = grads
    of_grads = grad_q.stride(), grad_k.stride(), grad_v.stride()
    settings = (
        architecture(q),
        q.element_size(),
        sizes,
        causal,
        scale,
        (dropout_p, rng is not None, site),
    )
    strides_of = (q.stride(), k.stride(), v.stride(), *of_grads)
    readable, shape, for_q, for_kv = _backward_launches(q.shape, k.shape, strides_of, *settings)
    if not readable:
        q, k, v = aligned(q), aligned(k), aligned(v)
        strides_of = (q.stride(), k.stride(), v.stride(), *of_grads)
        _, shape, for_q, for_kv = _backward_launches(q.shape, k.shape, strides_of, *settings)
    grad_out = contiguous(grad_out)
    cu_seqlens_q, cu_seqlens_k = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k)
    index = cu_seqlens_q, cu_seqlens_k, contiguous(key_lengths), contiguous(rng)
    lse_log2, delta = q.new_empty(*shape, dtype=torch.float32).unbind()
    out, lse = contiguous(out), contiguous(lse)
    for_q(grad_out, q, k, v, out, lse, lse_log2, delta, grad_q, *index)
    for_kv(grad_out, q, k, v, lse_log2, delta, grad_k, grad_v, *index)
