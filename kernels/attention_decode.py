"""Attention of few queries to many keys, as when tokens are generated one by one.

One head has too little work for a GPU's multiprocessors, so that its keys are split into chunks
which a first launch attends to at the same time; a second one puts the chunks together in order
(Dao et al., "Flash-Decoding for long-context inference", 2023).

B sequences, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention_blocks import LN_2, LOG2_E, head_block
from fastformer.kernels.attention_long import launch_forward
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv

MAX_T = 16  # queries that a program takes, the rows of a product on tensor cores
_PROGRAMS = 256  # enough to read at the speed of memory
_LEAST_CHUNK = 128  # keys that are worth a program
_MAX_CHUNKS = 64


@CachedLaunch
@triton.jit(do_not_specialize=["T", "H", "rows", "chunks"])
def _attention_decode_combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    T,
    H,
    rows,
    chunks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the outputs of a row's chunks, each weighted by its share of the sum of the softmax."""
    row = tl.program_id(0).to(tl.int64)  # (b * T + t) * H + h
    token, h = row // H, row % H
    statistic = (token // T * H + h) * T + token % T
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    mask_c = offs_c < chunks
    offs_rows = offs_c.to(tl.int64) * rows
    lse = tl.load(partial_lse_ptr + offs_rows + statistic, mask=mask_c, other=float("-inf"))
    lse *= LOG2_E
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no chunk has seen a key
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    offs = (offs_rows + row)[:, None] * D + offs_d[None, :]
    mask = mask_c[:, None] & (offs_d < D)[None, :]
    partial = tl.load(partial_out_ptr + offs, mask=mask, other=0.0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(lse_ptr + statistic, (top + tl.log2(total)) * LN_2)


def _chunk(programs: int, S: int, block_n: int) -> int:
    """Keys of a chunk, from the sizes alone, so that every GPU adds in the same order."""
    chunks = min(_MAX_CHUNKS, cdiv(_PROGRAMS, max(1, programs)), S // _LEAST_CHUNK)
    return cdiv(cdiv(S, max(1, chunks)), block_n) * block_n


def _launch_options(D: int, size: int, dropout: bool = False) -> dict[str, int]:
    shared = {"D": D, "BLOCK_D": head_block(D), "BLOCK_M": MAX_T, "num_warps": 4}
    return shared | {"BLOCK_N": 64 if size == 2 else 32, "num_stages": 3}


@lru_cache(maxsize=1024)
def _chunks(shape: tuple[int, ...], S: int, size: int) -> tuple[int, int, Launch]:
    """Keys of a chunk, the number of chunks, and the launch that puts them together."""
    B, T, H, D = shape
    options = _launch_options(D, size)
    chunk = max(1, _chunk(B * H * cdiv(T, MAX_T), S, options["BLOCK_N"]))
    chunks, rows = max(1, cdiv(S, chunk)), B * T * H
    options = {
        "D": D,
        "BLOCK_D": options["BLOCK_D"],
        "BLOCK_C": triton.next_power_of_2(chunks),
        "num_warps": 4,
    }
    combine = Launch(_attention_decode_combine_kernel, (rows,), (T, H, rows, chunks), options)
    return chunk, chunks, combine


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """What `attention_long.forward` returns, at any T, and faster where T is small and S long."""
    shape, S = q.shape, k.shape[1]
    B, T, H, _ = shape
    chunk, chunks, combine = _chunks(shape, S, q.element_size())
    out = partial_out = q.new_empty(*shape)
    lse = partial_lse = q.new_empty(B, H, T, dtype=torch.float32)
    if chunks > 1:
        partial_out = q.new_empty(chunks, *shape, dtype=torch.float32)
        partial_lse = q.new_empty(chunks, B, H, T, dtype=torch.float32)
    launch_forward(
        q,
        k,
        v,
        partial_out,
        partial_lse,
        None,
        None,
        key_lengths,
        (B, T, S),
        causal,
        scale,
        dropout_p,
        rng,
        site,
        chunk=chunk,
        options_of=_launch_options,
    )
    if chunks > 1:
        combine(partial_out, partial_lse, out, lse)
    return out, lse
