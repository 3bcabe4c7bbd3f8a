"""Which element of a matrix each register of each thread holds, for mma and wgmma.

From the figures of the PTX ISA, "Matrix Fragments". With g = lane / 4 and t = lane % 4, a register
holds `width` elements, and all types and shapes follow the same three formulas.
The matrices of several warps lie below each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

LANES = 32


@dataclass(frozen=True)
class Fragment:
    """`row` and `column` of the elements (registers, threads, width) that the registers hold."""

    row: np.ndarray
    column: np.ndarray
    _indices: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def places(self, columns: int) -> np.ndarray:
        """Where the elements lie in a flat row-major matrix: takes a matrix apart."""
        if ("places", columns) not in self._indices:
            self._indices["places", columns] = (self.row * columns + self.column).ravel()
        return self._indices["places", columns]

    def order(self, columns: int) -> np.ndarray:
        """The element for each place of a flat matrix: puts it together from flat registers."""
        if ("order", columns) not in self._indices:
            self._indices["order", columns] = np.argsort(self.places(columns))
        return self._indices["order", columns]


def _indices(registers: int, threads: int, width: int) -> tuple[np.ndarray, ...]:
    """Register, group of four lanes, lane in it, warp and element, as arrays of that shape."""
    register, thread, element = np.indices((registers, threads, width))
    lane = thread % LANES
    return register, lane // 4, lane % 4, thread // LANES, element


@cache
def matrix_a(registers: int, width: int, threads: int = LANES) -> Fragment:
    """A (M, K): two row halves in consecutive registers, then the next 4 * width columns."""
    register, g, t, warp, element = _indices(registers, threads, width)
    row = 16 * warp + g + 8 * (register % 2)
    return Fragment(row, 4 * width * (register // 2) + width * t + element)


@cache
def matrix_b(registers: int, width: int, threads: int = LANES) -> Fragment:
    """B (K, 8): a column per group, 4 * width rows per register."""
    register, g, t, warp, element = _indices(registers, threads, width)
    return Fragment(4 * width * (registers * warp + register) + width * t + element, g)


@cache
def accumulator(registers: int, width: int, threads: int = LANES) -> Fragment:
    """C and D (M, N): pairs of columns, then the lower half of the rows, then the next 8 columns.

    `width` 2: two halves in a register, as f16 accumulators have it.
    """
    register, g, t, warp, element = _indices(registers, threads, width)
    number = width * register + element
    row = 16 * warp + g + 8 * (number // 2 % 2)
    return Fragment(row, 8 * (number // 4) + 2 * t + number % 2)
