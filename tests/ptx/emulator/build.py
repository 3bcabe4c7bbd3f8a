"""Turns an instruction into a function of a thread block and a mask of its threads.

A handler of instructions/ asks a Build for functions that read and write its operands, once, and
returns a function that uses them at every execution. A mask is None for all threads, which is the
common case and the fast one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import find
from tests.ptx.emulator.program import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from tests.ptx.emulator.types import SIGNED, TYPES, UNSIGNED, size_of

if TYPE_CHECKING:
    from tests.ptx.emulator.block import Block, Execute, Mask
    from tests.ptx.emulator.program import Program

Read = Callable[["Block"], np.ndarray]
Write = Callable[["Block", np.ndarray, "Mask"], None]

# State spaces by their address: shared and local memory and parameters have windows in generic
# addresses. Constants lie in global memory.
GLOBAL_BASE = 1 << 32
PARAMETER_BASE = 1 << 40
SHARED_BASE = 1 << 41
LOCAL_BASE = 1 << 42


class Build:
    """One instruction of an entry while it is turned into a function.

    `choices` are those of its form by name, None where one is left out; `type` is that named type.
    """

    def __init__(self, program: Program, entry: Entry, instruction: Instruction) -> None:
        self.program, self.entry, self.instruction = program, entry, instruction
        self.form, self.choices = find(instruction.opcode)

    @property
    def type(self) -> str:
        chosen = self.choices["type"]
        assert chosen is not None
        return chosen

    def has(self, name: str) -> bool:
        """Whether a named choice was made."""
        return self.choices.get(name) is not None

    @property
    def modifiers(self) -> list[str]:
        return self.instruction.opcode.split(".")[1:]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.instruction.operands

    def operand(self, index: int) -> Operand:
        if not -len(self.operands) <= index < len(self.operands):
            raise self.error("an operand is missing")
        return self.operands[index]

    def vector(self, index: int) -> tuple[Operand, ...]:
        """The items of a vector operand, or the operand as the only one."""
        operand = self.operand(index)
        return operand.items if isinstance(operand, Vector) else (operand,)

    def immediate(self, index: int) -> int:
        operand = self.operand(index)
        if not isinstance(operand, Immediate) or operand.kind != "int":
            raise self.error(f"operand {index} must be an integer constant")
        return operand.value

    def error(self, message: str, kind: str = "unsupported") -> PtxError:
        return PtxError(kind, message)

    # ---- reading

    def read(self, what: int | Operand, type_name: str | None = None) -> Read:
        """A function that gives the operand's value per thread, (T,), viewed as the type.

        A register may be wider than the type, of which the low bits then count, or narrower, as
        ld, st and cvt allow: it is extended by its own sign if the type is signed. A constant or a
        special register gives (T,) too.
        """
        operand = self.operand(what) if isinstance(what, int) else what
        type_name = type_name or self.type
        dtype = np.dtype(TYPES[type_name])
        if isinstance(operand, Register):
            return self._read_register(operand.name, dtype)
        if isinstance(operand, Not):
            inner = self._read_register(operand.predicate.name, dtype)
            return lambda block: ~inner(block)
        if isinstance(operand, Immediate):
            value = self._constant(operand, dtype)
            return lambda block: block.constant(value)
        if isinstance(operand, Special):
            name = operand.name
            return lambda block: block.special(name).astype(dtype)
        if isinstance(operand, Symbol):
            address = np.array(self.symbol(operand.name), dtype)
            return lambda block: block.constant(address)
        raise self.error(f"operand {operand} cannot be read as a value")

    def _read_register(self, name: str, dtype: np.dtype) -> Read:
        own = np.dtype(TYPES[self.entry.registers[name]])
        if own == np.bool_ or dtype == np.bool_:
            if own != dtype:
                raise self.error(f"{name} is a {self.entry.registers[name]}, not a {dtype}")
            return lambda block: block.registers[name]
        size = own.itemsize
        if size == dtype.itemsize:
            return lambda block: block.register(name).view(dtype)
        if size > dtype.itemsize:
            low = UNSIGNED[dtype.itemsize]
            return lambda block: block.register(name).astype(low).view(dtype)
        if dtype.kind == "i":
            signed = SIGNED[size]
            return lambda block: block.register(name).view(signed).astype(dtype)
        wide = UNSIGNED[dtype.itemsize]
        return lambda block: block.register(name).astype(wide).view(dtype)

    def _constant(self, operand: Immediate, dtype: np.dtype) -> np.ndarray:
        if operand.kind != "int":
            size = 4 if operand.kind == "f32" else 8
            if dtype == np.float64 and size == 4:
                return np.array(struct.unpack("<f", struct.pack("<I", operand.value))[0], dtype)
            if dtype.itemsize != size:
                raise self.error(f"a constant of {size} bytes where {dtype} is meant")
            return np.array(operand.value, UNSIGNED[size]).view(dtype)
        if dtype == np.bool_:
            return np.array(bool(operand.value))
        if dtype.kind == "f":
            return np.array(operand.value, dtype)
        low = operand.value & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(low, UNSIGNED[dtype.itemsize]).view(dtype)

    def symbol(self, name: str) -> int:
        """The address of a variable or a parameter, in its own state space.

        `name` may have an offset: "variable+16". WARP_SZ is a constant of PTX.
        """
        if name == "WARP_SZ":
            return 32
        name, _, offset = name.partition("+")
        for addresses in (self.entry.local, self.program.shared, self.program.addresses):
            if name in addresses:
                return addresses[name] + int(offset or "0", 0)
        for parameter in self.entry.parameters:
            if parameter.name == name:
                return parameter.offset + int(offset or "0", 0)
        raise self.error(f"unknown symbol {name}")

    # ---- writing

    def write(self, what: int | Operand) -> Write:
        """A function that stores values (T,) of any type of the register's size, or a wider one.

        A narrower value is extended by its sign if it is signed.
        """
        operand = self.operand(what) if isinstance(what, int) else what
        if isinstance(operand, Sink):
            return lambda block, values, mask: None
        if not isinstance(operand, Register):
            raise self.error(f"operand {operand} cannot be written")
        name = operand.name

        def write(block: Block, values: np.ndarray, mask: Mask) -> None:
            register = block.registers[name]
            values = np.asarray(values)
            if register.dtype != values.dtype:
                values = _as_bits(values, register.dtype)
            if mask is None:
                register[:] = values
            else:
                np.copyto(register, values, where=mask)

        if name not in self.entry.matrix_registers:
            return write

        def noted(block: Block, values: np.ndarray, mask: Mask) -> None:
            block.note_write(name, mask)
            write(block, values, mask)

        return noted

    def write_pair(self, index: int) -> tuple[Write, Write]:
        """The destinations of a|b, or of a alone."""
        operand = self.operand(index)
        if isinstance(operand, Pair):
            return self.write(operand.first), self.write(operand.second)
        return self.write(operand), self.write(Sink())

    # ---- addresses

    def address(self, what: int | Operand) -> Read:
        """A function that gives a memory operand's addresses (T,) as int64."""
        operand = self.operand(what) if isinstance(what, int) else what
        if not isinstance(operand, Address):
            raise self.error(f"operand {operand} is no address")
        offset = operand.offset
        base = operand.base
        narrow = isinstance(base, Register) and size_of(self.entry.registers[base.name]) == 4
        if not isinstance(base, Register):
            value = base.value if isinstance(base, Immediate) else self.symbol(base.name)
            fixed = np.array(value + offset, np.int64)
            return lambda block: block.constant(fixed)
        name = base.name

        def address(block: Block) -> np.ndarray:
            addresses = block.register(name).astype(np.int64) + offset
            return addresses & 0xFFFFFFFF if narrow else addresses

        return address

    @property
    def space(self) -> str:
        """The state space that the opcode names: "global", "shared", "param", ... or "generic"."""
        for modifier in self.modifiers:
            space = modifier.split("::")[0]
            if space in ("global", "shared", "param", "local", "const"):
                return space
        return "generic"


