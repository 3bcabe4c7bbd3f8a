"""Races between the blocks of a launch, in global memory.

An actor is a block: what its threads do to one another through global memory is not looked at, and
a fence of one thread counts for the whole block. A granule is four bytes, or as many as the
smallest access of the kernel has, so that neighbours in a row of odd length do not collide.

Plain accesses of different blocks to one granule, one of them a write, are a race unless a release
and an acquire order them (clocks.Flags). Atomics and other strong accesses, of a scope that holds
between blocks, do not race with one another, but they do with plain ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.emulator.clocks import GRANULE, WEAK, Flags, Ordering
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.program import Entry
from tests.ptx.emulator.types import TYPES, size_of

if TYPE_CHECKING:
    from tests.ptx.emulator.block import Block
    from tests.ptx.emulator.grid import Launch

_SEVERAL = -1


class BlockClocks:
    """Vector clocks of blocks. Nearly all kernels order none, so that few ever exist."""

    def __init__(self, blocks: int) -> None:
        self.time = np.ones(blocks, np.int64)
        self.known: dict[int, np.ndarray] = {}  # by block, the times of the others

    def snapshot(self, block: int) -> np.ndarray:
        known = self.known.get(block)
        clock = np.zeros(len(self.time), np.int64) if known is None else known.copy()
        clock[block] = self.time[block]
        self.time[block] += 1
        return clock

    def learn(self, block: int, clock: np.ndarray) -> None:
        known = self.known.get(block)
        self.known[block] = clock.copy() if known is None else np.maximum(known, clock)


class Touched:
    """Who has accessed each granule in some way, and when each block last did."""

    def __init__(self, granules: int, clocks: BlockClocks) -> None:
        self.clocks = clocks
        # Zeros cost nothing until they are touched. 0: nobody; block b counts as b + 1.
        self.who = np.zeros(granules, np.int32)
        self._times: dict[int, np.ndarray] = {}
        self.empty = True

    def add(self, granules: np.ndarray, block: int) -> None:
        """Also this block."""
        who = self.who[granules]
        alone = (who == 0) | (who == block + 1)
        self.who[granules] = np.where(alone, block + 1, _SEVERAL)
        self._stamp(granules, block)

    def replace(self, granules: np.ndarray, block: int) -> None:
        """Only this block: the others are known to have come before."""
        self.who[granules] = block + 1
        self._stamp(granules, block)

    def clear(self, granules: np.ndarray) -> None:
        if not self.empty:
            self.who[granules] = 0

    def _stamp(self, granules: np.ndarray, block: int) -> None:
        times = self._times.get(block)
        if times is None:
            times = self._times[block] = np.zeros(len(self.who), np.int32)
        times[granules] = self.clocks.time[block]
        self.empty = False

    def unordered(self, granules: np.ndarray, block: int) -> np.ndarray:
        """For each granule, a block plus one that touched it and did not come before, or 0."""
        found = np.zeros(len(granules), np.int32)
        if self.empty:
            return found
        who = self.who[granules]
        others = (who != 0) & (who != block + 1)
        if not others.any():
            return found
        candidates = np.unique(who[others])
        several = candidates[0] == _SEVERAL
        blocks = list(self._times) if several else [int(w) - 1 for w in candidates]
        known = self.clocks.known.get(block)
        for other in blocks:
            if other == block:
                continue
            time = 0 if known is None else known[other]
            late = others & ((who == other + 1) | (who == _SEVERAL))
            found[late & (self._times[other][granules] > time)] = other + 1
        return found


class GlobalRaces:
    """The watch over global memory, between the blocks of one launch."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        x, y, z = launch.grid
        self.clocks = BlockClocks(x * y * z)
        self.flags = Flags(self.clocks)
        self._granule = smallest_access(launch.entry)
        granules = len(launch.memory.data) // self._granule
        self._writes = Touched(granules, self.clocks)
        self._reads = Touched(granules, self.clocks)
        self._strong = Touched(granules, self.clocks)  # atomics and other strong writes

    def read(self, block: Block, offsets: np.ndarray, size: int, order: Ordering = WEAK) -> None:
        """Accesses of `size` bytes by threads of a block."""
        granules, me = self._granules(offsets, size), self._number(block)
        self._refuse("read", block, granules, self._writes.unordered(granules, me))
        if order.guess:
            return
        if order.strong and order.blocks:
            self.flags.read(me, offsets, order.acquire)
            return
        self._refuse("read", block, granules, self._strong.unordered(granules, me))
        self._reads.add(granules, me)

    def write(self, block: Block, offsets: np.ndarray, size: int, order: Ordering = WEAK) -> None:
        strong = order.strong and order.blocks
        granules, me = self._granules(offsets, size), self._number(block)
        self._check_write(block, granules, strong)
        if strong:
            self._strong.add(granules, me)
            self.flags.write(me, offsets, order.release, keeps=False)
        else:
            self._writes.replace(granules, me)
            self._reads.clear(granules)
            self._strong.clear(granules)

    def atomic(
        self, block: Block, offsets: np.ndarray, size: int, order: Ordering, *, reads: bool
    ) -> None:
        """`reads`: atom, which gives the old value; red does not."""
        if not (order.strong and order.blocks):
            self.read(block, offsets, size)
            self.write(block, offsets, size)
            return
        granules, me = self._granules(offsets, size), self._number(block)
        self._check_write(block, granules, True)
        self._strong.add(granules, me)
        if reads:
            self.flags.read(me, offsets, order.acquire)
        self.flags.write(me, offsets, order.release, keeps=True)

    def fence(self, block: Block) -> None:
        """A fence of a scope that holds between blocks."""
        self.flags.fence(self._number(block))

    def _check_write(self, block: Block, granules: np.ndarray, strong: bool) -> None:
        me = self._number(block)
        plain = (self._writes, self._reads)
        for touched in plain if strong else (*plain, self._strong):
            self._refuse("write", block, granules, touched.unordered(granules, me))

    def _number(self, block: Block) -> int:
        x, y, z = block.index
        columns, rows, _ = self.launch.grid
        return x + columns * (y + rows * z)

    def _granules(self, offsets: np.ndarray, size: int) -> np.ndarray:
        if size <= self._granule:
            return offsets // self._granule
        first = offsets[:, None] // self._granule
        return (first + np.arange(size // self._granule)).ravel()

    def _refuse(self, what: str, block: Block, granules: np.ndarray, found: np.ndarray) -> None:
        if not found.any():
            return
        first = int(np.nonzero(found)[0][0])
        columns, rows, _ = self.launch.grid
        other = int(found[first]) - 1
        index = (other % columns, other // columns % rows, other // (columns * rows))
        place = self.launch.memory.describe(int(granules[first]) * self._granule)
        raise PtxError(
            "race",
            f"{what} of {place} by block {block.index} is not ordered with an access by"
            f" block {index}",
        )


def smallest_access(entry: Entry) -> int:
    """Bytes of the smallest access that a kernel makes to global memory, at most GRANULE."""
    smallest = GRANULE
    for instruction in entry.instructions:
        base, *modifiers = instruction.opcode.split(".")
        spaces = {modifier.split("::")[0] for modifier in modifiers}
        if base in ("ld", "ldu", "st", "atom", "red") and not spaces & {"param", "shared", "local"}:
            types = [modifier for modifier in modifiers if modifier in TYPES]
            smallest = min([smallest, *map(size_of, types)])
    return smallest
