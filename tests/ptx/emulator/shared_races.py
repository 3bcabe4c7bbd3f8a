"""Races in shared memory, by happens-before (clocks.py).

A granule is four bytes, of which a smaller write is known to be one. What the threads of one warp
do to one another is not looked at: a missing __syncwarp is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.emulator.accesses import Accesses, bytes_of, granules_of
from tests.ptx.emulator.clocks import GRANULE, WEAK, Clocks, Flags, Ordering
from tests.ptx.emulator.errors import PtxError

if TYPE_CHECKING:
    from tests.ptx.emulator.block import Block

LOADS = 16  # barriers whose loads are told apart


def _by_actor(offsets: np.ndarray, actors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    actors = np.broadcast_to(actors, offsets.shape)
    for actor in np.unique(actors).tolist():
        yield actor, offsets[actors == actor]


class SharedRaces:
    """The watch over one block's shared memory.

    Its actors are the warps, the stores of TMA, and its loads by their barriers: who has waited for
    one load knows nothing of another barrier's, nor of a store that was issued earlier.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.stores = block.warps
        self._loads: dict[int, int] = {}  # actors by barrier; more than LOADS share some
        self.clocks = Clocks(block.warps + 1 + LOADS)
        self.flags = Flags(self.clocks)
        self._accesses = Accesses(self.clocks, block.warps, len(block.shared.data), block.warps + 1)
        granules = len(self._accesses.writer)
        # The step of the last write; negative if the asynchronous proxy wrote, or cp.async, after
        # which no fence.proxy.async is asked for.
        self._stored_at = np.zeros(granules, np.int64)
        self._fenced_at = np.zeros(len(self.clocks.now), np.int64)

    def read(
        self,
        offsets: np.ndarray,
        size: int,
        actors: np.ndarray,
        *,
        asynchronous: bool = False,
        order: Ordering = WEAK,
    ) -> None:
        """Accesses of `size` bytes by actors (n,) or one; `asynchronous`: by TMA or wgmma."""
        settled = self._settled(offsets, size, actors, order, writes=False)
        if settled and not asynchronous:
            return
        granules, each = granules_of(offsets, size, actors)
        if not settled:
            races = self._accesses.read(
                granules, each, strong=order.strong or order.guess, bytes=bytes_of(offsets, size)
            )
            if races.any():
                self._report("read", granules, each, races)
        if order.strong:
            for warp, places in _by_actor(offsets, actors):
                self.flags.read(warp, places, order.acquire)
        if asynchronous:
            self._require_proxy_fence(granules)

    def read_matrix(self, granules: np.ndarray, warps: slice) -> None:
        """wgmma reads granules for each warp of a warpgroup, through the asynchronous proxy."""
        accesses, now = self._accesses, self.clocks.now
        writer = accesses.writer[granules]
        # What the least informed warp knows is what all know; a writer knows its own writes.
        known = now[warps].min(axis=0)
        races = (writer >= 0) & (accesses.written_at[granules] > known[writer])
        if races.any():
            first = int(writer[races][0])
            actor = warps.start + int(now[warps, first].argmin())
            self._report("read", granules, np.full(len(granules), actor), races)
        self._record_reads(granules, warps)
        self._require_proxy_fence(granules)

    def _record_reads(self, granules: np.ndarray, warps: slice) -> None:
        times = self.clocks.now[warps, warps].diagonal()
        self._accesses.read_at[warps, granules] = times[:, None]

    def end_matrix(self, granules: np.ndarray, warps: slice, since: int) -> None:
        """The wait for a wgmma that was issued at step `since`: its reads last until here."""
        changed = np.abs(self._stored_at[granules]) >= since
        if changed.any():
            at = int(granules[changed][0]) * GRANULE
            raise PtxError("race", f"shared+{at} is overwritten before the wait for a wgmma")
        self._record_reads(granules, warps)

    def _require_proxy_fence(self, granules: np.ndarray) -> None:
        writer = self._accesses.writer[granules]
        unfenced = (writer >= 0) & (self._stored_at[granules] > self._fenced_at[writer])
        if unfenced.any():
            at = int(granules[unfenced][0]) * GRANULE
            raise PtxError(
                "proxy",
                f"shared+{at}, written by ordinary stores of warp"
                f" {int(writer[unfenced][0])}, is read by TMA or wgmma without"
                " fence.proxy.async in that warp",
            )

    def write(
        self,
        offsets: np.ndarray,
        size: int,
        actors: np.ndarray,
        *,
        ordinary: bool = True,
        order: Ordering = WEAK,
    ) -> None:
        """`ordinary`: by st or atom, which TMA and wgmma see only after fence.proxy.async."""
        if self._settled(offsets, size, actors, order, writes=True):
            count = max(size // GRANULE, 1)
            rows = self._stored_at.reshape(-1, count)
            steps = self.block.steps
            rows[offsets // (GRANULE * count)] = steps if ordinary else -steps
            return
        granules, each = granules_of(offsets, size, actors)
        races = self._accesses.write(
            granules, each, strong=order.strong, bytes=bytes_of(offsets, size)
        )
        if races.any():
            self._report("write", granules, each, races)
        if order.strong:
            for warp, places in _by_actor(offsets, actors):
                self.flags.write(warp, places, order.release, keeps=False)
            return
        self._stored_at[granules] = self.block.steps if ordinary else -self.block.steps

    def copy(self, offsets: np.ndarray, size: int, warp: int, barrier: int | None) -> np.ndarray:
        """A bulk copy that a warp issues: a load that a barrier counts, or a store if none does.

        It is ordered after what the warp knew at that time only, other copies included. Return its
        clock, which is for those that wait for the copy.
        """
        clocks, accesses = self.clocks, self._accesses
        actor = self.stores
        if barrier is not None:
            actor += 1 + self._loads.setdefault(barrier, len(self._loads)) % LOADS
        granules, actors = granules_of(offsets, size, np.int64(actor))
        known = clocks.now[warp, actor]
        races = (accesses.writer[granules] == actor) & (accesses.written_at[granules] > known)
        if races.any():
            self._report("write", granules, actors, races)
        time = clocks.now[actor, actor] + 1
        clocks.now[actor] = clocks.now[warp]
        clocks.now[actor, actor] = time
        if barrier is None:
            self.read(offsets, size, np.int64(actor), asynchronous=True)
        else:
            self.write(offsets, size, np.int64(actor), ordinary=False)
        clocks.tick(np.array([warp]))
        return clocks.now[actor].copy()

    def _settled(
        self, offsets: np.ndarray, size: int, actors: np.ndarray, order: Ordering, *, writes: bool
    ) -> bool:
        if not offsets.size:
            return True
        self._accesses.has_proxy |= int(np.max(actors)) >= self.block.warps
        if order.strong or order.guess or np.shape(actors) != offsets.shape:
            return False
        return self._accesses.settled(offsets, size, actors, writes=writes)

    def atomic(
        self, offsets: np.ndarray, size: int, warps: np.ndarray, order: Ordering, *, reads: bool
    ) -> None:
        """`reads`: atom, which gives the old value; red does not."""
        granules, each = granules_of(offsets, size, warps)
        races = self._accesses.write(granules, each, strong=True)
        if races.any():
            self._report("atomic", granules, each, races)
        for warp, places in _by_actor(offsets, warps):
            if reads:
                self.flags.read(warp, places, order.acquire)
            self.flags.write(warp, places, order.release, keeps=True)

    def fence(self, warps: np.ndarray) -> None:
        """A thread fence."""
        for warp in warps.tolist():
            self.flags.fence(warp)

    def fence_proxy(self, warps: np.ndarray) -> None:
        self._fenced_at[warps] = self.block.steps

    def _report(
        self, what: str, granules: np.ndarray, actors: np.ndarray, races: np.ndarray
    ) -> None:
        first = int(np.nonzero(races)[0][0])
        granule, actor = int(granules[first]), int(actors[first])
        writer = int(self._accesses.writer[granule])
        raise PtxError(
            "race",
            f"{what} of shared+{granule * GRANULE} by {self._name(actor)} is not ordered with"
            f" another access (last written by {self._name(writer)})",
        )

    def _name(self, actor: int) -> str:
        return "nobody" if actor < 0 else "TMA" if actor >= self.stores else f"warp {actor}"