def _as_bits(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    size = values.dtype.itemsize
    if values.dtype == np.bool_ or dtype == np.bool_:
        raise PtxError("unsupported", f"a {values.dtype} value for a register of {dtype}")
    if size == dtype.itemsize:
        return values.view(dtype) if values.ndim else values.reshape(1).view(dtype)
    if values.dtype.kind == "i":
        return values.astype(SIGNED[dtype.itemsize]).view(dtype)
    if values.dtype.kind == "f":
        raise PtxError("unsupported", f"a {values.dtype} value for a register of {dtype}")
    return values.astype(dtype)


def build(program: Program, entry: Entry, instruction: Instruction) -> Execute:
    """The function that runs one instruction, its guard included."""
    try:
        one = Build(program, entry, instruction)
        execute = one.form.handler(one)
    except PtxError as error:
        raise error.located(instruction.text, instruction.line) from None
    except (IndexError, KeyError, ValueError, AssertionError) as error:
        reason = f"not understood ({type(error).__name__}: {error})"
        raise PtxError("unsupported", reason).located(instruction.text, instruction.line) from error
    if instruction.guard is None or instruction.target is not None:
        return execute
    register, negated = instruction.guard
    name = register.name

    def guarded(block: Block, mask: Mask) -> object:
        wanted = ~block.registers[name] if negated else block.registers[name]
        if mask is not None:
            wanted = wanted & mask
        if wanted.all():
            return execute(block, None)
        if not wanted.any():
            return None
        before, block.running = block.running, wanted
        result = execute(block, wanted)
        block.running = before
        return result

    return guarded
