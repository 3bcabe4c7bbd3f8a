"""cp.async.bulk: linear copies, and what they share with copies of tensor boxes.

A load makes its part of shared memory in flight until the scheduler delivers it, in any order. A
store reads its source at its issue or at the wait for its group, as the seed has it, and what it
writes is in flight until the wait without `.read`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.emulator.block import ENDS, Block, Execute, Mask
from tests.ptx.emulator.build import GLOBAL_BASE, Build
from tests.ptx.emulator.clocks import Ordering
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction, nothing
from tests.ptx.emulator.instructions.mbarrier import barriers, deliver_early, shared_address
from tests.ptx.emulator.memory import IN_FLIGHT, WRITTEN
from tests.ptx.emulator.types import TYPES, UNSIGNED, float_to_halves, flush, halves_to_float

PIECE = 16  # bytes that sizes and addresses are multiples of
_WORD = 8
_RELAXED = Ordering(strong=True, blocks=True)  # how a reduction accesses each item
Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]  # the old and the new words


@dataclass(frozen=True)
class Transfer:
    """Which items of shared memory belong to which items of global memory.

    `start` and `bytes` are its part of shared memory; `shared` and `outer` the offsets (n,) of
    items of `item` bytes; `inside` (n,) which of them exist in global memory, None for all. The
    others are read as the bits `fill`.
    """

    start: int
    bytes: int
    item: int
    shared: np.ndarray
    outer: np.ndarray
    inside: np.ndarray | None = None
    fill: int = 0

    @property
    def pieces(self) -> np.ndarray:
        return np.arange(self.start, self.start + self.bytes, PIECE)

    def existing(self) -> tuple[np.ndarray, np.ndarray]:
        """The offsets in shared and global memory of the items that global memory has."""
        if self.inside is None:
            return self.shared, self.outer
        return self.shared[self.inside], self.outer[self.inside]


@dataclass
class Store:
    """A copy to global memory that a thread has issued, in its group of that number."""

    transfer: Transfer
    thread: int
    group: int
    combine: Combine | None
    clock: np.ndarray | None
    done: bool = False  # its source is read
    waited: bool = False  # some wait has seen that


@dataclass
class BulkCopies:
    """The bulk copies of a block that are under way."""

    committed: np.ndarray  # groups per thread
    stores: list[Store] = field(default_factory=list)
    loads: int = 0


def bulk_copies(block: Block) -> BulkCopies:
    found: BulkCopies | None = block.state.get("bulk_copy")
    if found is None:
        found = block.state["bulk_copy"] = BulkCopies(np.zeros(block.threads, np.int64))
    return found


def load(block: Block, transfer: Transfer, barrier: int, thread: int) -> None:
    """Start a copy to shared memory whose bytes an mbarrier is to count."""
    warp, every, memory = int(block.warp[thread]), barriers(block), block.launch.memory
    every.use(barrier, np.array([warp]))
    _, outer = transfer.existing()
    memory.check(outer, transfer.item, "a bulk copy's read", reads=True)
    if block.launch.races:
        block.launch.races.read(block, outer, transfer.item)
    block.shared.check(transfer.pieces, PIECE, "a bulk copy's write", reads=False)
    clock = None
    if block.races:
        clock = block.races.copy(transfer.pieces, PIECE, warp, barrier)
    part = slice(transfer.start, transfer.start + transfer.bytes)
    block.shared.state[part] = IN_FLIGHT
    block.shared.data[part] = 0xFF
    bulk_copies(block).loads += 1

    def deliver() -> None:
        shared, outer = transfer.existing()
        if transfer.inside is not None:
            filled = np.full(len(transfer.shared), transfer.fill, UNSIGNED[transfer.item])
            block.shared.store(transfer.shared, transfer.item, filled)
        block.shared.store(shared, transfer.item, memory.load(outer, transfer.item))
        bulk_copies(block).loads -= 1
        every.deliver(barrier, transfer.bytes, clock)

    # In front: without a seed the last one is the first to arrive.
    block.pending.insert(0, deliver)


def store(block: Block, transfer: Transfer, thread: int, combine: Combine | None) -> None:
    """Start a copy, or a reduction, to global memory."""
    copies, warp, random = bulk_copies(block), int(block.warp[thread]), block.launch.random
    memory, (_, outer) = block.launch.memory, transfer.existing()
    block.shared.check(transfer.pieces, PIECE, "a bulk copy's read", reads=True)
    memory.check(outer, transfer.item, "a bulk copy's write", reads=combine is not None)
    _watch_store(block, transfer, combine)
    clock = None
    if block.races:
        clock = block.races.copy(transfer.pieces, PIECE, warp, None)
    if combine is None:
        memory.mark(outer, transfer.item, IN_FLIGHT)
    one = Store(transfer, thread, int(copies.committed[thread]), combine, clock)
    copies.stores.append(one)
    if random is not None and random.random() < 0.5:
        _move(block, one)


def _watch_store(block: Block, transfer: Transfer, combine: Combine | None) -> None:
    races, (_, outer) = block.launch.races, transfer.existing()
    if races and combine is None:
        races.write(block, outer, transfer.item)
    elif races:
        races.atomic(block, outer, transfer.item, _RELAXED, reads=False)


def _move(block: Block, one: Store) -> None:
    if one.done:
        return
    one.done = True
    transfer, memory = one.transfer, block.launch.memory
    shared, outer = transfer.existing()
    values = block.shared.load(shared, transfer.item)
    if one.combine is not None:
        values = one.combine(memory.load(outer, transfer.item), values)
    words = memory.data[: len(memory.data) // transfer.item * transfer.item]
    words.view(UNSIGNED[transfer.item])[outer // transfer.item] = values


def _finish(block: Block, one: Store) -> None:
    _move(block, one)
    if one.combine is None:
        _, outer = one.transfer.existing()
        block.launch.memory.mark(outer, one.transfer.item, WRITTEN)


def _end(block: Block) -> None:
    """A block's shared memory is another block's once it has ended."""
    copies = bulk_copies(block)
    if copies.loads:
        raise PtxError(
            "in flight", f"block {block.index} ends while {copies.loads} loads are under way"
        )
    for one in copies.stores:
        if not one.waited:
            raise PtxError(
                "in flight",
                f"block {block.index} ends, and thread {one.thread} has not waited until its"
                f" bulk copy has read shared+{one.transfer.start}",
            )
        _finish(block, one)


ENDS.append(_end)


@instruction("cp.async.bulk.commit_group")
def commit_group(build: Build) -> Execute:
    def execute(block: Block, mask: Mask) -> None:
        bulk_copies(block).committed[block.active(mask)] += 1

    return execute


@instruction("cp.async.bulk.wait_group[.{read:read}]")
def wait_group(build: Build) -> Execute:
    most, only_read = build.immediate(0), build.has("read")

    def execute(block: Block, mask: Mask) -> None:
        copies, active = bulk_copies(block), block.active(mask)
        under_way = []
        for one in copies.stores:
            over = active[one.thread] and one.group < copies.committed[one.thread] - most
            if not over:
                under_way.append(one)
                continue
            one.waited = True
            if block.races and one.clock is not None:
                block.races.clocks.learn(int(block.warp[one.thread]), one.clock)
            if only_read:
                _move(block, one)
                under_way.append(one)
            else:
                _finish(block, one)
        copies.stores = under_way
        block.progress += 1

    return execute


def combiner(build: Build, operation: str, type_name: str) -> Combine:
    """What a reduction does to words of a type; raises where PTX has no such reduction."""
    if (operation, type_name) not in _REDUCTIONS:
        raise build.error(f"the reduction {operation} of {type_name or 'an unknown type'}")
    function = _FUNCTIONS[operation]
    if type_name in ("f16", "bf16"):

        def of_halves(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            a, b = halves_to_float(old, type_name), halves_to_float(new, type_name)
            with np.errstate(all="ignore"):
                return float_to_halves(function(a, b), type_name)

        return of_halves
    dtype = np.dtype(TYPES[type_name])
    flushed = flush if type_name == "f32" else np.asarray

    def of_words(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            result = flushed(function(flushed(old.view(dtype)), flushed(new.view(dtype))))
        return result.astype(dtype, copy=False).view(old.dtype)

    return of_words


_FUNCTIONS: dict[str, Combine] = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_REDUCTIONS = {
    *(("add", t) for t in ("f16", "bf16", "u32", "s32", "u64", "f32", "f64")),
    *((op, t) for op in ("min", "max") for t in ("f16", "bf16", "u32", "s32", "u64", "s64")),
    *((op, t) for op in ("and", "or", "xor") for t in ("b32", "b64")),
}


def _linear(block: Block, start: int, address: int, size: int, item: int = _WORD) -> Transfer:
    for name, value in (("size", size), ("global address", address), ("shared address", start)):
        if value % PIECE:
            raise PtxError("alignment", f"a bulk copy's {name} {value:#x} is no multiple of 16")
    if start < 0 or start + size > len(block.shared.data):
        raise PtxError("bounds", f"a bulk copy of {size} bytes at {block.shared.describe(start)}")
    offsets = np.arange(0, size, item)
    return Transfer(start, size, item, start + offsets, address - GLOBAL_BASE + offsets)


def expect_operands(build: Build, count: int) -> None:
    """Refuse another number of operands than `count`, and one more where there is a cache hint."""
    count += build.has("hint")
    if len(build.operands) != count:
        raise build.error(f"{len(build.operands)} operands where there should be {count}")


@instruction(
    "cp.async.bulk.{space:shared::cluster,shared::cta}.global.mbarrier::complete_tx::bytes"
    "[.{hint:L2::cache_hint}]"
)
def bulk_load(build: Build) -> Execute:
    expect_operands(build, 4)
    shared, barrier = (shared_address(build, k, build.choices["space"]) for k in (0, 3))
    address, size = build.address(1), build.read(2, "u32")

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        starts, sources, sizes, bars = (f(block) for f in (shared, address, size, barrier))
        for t in np.flatnonzero(block.active(mask)):
            transfer = _linear(block, int(starts[t]), int(sources[t]), int(sizes[t]))
            load(block, transfer, int(bars[t]), int(t))

    return execute


@instruction(
    "cp.async.bulk.global.shared::cta.bulk_group[.{hint:L2::cache_hint}]",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint:L2::cache_hint}]"
    ".{op:add,min,max,and,or,xor}.{type:b32,u32,s32,b64,u64,s64,f16,bf16,f32,f64}",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group[.{hint:L2::cache_hint}]"
    ".{op:add}.{noftz:noftz}.{type:f16,bf16}",
)
def bulk_store(build: Build) -> Execute:
    expect_operands(build, 3)
    address, size = build.address(0), build.read(2, "u32")
    shared = shared_address(build, 1, "shared")
    combine, item = None, _WORD
    if build.has("op"):
        operation = str(build.choices["op"])
        if operation == "add" and build.type in ("f16", "bf16") and not build.has("noftz"):
            raise build.error(f"add.{build.type} must say .noftz")
        combine = combiner(build, operation, build.type)
        item = np.dtype(TYPES[build.type]).itemsize

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        targets, starts, sizes = address(block), shared(block), size(block)
        for t in np.flatnonzero(block.active(mask)):
            where = int(starts[t]), int(targets[t])
            store(block, _linear(block, *where, int(sizes[t]), item), int(t), combine)

    return execute


instruction("cp.async.bulk.prefetch.L2.global[.L2::cache_hint]")(nothing)
