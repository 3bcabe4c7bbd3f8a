"""Attention over long sequences on Hopper (sm_90): forward by warps that have different tasks.

A warpgroup copies keys and values by TMA into a ring of tiles in shared memory. Two or three
others attend to them with 64 queries each, and start the product for the next scores before the
softmax of those they have, so that tensor cores and exponentials work at the same time (Shah et
al., "FlashAttention-3", 2024, sections 3.1 and 3.2). A program goes on to other queries, whose
copies begin while the last ones are attended to. Written in Gluon, the lower level of Triton, which
is experimental: `kernels/attention.py` does without where it is not as needed here.

Tiles of keys are counted back from the last key that a program sees. So the first one may begin
before the first key, where TMA reads zeros, none reaches keys that are padding, and of a causal
mask the diagonal cuts one tile of a warpgroup.

B sequences, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastformer.kernels.attention_blocks import LN_2, LOG2_E, head_block
from fastformer.kernels.launch import CachedLaunch, Launch, cdiv, contiguous
from fastformer.kernels.tile_ring import copy, release, tile, wait

_BLOCK_M = 64  # queries of a warpgroup, the rows of a product on its tensor cores
_BLOCK_N = 128
_CACHE = 2**25  # bytes of keys and values that the second-level cache holds beside the rest
_STRIDE_BYTES = 16  # that TMA's strides and addresses are multiples of
_MAX_STRIDE = 2**40  # in bytes
_COPY_REGISTERS = gl.constexpr(24)  # of a thread that copies; it leaves its others to the rest


@gluon.jit
def _place(
    block,
    sizes,
    key_lengths_ptr,
    CAUSAL: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Sequence, head and first query of a block; the first key and the number of its tiles of keys.

    Blocks of `group` heads come before those of others, so that their keys and values stay in the
    cache.
    """
    T, S, H, heads, group, blocks = sizes
    first = block // (group * blocks) * group
    within = block % (group * blocks)
    members = gl.minimum(group, heads - first)
    bh, of_head = first + within % members, within // members
    if CAUSAL:
        of_head = blocks - 1 - of_head  # the blocks with the most keys first
    b, start_m, end = bh // H, of_head * ROWS, S
    if key_lengths_ptr is not None:
        end = gl.minimum(end, gl.load(key_lengths_ptr + b))
    if CAUSAL:
        end = gl.minimum(end, gl.minimum(start_m + ROWS, T) + (S - T))
    tiles = gl.maximum(gl.cdiv(end, BLOCK_N), 1)  # one of no keys is masked
    return b, bh % H, start_m, end - tiles * BLOCK_N, tiles


@gluon.jit
def _scores(q, ring, n, no_scores):
    """Start the product of queries and the keys of tile `n`."""
    k = tile(ring, n).permute((1, 0))
    return warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)


@gluon.jit
def _copy_all(q, k, v, shared, sizes, key_lengths_ptr, CAUSAL: gl.constexpr):
    """The task of the warpgroup that copies: of each block queries, then keys and values."""
    q_tiles, q_full, q_empty, _, ring, full, empty = shared
    WARPGROUPS: gl.constexpr = q_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.shape[3]
    _, _, _, heads, _, blocks = sizes
    n, parity = 0, 0  # tiles so far, and whether blocks so far are odd
    for block in range(gl.program_id(0), heads * blocks, gl.num_programs(0)):
        b, h, start_m, first_n, tiles = _place(
            block, sizes, key_lengths_ptr, CAUSAL, WARPGROUPS * BLOCK_M, BLOCK_N
        )
        for i in gl.static_range(WARPGROUPS):
            mbarrier.wait(q_empty.index(i), parity ^ 1)
            mbarrier.expect(q_full.index(i), q.block_type.nbytes)
            row = start_m + i * BLOCK_M
            tma.async_copy_global_to_shared(q, [b, h, row, 0], q_full.index(i), q_tiles.index(i))
        for i in range(tiles):
            row = first_n + i * BLOCK_N
            copy(k, [b, h, row, 0], ring, full, empty, n)
            copy(v, [b, h, row, 0], ring, full, empty, n + 1)
            n += 2
        parity ^= 1


