"""LayerNorm, forward and backward. M rows, C columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, C, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < C
    x = tl.load(x_ptr + row * C + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / C
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * C + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    x_ptr,
    weight_ptr,
    grad_out_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < C
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = (pid * ROWS + i).to(tl.int64)
        if row < M:
            x = tl.load(x_ptr + row * C + offs, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_out_ptr + row * C + offs, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            normal = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            weighted = weight * grad
            along = tl.sum(normal * weighted, 0) / C
            mean = tl.sum(weighted, 0) / C
            grad_x = (weighted - (normal * along + mean)) * rstd
            tl.store(grad_x_ptr + row * C + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
            grad_weight += grad * normal
            grad_bias += grad
    tl.store(grad_weight_ptr + pid * C + offs, grad_weight, mask=mask)
    tl.store(grad_bias_ptr + pid * C + offs, grad_bias, mask=mask)


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd of x (M, C); weight and bias are float32."""
    M, C = x.shape
    y = torch.empty_like(x)
    mean, rstd = torch.empty((2, M), dtype=torch.float32, device=x.device)
    _layer_norm_fwd_kernel[(M,)](
        x, weight, bias, y, mean, rstd, C, eps, BLOCK=triton.next_power_of_2(C)
    )
    return y, mean, rstd


def layer_norm_bwd(
    x: Tensor, weight: Tensor, grad_out: Tensor, mean: Tensor, rstd: Tensor, rows: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; a program sums over `rows` rows."""
    M, C = x.shape
    programs = triton.cdiv(M, rows)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = torch.empty((2, programs, C), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(programs,)](
        x,
        weight,
        grad_out,
        grad_x,
        grad_weight,
        grad_bias,
        mean,
        rstd,
        M,
        C,
        ROWS=rows,
        BLOCK=triton.next_power_of_2(C),
    )
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)
