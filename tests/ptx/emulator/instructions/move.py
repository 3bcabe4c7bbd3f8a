"""mov: registers, constants, special registers and addresses; vectors to and from one register."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import (
    elementwise,
    expect_operands,
    require_type,
)
from tests.ptx.emulator.program import Vector
from tests.ptx.emulator.types import UNSIGNED, size_of


@instruction("mov.{type:pred,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}")
def mov(build: Build) -> Execute:
    expect_operands(build, 2)
    if isinstance(build.operand(0), Vector):
        return _unpack(build)
    if isinstance(build.operand(1), Vector):
        return _pack(build)
    return elementwise(build, lambda a: a, build.type)


def _pieces(build: Build, index: int) -> tuple[int, int]:
    """How many items a vector has, and their bytes."""
    count = len(build.vector(index))
    size = size_of(build.type) // count if build.type.startswith("b") else 0
    if size not in UNSIGNED or size * count != size_of(build.type) or count not in (2, 4):
        raise build.error(f"a {build.type} in {count} pieces")
    for item in build.vector(index):
        require_type(build, item, f"b{8 * size}")
    return count, size


def _unpack(build: Build) -> Execute:
    _, size = _pieces(build, 0)
    require_type(build, build.operand(1), build.type)
    read, writes = build.read(1), [build.write(item) for item in build.vector(0)]

    def execute(block: Block, mask: Mask) -> None:
        # Copied: a piece may be written to the register that is taken apart.
        whole = read(block).copy()
        pieces = whole.view(UNSIGNED[size]).reshape(len(whole), -1)
        for k, write in enumerate(writes):
            write(block, pieces[:, k], mask)

    return execute


def _pack(build: Build) -> Execute:
    count, size = _pieces(build, 1)
    require_type(build, build.operand(0), build.type)
    reads = [build.read(item, f"b{8 * size}") for item in build.vector(1)]
    write, whole = build.write(0), UNSIGNED[size * count]

    def execute(block: Block, mask: Mask) -> None:
        pieces = np.stack([read(block) for read in reads], axis=1)
        write(block, pieces.view(whole)[:, 0], mask)

    return execute
