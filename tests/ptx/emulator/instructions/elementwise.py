"""What instructions share that compute from their own thread's registers only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.block import Execute
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.program import Immediate, Operand, Register
from tests.ptx.emulator.rounding import HALF_TYPES
from tests.ptx.emulator.types import size_of

Operation = Callable[..., np.ndarray]


def expect_operands(build: Build, count: int) -> None:
    if len(build.operands) != count:
        raise build.error(f"{len(build.operands)} operands where {count} are meant")


def require_type(build: Build, operand: Operand, type_name: str) -> None:
    """Refuse registers of another size, and constants of 16-bit floating types, as ptxas does."""
    if isinstance(operand, Register):
        own = build.entry.registers[operand.name]
        if size_of(own) != size_of(type_name):
            raise build.error(f"{operand.name} is a {own}, not a {type_name}")
    if isinstance(operand, Immediate) and type_name in HALF_TYPES:
        raise build.error(f"a constant where a {type_name} is meant")


def elementwise(
    build: Build, operation: Operation, *types: str, result: str | None = None
) -> Execute:
    """Give operand 0, of type `result`, the operation's value on the others, of these types.

    `result` is the instruction's type unless given.
    """
    expect_operands(build, len(types) + 1)
    for operand, type_name in zip(build.operands, (result or build.type, *types), strict=True):
        require_type(build, operand, type_name)
    write = build.write(0)
    reads = [build.read(index, type_name) for index, type_name in enumerate(types, 1)]
    if len(reads) == 1:
        (only,) = reads
        return lambda block, mask: write(block, operation(only(block)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda block, mask: write(block, operation(a(block), b(block)), mask)
    return lambda block, mask: write(block, operation(*[read(block) for read in reads]), mask)
