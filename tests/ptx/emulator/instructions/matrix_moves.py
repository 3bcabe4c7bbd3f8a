"""ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements, spread over a warp.

Lane 4 * row + column / 2 holds two neighbours of a row, so that the 32 registers of a warp are the
matrix in row-major order.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import WARP, Block, Execute, Mask
from tests.ptx.emulator.build import Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.together import together

_ROW = 16  # bytes of a row
_MOVE = "sync.aligned.m8n8.{count:x1,x2,x4}[.{transposed:trans}].shared[::cta].b16"


def _transposed(words: np.ndarray) -> np.ndarray:
    """Matrices (..., 32) of packed halves with rows and columns exchanged."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape[:-1], 8, 8)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(*words.shape[:-1], 64).view("u4")


def _active_warps(block: Block, mask: Mask) -> np.ndarray:
    """The numbers of the warps that take part, as a whole."""
    return np.arange(block.warps) if mask is None else np.flatnonzero(mask[::WARP])


def _row_addresses(block: Block, address: Read, warps: np.ndarray, count: int) -> np.ndarray:
    """Offsets (warps, count, 8) of the rows, which lanes 8 * matrix + row have."""
    return address(block).reshape(-1, WARP)[warps, : 8 * count].reshape(-1, count, 8)


@instruction(f"ldmatrix.{_MOVE}")
def ldmatrix(build: Build) -> Execute:
    count = int((build.choices["count"] or "")[1:])
    items, address = build.vector(0), build.address(1)
    if len(items) != count:
        raise build.error(f"{len(items)} registers for {count} matrices", "syntax")
    writes = [build.write(item) for item in items]
    transposed = build.has("transposed")

    def body(block: Block, mask: Mask) -> None:
        warps = _active_warps(block, mask)
        rows = _row_addresses(block, address, warps, count)
        offsets = rows.reshape(-1)
        block.shared.check(offsets, _ROW, "ldmatrix", reads=True)
        if block.races:
            block.races.read(offsets, _ROW, warps.repeat(8 * count))
        words = block.shared.load(rows[..., None] + np.arange(0, _ROW, 4), 4)
        words = words.reshape(len(warps), count, WARP)
        if transposed:
            words = _transposed(words)
        if mask is not None:
            whole = np.zeros((block.warps, count, WARP), np.uint32)
            whole[warps] = words
            words = whole
        for matrix, write in enumerate(writes):
            write(block, words[:, matrix].reshape(-1), mask)

    return together(build, WARP, body)


@instruction(f"stmatrix.{_MOVE}")
def stmatrix(build: Build) -> Execute:
    count = int((build.choices["count"] or "")[1:])
    address, items = build.address(0), build.vector(1)
    if len(items) != count:
        raise build.error(f"{len(items)} registers for {count} matrices", "syntax")
    reads = [build.read(item, "b32") for item in items]
    transposed = build.has("transposed")

    def body(block: Block, mask: Mask) -> None:
        warps = _active_warps(block, mask)
        rows = _row_addresses(block, address, warps, count)
        offsets = rows.reshape(-1)
        block.shared.check(offsets, _ROW, "stmatrix", reads=False)
        words = np.stack([read(block).reshape(-1, WARP)[warps] for read in reads], axis=1)
        if transposed:
            words = _transposed(words)
        words = words.reshape(-1, 4)
        _refuse_conflicts(offsets, words)
        if block.races:
            block.races.write(offsets, _ROW, warps.repeat(8 * count))
        places = offsets[:, None] + np.arange(0, _ROW, 4)
        block.shared.store(places.reshape(-1), 4, words.reshape(-1))

    return together(build, WARP, body)


def _refuse_conflicts(offsets: np.ndarray, rows: np.ndarray) -> None:
    """Two rows at one address must be equal, as it is not defined which one stays."""
    order = np.argsort(offsets, kind="stable")
    same = offsets[order[1:]] == offsets[order[:-1]]
    differ = same & (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    if differ.any():
        at = int(offsets[order[1:]][differ][0])
        raise PtxError("race", f"stmatrix writes two different rows to shared+{at}")


@instruction("movmatrix.sync.aligned.m8n8.trans.b16")
def movmatrix(build: Build) -> Execute:
    write, read = build.write(0), build.read(1, "b32")

    def body(block: Block, mask: Mask) -> None:
        write(block, _transposed(read(block).reshape(-1, WARP)).reshape(-1), mask)

    return together(build, WARP, body)