@gluon.jit
def _softmax(
    s, row_max, row_sum, scale_log2, start_n, last_seen, MASKED: gl.constexpr, CAUSAL: gl.constexpr
):
    """Weights of a tile of scores, the factor of what came before, and maximum and sum of rows."""
    if MASKED:
        offs_n = start_n + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        seen = (offs_n >= 0)[None, :]
        if CAUSAL:
            seen = seen & (offs_n[None, :] <= last_seen[:, None])
        s = gl.where(seen, s * scale_log2, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(s, 1))
        # Of a row that has seen no key yet.
        finite = gl.where(new_max == float("-inf"), 0.0, new_max)
        p = gl.exp2(s - finite[:, None])
        decay = gl.exp2(row_max - finite)
    else:
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
        p = gl.exp2(s * scale_log2 - new_max[:, None])
        decay = gl.exp2(row_max - new_max)
    return p, decay, new_max, row_sum * decay + gl.sum(p, 1)


@gluon.jit
def _attend(
    WHICH: gl.constexpr, results, scale_log2, shared, sizes, place, n, parity, CAUSAL: gl.constexpr
):
    """Attend with 64 queries of a block, to keys and values from tile `n` of the ring on.

    Of the block's `tiles` these are `own`, of which `whole` ones, but for the first, have no mask.
    """
    q_tiles, q_full, q_empty, out_tiles, ring, full, empty = shared
    T, S, H, _, _, _ = sizes
    b, h, start_m, first_n, tiles = place
    out, lse_ptr = results
    BLOCK_M: gl.constexpr = q_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.shape[3]
    BLOCK_D: gl.constexpr = ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    start_m += WHICH * BLOCK_M
    offs_m = start_m + gl.arange(0, BLOCK_M, ROWS)
    last_seen = offs_m + (S - T)  # of causal attention, the diagonal ends in the bottom right
    own = gl.where(start_m < T, tiles, 1)
    whole = own
    if CAUSAL:
        end = gl.minimum(start_m + BLOCK_M, T) + (S - T) - first_n
        own = gl.minimum(own, gl.maximum(gl.cdiv(end, BLOCK_N), 1))
        whole = gl.minimum(own, gl.maximum(start_m + (S - T) + 1 - first_n, 0) // BLOCK_N)

    q = q_tiles.index(WHICH).reshape([BLOCK_M, BLOCK_D])
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    row_sum = gl.zeros([BLOCK_M], gl.float32, ROWS)
    acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, OUT)
    mbarrier.wait(q_full.index(WHICH), parity)
    wait(full, n)
    s = _scores(q, ring, n, no_scores)
    s = warpgroup_mma_wait(0, [s])
    release(empty, n)
    p, decay, row_max, row_sum = _softmax(
        s, row_max, row_sum, scale_log2, first_n, last_seen, True, CAUSAL
    )
    p = gl.convert_layout(p.to(ring.dtype), WEIGHTS)
    for MASKED in gl.static_range(1 + CAUSAL):
        begin, end = gl.maximum(whole, 1) if MASKED else 1, own if MASKED else whole
        for i in range(begin, end):
            # Scores of this tile, and meanwhile the product of the last one's weights and values.
            at = n + 2 * i
            wait(full, at)
            s = _scores(q, ring, at, no_scores)
            wait(full, at - 1)
            acc = warpgroup_mma(p, tile(ring, at - 1), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            release(empty, at)
            p, decay, row_max, row_sum = _softmax(
                s, row_max, row_sum, scale_log2, first_n + i * BLOCK_N, last_seen, MASKED, CAUSAL
            )
            acc = warpgroup_mma_wait(0, [acc])
            release(empty, at - 1)
            acc *= gl.convert_layout(decay, OUT_ROWS)[:, None]
            p = gl.convert_layout(p.to(ring.dtype), WEIGHTS)
    mbarrier.arrive(q_empty.index(WHICH), count=1)
    last = n + 2 * own - 1
    wait(full, last)
    acc = warpgroup_mma(p, tile(ring, last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(empty, last)
    for at in range(last + 1, n + 2 * tiles):  # which only other warpgroups see
        wait(full, at)
        release(empty, at)

    lse = (row_max + gl.log2(row_sum)) * LN_2
    lse_ptr += (b * H + h).to(gl.int64) * T
    gl.store(lse_ptr + offs_m, lse, mask=offs_m < T)
    # A row without keys has the sum 0 and the output 0.
    factor = 1.0 / gl.where(row_sum == 0, 1.0, row_sum)
    acc *= gl.convert_layout(factor, OUT_ROWS)[:, None]
    tma.store_wait(0)  # for the output of the block before
    out_tiles.index(WHICH).reshape([BLOCK_M, BLOCK_D]).store(acc.to(ring.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [b, h, start_m, 0], out_tiles.index(WHICH))


@gluon.jit
def _attend_all(
    WHICH: gl.constexpr, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL: gl.constexpr
):
    """The task of the other warpgroups, of which this is WHICH."""
    q_tiles, _, _, _, ring, _, _ = shared
    ROWS: gl.constexpr = q_tiles.shape[0] * q_tiles.shape[3]
    BLOCK_N: gl.constexpr = ring.shape[3]
    _, _, _, heads, _, blocks = sizes
    n, parity = 0, 0  # tiles so far, and whether blocks so far are odd
    for block in range(gl.program_id(0), heads * blocks, gl.num_programs(0)):
        place = _place(block, sizes, key_lengths_ptr, CAUSAL, ROWS, BLOCK_N)
        _attend(WHICH, results, scale_log2, shared, sizes, place, n, parity, CAUSAL)
        n += 2 * place[4]
        parity ^= 1
    tma.store_wait(0)


# What is not specialised would compile the kernel anew for another batch or length.
@CachedLaunch
@gluon.jit(do_not_specialize=["T", "S", "H", "heads", "group"])
def _attention_hopper_fwd_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    key_lengths_ptr,
    scale_log2,
    T,
    S,
    H,
    heads,
    group,
    CAUSAL: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """q, k, v and out are descriptors of (B, H, T or S, D), `heads` are B * H; see `_place`."""
    BLOCK_M: gl.constexpr = q.block_shape[2]
    BLOCK_N: gl.constexpr = k.block_shape[2]
    BLOCK_D: gl.constexpr = k.block_shape[3]
    q_tiles = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, BLOCK_M, BLOCK_D], q.layout)
    out_tiles = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, BLOCK_M, BLOCK_D], q.layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    ring = gl.allocate_shared_memory(k.dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()

    shared = (q_tiles, q_full, q_empty, out_tiles, ring, full, empty)
    results = (out, lse_ptr)
    sizes = (T, S, H, heads, group, gl.cdiv(T, WARPGROUPS * BLOCK_M))
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_attend_all, (0, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL)),
                (_attend_all, (1, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL)),
                (_copy_all, (q, k, v, shared, sizes, key_lengths_ptr, CAUSAL)),
            ],
            [4, 4],
            [REGISTERS, _COPY_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend_all, (0, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL)),
                (_attend_all, (1, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL)),
                (_attend_all, (2, results, scale_log2, shared, sizes, key_lengths_ptr, CAUSAL)),
                (_copy_all, (q, k, v, shared, sizes, key_lengths_ptr, CAUSAL)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, _COPY_REGISTERS],
        )


