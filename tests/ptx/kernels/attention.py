"""Attention forward with an online softmax (Dao, "FlashAttention-2", 2023), on tensors (H, T, D).

Once with pointers, which sm_80 and sm_90 copy by cp.async, and once with tensor descriptors, which
sm_90 copies by TMA. Both multiply by mma.sync or wgmma.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634


@triton.jit
def _softmax_step(s, v, acc, row_max, row_sum):
    """One tile of scores, base 2, into the running maximum, sum and output."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    finite = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s - finite[:, None])
    decay = tl.exp2(row_max - finite)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return acc, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    T,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    tile = head * T * D + offs_m[:, None] * D + offs_d[None, :]
    mask_m = offs_m < T
    q = tl.load(q_ptr + tile, mask=mask_m[:, None], other=0.0)
    k_ptr += head * T * D
    v_ptr += head * T * D
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    # The tiles before `whole` need no mask.
    whole = (pid * BLOCK_M if CAUSAL else T) // BLOCK_N * BLOCK_N
    end = tl.minimum(T, (pid + 1) * BLOCK_M) if CAUSAL else T
    for start in range(0, whole, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + offs_n[None, :] * D + offs_d[:, None])
        s = tl.dot(q, k) * scale_log2
        v = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum)
    for start in range(whole, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < T
        k = tl.load(k_ptr + offs_n[None, :] * D + offs_d[:, None], mask=mask_n[None, :], other=0.0)
        seen = mask_n[None, :]
        if CAUSAL:
            seen = seen & (offs_m[:, None] >= offs_n[None, :])
        s = tl.where(seen, tl.dot(q, k) * scale_log2, float("-inf"))
        v = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask_n[:, None], other=0.0)
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tile, out, mask=mask_m[:, None])
    tl.store(lse_ptr + head * T + offs_m, row_max + tl.log2(row_sum), mask=mask_m)


@triton.jit
def _attention_fwd_descriptor_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    scale_log2,
    T,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, head = tl.program_id(0), tl.program_id(1)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    q = q_desc.load([head, pid * BLOCK_M, 0]).reshape(BLOCK_M, D)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    whole = (pid * BLOCK_M if CAUSAL else T) // BLOCK_N * BLOCK_N
    end = tl.minimum(T, (pid + 1) * BLOCK_M) if CAUSAL else T
    for start in range(0, whole, BLOCK_N):
        k = k_desc.load([head, start, 0]).reshape(BLOCK_N, D)
        s = tl.dot(q, k.T) * scale_log2
        v = v_desc.load([head, start, 0]).reshape(BLOCK_N, D)
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum)
    for start in range(whole, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = k_desc.load([head, start, 0]).reshape(BLOCK_N, D)
        seen = offs_n[None, :] < T
        if CAUSAL:
            seen = seen & (offs_m[:, None] >= offs_n[None, :])
        s = tl.where(seen, tl.dot(q, k.T) * scale_log2, float("-inf"))
        v = v_desc.load([head, start, 0]).reshape(BLOCK_N, D)
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum)
    out = (acc / row_sum[:, None]).to(out_desc.dtype).reshape(1, BLOCK_M, D)
    out_desc.store([head, pid * BLOCK_M, 0], out)
    lse_ptr += head.to(tl.int64) * T
    tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=offs_m < T)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    descriptors: bool = False,
    block_m: int = 128,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
) -> tuple[Tensor, Tensor]:
    """out (H, T, D) and lse (H, T), base 2, of contiguous q, k and v."""
    H, T, D = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
    tensors = (q, k, v, out)
    kernel = _attention_fwd_kernel
    if descriptors:
        blocks = (block_m, block_n, block_n, block_m)
        tensors = tuple(
            TensorDescriptor.from_tensor(tensor, [1, block, D])
            for tensor, block in zip(tensors, blocks, strict=True)
        )
        kernel = _attention_fwd_descriptor_kernel
    kernel[(triton.cdiv(T, block_m), H)](
        *tensors,
        lse,
        LOG2_E / math.sqrt(D),
        T,
        CAUSAL=causal,
        D=D,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, lse
