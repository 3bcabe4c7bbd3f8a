"""What happened before what (Lamport's vector clocks), for the watches over races.

An access is a race unless the last conflicting one by another actor happened before it: through a
barrier, an mbarrier, a flag with its fences, or a wait for the copy that made it. In shared memory
(shared_races.py) an actor is a warp, the loads of TMA that one mbarrier counts, or its stores; in
global memory (global_races.py) it is a block.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

GRANULE = 4  # bytes that are looked at together


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
