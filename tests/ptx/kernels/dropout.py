"""Dropout by Philox-4x32-10, as triton.language.rand has it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dropout_kernel(x_ptr, y_ptr, dropout_p, seed, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    keep = tl.rand(seed, offs) > dropout_p
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, tl.where(keep, x / (1 - dropout_p), 0.0), mask=mask)


def dropout(x: Tensor, dropout_p: float, seed: int, block: int = 1024) -> Tensor:
    y = torch.empty_like(x)
    _dropout_kernel[(triton.cdiv(x.numel(), block),)](x, y, dropout_p, seed, x.numel(), BLOCK=block)
    return y
