"""Hints to the caches: no effect on values, but operands that must be right."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction, nothing
from tests.ptx.emulator.instructions.loads import check_count, resolve, watch_write
from tests.ptx.emulator.memory import UNWRITTEN

_LINE = 128  # bytes, what discard and applypriority work on
_PRIORITY = "L2::evict_last,L2::evict_normal,L2::evict_first,L2::evict_unchanged"


@instruction(
    "prefetch[.{space:global,local}].{level:L1,L2}",
    "prefetch.global.{level:L2::evict_last,L2::evict_normal}",
    "prefetchu.L1",
)
def prefetch(build: Build) -> Execute:
    check_count(build, 1)
    build.address(0)
    return nothing(build)


@instruction(
    f"createpolicy.fractional.{{primary:{_PRIORITY}}}"
    "[.{secondary:L2::evict_first,L2::evict_unchanged}].b64",
    f"createpolicy.range[.global].{{primary:{_PRIORITY}}}"
    "[.{secondary:L2::evict_first,L2::evict_unchanged}].b64",
    "createpolicy.cvt.L2.b64",
)
def createpolicy(build: Build) -> Execute:
    if "range" in build.modifiers:
        check_count(build, 4)
        build.address(1)
    elif "cvt" in build.modifiers:
        check_count(build, 2)
    elif len(build.operands) not in (1, 2):
        raise build.error(f"{len(build.operands)} operands, not 1 or 2")
    write = build.write(0)
    policy = np.array(0, np.uint64)
    return lambda block, mask: write(block, block.constant(policy), mask)


@instruction("discard[.{space:global}].L2", "applypriority[.{space:global}].L2::evict_normal")
def line(build: Build) -> Execute:
    check_count(build, 2)
    address, space = build.address(0), build.space
    if build.immediate(1) != _LINE:
        raise build.error(f"{build.immediate(1)} bytes, not {_LINE}")
    discards = build.instruction.opcode.startswith("discard")

    def execute(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        memory, offsets = resolve(block, space, address(block)[threads], threads)
        if (offsets % _LINE).any():
            raise build.error(f"an address that is no multiple of {_LINE}", "alignment")
        words = (offsets[:, None] + np.arange(0, _LINE, 8)).ravel()
        memory.check(words, 8, build.form.base, reads=False)
        if discards:
            watch_write(block, memory, offsets, _LINE, threads)
            memory.state[offsets[:, None] + np.arange(_LINE)] = UNWRITTEN

    return execute
