"""Sums by atomics, histograms, arg max, scans and sorts of rows: what goes between threads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _column_sums_kernel(x_ptr, sums_ptr, M, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < C
    mask = (offs_m[:, None] < M) & mask_c[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    tl.atomic_add(sums_ptr + offs_c, tl.sum(x.to(tl.float32), 0), mask=mask_c)


@triton.jit
def _counts_kernel(x_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    tl.atomic_add(counts_ptr + x, 1, mask=mask)


@triton.jit
def _rows_kernel(x_ptr, maximum_ptr, where_ptr, scan_ptr, sorted_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < C
    x = tl.load(x_ptr + row * C + offs, mask=mask, other=float("-inf"))
    maximum, where = tl.max(x, 0, return_indices=True)
    tl.store(maximum_ptr + row, maximum)
    tl.store(where_ptr + row, where)
    scan = tl.cumsum(tl.where(mask, x, 0.0), 0)
    tl.store(scan_ptr + row * C + offs, scan, mask=mask)
    tl.store(sorted_ptr + row * C + offs, tl.sort(x, descending=True), mask=mask)


def column_sums(x: Tensor, rows: int = 8) -> Tensor:
    M, C = x.shape
    sums = torch.zeros(C, dtype=torch.float32, device=x.device)
    _column_sums_kernel[(triton.cdiv(M, rows),)](
        x, sums, M, C, ROWS=rows, BLOCK=triton.next_power_of_2(C)
    )
    return sums


def counts(x: Tensor, classes: int, block: int = 256) -> Tensor:
    """How often each of the integers 0 ... classes - 1 occurs in x (n,)."""
    found = torch.zeros(classes, dtype=torch.int32, device=x.device)
    _counts_kernel[(triton.cdiv(len(x), block),)](x, found, len(x), BLOCK=block)
    return found


def rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum, arg max, prefix sums and values in falling order of each row of float32 x (M, C)."""
    M, C = x.shape
    maximum = torch.empty(M, dtype=x.dtype, device=x.device)
    where = torch.empty(M, dtype=torch.int32, device=x.device)
    scan, ordered = torch.empty_like(x), torch.empty_like(x)
    _rows_kernel[(M,)](x, maximum, where, scan, ordered, C, BLOCK=triton.next_power_of_2(C))
    return maximum, where, scan, ordered
