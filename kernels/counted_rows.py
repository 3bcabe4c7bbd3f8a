"""The rows that count, packed together, and the products of a head with them alone.

How many there are stays on the device, so that nothing waits for it: the programs of a product read
it, and share the tiles that there are. A product of ours is slower than cuBLAS's, which multiplies
all rows; it pays where few count.

N rows, C model dim, V vocabulary. A slot is a place among the packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import CachedLaunch, cdiv
from fastformer.kernels.product import has_tma, operands, product, tile_of

# Packed rows, and their logits, are zero from the last one up to a multiple of this: a sum over
# slots takes whole blocks of them.
PADDING = 64
_ORDER_BLOCK = 4096  # targets that a program takes at a time
_GATHER_ROWS = 16


@CachedLaunch
@triton.jit(do_not_specialize=["ignore_index", "N"])
def _order_kernel(targets_ptr, order_ptr, count_ptr, ignore_index, N, BLOCK: tl.constexpr):
    """The row of every slot, and their number. A program counts what lies before its own rows."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    targets_ptr += offs
    before = tl.zeros((BLOCK,), tl.int32)
    for _ in range(tl.program_id(0)):
        before += (tl.load(targets_ptr) != ignore_index).to(tl.int32)
        targets_ptr += BLOCK
    rows = pid * BLOCK + offs
    inside = rows < N
    counts = inside & (tl.load(targets_ptr, mask=inside, other=0) != ignore_index)
    first = tl.sum(before, 0)
    slots = first + tl.cumsum(counts.to(tl.int32), 0) - 1
    tl.store(order_ptr + slots, rows, mask=counts)
    if pid == tl.num_programs(0) - 1:
        tl.store(count_ptr, first + tl.sum(counts.to(tl.int32), 0))


