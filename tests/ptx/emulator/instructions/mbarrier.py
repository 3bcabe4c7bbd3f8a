"""mbarrier: barriers in shared memory that count arrivals and bytes of asynchronous copies.

A phase is over when no arrival is pending and the transaction count is zero (PTX ISA, "mbarrier").
Its 8 bytes belong to the barrier until it is invalidated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.emulator.block import RELEASES, Block, Execute, Mask
from tests.ptx.emulator.build import SHARED_BASE, Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.memory import BARRIER, UNWRITTEN
from tests.ptx.emulator.program import Address, Symbol

BYTES = 8
_LIMIT = (1 << 20) - 1  # of arrivals and of transactions
_PENDING_KNOWN = 1 << 31  # in a state: it comes from .noComplete, and may be asked for its count
_EARLY = 0.25  # how often a copy arrives before anything waits for it
_SPACE = "[.{space:shared,shared::cta,shared::cluster}].b64"
_ARRIVE = f"[.{{order:release,relaxed}}.{{scope:cta,cluster}}]{_SPACE}"
_RELAXED = f"[.relaxed.{{scope:cta,cluster}}]{_SPACE}"


@dataclass
class Barrier:
    """`expected` arrivals make a phase, `pending` of them are missing, `transactions` in bytes."""

    expected: int
    pending: int
    phase: int = 0
    transactions: int = 0


class Barriers:
    """The mbarriers of a block by their offset in shared memory."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.spurious = np.zeros(block.threads, bool)  # whether the next success is to fail
        self.failed: dict[object, np.ndarray] = {}  # the progress at the last failure, per wait
        self._barriers: dict[int, Barrier] = {}

    def init(self, offset: int, count: int, warp: int) -> None:
        _check_alignment(offset)
        if not 1 <= count <= _LIMIT:
            raise PtxError("barrier", f"mbarrier.init with a count of {count}")
        block, where = self.block, np.array([offset])
        block.shared.check(where, BYTES, "mbarrier.init", reads=False)
        block.shared.mark(where, BYTES, BARRIER)
        if block.races:
            block.races.write(where, BYTES, np.int64(warp), ordinary=False)
            block.races.clocks.forget(("mbarrier", offset))
            block.races.clocks.forget(("arrivals", offset))
        self._barriers[offset] = Barrier(count, count)

    def invalidate(self, offset: int, warp: int) -> None:
        self.find(offset)
        del self._barriers[offset]
        self.block.shared.mark(np.array([offset]), BYTES, UNWRITTEN)
        if self.block.races:
            where = np.array([offset])
            self.block.races.write(where, BYTES, np.int64(warp), ordinary=False)

    def find(self, offset: int) -> Barrier:
        _check_alignment(offset)
        barrier = self._barriers.get(offset)
        if barrier is None:
            raise PtxError("barrier", f"shared+{offset} holds no mbarrier that is initialised")
        return barrier

    def use(self, offset: int, warps: np.ndarray) -> Barrier:
        """The barrier, for warps that have to know that it is initialised."""
        barrier = self.find(offset)
        if self.block.races:
            self.block.races.read(np.full(len(warps), offset), BYTES, warps)
        return barrier

    def arrive(self, offset: int, counts: np.ndarray, *, drop: bool, partial: bool) -> np.ndarray:
        """Count arrivals of threads (n,), and return the state before each of them."""
        barrier, total = self.find(offset), int(counts.sum())
        if total > barrier.pending and len(counts) > 1:
            # A phase may end between them.
            one_by_one = [
                self.arrive(offset, counts[i : i + 1], drop=drop, partial=partial)
                for i in range(len(counts))
            ]
            return np.concatenate(one_by_one)
        if total > barrier.pending or (counts < 1).any():
            raise PtxError(
                "barrier",
                f"{total} arrivals at the mbarrier shared+{offset}, of whose {barrier.expected}"
                f" {barrier.pending} are pending in this phase",
            )
        states = barrier.phase << 32 | (barrier.pending - (np.cumsum(counts) - counts))
        barrier.pending -= total
        if drop:
            barrier.expected -= total
        if partial:
            if barrier.pending == 0:
                raise PtxError("barrier", f".noComplete completes a phase of shared+{offset}")
            states |= _PENDING_KNOWN
        self._advance(offset, barrier)
        return states

    def transact(self, offset: int, bytes: int) -> None:
        """Expect bytes, or count them as delivered if negative."""
        barrier = self.find(offset)
        barrier.transactions += bytes
        if abs(barrier.transactions) > _LIMIT:
            raise PtxError(
                "barrier", f"transaction count {barrier.transactions} of shared+{offset}"
            )
        if bytes < 0:
            self._advance(offset, barrier)

    def deliver(self, offset: int, bytes: int, clock: np.ndarray | None) -> None:
        """A copy has arrived: what happened before `clock` happened before the phase's end."""
        self.find(offset)
        if self.block.races and clock is not None:
            self.block.races.clocks.leave(("arrivals", offset), clock)
        self.transact(offset, -bytes)
        self.block.progress += 1

    def _advance(self, offset: int, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.transactions == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            if self.block.races:
                self.block.races.clocks.pass_on(("arrivals", offset), ("mbarrier", offset))


def barriers(block: Block) -> Barriers:
    found: Barriers | None = block.state.get("mbarrier")
    if found is None:
        found = block.state["mbarrier"] = Barriers(block)
    return found


def deliver_early(block: Block) -> bool:
    """With a seed, let a copy arrive now and then before anything waits for it."""
    random = block.launch.random
    if random is None or not block.pending or random.random() > _EARLY:
        return False
    block.pending.pop(block.launch.choose(len(block.pending)))()
    block.progress += 1
    return True


RELEASES.append(deliver_early)


def shared_address(build: Build, index: int, space: str | None) -> Read:
    """A function that gives the offsets in shared memory (T,) of an address, generic if no space.

    A variable's name is its address in shared memory even where a generic one is meant.
    """
    operand, address = build.operand(index), build.address(index)
    if space is not None or (isinstance(operand, Address) and isinstance(operand.base, Symbol)):
        return address
    return lambda block: address(block) - SHARED_BASE


def by_address(offsets: np.ndarray, active: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The active threads of each address."""
    threads = np.flatnonzero(active)
    own = offsets[threads]
    if (own == own[0]).all():
        return [(int(own[0]), threads)]
    return [(int(offset), threads[own == offset]) for offset in np.unique(own)]


def _check_alignment(offset: int) -> None:
    if offset % BYTES:
        raise PtxError("barrier", f"an mbarrier at shared+{offset}, not a multiple of {BYTES}")


@instruction("mbarrier.{what:init,inval}[.{space:shared,shared::cta}].b64")
def init(build: Build) -> Execute:
    address = shared_address(build, 0, build.choices["space"])
    inval = build.choices["what"] == "inval"
    count = None if inval else build.read(1, "u32")

    def execute(block: Block, mask: Mask) -> None:
        offsets = address(block)
        counts = None if count is None else count(block)
        for thread in np.flatnonzero(block.active(mask)):
            offset, warp = int(offsets[thread]), int(block.warp[thread])
            if counts is None:
                barriers(block).invalidate(offset, warp)
            else:
                barriers(block).init(offset, int(counts[thread]), warp)

    return execute


@instruction(
    f"mbarrier.{{kind:arrive,arrive_drop}}{_ARRIVE}",
    f"mbarrier.{{kind:arrive,arrive_drop}}.{{expect:expect_tx}}{_ARRIVE}",
    "mbarrier.{kind:arrive,arrive_drop}.{partial:noComplete}"
    "[.{order:release}.{scope:cta}][.{space:shared,shared::cta}].b64",
)
def arrive(build: Build) -> Execute:
    write, address = build.write(0), shared_address(build, 1, build.choices["space"])
    expects, partial = build.has("expect"), build.has("partial")
    drop, releases = build.choices["kind"] == "arrive_drop", build.choices["order"] != "relaxed"
    amount = build.read(2, "u32") if expects or partial or len(build.operands) > 2 else None
    one = np.ones(1, np.int64)

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        every, active = barriers(block), block.active(mask)
        states = np.zeros(block.threads, np.int64)
        amounts = one.repeat(block.threads) if amount is None else amount(block).astype(np.int64)
        for offset, threads in by_address(address(block), active):
            warps = np.unique(block.warp[threads])
            every.use(offset, warps)
            if block.races and releases:
                block.races.clocks.release(("arrivals", offset), warps)
            if not expects:
                counts = amounts[threads]
                states[threads] = every.arrive(offset, counts, drop=drop, partial=partial)
                continue
            for thread in threads:
                every.transact(offset, int(amounts[thread]))
                states[thread] = every.arrive(offset, one, drop=drop, partial=False)[0]
        block.progress += 1
        write(block, states, mask)

    return execute


@instruction(f"mbarrier.{{kind:expect_tx,complete_tx}}{_RELAXED}")
def expect_tx(build: Build) -> Execute:
    address = shared_address(build, 0, build.choices["space"])
    amount = build.read(1, "u32")
    sign = 1 if build.choices["kind"] == "expect_tx" else -1

    def execute(block: Block, mask: Mask) -> None:
        amounts = amount(block)
        for offset, threads in by_address(address(block), block.active(mask)):
            barriers(block).use(offset, np.unique(block.warp[threads]))
            for thread in threads:
                barriers(block).transact(offset, sign * int(amounts[thread]))
        block.progress += 1

    return execute


@instruction(
    "mbarrier.{kind:test_wait,try_wait}[.{parity:parity}]"
    "[.{order:acquire,relaxed}.{scope:cta,cluster}][.{space:shared,shared::cta}].b64"
)
def wait(build: Build) -> Execute:
    write, address = build.write(0), shared_address(build, 1, build.choices["space"])
    by_parity, patient = build.has("parity"), build.choices["kind"] == "try_wait"
    acquires = build.choices["order"] != "relaxed"
    wanted = build.read(2, "u32" if by_parity else "u64")
    if len(build.operands) > (4 if patient else 3):
        raise build.error("too many operands")
    key = object()

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        every, active = barriers(block), block.active(mask)
        phases, over = wanted(block), np.zeros(block.threads, bool)
        groups = by_address(address(block), active)
        for offset, threads in groups:
            barrier = every.use(offset, np.unique(block.warp[threads]))
            over[threads] = _is_over(barrier, offset, phases[threads], by_parity)
        failed = active & ~over
        if patient and block.races:
            over &= ~_fails_spuriously(every, active)
        if block.races and acquires:
            for offset, threads in groups:
                warps = np.unique(block.warp[threads[over[threads]]])
                block.races.clocks.acquire(("mbarrier", offset), warps)
        write(block, over, mask)
        if failed.any():
            # The first failure may be a look ahead, behind which the thread has more to do.
            seen = every.failed.setdefault(key, np.full(block.threads, -1))
            block.spin(failed & (seen == block.progress))
            seen[failed] = block.progress

    return execute


def _is_over(barrier: Barrier, offset: int, wanted: np.ndarray, by_parity: bool) -> np.ndarray:
    """Whether the phases that threads (n,) wait for, by parity or state, have completed."""
    if by_parity:
        if (wanted > 1).any():
            raise PtxError("barrier", f"a wait for parity {int(wanted.max())} of shared+{offset}")
        return wanted != barrier.phase % 2
    behind = barrier.phase - (wanted >> np.uint64(32)).astype(np.int64)
    if ((behind < 0) | (behind > 1)).any():
        raise PtxError(
            "barrier", f"a state of shared+{offset} that is neither of this phase nor the last"
        )
    return behind == 1


def _fails_spuriously(every: Barriers, active: np.ndarray) -> np.ndarray:
    """Which threads' try_wait (T,) gives up early, as it may: every other one of each thread.

    The threads of a warp do so together, since compilers take the branch on it to be uniform.
    """
    threads = np.flatnonzero(active)
    warp = every.block.warp
    warps, first = np.unique(warp[threads], return_index=True)
    fails = np.zeros(every.block.warps, bool)
    fails[warps] = ~every.spurious[threads[first]]
    every.spurious[threads] = fails[warp[threads]]
    return fails[warp]


@instruction("mbarrier.pending_count.b64")
def pending_count(build: Build) -> Execute:
    write, state = build.write(0), build.read(1, "u64")

    def execute(block: Block, mask: Mask) -> None:
        states = state(block)
        if ((states & np.uint64(_PENDING_KNOWN)) == 0)[block.active(mask)].any():
            raise PtxError("barrier", "pending_count of a state that is not of .noComplete")
        write(block, (states & np.uint64(_LIMIT)).astype(np.uint32), mask)

    return execute