def launch_options(D: int) -> dict[str, int]:
    """As many warpgroups as the registers of a multiprocessor are enough for, without spills."""
    if D <= 64:
        return {"WARPGROUPS": 3, "REGISTERS": 160, "SLOTS": 8}
    return {"WARPGROUPS": 2, "REGISTERS": 240, "SLOTS": 4}


def refuse(q: Tensor, k: Tensor, v: Tensor, scale: float, rng: Tensor | None) -> str | None:
    """Why this kernel does not run where the others for long sequences do, or None."""
    if q.element_size() != 2:
        return f"it takes bfloat16 and float16, got {str(q.dtype)[6:]}"
    if rng is not None:
        return "it has no dropout"
    if scale < 0:  # the maximum is taken of what is not yet scaled
        return f"scale must not be negative, got {scale}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not _has_tma(t):
            return f"TMA cannot copy {name} of shape {tuple(t.shape)}, strides {t.stride()}"
    return None


def _has_tma(t: Tensor) -> bool:
    return t.data_ptr() % _STRIDE_BYTES == 0 and _fits(t.shape, t.stride(), t.element_size())


@lru_cache(maxsize=1024)
def _fits(shape: tuple[int, ...], stride: tuple[int, ...], size: int) -> bool:
    in_bytes = [size * s for s in _strides(shape, stride)]
    return (
        0 not in shape
        and in_bytes[3] == size
        and all(s % _STRIDE_BYTES == 0 and 0 < s < _MAX_STRIDE for s in in_bytes[:3])
    )