@CachedLaunch
@triton.jit(do_not_specialize=["N"])
def _gather_kernel(
    x_ptr,
    order_ptr,
    count_ptr,
    rows_ptr,
    N,
    C,
    columns,
    stride_xn,
    stride_xc,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x by slots; columns beyond C are a one and zeros."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    count = tl.load(count_ptr)
    if first < tl.cdiv(count, PADDING) * PADDING:
        slots = first + tl.arange(0, BLOCK_M)
        counts = slots < count
        row = tl.load(order_ptr + slots, mask=counts, other=0)
        for start in range(0, columns, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = counts[:, None] & (offs_c < C)[None, :]
            offs = row[:, None] * stride_xn + offs_c[None, :].to(tl.int64) * stride_xc
            values = tl.load(x_ptr + offs, mask=mask, other=0.0)
            values = tl.where(counts[:, None] & (offs_c == C)[None, :], 1.0, values)
            mask = (slots < N)[:, None] & (offs_c < columns)[None, :]
            offs = slots[:, None] * columns + offs_c[None, :]
            tl.store(rows_ptr + offs, values, mask=mask)


@CachedLaunch
@triton.jit(do_not_specialize=["first", "size"])
def _rows_product_kernel(
    a,
    b,
    order_ptr,
    count_ptr,
    out_ptr,
    first,
    size,
    N,
    K,
    columns,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_out,
    a_columns,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a b for the slots of a chunk that are taken; stored to their rows, if there is an order.

    a may have more columns than K, and zeros there.
    """
    M = tl.minimum(tl.load(count_ptr) - first, size)
    tiles_m, tiles_n = tl.cdiv(tl.maximum(M, 0), BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        acc = product(
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
            TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            False,
            a_columns,
        )
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        taken = offs_m < M
        rows = offs_m
        if order_ptr is not None:
            rows = tl.load(order_ptr + offs_m, mask=taken, other=0)
        offs, mask = rows[:, None] * stride_out + offs_n[None, :], taken[:, None]
        mask = mask & (offs_n < columns)[None, :]
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@CachedLaunch
@triton.jit(do_not_specialize=["first", "size"])
def _table_product_kernel(
    grad,
    rows,
    count_ptr,
    out_ptr,
    first,
    size,
    V,
    grad_columns,
    columns,
    stride_gn,
    stride_gv,
    stride_rn,
    stride_rc,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad^T rows, summed over the slots of a chunk that are taken; added to what is there if ADDS,
    and then, where none is taken, at no cost. grad may have more columns than V."""
    K = tl.minimum(tl.load(count_ptr) - first, size)
    tiles_m, tiles_n = tl.cdiv(V, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ADDS:
        tiles = tl.where(K > 0, tiles, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        acc = product(
            grad,
            rows,
            tile_m,
            tile_n,
            grad_columns,
            columns,
            K,
            stride_gv,
            stride_gn,
            stride_rn,
            stride_rc,
            False,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            True,
        )
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs = offs_m[:, None] * columns + offs_n[None, :]
        mask = (offs_m < V)[:, None] & (offs_n < columns)[None, :]
        if ADDS:
            acc += tl.load(out_ptr + offs, mask=mask, other=0.0)
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_options(dtype: torch.dtype, tma: bool) -> dict[str, Any]:
    """Several programs fit into a multiprocessor: one stores a tile behind another's product."""
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
        return {**tile, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    if not tma:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
        return {**tile, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    return {**tile, "GROUP": 8, "num_warps": 8, "num_stages": 3, "maxnreg": 128}


def _grid(x: Tensor, M: int, N: int, options: dict[str, Any]) -> tuple[int]:
    """As many programs as a GPU holds, of 16 warps on a multiprocessor, if there are the tiles."""
    tiles = cdiv(M, options["BLOCK_M"]) * cdiv(N, options["BLOCK_N"])
    if not x.is_cuda:  # without a GPU: few, so that one takes several tiles
        return (min(tiles, 2),)
    properties = torch.cuda.get_device_properties(x.device)
    return (min(tiles, properties.multi_processor_count * 16 // options["num_warps"]),)


class CountedRows:
    """Products with the rows of x whose target is not ignored, in chunks of slots.

    `order` (N,) has the row of each slot, `count` their number. A column of `table` more than x
    has is multiplied by one. `grad_x` and `grad_table` are there after `add_gradients`, the second
    in float32 if there are `several` chunks.
    """

    def __init__(
        self, x: Tensor, table: Tensor, targets: Tensor, ignore_index: int, several: bool
    ) -> None:
        N, C = x.shape
        columns = table.shape[1]
        self.order = targets.new_empty(N)
        self.count = targets.new_zeros((), dtype=torch.int32)
        self.rows = x.new_empty(N, columns)
        self.table = table
        self.several = several
        self.grad_x: Tensor | None = None
        self.grad_table: Tensor | None = None
        if N == 0:
            return
        _order_kernel[(cdiv(N, _ORDER_BLOCK),)](
            targets, self.order, self.count, ignore_index, N, BLOCK=_ORDER_BLOCK, num_warps=8
        )
        _gather_kernel[(cdiv(N, _GATHER_ROWS),)](
            x,
            self.order,
            self.count,
            self.rows,
            N,
            C,
            columns,
            *x.stride(),
            PADDING=PADDING,
            BLOCK_M=_GATHER_ROWS,
            BLOCK_C=256,
        )

    def logits(self, first: int, out: Tensor) -> None:
        """Write those of the slots from `first` on to `out`, which has some columns more."""
        rows = self.rows[first : first + out.shape[0]]
        self._product(rows, self.table, None, out, first, transposed=True)

    def add_gradients(self, first: int, grad: Tensor, weight: Tensor) -> None:
        """Of the chunk whose logits have the gradient `grad`, zero in columns beyond V."""
        size, V = grad.shape[0], weight.shape[0]
        columns = self.table.shape[1]
        if self.grad_x is None:
            self.grad_x = weight.new_zeros((self.rows.shape[0], weight.shape[1]))
        self._product(grad, weight, self.order[first:], self.grad_x, first, transposed=False)

        adds = self.grad_table is not None
        if self.grad_table is None:
            dtype = torch.float32 if self.several else weight.dtype
            self.grad_table = weight.new_empty(V, columns, dtype=dtype)
        rows = self.rows[first : first + size]
        tma = has_tma(grad, rows)
        options = _launch_options(grad.dtype, tma)
        _table_product_kernel[_grid(grad, V, columns, options)](
            *operands(grad, rows, False, tma, options, left_transposed=True),
            self.count,
            self.grad_table,
            first,
            size,
            V,
            grad.shape[1],
            columns,
            *grad.stride(),
            *rows.stride(),
            ADDS=adds,
            **options,
        )

    def _product(
        self,
        a: Tensor,
        b: Tensor,
        order: Tensor | None,
        out: Tensor,
        first: int,
        *,
        transposed: bool,
    ) -> None:
        K, N = b.shape[::-1] if transposed else b.shape
        tma = has_tma(a, b)
        options = _launch_options(a.dtype, tma)
        stride_bk, stride_bn = b.stride()[::-1] if transposed else b.stride()
        _rows_product_kernel[_grid(a, a.shape[0], N, options)](
            *operands(a, b, transposed, tma, options),
            order,
            self.count,
            out,
            first,
            a.shape[0],
            N,
            K,
            out.shape[1],
            *a.stride(),
            stride_bk,
            stride_bn,
            out.stride(0),
            a.shape[1],
            TRANSPOSED=transposed,
            **options,
        )
