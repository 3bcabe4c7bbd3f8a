"""Who has last read and written each word of a block's shared memory, and when."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.clocks import GRANULE, Clocks

_ALL = (1 << GRANULE) - 1  # the bytes of a granule, as bits


def bytes_of(offsets: np.ndarray, size: int) -> int | np.ndarray:
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