def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """A dimension of one element has no stride that counts, but TMA is given one."""
    return [s if size > 1 else _STRIDE_BYTES for s, size in zip(stride, shape, strict=True)]


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    """Of the device, each of which runs one program; of an H200 without a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, rows: int
) -> TensorDescriptor:
    """Of tiles of `rows` tokens of one head; TMA fills what is beyond the tensor with zeros."""
    block = [1, 1, rows, head_block(shape[3])]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # of a type the width counts
    B, T, H, D = shape
    stride_b, stride_t, stride_h, stride_d = _strides(shape, stride)
    strides = [stride_b, stride_h, stride_t, stride_d]
    base = torch.empty(0, dtype=dtype, device="meta")
    return TensorDescriptor(base, [B, H, T, D], strides, block, layout)


@lru_cache(maxsize=1024)
def _launch(
    shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    out_stride: tuple[int, ...],
    dtype: torch.dtype,
    multiprocessors: int,
    causal: bool,
    scale: float,
) -> Launch:
    """The launch for such tensors, of which q, k, v and out arrive as descriptors."""
    B, T, H, D = shape
    S = k_shape[1]
    options = launch_options(D)
    group = min(B * H, max(1, _CACHE // (2 * S * D * dtype.itemsize)))
    blocks = B * H * cdiv(T, options["WARPGROUPS"] * _BLOCK_M)
    grid = (min(blocks, multiprocessors),)
    boxes = (
        _descriptor(shape, q_stride, dtype, _BLOCK_M),
        _descriptor(k_shape, k_stride, dtype, _BLOCK_N),
        _descriptor(k_shape, v_stride, dtype, _BLOCK_N),
        _descriptor(shape, out_stride, dtype, _BLOCK_M),
    )
    numbers = scale * LOG2_E.value, T, S, H, B * H, group
    options = {"CAUSAL": causal, "num_warps": 4, **options}
    return Launch(_attention_hopper_fwd_kernel, grid, numbers, options, boxes)


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
    """out (B, T, H, D) and lse (B, H, T) of `ops.reference.attention_fwd`, if not `refuse`d."""
    shape = q.shape
    B, T, H, _ = shape
    out = q.new_empty(*shape)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    strides_of = q.stride(), k.stride(), v.stride(), out.stride()
    settings = q.dtype, _multiprocessors(q.device), causal, scale
    launch = _launch(shape, k.shape, *strides_of, *settings)
    launch(q, k, v, out, lse, contiguous(key_lengths))
    return out, lse
