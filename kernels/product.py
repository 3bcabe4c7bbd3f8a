"""A tile of a matrix product, for kernels that go on with it before it is stored.

Operands are pointers with strides, or tensor descriptors where TMA copies them (sm_90 and up, rows
of a multiple of 16 bytes): the addresses then cost neither registers nor instructions.

(M, K) by (K, N).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer.kernels.launch import architecture, with_base


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles share the columns that the cache holds."""
    group = pid // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _add_product(acc, left, right, BLOCK_K: tl.constexpr):
    """acc + left right; float32 as three products of its halves in tf32, nearly as exact.

    A tensor core rounds its sums towards zero (Ootomo and Yokota, "Recovering single precision
    accuracy from tensor cores", 2022, section 3). In float32 that would be the largest error: there
    its sums are short, begin at zero, and are added up outside.
    """
    if left.dtype == tl.float32:
        # The last argument keeps the compiler from moving the addition into the tensor core.
        acc += tl.dot(left, right, input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def product(
    a,
    b,
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEFT_TRANSPOSED: tl.constexpr = False,
    left_columns=None,
):
    """A tile of a b, (BLOCK_M, BLOCK_N) in float32. A descriptor of b is of b^T if TRANSPOSED, one
    of a is of a^T if LEFT_TRANSPOSED.

    `left_columns` are those that a has, if they are more than K; b counts as zero there. A multiple
    of 16 makes for wide loads.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if isinstance(a, tl.tensor_descriptor):
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        for start in range(0, K, BLOCK_K):
            if LEFT_TRANSPOSED:
                left = a.load([start, first_m]).T
            else:
                left = a.load([first_m, start])
            if TRANSPOSED:
                right = b.load([first_n, start]).T
            else:
                right = b.load([start, first_n])
            acc = _add_product(acc, left, right, BLOCK_K)
    else:
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        step = tl.full((), BLOCK_K, tl.int64)
        mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
        if left_columns is None:
            left_columns = K
        a += offs_m[:, None] * stride_am + offs_k[None, :].to(tl.int64) * stride_ak
        b += offs_k[:, None].to(tl.int64) * stride_bk + offs_n[None, :] * stride_bn
        for start in range(0, K, BLOCK_K):
            mask_left = mask_m & (offs_k < left_columns - start)[None, :]
            left = tl.load(a, mask=mask_left, other=0.0)
            right = tl.load(b, mask=(offs_k < K - start)[:, None] & mask_n, other=0.0)
            acc = _add_product(acc, left, right, BLOCK_K)
            a += step * stride_ak
            b += step * stride_bk
    return acc


@triton.jit
def columns(x, ROWS: tl.constexpr, COLS: tl.constexpr, PART: tl.constexpr):
    """A tuple of the parts of `x` (ROWS, COLS), PART columns each."""
    if COLS == PART:
        parts = (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        parts = columns(left, ROWS, COLS // 2, PART) + columns(right, ROWS, COLS // 2, PART)
    return parts


def matrix(t: Tensor) -> Tensor:
    """All leading dimensions flattened; a copy where neither rows nor columns are dense."""
    rows = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return rows if 1 in rows.stride() else rows.contiguous()


def fits_tma(shape: tuple[int, ...], stride: tuple[int, ...], size: int) -> bool:
    """Whether TMA copies such a matrix of elements of `size` bytes: its rows begin at multiples of
    16 bytes, as its address has to be one."""
    return 0 not in shape and stride[1] == 1 and stride[0] * size % 16 == 0


def has_tma(*operands: Tensor) -> bool:
    """Whether TMA copies them on their device."""
    return architecture(operands[0]) >= 90 and all(
        t.data_ptr() % 16 == 0 and fits_tma(t.shape, t.stride(), t.element_size()) for t in operands
    )


def blocks(
    options: dict[str, Any], transposed: bool, left_transposed: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a descriptor of each operand copies at a time."""
    block_m, block_n, block_k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    return (
        (block_k, block_m) if left_transposed else (block_m, block_k),
        (block_n, block_k) if transposed else (block_k, block_n),
    )


@lru_cache(maxsize=1024)
def descriptor_like(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, block: tuple[int, int]
) -> TensorDescriptor:
    """That of no tensor, for `with_base`."""
    base = torch.empty(0, dtype=dtype, device="meta")
    return TensorDescriptor(base, list(shape), list(stride), list(block))


def operands(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    tma: bool,
    options: dict[str, Any],
    left_transposed: bool = False,
) -> tuple[Any, Any]:
    """What `product` takes: `b` is of shape (N, K) if `transposed`, else (K, N); `a` is of shape
    (K, M) if `left_transposed`, else (M, K)."""
    if not tma:
        return a, b
    of_a, of_b = blocks(options, transposed, left_transposed)
    return (
        with_base(descriptor_like(a.shape, a.stride(), a.dtype, of_a), a),
        with_base(descriptor_like(b.shape, b.stride(), b.dtype, of_b), b),
    )
