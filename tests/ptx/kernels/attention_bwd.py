"""Attention backward on tensors (H, T, D): one kernel for dK and dV, one for dQ."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ptx.kernels.attention import LOG2_E


@triton.jit
def _attention_bwd_delta_kernel(
    out_ptr, grad_out_ptr, delta_ptr, T, D: tl.constexpr, BLOCK_M: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    tile = head * T * D + offs_m[:, None] * D + tl.arange(0, D)[None, :]
    out = tl.load(out_ptr + tile, mask=mask_m[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_out_ptr + tile, mask=mask_m[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * T + offs_m, tl.sum(out * grad, 1), mask=mask_m)


@triton.jit
def _attention_bwd_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale,
    scale_log2,
    T,
    stride,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    mask_n = offs_n < T
    first = head * T * D
    tile = first + offs_n[:, None] * D + offs_d[None, :]
    k = tl.load(k_ptr + tile, mask=mask_n[:, None], other=0.0)
    v = tl.load(v_ptr + tile, mask=mask_n[:, None], other=0.0)
    grad_k = tl.zeros((BLOCK_N, D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, D), tl.float32)
    begin = (pid * BLOCK_N) // BLOCK_M * BLOCK_M if CAUSAL else 0
    for start in range(begin, T, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < T
        q_t = tl.load(
            q_ptr + first + offs_m[None, :] * D + offs_d[:, None], mask=mask_m[None, :], other=0.0
        )
        grad_out = tl.load(
            grad_out_ptr + first + offs_m[:, None] * D + offs_d[None, :],
            mask=mask_m[:, None],
            other=0.0,
        )
        lse = tl.load(lse_ptr + head * T + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + head * T + offs_m, mask=mask_m, other=0.0)
        seen = mask_m[None, :] & mask_n[:, None]
        if CAUSAL:
            seen = seen & (offs_m[None, :] >= offs_n[:, None])
        p_t = tl.where(seen, tl.exp2(tl.dot(k, q_t) * scale_log2 - lse[None, :]), 0.0)
        grad_v = tl.dot(p_t.to(grad_out.dtype), grad_out, grad_v)
        grad_s = (p_t * (tl.dot(v, tl.trans(grad_out)) - delta[None, :])).to(q_t.dtype)
        grad_k = tl.dot(grad_s, tl.trans(q_t), grad_k)
    # The gradients are parts of one tensor (H, T, 3, D), of which `stride` is that of a token.
    packed = head * T * stride + offs_n[:, None] * stride + offs_d[None, :]
    element = grad_k_ptr.dtype.element_ty
    tl.store(grad_k_ptr + packed, (grad_k * scale).to(element), mask=mask_n[:, None])
    tl.store(grad_v_ptr + packed, grad_v.to(element), mask=mask_n[:, None])


@triton.jit
def _attention_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    scale,
    scale_log2,
    T,
    stride,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < T
    first = head * T * D
    tile = first + offs_m[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + tile, mask=mask_m[:, None], other=0.0)
    grad_out = tl.load(grad_out_ptr + tile, mask=mask_m[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * T + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + head * T + offs_m, mask=mask_m, other=0.0)
    grad_q = tl.zeros((BLOCK_M, D), tl.float32)
    end = tl.minimum(T, (pid + 1) * BLOCK_M) if CAUSAL else T
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < T
        tile_t = first + offs_n[None, :] * D + offs_d[:, None]
        k_t = tl.load(k_ptr + tile_t, mask=mask_n[None, :], other=0.0)
        v_t = tl.load(v_ptr + tile_t, mask=mask_n[None, :], other=0.0)
        seen = mask_m[:, None] & mask_n[None, :]
        if CAUSAL:
            seen = seen & (offs_m[:, None] >= offs_n[None, :])
        p = tl.where(seen, tl.exp2(tl.dot(q, k_t) * scale_log2 - lse[:, None]), 0.0)
        grad_s = (p * (tl.dot(grad_out, v_t) - delta[:, None])).to(k_t.dtype)
        grad_q = tl.dot(grad_s, tl.trans(k_t), grad_q)
    packed = head * T * stride + offs_m[:, None] * stride + offs_d[None, :]
    grad_q = (grad_q * scale).to(grad_q_ptr.dtype.element_ty)
    tl.store(grad_q_ptr + packed, grad_q, mask=mask_m[:, None])


def attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    causal: bool,
    num_warps: int = 8,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, views of one packed tensor (H, T, 3, D); lse (H, T) is base 2."""
    H, T, D = q.shape
    grad = torch.empty((H, T, 3, D), dtype=q.dtype, device=q.device)
    grad_q, grad_k, grad_v = grad.unbind(2)
    delta = torch.empty_like(lse)
    scale = 1 / math.sqrt(D)
    _attention_bwd_delta_kernel[(triton.cdiv(T, 128), H)](out, grad_out, delta, T, D=D, BLOCK_M=128)
    inputs = (q, k, v, grad_out, lse, delta)
    numbers = (scale, scale * LOG2_E, T, 3 * D)
    options = {"CAUSAL": causal, "D": D, "num_warps": num_warps, "num_stages": 2}
    _attention_bwd_kv_kernel[(triton.cdiv(T, 128), H)](
        *inputs, grad_k, grad_v, *numbers, BLOCK_M=64, BLOCK_N=128, **options
    )
    _attention_bwd_q_kernel[(triton.cdiv(T, 128), H)](
        *inputs, grad_q, *numbers, BLOCK_M=128, BLOCK_N=64, **options
    )
    return grad_q, grad_k, grad_v
