"""The language-model head and its loss: chunks of logits that become their own gradient in place.

The matrix products are cuBLAS's, in the dtype of x, or ours where most rows are ignored, which they
leave out (counted_rows.py). Between them one kernel reads a row of logits for its log-sum-exp
(online: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3) and
once more, out of the second-level cache, to write the gradient over it: no float32 logits, and
never more than a chunk of them. The number of rows that count stays on the device, so that nothing
waits for it.

N rows, C model dim, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.counted_rows import PADDING, CountedRows
from fastformer.kernels.launch import CachedLaunch, Launch, cast, cdiv, contiguous

_CHUNK_BYTES = 1 << 30  # of logits
_LEAST_ROWS = 256  # the weight is read once more for every chunk
_BLOCK_V = 8192  # logits that a program takes at a time
_LOWEST = tl.constexpr(-1e38)  # not -inf, whose difference with itself is NaN


# A thread takes whole vectors of VEC logits. Rows are padded to vectors, which keeps the mask of a
# load uniform along a vector whatever V is. With an order a program has a slot (counted_rows.py),
# and slots that no row has taken are as rows that are ignored.
@CachedLaunch
@triton.jit(do_not_specialize=["first", "ignore_index"])
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    order_ptr,
    count_ptr,
    losses_ptr,
    first,
    ignore_index,
    label_smoothing,
    z_loss,
    V,
    stride,
    MEAN: tl.constexpr,
    SMOOTHS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    PADDING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    losses_ptr += first + row
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    vectors = tl.arange(0, LANES) * VEC
    offs = vectors[:, None] + tl.arange(0, VEC)[None, :]
    columns = V  # of zeros, where the row does not count
    if order_ptr is None:
        target = tl.load(targets_ptr + first + row)
    else:
        slot, count = first + row, tl.load(count_ptr)
        taken = slot < count
        target = tl.load(order_ptr + slot, mask=taken, other=0)
        target = tl.load(targets_ptr + target, mask=taken, other=0)
        target = tl.where(taken, target, ignore_index)
        columns = tl.where(slot < tl.cdiv(count, PADDING) * PADDING, V, 0)
    if target == ignore_index:
        tl.store(losses_ptr, 0.0)
        if NEEDS_GRAD:
            zeros = tl.zeros((LANES, VEC), dtype)
            for start in range(0, columns, LANES * VEC):
                tl.store(logits_ptr + start + offs, zeros, mask=(start + vectors < V)[:, None])
    else:
        # Before anything is written over it. A target out of range makes the loss NaN.
        known = (target >= 0) & (target < V)
        wanted = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        top = tl.full((LANES,), _LOWEST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        logit_sum = tl.zeros((LANES,), tl.float32)
        for start in range(0, V, LANES * VEC):
            mask = (start + vectors < V)[:, None]
            logits = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            inside = start + offs < V
            if SMOOTHS:
                logit_sum += tl.sum(tl.where(inside, logits, 0.0), 1)
            logits = tl.where(inside, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - new_top[:, None])
            total = total * tl.exp(top - new_top) + tl.sum(weights, 1)
            top = new_top
        row_top = tl.max(top, 0)
        lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
        loss = lse - (1.0 - label_smoothing) * wanted + z_loss * lse * lse
        if SMOOTHS:
            loss -= label_smoothing * (tl.sum(logit_sum, 0) / V)
        share = 1.0
        if MEAN:
            share = 1.0 / tl.load(count_ptr).to(tl.float32)
        tl.store(losses_ptr, loss * share)
        if NEEDS_GRAD:
            slope = (1.0 + 2.0 * z_loss * lse) * share
            offset = label_smoothing / V * share
            at_target = (1.0 - label_smoothing) * share
            for start in range(0, V, LANES * VEC):
                mask = (start + vectors < V)[:, None]
                logits = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                grad = tl.exp(logits - lse) * slope
                if SMOOTHS:
                    grad -= offset
                grad = tl.where(start + offs == target, grad - at_target, grad)
                if order_ptr is not None:  # whose products read the padding too
                    grad = tl.where(start + offs < V, grad, 0.0)
                tl.store(logits_ptr + start + offs, grad.to(dtype), mask=mask)


def _with_column(matrix: Tensor, column: Tensor) -> Tensor:
    """`matrix` with one more column, and zeros up to a multiple of 16, as fast products need."""
    C = matrix.shape[1]
    wider = matrix.new_zeros((matrix.shape[0], C // 16 * 16 + 16))
    wider[:, :C] = matrix
    wider[:, C] = column
    return wider


def _chunk_rows(N: int, bytes_per_row: int) -> int:
    """Rows of a chunk: all chunks but the last are equal, and their parts of any tensor aligned."""
    most = max(_LEAST_ROWS, _CHUNK_BYTES // bytes_per_row)
    chunks = max(1, cdiv(N, most))
    return cdiv(max(1, cdiv(N, chunks)), 64) * 64


def _launch_options(V: int, size: int) -> dict[str, int]:
    block, vec = min(_BLOCK_V, max(512, triton.next_power_of_2(V))), 16 // size
    return {"LANES": block // vec, "VEC": vec, "num_warps": min(16, block // 512)}


@lru_cache(maxsize=1024)
def _launch(
    rows: int,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    V: int,
    stride: int,
    size: int,
    mean: bool,
    needs_grad: bool,
) -> Launch:
    """The launch for the chunk of `rows` rows from `first` on; `size`: bytes of a logit."""
    numbers = first, ignore_index, label_smoothing, z_loss, V, stride
    constants = {"MEAN": mean, "SMOOTHS": label_smoothing > 0.0, "NEEDS_GRAD": needs_grad}
    options = {**constants, "PADDING": PADDING, **_launch_options(V, size)}
    return Launch(_cross_entropy_kernel, (rows,), numbers, options)


class _AllRows:
    """Products with all rows, by cuBLAS, in chunks; what it has in common with CountedRows."""

    order = None

    def __init__(self, x: Tensor, table: Tensor, targets: Tensor, ignore_index: int) -> None:
        counted = targets != ignore_index
        self.count = counted.sum()
        # The gradient of a row that does not count is zero, but zero times NaN is not.
        self.rows = torch.where(counted[:, None], x, 0.0)
        if table.shape[1] > x.shape[1]:
            self.rows = _with_column(self.rows, counted.to(x.dtype))
        self.table = table
        self.grad_x: Tensor | None = None
        self.grad_table: Tensor | None = None

    def logits(self, first: int, out: Tensor) -> None:
        rows = self.rows[first : first + out.shape[0]]
        torch.mm(rows, self.table.t(), out=out[:, : self.table.shape[0]])

    def add_gradients(self, first: int, padded: Tensor, weight: Tensor) -> None:
        grad = padded[:, : weight.shape[0]]
        rows = self.rows[first : first + grad.shape[0]]
        if self.grad_x is None:
            self.grad_x = weight.new_empty(self.rows.shape[0], weight.shape[1])
        torch.mm(grad, weight, out=self.grad_x[first : first + grad.shape[0]])
        product = grad.t() @ rows
        # One chunk is rounded once. Of several the sum is float32.
        self.grad_table = (
            product if self.grad_table is None else self.grad_table.float().add_(product)
        )


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    mostly_ignored: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, C), V = x.shape, weight.shape[0]
    targets = contiguous(targets)
    # The bias is a column of the weight whose input is 1: added before the one rounding of a logit,
    # and its gradient comes with that of the weight.
    table = weight if bias is None else _with_column(weight, bias.to(x.dtype))
    size = x.element_size()
    stride = cdiv(V, 64) * 64
    length = _chunk_rows(N, stride * size)
    products: CountedRows | _AllRows
    if mostly_ignored:
        products = CountedRows(x, table, targets, ignore_index, several=length < N)
    else:
        products = _AllRows(x, table, targets, ignore_index)
    settings = ignore_index, label_smoothing, z_loss, V, stride, size, mean, grad_dtype is not None
    losses = x.new_empty(N, dtype=torch.float32)
    padded = x.new_empty((min(length, N), stride))
    if stride > V:
        padded[:, V:] = 0.0
    for first in range(0, N, length):
        rows = min(length, N - first)
        chunk = padded[:rows]
        products.logits(first, chunk)
        launch = _launch(rows, first, *settings)
        launch(chunk, targets, products.order, products.count, losses)
        if grad_dtype is not None:
            products.add_gradients(first, chunk, weight)
    loss = losses.sum()
    if grad_dtype is None:
        return loss, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    grad_x, grad_table = products.grad_x, products.grad_table
    if grad_x is None or grad_table is None:  # no rows
        grad_x, grad_table = torch.empty_like(x), torch.zeros_like(table)
    if bias is None:
        return loss, grad_x, cast(grad_table, grad_dtype), x.new_empty(0)
    grad_weight = grad_table[:, :C].to(grad_dtype, copy=True)
    return loss, grad_x, grad_weight, grad_table[:, C].to(grad_dtype, copy=True)
