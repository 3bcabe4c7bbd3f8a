"""cp.async: copies from global to shared memory that are there after a wait of their thread.

The source is read at once. The destination stays in flight until the thread waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.loads import check_count, resolve, watch_read
from tests.ptx.emulator.instructions.mbarrier import barriers, by_address, shared_address
from tests.ptx.emulator.memory import IN_FLIGHT, WRITTEN
from tests.ptx.emulator.program import Not, Register

_HINTS = "[.{hint:L2::cache_hint}][.{prefetch:L2::64B,L2::128B,L2::256B}]"


@dataclass
class _Copy:
    """What threads (n,) copy with one instruction."""

    threads: np.ndarray
    groups: np.ndarray  # (n,): of each thread's groups, the one that the copy belongs to
    offsets: np.ndarray  # (n,), in shared memory
    data: np.ndarray  # (n, size)
    serial: int  # counts the copies of a block

    def __getitem__(self, which: np.ndarray) -> _Copy:
        parts = (self.threads, self.groups, self.offsets, self.data)
        return _Copy(*(part[which] for part in parts), self.serial)


@dataclass
class _Copies:
    """A block's copies that are in flight."""

    group: np.ndarray  # (T,): how many groups a thread has committed
    copies: list[_Copy]
    issued: int = 0


def _copies(block: Block) -> _Copies:
    if "cp.async" not in block.state:
        block.state["cp.async"] = _Copies(np.zeros(block.threads, np.int64), [])
    return block.state["cp.async"]


