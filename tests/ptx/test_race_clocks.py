"""The race detectors against the definition: random histories, kept and compared in full."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.clocks import Ordering
from tests.ptx.emulator.global_races import GlobalRaces
from tests.ptx.emulator.memory import GlobalMemory, SharedMemory
from tests.ptx.emulator.program import Entry
from tests.ptx.emulator.shared_races import SharedRaces

WORDS, ACTORS = 8, 3
BOTH = Ordering(strong=True, acquire=True, release=True, blocks=True)


class History:
    """Every access to every word, with the times that each actor knows of the others."""

    def __init__(self) -> None:
        self.known = np.zeros((ACTORS, ACTORS), np.int64)
        self.time = np.ones(ACTORS, np.int64)
        self.accesses: list[list[tuple[int, int, str]]] = [[] for _ in range(WORDS)]
        self.left: dict[int, np.ndarray] = {}

    def races(self, word: int, actor: int, what: str) -> bool:
        """Add an access, "read", "write" or "atomic"; return whether it races with another."""
        conflicts = {
            "read": {"write", "atomic"},
            "write": {"read", "write", "atomic"},
            "atomic": {"read", "write"},
        }[what]
        race = any(
            other != actor and time > self.known[actor, other] and kind in conflicts
            for other, time, kind in self.accesses[word]
        )
        self.accesses[word].append((actor, int(self.time[actor]), what))
        return race

    def release(self, place: int, actor: int) -> None:
        clock = self.known[actor].copy()
        clock[actor] = self.time[actor]
        self.left[place] = np.maximum(self.left.get(place, 0), clock)
        self.time[actor] += 1

    def acquire(self, place: int, actor: int) -> None:
        self.known[actor] = np.maximum(self.known[actor], self.left.get(place, 0))

    def meet(self, actors: np.ndarray) -> None:
        for actor in actors:
            self.release(-1, actor)
        for actor in actors:
            self.acquire(-1, actor)
        del self.left[-1]


def some(random: np.random.Generator, size: int) -> np.ndarray:
    """Aligned offsets of accesses of a size, as bytes."""
    count = WORDS * 4 // size
    return random.permutation(count)[: random.integers(1, count + 1)] * size


def agree(raised: bool, expected: bool) -> bool:
    """Whether the history ends here, at its first race."""
    assert raised == expected
    return expected


def attempt(call, *arguments, **options) -> bool:
    try:
        call(*arguments, **options)
    except PtxError as error:
        assert error.kind == "race"
        return True
    return False


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "atomics"])
def test_shared_memory(plain):
    found = 0
    for seed in range(300):
        random, history = np.random.default_rng(seed), History()
        block = SimpleNamespace(warps=ACTORS, shared=SharedMemory(4 * WORDS), steps=0)
        races = SharedRaces(block)
        for _ in range(40):
            kind = random.choice(["read", "write", "atomic", "meet"], p=[0.3, 0.2, 0.05, 0.45])
            if kind == "meet":
                actors = np.arange(ACTORS) if random.random() < 0.8 else np.array([0, 2])
                history.meet(actors)
                races.clocks.join(actors)
                continue
            if kind == "atomic" and plain:
                continue
            size = 4 if kind == "atomic" else int(random.choice([4, 8, 16]))
            offsets = some(random, size)
            # Each access has a warp of its own; words of one instruction never overlap.
            warps = random.integers(0, ACTORS, len(offsets))
            expected = [
                history.races(word, int(warp), str(kind))
                for offset, warp in zip(offsets, warps, strict=True)
                for word in range(offset // 4, (offset + size) // 4)
            ]
            if kind == "atomic":
                order = Ordering(strong=True)
                raised = attempt(races.atomic, offsets, size, warps, order, reads=True)
            else:
                call = races.read if kind == "read" else races.write
                raised = attempt(call, offsets, size, warps)
            if agree(raised, any(expected)):
                found += 1
                break
    assert 30 < found < 300  # both outcomes are there


def test_global_memory():
    found = 0
    for seed in range(300):
        random, history = np.random.default_rng(seed), History()
        memory = GlobalMemory()
        memory.allocate(4 * WORDS, "x", written=True)
        entry = Entry("kernel", (), None)
        launch = SimpleNamespace(grid=(ACTORS, 1, 1), entry=entry, memory=memory)
        races = GlobalRaces(launch)
        flags = np.arange(2) * 4
        base = 4096
        for _ in range(40):
            actor = int(random.integers(ACTORS))
            block = SimpleNamespace(index=(actor, 0, 0))
            kind = str(random.choice(["read", "write", "flag"], p=[0.2, 0.1, 0.7]))
            if kind == "flag":
                flag = flags[random.integers(2)]
                races.atomic(block, np.array([base + flag]), 4, BOTH, reads=True)
                assert not history.races(int(flag) // 4, actor, "atomic")
                history.acquire(int(flag), actor)
                history.release(int(flag), actor)
                continue
            size = int(random.choice([4, 8]))
            offsets = some(random, size)[:2]
            offsets = offsets[offsets >= 8]  # after the flags
            expected = [
                history.races(word, actor, kind)
                for offset in offsets
                for word in range(offset // 4, (offset + size) // 4)
            ]
            call = races.read if kind == "read" else races.write
            if agree(attempt(call, block, base + offsets, size), any(expected)):
                found += 1
                break
    assert 30 < found < 300
