"""What the attention kernels share: where a sequence lies, its tiles, the mask of dropout.

A batch is either (B, T, H, D), all sequences of one length, or packed (N, H, D), with cu_seqlens.
Strides arrive in units of eight elements: so the compiler knows that rows are aligned, whatever
the sizes, and copies 16 bytes at a time.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import architecture

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
UNIT = 8  # elements that strides count in
_MAX_STRIDE = 2**24  # of tokens: the offsets within a tile, of at most 128, fit into 32 bits

# Of float32, so that it is as exact as float32 products are; other types do not ask.
PRECISION = tl.constexpr("tf32x3")

# Specialised, each of these would compile the kernels anew for other sizes.
VARYING = ["T", "S", "H", "N", "chunk", "padded", "site", "threshold"] + [
    f"stride_{name}{dim}"
    for name in ("q", "k", "v", "grad_q", "grad_k", "grad_v")
    for dim in ("b", "t", "h")
]


@triton.jit
def sequence(cu_seqlens_ptr, b, tokens):
    """First row and length of sequence `b` where the tokens of all are numbered one by one."""
    if cu_seqlens_ptr is None:
        first = b.to(tl.int64) * tokens
        length = tokens
    else:
        start = tl.load(cu_seqlens_ptr + b)
        first = start.to(tl.int64)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
    return first, length


@triton.jit
def head(ptr, b, h, first, stride_b, stride_t, stride_h, PACKED: tl.constexpr):
    """Where head `h` of sequence `b` starts, whose first row is `first`."""
    offset = h.to(tl.int64) * stride_h
    if PACKED:
        offset += first * stride_t
    else:
        offset += b.to(tl.int64) * stride_b
    return ptr + offset * 8


@triton.jit
def rows_ptr(ptr, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of ROWS rows of one head. Offsets within it fit into 32 bits, see `aligned`."""
    ptr += start.to(tl.int64) * stride * 8
    return ptr + (tl.arange(0, ROWS)[:, None] * stride * 8 + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(
    ptr,
    start,
    end,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Rows from `start` on of one head, zeros from row `end` on, which is beyond a WHOLE tile."""
    ptr = rows_ptr(ptr, start, stride, ROWS, BLOCK_D)
    mask_d = tl.arange(0, BLOCK_D)[None, :] < D
    if not WHOLE:
        mask = (start + tl.arange(0, ROWS) < end)[:, None] & mask_d
        rows = tl.load(ptr, mask=mask, other=0.0)
    elif D < BLOCK_D:
        rows = tl.load(ptr, mask=mask_d, other=0.0)
    else:
        rows = tl.load(ptr)
    return rows


@triton.jit
def store_rows(
    ptr, rows, start, end, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    mask = (start + tl.arange(0, ROWS) < end)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    rows = rows.to(ptr.dtype.element_ty)
    tl.store(rows_ptr(ptr, start, stride, ROWS, BLOCK_D), rows, mask=mask)


@triton.jit
def statistic_ptr(ptr, b, h, first, tokens, H, N, PACKED: tl.constexpr):
    """Where one number per query of a head is kept: (B, H, T), or (H, N) of packed sequences."""
    if PACKED:
        offset = h.to(tl.int64) * N + first
    else:
        offset = (b * H + h).to(tl.int64) * tokens
    return ptr + offset


def refuse(*args: Any) -> str | None:
    """Why the kernels for long and for packed sequences cannot run on `args`, or None."""
    H, D = args[0].shape[-2:]
    if D % 8 or not 0 < D <= 128:
        return f"head_dim must be a multiple of 8 and at most 128, got {D}"
    if 3 * H * D >= _MAX_STRIDE:  # of a packed gradient
        return f"it takes less than {_MAX_STRIDE // 3} elements in a token, got {H * D} (H={H})"
    return None


def is_hopper(t: Tensor) -> bool:
    """Whether the GPU that has `t` is sm_90, or what is compiled is for one."""
    return architecture(t) == 90


def is_aligned(
    shape: tuple[int, ...], stride: tuple[int, ...], max_stride: int = _MAX_STRIDE
) -> bool:
    """Whether the kernels can read such a tensor; `max_stride` is that of tokens."""
    # A dimension of one element has no stride that counts.
    counted = [s for s, size in zip(stride, shape[:-1], strict=False) if size > 1]
    return stride[-1] == 1 and stride[-3] < max_stride and all(s % UNIT == 0 for s in counted)


def aligned(t: Tensor, max_stride: int = _MAX_STRIDE) -> Tensor:
    """`t` as it is where the kernels can read it, else a copy."""
    return t if is_aligned(t.shape, t.stride(), max_stride) else t.contiguous()


def strides(stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Of sequences, tokens and heads, as kernels take them; packed tokens have no sequences."""
    *first, token, head, _ = stride
    return (first[0] // UNIT if first else 0), token // UNIT, head // UNIT


def head_block(D: int) -> int:
    """The power of two that D is padded to."""
    return max(16, triton.next_power_of_2(D))