@instruction(f"cp.async.{{cop:ca,cg}}.{{to:shared,shared::cta}}.global{_HINTS}")
def cp_async(build: Build) -> Execute:
    size = build.immediate(2)
    if size not in ((16,) if build.choices["cop"] == "cg" else (4, 8, 16)):
        raise build.error(f"cp.async.{build.choices['cop']} of {size} bytes")
    has_source_size = len(build.operands) - build.has("hint") == 4
    check_count(build, 4 if has_source_size else 3)
    to, source = build.address(0), build.address(1)
    wanted = _source_size(build, size) if has_source_size else None

    def execute(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        offsets = to(block)[threads]
        block.shared.check(offsets, size, "cp.async to", reads=False)
        sizes = wanted(block)[threads].astype(np.int64) if wanted else np.full(len(offsets), size)
        data = _read_source(block, source(block)[threads], sizes, size, block.thread[threads])
        if block.races:
            block.races.write(offsets, size, block.warp[threads], ordinary=False)
        block.shared.state[offsets[:, None] + np.arange(size)] = IN_FLIGHT
        found = _copies(block)
        own, groups = block.thread[threads], found.group[threads].copy()
        found.copies.append(_Copy(own, groups, offsets, data, found.issued))
        found.issued += 1

    return execute


def _source_size(build: Build, size: int) -> Read:
    """How many bytes a thread reads: the operand says it, or whether to ignore the source."""
    operand = build.operand(3)
    name = operand.predicate.name if isinstance(operand, Not) else None
    if isinstance(operand, Register):
        name = operand.name
    if name is not None and build.entry.registers[name] == "pred":
        ignore = build.read(3, "pred")
        return lambda block: np.where(ignore(block), 0, size)
    return build.read(3, "u32")


def _read_source(
    block: Block, addresses: np.ndarray, sizes: np.ndarray, size: int, threads: np.ndarray
) -> np.ndarray:
    """The bytes (n, size), zero beyond what each thread reads."""
    if (sizes > size).any():
        raise PtxError("bounds", f"cp.async of {size} bytes reads {int(sizes.max())}")
    data = np.zeros((len(addresses), size), np.uint8)
    reading = sizes > 0
    if not reading.any():
        return data
    memory, offsets = resolve(block, "global", addresses[reading])
    if (offsets % size).any():
        first = int(offsets[offsets % size != 0][0])
        raise PtxError("alignment", f"cp.async of {size} bytes at {memory.describe(first)}")
    if (sizes == size).all():
        memory.check(offsets, size, "cp.async from", reads=True)
        watch_read(block, memory, offsets, size, threads)
        return memory.data[offsets[:, None] + np.arange(size)]
    used = np.arange(size) < sizes[reading][:, None]
    each = offsets[:, None] + np.arange(size)
    memory.check(each[used], 1, "cp.async from", reads=True)
    watch_read(block, memory, each[used], 1, threads[reading][np.nonzero(used)[0]])
    data[reading] = np.where(used, memory.data[np.where(used, each, 0)], 0)
    return data


@instruction("cp.async.commit_group")
def commit_group(build: Build) -> Execute:
    check_count(build, 0)

    def execute(block: Block, mask: Mask) -> None:
        _copies(block).group[slice(None) if mask is None else mask] += 1

    return execute


@instruction("cp.async.wait_group")
def wait_group(build: Build) -> Execute:
    check_count(build, 1)
    pending = build.immediate(0)
    if pending < 0:
        raise build.error(f"{pending} groups")

    def execute(block: Block, mask: Mask) -> None:
        found = _copies(block)
        _complete(block, mask, lambda copy: copy.groups < found.group[copy.threads] - pending)

    return execute


@instruction("cp.async.wait_all")
def wait_all(build: Build) -> Execute:
    check_count(build, 0)
    return lambda block, mask: _complete(block, mask, lambda copy: np.ones(len(copy.threads), bool))


def _complete(
    block: Block, mask: Mask, is_done: Callable[[_Copy], np.ndarray], *, late: bool = False
) -> None:
    """Deliver those copies of the active threads; `late`: while the threads do something else."""
    found = _copies(block)
    rest = []
    for copy in found.copies:
        done = is_done(copy)
        if mask is not None:
            done = done & mask[copy.threads]
        if done.any():
            _deliver(block, copy if done.all() else copy[done], late)
        if not done.all():
            rest.append(copy[~done])
    found.copies = rest


def _deliver(block: Block, copy: _Copy, late: bool) -> None:
    size = copy.data.shape[1]
    where = copy.offsets[:, None] + np.arange(size)
    block.shared.data[where] = copy.data
    block.shared.state[where] = WRITTEN
    # What comes late was ordered when it was issued.
    if block.races and not late:
        # No fence.proxy.async is asked for: neither Triton nor CUTLASS has one here.
        block.races.write(copy.offsets, size, block.warp[copy.threads], ordinary=False)


@instruction("cp.async.mbarrier.arrive[.{noinc:noinc}][.{space:shared,shared::cta}].b64")
def arrive_when_copied(build: Build) -> Execute:
    """Each thread arrives when its copies so far are there; it may go on before.

    Without .noinc the arrival is added to those that the phase expects.
    """
    check_count(build, 1)
    address = shared_address(build, 0, build.choices["space"])
    adds = not build.has("noinc")

    def execute(block: Block, mask: Mask) -> None:
        for offset, threads in by_address(address(block), block.active(mask)):
            warps = np.unique(block.warp[threads])
            barrier = barriers(block).use(offset, warps)
            barrier.pending += len(threads) if adds else 0
            clocks = block.races.clocks if block.races else None
            known = [clocks.snapshot(warp) for warp in warps.tolist()] if clocks else []
            issued = _copies(block).issued
            block.pending.append(partial(_arrive, block, offset, threads, issued, known))

    return execute


def _arrive(
    block: Block, offset: int, threads: np.ndarray, issued: int, known: list[np.ndarray]
) -> None:
    """Deliver the copies issued before, and arrive, which releases what was known then."""
    mask = np.zeros(block.threads, bool)
    mask[threads] = True
    _complete(block, mask, lambda copy: np.full(len(copy.threads), copy.serial < issued), late=True)
    if block.races:
        for clock in known:
            block.races.clocks.leave(("arrivals", offset), clock)
    barriers(block).arrive(offset, np.ones(len(threads), np.int64), drop=False, partial=False)
    block.progress += 1
