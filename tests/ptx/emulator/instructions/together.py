"""Instructions that whole warps or warpgroups execute: the threads that come first wait."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.block import WARP, WARPGROUP, Block, Execute, Jump, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.errors import PtxError

Body = Callable[[Block, Mask], None]
_NAMES = {WARP: "warp", WARPGROUP: "warpgroup"}


def together(build: Build, size: int, body: Body) -> Execute:
    """Run `body` for units of `size` threads, each once all its threads are there.

    A thread that has ended, or skips the instruction by its guard, never comes: kind "warp".
    """

    def execute(block: Block, mask: Mask) -> Jump | None:
        if block.threads % WARP:
            raise PtxError("warp", f"a block of {block.threads} threads has an incomplete warp")
        if mask is None:
            if block.threads % size:
                raise PtxError("warp", f"{block.threads} threads have an incomplete warpgroup")
            body(block, None)
            return None
        units = _units(mask, size)
        if np.array_equal(units.any(axis=1), units.all(axis=1)):
            body(block, mask)
            return None
        return _meet(build, block, mask, size, body)

    return execute


def _units(mask: np.ndarray, size: int) -> np.ndarray:
    """The mask as (units, size); threads that the last unit lacks are not there."""
    lacking = -len(mask) % size
    if lacking:
        mask = np.concatenate([mask, np.zeros(lacking, bool)])
    return mask.reshape(-1, size)


def _meet(build: Build, block: Block, mask: np.ndarray, size: int, body: Body) -> Jump:
    """Run the complete units and let the others wait, at this instruction."""
    if build.instruction.guard is not None:
        raise PtxError("warp", f"the guard is false for a part of a {_NAMES[size]}")
    own = next(i for i, x in enumerate(build.entry.instructions) if x is build.instruction)
    waiting = block.state.setdefault("together", {})
    here = waiting.setdefault(own, np.zeros(block.threads, bool))
    here |= mask
    units = _units(here, size)
    lost = units.any(axis=1)[:, None] & ~units & ~_units(block.alive, size)
    if lost.any():
        raise PtxError("warp", f"{int(lost.sum())} threads of a {_NAMES[size]} never come")
    complete = here & units.all(axis=1).repeat(size)[: block.threads]
    if complete.any():
        block.running = complete
        body(block, complete)
        here &= ~complete
        block.pc[complete] = own + 1
        block.spun_at[complete] = 0
    late = mask & ~complete
    if late.any():
        block.spin(late)
        return Jump(own, late)
    # A jump ends the turn, after which those that had come before go on with the others.
    return Jump(own + 1, mask)
