"""The keep mask of `fastformer.ops.dropout` inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastformer.ops.reference import dropout_scale, dropout_threshold


@triton.jit
def keep_mask(seed, stream, rows, threshold, first_col, COLS: tl.constexpr):
    """Return the mask (M, COLS) of `rows` (M,) and the COLS columns from `first_col` on.

    `seed` is rng[0] and `stream` is rng[1] + site, both int64. COLS and `first_col` are multiples
    of 8: one draw of Philox serves eight columns.
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


def launch_arguments(dropout_p: float, rng: Tensor | None, site: int) -> tuple[int, int, float]:
    """What a kernel takes beside `rng`: the site, the threshold and the scale of what is kept."""
    if rng is None:
        return 0, 0, 1.0
    return site, dropout_threshold(dropout_p), dropout_scale(dropout_p)
