"""Operands of wgmma in shared memory: matrix descriptors, and where they put each element.

A descriptor has, in units of 16 bytes, a start address (bits 0-13), the leading (16-29) and the
stride (32-45) byte offset, then a base offset (49-51) and the swizzle mode (62-63). An operand
is a matrix of `rows` (M or N) by `depth` (K).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tests.ptx.emulator.block import Block
from tests.ptx.emulator.clocks import GRANULE
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.instructions.matrix_types import BYTES, decode
from tests.ptx.emulator.memory import WRITTEN, SharedMemory
from tests.ptx.emulator.types import UNSIGNED

CHUNK = 16  # bytes that every layout keeps together
PATTERN = 1024  # bytes after which every swizzle repeats
_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
_ALL_WRITTEN = np.uint64(WRITTEN * 0x0101010101010101)
_RESERVED = ~((0x3FFF) | (0x3FFF << 16) | (0x3FFF << 32) | (7 << 49) | (3 << 62))


@dataclass(frozen=True)
class Operand:
    """What an instruction says about an operand. `mn_major`: neighbours in M or N are adjacent."""

    rows: int
    depth: int
    type: str
    mn_major: bool = False


@dataclass(frozen=True)
class Layout:
    """What a descriptor says, without the start address."""

    leading: int
    stride: int
    swizzle_bytes: int


@dataclass(frozen=True)
class Places:
    """Offsets from the start, rounded down to PATTERN: in elements, bytes, granules of races."""

    elements: np.ndarray  # (rows, depth)
    chunks: np.ndarray  # (n,)
    granules: np.ndarray  # (4 n,)

    def check(self, memory: SharedMemory, base: int) -> None:
        """Refuse elements that are outside, or of no defined value."""
        words = (self.granules[::2] + base // GRANULE) // 2
        if base + self.chunks[-1] + CHUNK <= len(memory.data) and (
            (memory.state.view(np.uint64)[words] == _ALL_WRITTEN).all()
        ):
            return
        memory.check(self.chunks + base, CHUNK, "wgmma", reads=True)


def parse_descriptor(bits: int) -> tuple[int, Layout]:
    """The start address and the layout."""
    if bits & _RESERVED:
        raise PtxError("unsupported", f"reserved bits are set in the descriptor {bits:#x}")
    if bits >> 49 & 7:
        raise PtxError("unsupported", f"a base offset in the descriptor {bits:#x}")
    start, leading, stride = ((bits >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))
    layout = Layout(leading, stride, _SWIZZLE_BYTES[bits >> 62])
    if start >> 7 & _swizzle_mask(layout.swizzle_bytes):
        raise PtxError(
            "alignment",
            f"the matrix at shared+{start} begins within the pattern of the"
            f" {layout.swizzle_bytes}-byte swizzle, without a base offset",
        )
    return start, layout


def _swizzle_mask(swizzle_bytes: int) -> int:
    return swizzle_bytes // CHUNK - 1


def swizzled(addresses: np.ndarray, swizzle_bytes: int) -> np.ndarray:
    """Permute the chunks, bits 4 to 6, by the number of the 128-byte line, bits 7 to 9."""
    return addresses ^ ((addresses >> 7 & _swizzle_mask(swizzle_bytes)) << 4)


def byte_offsets(operand: Operand, layout: Layout) -> np.ndarray:
    """Offsets (rows, depth) of the elements from the start, before the swizzle.

    The unit is a core matrix, 8 rows of 16 bytes, or with a swizzle 8 rows of its width. Rows run
    along K if K-major and along M or N if not.
    """
    size = BYTES[operand.type]
    row, k = np.indices((operand.rows, operand.depth))
    width = layout.swizzle_bytes
    if not operand.mn_major:
        inside = row // 8 * layout.stride + row % 8 * width
        if width == CHUNK:
            return inside + k * size // CHUNK * layout.leading + k * size % CHUNK
        return inside + k * size
    along, across = row * size // width, k // 8
    inside = row * size % width + k % 8 * width
    if width == CHUNK:
        return inside + along * layout.stride + across * layout.leading
    return inside + along * layout.leading + across * layout.stride


@cache
def _places(operand: Operand, layout: Layout, phase: int) -> Places:
    offsets = swizzled(phase + byte_offsets(operand, layout), layout.swizzle_bytes)
    chunks = np.unique(offsets // CHUNK) * CHUNK
    granules = (chunks[:, None] + np.arange(0, CHUNK, GRANULE)).ravel() // GRANULE
    return Places(offsets // BYTES[operand.type], chunks, granules)


def load(block: Block, operand: Operand, bits: int, warps: slice) -> tuple[np.ndarray, np.ndarray]:
    """The operand (rows, depth) that a descriptor means, as float32, and the granules it has.

    `warps` are those of the warpgroup that reads it.
    """
    start, layout = parse_descriptor(bits)
    phase = start % PATTERN
    places, base = _places(operand, layout, phase), start - phase
    places.check(block.shared, base)
    granules = places.granules + base // GRANULE
    if block.races:
        block.races.read_matrix(granules, warps)
    size = BYTES[operand.type]
    elements = block.shared.data.view(UNSIGNED[size])[places.elements + base // size]
    return decode(elements, operand.type), granules
