"""Branches and ends."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Jump, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction, nothing


@instruction("bra[.uni]")
def bra(build: Build) -> Execute:
    target = build.instruction.target
    assert target is not None
    everyone = Jump(target)
    if build.instruction.guard is None:
        return lambda block, mask: everyone
    register, negated = build.instruction.guard
    name = register.name
    uniform = build.instruction.opcode == "bra.uni"

    def execute(block: Block, mask: Mask) -> Jump | None:
        taken = ~block.registers[name] if negated else block.registers[name]
        active = block.threads if mask is None else int(mask.sum())
        if mask is not None:
            taken = taken & mask
        count = int(np.count_nonzero(taken))
        if count == 0:
            return None
        if count == active:
            return everyone
        if uniform and _parts_a_warp(block, mask, taken):
            raise PtxError("warp", "bra.uni is taken by some threads of a warp only")
        return Jump(target, taken)

    return execute


@instruction("brx.idx[.uni]")
def brx(build: Build) -> Execute:
    targets = np.array(build.instruction.targets)
    index = build.read(0, "u32")
    uniform = build.instruction.opcode.endswith(".uni")

    def execute(block: Block, mask: Mask) -> Jump:
        active = block.active(mask)
        indices = index(block)[active]
        if (indices >= len(targets)).any():
            raise PtxError("bounds", f"target {int(indices.max())} of {len(targets)}")
        if uniform and _parts_a_warp(block, mask, active & (index(block) == indices[0])):
            raise PtxError("warp", "brx.idx.uni goes different ways in a warp")
        return Jump(targets[indices], active)

    return execute


def _parts_a_warp(block: Block, mask: Mask, taken: np.ndarray) -> bool:
    taking = np.bincount(block.warp[taken], minlength=block.warps)
    running = np.bincount(block.warp[block.active(mask)], minlength=block.warps)
    return bool(((taking > 0) & (taking < running)).any())


@instruction("ret[.uni]", "exit")
def ret(build: Build) -> Execute:
    return lambda block, mask: block.end(mask)


@instruction("trap", "brkpt")
def trap(build: Build) -> Execute:
    def execute(block: Block, mask: Mask) -> None:
        raise PtxError("trap", f"by {int(block.active(mask).sum())} threads")

    return execute


instruction("nanosleep.u32", "griddepcontrol.{launch_dependents,wait}")(nothing)
