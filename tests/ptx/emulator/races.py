"""Races, by happens-before (Lamport's vector clocks), in shared memory and between blocks.

In shared memory an actor is a warp, the loads of TMA that one mbarrier counts, or its stores; a
granule is four bytes, of which a smaller write is known to be one. An access is a race unless the
last conflicting one by another actor happened before it: through a barrier, an mbarrier, a flag
with its fences, or a wait for the copy that made it. What the threads of one warp do to one another
is not looked at: a missing __syncwarp is not found.

In global memory (global_races.py) an actor is a block. What orders blocks are atomics, with a fence
before (release) and after (acquire), as PTX's memory model has it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tests.ptx.emulator.errors import PtxError

if TYPE_CHECKING:
    from tests.ptx.emulator.block import Block

GRANULE = 4
_ALL = (1 << GRANULE) - 1  # the bytes of a granule, as bits
LOADS = 16  # barriers whose loads are told apart


class SomeClocks(Protocol):
    """Clocks of warps or of blocks."""

    def snapshot(self, actor: int) -> np.ndarray: ...

    def learn(self, actor: int, clock: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Ordering:
    """What an access says about order.

    `strong`: volatile, relaxed or more, which does not race with its like. `blocks`: its scope
    holds between blocks. `guess`: a weak read of which guesses.py says that it races with plain
    writes only.
    """

    strong: bool = False
    acquire: bool = False
    release: bool = False
    blocks: bool = False
    guess: bool = False


WEAK, GUESS = Ordering(), Ordering(guess=True)


class Clocks:
    """A vector clock per actor, and those that were left at places where actors meet."""

    def __init__(self, actors: int) -> None:
        self.now = np.zeros((actors, actors), np.int64)
        np.fill_diagonal(self.now, 1)
        self._left: dict[Hashable, np.ndarray] = {}

    def tick(self, actors: np.ndarray) -> None:
        self.now[actors, actors] += 1

    def join(self, actors: np.ndarray) -> None:
        """All of them have met: what each did before, happened before what any does next."""
        self.now[actors] = self.now[actors].max(axis=0)
        self.tick(actors)

    def release(self, place: Hashable, actors: np.ndarray) -> None:
        """What they did happened before whatever acquires at this place later."""
        self.leave(place, self.now[actors].max(axis=0))
        self.tick(actors)

    def leave(self, place: Hashable, clock: np.ndarray) -> None:
        """The same for what happened before a clock."""
        before = self._left.get(place)
        self._left[place] = clock.copy() if before is None else np.maximum(before, clock)

    def pass_on(self, place: Hashable, other: Hashable) -> None:
        """Whatever acquires at the other place acquires what is left at this one too."""
        if place in self._left:
            self.leave(other, self._left[place])

    def acquire(self, place: Hashable, actors: np.ndarray) -> None:
        left = self._left.get(place)
        if left is not None:
            self.now[actors] = np.maximum(self.now[actors], left)

    def snapshot(self, actor: int) -> np.ndarray:
        """What has happened before now for an actor; what it does next comes later."""
        clock = self.now[actor].copy()
        self.now[actor, actor] += 1
        return clock

    def learn(self, actor: int, clock: np.ndarray) -> None:
        """What a snapshot knew happened before what the actor does next."""
        np.maximum(self.now[actor], clock, out=self.now[actor])

    def forget(self, place: Hashable) -> None:
        self._left.pop(place, None)


class Flags:
    """What releases leave at words of memory, for the acquires that read them.

    A release is a fence before a strong write, or a write with .release; an acquire a fence after
    a strong read, or a read with .acquire. `clocks` gives an actor's clock and starts its next
    time (snapshot), and takes what an actor learns.
    """

    def __init__(self, clocks: SomeClocks) -> None:
        self.clocks = clocks
        self._left: dict[int, np.ndarray] = {}  # by word
        self._fenced: dict[int, np.ndarray] = {}  # an actor's clock at its last fence
        self._found: dict[int, np.ndarray] = {}  # what it has read, which a fence will acquire

    def fence(self, actor: int) -> None:
        found = self._found.pop(actor, None)
        if found is not None:
            self.clocks.learn(actor, found)
        self._fenced[actor] = self.clocks.snapshot(actor)

    def read(self, actor: int, offsets: np.ndarray, acquire: bool) -> None:
        if not self._left:
            return
        left = [self._left.get(word) for word in _words(offsets)]
        found = list({id(clock): clock for clock in left if clock is not None}.values())
        if not found:
            return
        if acquire:
            self.clocks.learn(actor, np.maximum.reduce(found))
        else:
            earlier = self._found.get(actor)
            found += [] if earlier is None else [earlier]
            self._found[actor] = np.maximum.reduce(found)

    def write(self, actor: int, offsets: np.ndarray, release: bool, *, keeps: bool) -> None:
        """`keeps`: an atomic, which carries on what earlier writes have left."""
        clock = self.clocks.snapshot(actor) if release else self._fenced.get(actor)
        if clock is None and not self._left:
            return
        merged: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for word in _words(offsets):
            left = self._left.get(word) if keeps else None
            if left is None and clock is None:
                self._left.pop(word, None)
            elif left is None or clock is None:
                self._left[word] = clock if left is None else left
            else:
                # Words that share a clock go on doing so; holding the old one keeps its id.
                if id(left) not in merged:
                    merged[id(left)] = (left, np.maximum(left, clock))
                self._left[word] = merged[id(left)][1]


def _words(offsets: np.ndarray) -> list[int]:
    return np.unique(offsets // GRANULE).tolist()


def _bytes_of(offsets: np.ndarray, size: int) -> int | np.ndarray:
    return _ALL if size >= GRANULE else ((1 << size) - 1) << offsets % GRANULE


class Accesses:
    """The last plain write, and each actor's last reads, of every granule of a memory.

    Strong writes (atomics among them) do not race with one another, so that each actor's last one
    counts; strong reads race with plain writes only, and only the later of both notices.
    """

    def __init__(self, clocks: Clocks, warps: int, bytes: int, readers: int) -> None:
        self.clocks, self.warps = clocks, warps
        granules = bytes // GRANULE
        self.writer = np.full(granules, -1, np.int32)
        self.written_at = np.zeros(granules, np.int64)
        self.read_at = np.zeros((readers, granules), np.int64)  # the first actors only
        self.strong_at: np.ndarray | None = None  # like read_at, once there is a strong write
        self.has_proxy = False  # whether an actor that is no warp has made an access
        # The bytes (bits 0 to 3) of the last plain writes, once there is one of fewer than four.
        self.bytes: np.ndarray | None = None

    def settled(self, offsets: np.ndarray, size: int, actors: np.ndarray, *, writes: bool) -> bool:
        """Record plain accesses by warps if none can be a race, and return whether that is so.

        The fast way for the usual case: all that has been done to these words lies before the last
        barrier of the whole block. Any other case is for read and write.
        """
        if size > 16 or (writes and size < GRANULE) or self.strong_at is not None or self.has_proxy:
            return False
        known = self.clocks.now[: self.warps, : self.warps].min()
        count = max(size // GRANULE, 1)
        index = offsets // (GRANULE * count)
        written_at = self.written_at.reshape(-1, count)
        read_at = self.read_at.reshape(len(self.read_at), -1, count)
        if written_at.take(index, axis=0).max() > known:
            return False
        if writes and read_at.take(index, axis=1).max() > known:
            return False
        times = self.clocks.now.diagonal()[actors][:, None]
        if writes:
            self.writer.reshape(-1, count)[index] = actors[:, None]
            if self.bytes is not None:
                self.bytes.reshape(-1, count)[index] = _ALL
            written_at[index] = times
        else:
            read_at[actors, index] = times
        return True

    def read(
        self,
        granules: np.ndarray,
        actors: np.ndarray,
        *,
        strong: bool = False,
        bytes: int | np.ndarray = _ALL,
    ) -> np.ndarray:
        """Record reads; return where (n,) they race with a write."""
        now = self.clocks.now
        races = self._after_a_write(granules, actors, bytes)
        if strong:
            return races
        if self.strong_at is not None:
            races |= self._after_any(self.strong_at, granules, actors)
        self.read_at[actors, granules] = now[actors, actors]
        return races

    def write(
        self,
        granules: np.ndarray,
        actors: np.ndarray,
        *,
        strong: bool = False,
        bytes: int | np.ndarray = _ALL,
    ) -> np.ndarray:
        """Record writes; return where (n,) they race with a write or a read."""
        now = self.clocks.now
        races = self._after_a_write(granules, actors, bytes)
        races |= self._after_any(self.read_at, granules, actors)
        if strong:
            if self.strong_at is None:
                self.strong_at = np.zeros_like(self.read_at)
            self.strong_at[actors, granules] = now[actors, actors]
            return races
        if self.strong_at is not None:
            races |= self._after_any(self.strong_at, granules, actors)
        self._note_bytes(granules, actors, bytes)
        self.writer[granules] = actors
        self.written_at[granules] = now[actors, actors]
        return races

    def _after_a_write(
        self, granules: np.ndarray, actors: np.ndarray, bytes: int | np.ndarray
    ) -> np.ndarray:
        writer = self.writer[granules]
        known = self.clocks.now[actors, writer]
        races = (writer >= 0) & (writer != actors) & (self.written_at[granules] > known)
        return races if self.bytes is None else races & (self.bytes[granules] & bytes != 0)

    def _note_bytes(
        self, granules: np.ndarray, actors: np.ndarray, bytes: int | np.ndarray
    ) -> None:
        if self.bytes is None:
            if np.ndim(bytes) == 0:
                return
            self.bytes = np.full(len(self.writer), _ALL, np.uint8)
        # Writes of one actor in a row add up; what another one wrote to other bytes is forgotten.
        same = self.writer[granules] == actors
        same &= self.written_at[granules] == self.clocks.now[actors, actors]
        self.bytes[granules] = np.where(same, self.bytes[granules], 0) | bytes

    def _after_any(self, times: np.ndarray, granules: np.ndarray, actors: np.ndarray) -> np.ndarray:
        """Where another actor's time (actors, granules) is not known to have come before."""
        # An actor's own times never lie after its clock.
        known = self.clocks.now[:, : len(times)]
        return (known[actors] < times[:, granules].T).any(axis=1)


def granules_of(offsets: np.ndarray, size: int, actors: np.ndarray) -> tuple[np.ndarray, ...]:
    """The granules (n * k,) that accesses of `size` bytes touch, and their actors."""
    actors = np.broadcast_to(actors, offsets.shape)
    if size <= GRANULE:
        return offsets // GRANULE, actors
    k = size // GRANULE
    return (offsets[:, None] // GRANULE + np.arange(k)).ravel(), actors.repeat(k)


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
                granules, each, strong=order.strong or order.guess, bytes=_bytes_of(offsets, size)
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
            granules, each, strong=order.strong, bytes=_bytes_of(offsets, size)
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
