"""The memories: global with its allocations, shared, parameters. Every access is checked here.

Each byte of global and shared memory has a state. Reading one that was never written, or one that
an asynchronous copy is about to write, is an error, as is leaving an allocation.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.build import GLOBAL_BASE
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.types import UNSIGNED

OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT, BARRIER = range(5)
_GAP = 512  # bytes after each allocation
_SHIFT = {1 << k: k for k in range(5)}
_WRITTEN = {
    size: UNSIGNED[size](WRITTEN * (0x0101010101010101 & ((1 << 8 * size) - 1)))
    for size in (1, 2, 4, 8)
}
_WHY = {
    UNWRITTEN: ("uninitialised", "which nothing has written"),
    IN_FLIGHT: ("in flight", "which an asynchronous copy is writing: a wait is missing"),
    BARRIER: ("barrier", "which belongs to an mbarrier"),
}


def _rows(memory: np.ndarray, size: int, count: int) -> np.ndarray:
    """Bytes as words (n, count); what is left over at the end is left out."""
    total = size * count
    return memory[: len(memory) // total * total].view(UNSIGNED[size]).reshape(-1, count)


class Memory:
    """Bytes with their states. `name` says in errors what it is."""

    def __init__(self, name: str, bytes: int, state: int) -> None:
        # Filled with ones, which are NaN in every floating type.
        self.name, self.data = name, np.full(bytes, 0xFF, np.uint8)
        self.state = np.full(bytes, state, np.uint8)

    def describe(self, offset: int) -> str:
        return f"{self.name}+{offset} (size {len(self.data)})"

    def check(self, offsets: np.ndarray, size: int, what: str, *, reads: bool) -> None:
        """Refuse accesses of `size` bytes that are misaligned, outside, or of no defined value.

        `size` is a power of two up to 16; a longer copy is checked in pieces by its caller.
        """
        if not offsets.size or self._is_plain(offsets, size):
            return
        misaligned = offsets % size != 0
        if misaligned.any():
            first = int(offsets[misaligned][0])
            raise PtxError("alignment", f"{what} of {size} bytes at {self.describe(first)}")
        outside = (offsets < 0) | (offsets + size > len(self.data))
        if outside.any():
            first = int(offsets[outside][0])
            raise PtxError("bounds", f"{what} of {size} bytes at {self.describe(first)}")
        states = self.state_of(offsets, size)
        outside = states == OUTSIDE
        if outside.any():
            first = int(offsets[outside.any(axis=1)][0])
            raise PtxError("bounds", f"{what} of {size} bytes at {self.describe(first)}")
        for state in (IN_FLIGHT, BARRIER, UNWRITTEN) if reads else (IN_FLIGHT, BARRIER):
            found = states == state
            if found.any():
                first = int(offsets[found.any(axis=1)][0])
                kind, why = _WHY[state]
                raise PtxError(kind, f"{what} of {size} bytes at {self.describe(first)}, {why}")

    def _is_plain(self, offsets: np.ndarray, size: int) -> bool:
        """Whether nothing is wrong with any access of written memory, as is nearly always so."""
        bits = int(np.bitwise_or.reduce(offsets, axis=None))
        if bits < 0 or bits & (size - 1) or int(offsets.max()) + size > len(self.data):
            return False
        word = min(size, 8)
        found = _rows(self.state, word, size // word).take(offsets >> _SHIFT[size], axis=0)
        return bool((found == _WRITTEN[word]).all())

    def state_of(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """The states (n, k) of aligned accesses, one per word where that is enough."""
        word = min(size, 8)
        words = self.state[: len(self.state) // word * word].view(UNSIGNED[word])
        ones = np.uint64(0x0101010101010101 & ((1 << 8 * word) - 1)).astype(UNSIGNED[word])
        if size == 16:
            found = words[(offsets // 8)[:, None] + np.arange(2)]
        else:
            found = words[offsets // word][:, None]
        if ((found == WRITTEN * ones) | (found == UNWRITTEN * ones)).all():
            return (found & 0xFF).astype(np.uint8)
        return self.state[offsets[:, None] + np.arange(size)]

    def load(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Words of `size` (up to 8) bytes at aligned offsets."""
        words = self.data[: len(self.data) // size * size].view(UNSIGNED[size])
        return words[offsets // size]

    def store(self, offsets: np.ndarray, size: int, values: np.ndarray) -> None:
        words = self.data[: len(self.data) // size * size].view(UNSIGNED[size])
        words[offsets // size] = values
        self.mark(offsets, size, WRITTEN)

    def mark(self, offsets: np.ndarray, size: int, state: int) -> None:
        """Give words of `size` (up to 8) bytes a state."""
        states = self.state[: len(self.state) // size * size].view(UNSIGNED[size])
        ones = 0x0101010101010101 & ((1 << 8 * size) - 1)
        states[offsets // size] = UNSIGNED[size](state * ones)

    def load_rows(self, offsets: np.ndarray, size: int, count: int) -> np.ndarray:
        """The words (n, count) of aligned vectors."""
        index = offsets >> _SHIFT[size * count]
        return _rows(self.data, size, count).take(index, axis=0)

    def store_rows(self, offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Store vectors (n, count) and return where (n,) something else is there now."""
        size, count = values.dtype.itemsize, values.shape[1]
        total = size * count
        index = offsets >> _SHIFT[total]
        words = _rows(self.data, size, count)
        words[index] = values
        word = min(total, 8)
        _rows(self.state, word, total // word)[index] = _WRITTEN[word]
        return (words.take(index, axis=0) != values).any(axis=1)


class SharedMemory(Memory):
    def __init__(self, bytes: int) -> None:
        super().__init__("shared", -(-max(bytes, 16) // 16) * 16, UNWRITTEN)


class LocalMemory(Memory):
    """The local variables of every thread, one region after the other."""

    def __init__(self, threads: int, bytes: int) -> None:
        self._bytes, self._stride = bytes, -(-bytes // 16) * 16 + 16
        super().__init__("local", threads * self._stride, OUTSIDE)
        self.state.reshape(threads, -1)[:, :bytes] = UNWRITTEN

    def offsets(self, addresses: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Where addresses (n,) of local memory lie for these threads (n,)."""
        outside = (addresses < 0) | (addresses >= self._stride)
        if outside.any():
            first = int(addresses[outside][0])
            raise PtxError("bounds", f"local+{first} (size {self._bytes})")
        return addresses + threads * self._stride

    def describe(self, offset: int) -> str:
        thread, start = divmod(offset, self._stride)
        return f"local+{start} (size {self._bytes}) of thread {thread}"


class GlobalMemory(Memory):
    """One arena; allocations have addresses of their own and a gap after each."""

    def __init__(self) -> None:
        super().__init__("global", 1 << 16, OUTSIDE)
        self._end = 4096
        self._allocations: list[tuple[int, int, str]] = []

    def allocate(self, bytes: int, name: str, *, written: bool, align: int = 256) -> int:
        """Reserve memory and return its address."""
        offset = -(-self._end // align) * align
        self._end = offset + bytes + _GAP
        if self._end > len(self.data):
            more = max(self._end - len(self.data), len(self.data))
            more = -(-more // 4096) * 4096
            self.data = np.concatenate([self.data, np.full(more, 0xFF, np.uint8)])
            self.state = np.concatenate([self.state, np.full(more, OUTSIDE, np.uint8)])
        self.state[offset : offset + bytes] = WRITTEN if written else UNWRITTEN
        self._allocations.append((offset, bytes, name))
        return GLOBAL_BASE + offset

    def describe(self, offset: int) -> str:
        before = [a for a in self._allocations if a[0] <= offset]
        if not before:
            return f"global address {GLOBAL_BASE + offset:#x}, which belongs to nothing"
        start, bytes, name = before[-1]
        return f"{name}+{offset - start} (size {bytes})"
