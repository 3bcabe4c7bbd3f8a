"""The keep mask of `fastformer.ops.dropout`: inside Triton kernels, and on its own.

N rows, C columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer._dropout import dropout_scale, dropout_threshold
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv, contiguous

_BLOCK_C = 256
_TILE = 4096  # elements that a program draws


@triton.jit
def dropout_state(rng_ptr, site):
    """The seed, and the stream of numbers of a site; nothing of use where nothing is dropped."""
    if rng_ptr is None:
        seed, stream = 0, 0
    else:
        seed, stream = tl.load(rng_ptr), tl.load(rng_ptr + 1) + site
    return seed, stream


@triton.jit
def keep_mask(seed, stream, rows, threshold, first_col, COLS: tl.constexpr):
    """Return the mask (M, COLS) of `rows` (M,) and the COLS columns from `first_col` on.

    `seed` and `stream` are those of `dropout_state`. COLS and `first_col` are multiples of 8: one
    draw of Philox serves eight columns.
    """
    groups = first_col // 8 + tl.arange(0, COLS // 8)
    col_group = groups[None, :].to(tl.uint32)
    row = rows[:, None].to(tl.uint32) + tl.zeros_like(col_group)
    col_group += tl.zeros_like(row)
    low = tl.zeros_like(row) + stream.to(tl.uint32)
    high = tl.zeros_like(row) + (stream >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, col_group, row, low, high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16) >= threshold


@lru_cache(maxsize=64)
def _rate(dropout_p: float) -> tuple[int, float]:
    return dropout_threshold(dropout_p), dropout_scale(dropout_p)


def launch_arguments(dropout_p: float, drops: bool, site: int) -> tuple[int, int, float]:
    """What a kernel takes beside `rng`, which there is if it `drops`: the site, the threshold and
    the scale of what is kept."""
    return (site, *_rate(dropout_p)) if drops else (0, 0, 1.0)


@CachedLaunch
@triton.jit(do_not_specialize=["site", "threshold", "N"])
def _dropout_mask_kernel(
    rng_ptr,
    keep_ptr,
    site,
    threshold,
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = pid % tiles_c * BLOCK_C
    offs_c = first_col + tl.arange(0, BLOCK_C)
    seed, stream = dropout_state(rng_ptr, site)
    keep = keep_mask(seed, stream, offs_m, threshold, first_col, BLOCK_C)
    offs = offs_m[:, None] * C + offs_c[None, :]
    mask = (offs_m < N)[:, None] & (offs_c < C)[None, :]
    tl.store(keep_ptr + offs, keep.to(tl.uint8), mask=mask)


@lru_cache(maxsize=1024)
def _mask_launch(rows: int, cols: int, p: float, site: int) -> Launch:
    block_c = min(_BLOCK_C, max(16, triton.next_power_of_2(cols)))
    block_m = _TILE // block_c
    grid = (cdiv(rows, block_m) * cdiv(cols, block_c),)
    numbers = site, dropout_threshold(p), rows, cols
    options = {"BLOCK_M": block_m, "BLOCK_C": block_c}
    return Launch(_dropout_mask_kernel, grid, numbers, options)


def dropout_mask(rows: int, cols: int, p: float, rng: Tensor, site: int) -> Tensor:
    keep = torch.empty((rows, cols), dtype=torch.bool, device=rng.device)
    _mask_launch(rows, cols, p, site)(contiguous(rng), keep.view(torch.uint8))
    return keep
