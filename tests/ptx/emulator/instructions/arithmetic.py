"""Integer arithmetic."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import (
    Operation,
    elementwise,
    expect_operands,
    require_type,
)
from tests.ptx.emulator.types import TYPES, UNSIGNED, size_of

_INTEGERS = "{type:u16,s16,u32,s32,u64,s64}"
_SIGNED = "{type:s16,s32,s64}"
_CARRIES = "{type:u32,s32,u64,s64}"
_CARRY = "carry"  # the key of the condition code, (T,), in a block's state


def _wide(type_name: str) -> str:
    return f"{type_name[0]}{16 * size_of(type_name)}"


# NumPy's integer arithmetic on arrays wraps around, as PTX's does.


@instruction(f"add.{_INTEGERS}")
def add(build: Build) -> Execute:
    return elementwise(build, np.add, build.type, build.type)


@instruction(f"sub.{_INTEGERS}")
def sub(build: Build) -> Execute:
    return elementwise(build, np.subtract, build.type, build.type)


@instruction("add.sat.{type:s32}", "sub.sat.{type:s32}")
def add_saturated(build: Build) -> Execute:
    plain = np.add if build.instruction.opcode.startswith("add") else np.subtract

    def operation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _saturate(plain(a.astype(np.int64), b.astype(np.int64)))

    return elementwise(build, operation, "s32", "s32")


def _saturate(x: np.ndarray) -> np.ndarray:
    bounds = np.iinfo(np.int32)
    return np.clip(x, bounds.min, bounds.max).astype(np.int32)


# ---- products


def _product(part: str, type_name: str) -> Operation:
    """The low or the high half of a product, or all of it in the wide type."""
    if part == "lo":
        return np.multiply
    if part == "hi" and size_of(type_name) == 8:
        return _high_u64 if type_name == "u64" else _high_s64
    wide, narrow = TYPES[_wide(type_name)], TYPES[type_name]
    bits = 8 * size_of(type_name)

    def whole(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.astype(wide) * b.astype(wide)

    if part == "wide":
        return whole
    return lambda a, b: (whole(a, b) >> bits).astype(narrow)


def _high_u64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.uint64(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & low, a >> 32, b & low, b >> 32
    middle = a_high * b_low + (a_low * b_low >> 32)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> 32) + (other >> 32)


def _high_s64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # A negative number is 2^64 less than its bits say.
    x, y, zero = a.view(np.uint64), b.view(np.uint64), np.uint64(0)
    return _high_u64(x, y) - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)


@instruction(f"mul.{{part:lo,hi}}.{_INTEGERS}", "mul.{part:wide}.{type:u16,s16,u32,s32}")
def mul(build: Build) -> Execute:
    part, kind = build.choices["part"], build.type
    result = _wide(kind) if part == "wide" else kind
    return elementwise(build, _product(part, kind), kind, kind, result=result)


@instruction(f"mad.{{part:lo,hi}}.{_INTEGERS}", "mad.{part:wide}.{type:u16,s16,u32,s32}")
def mad(build: Build) -> Execute:
    part, kind = build.choices["part"], build.type
    result = _wide(kind) if part == "wide" else kind
    product = _product(part, kind)

    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return product(a, b).view(c.dtype) + c

    return elementwise(build, operation, kind, kind, result, result=result)


@instruction("mad.hi.sat.{type:s32}")
def mad_saturated(build: Build) -> Execute:
    product = _product("hi", "s32")

    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return _saturate(product(a, b).astype(np.int64) + c)

    return elementwise(build, operation, "s32", "s32", "s32")


# ---- quotients; dividing by zero gives an unspecified value, here all ones


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    # Exact once the remainder, which has the dividend's sign, is gone: PTX rounds towards zero.
    quotient = (a - np.fmod(a, divisor)) // divisor
    return np.where(zero, ~b.dtype.type(0), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = b == 0
    return np.where(zero, ~b.dtype.type(0), np.fmod(a, np.where(zero, b.dtype.type(1), b)))


@instruction(f"div.{_INTEGERS}")
def div(build: Build) -> Execute:
    return elementwise(build, _divide, build.type, build.type)


@instruction(f"rem.{_INTEGERS}")
def rem(build: Build) -> Execute:
    return elementwise(build, _remainder, build.type, build.type)


# ---- the rest


def _extreme(build: Build, of_two: np.ufunc) -> Execute:
    def positive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(of_two(a, b), np.int32(0))

    return elementwise(build, positive if build.has("relu") else of_two, build.type, build.type)


@instruction(f"min.{_INTEGERS}", "min.{relu:relu}.{type:s32}")
def minimum(build: Build) -> Execute:
    return _extreme(build, np.minimum)


@instruction(f"max.{_INTEGERS}", "max.{relu:relu}.{type:s32}")
def maximum(build: Build) -> Execute:
    return _extreme(build, np.maximum)


@instruction(f"neg.{_SIGNED}")
def neg(build: Build) -> Execute:
    return elementwise(build, np.negative, build.type)


@instruction(f"abs.{_SIGNED}")
def absolute(build: Build) -> Execute:
    return elementwise(build, np.abs, build.type)


@instruction(f"sad.{_INTEGERS}")
def sad(build: Build) -> Execute:
    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return c + np.where(a < b, b - a, a - b)

    return elementwise(build, operation, build.type, build.type, build.type)


@instruction("dp4a.{type:u32,s32}.{second:u32,s32}")
def dp4a(build: Build) -> Execute:
    first, second = (np.uint8 if t == "u32" else np.int8 for t in build.choices.values())
    # The sum wraps, so that its sign does not matter.
    result = "u32" if build.type == build.choices["second"] == "u32" else "s32"

    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        products = a.view(first).astype(np.int64) * b.view(second).astype(np.int64)
        return (products.reshape(-1, 4).sum(axis=1) + c).astype(c.dtype)

    return elementwise(build, operation, "b32", "b32", result)


# ---- carries


@instruction(f"add.{{out:cc}}.{_CARRIES}", f"addc[.{{out:cc}}].{_CARRIES}")
def add_carry(build: Build) -> Execute:
    return _with_carry(build, np.add, build.instruction.opcode.startswith("addc"))


@instruction(f"sub.{{out:cc}}.{_CARRIES}", f"subc[.{{out:cc}}].{_CARRIES}")
def sub_borrow(build: Build) -> Execute:
    return _with_carry(build, np.subtract, build.instruction.opcode.startswith("subc"))


@instruction(
    f"mad.{{part:lo,hi}}.{{out:cc}}.{_CARRIES}", f"madc.{{part:lo,hi}}[.{{out:cc}}].{_CARRIES}"
)
def mad_carry(build: Build) -> Execute:
    return _with_carry(build, np.add, build.instruction.opcode.startswith("madc"))


def _with_carry(build: Build, operation: np.ufunc, carry_in: bool) -> Execute:
    """x + y or x - y with the condition code as a third operand, as a further result, or both."""
    kind, carry_out = build.type, build.has("out")
    part = build.choices.get("part")
    count = 3 if part is None else 4
    expect_operands(build, count)
    for operand in build.operands:
        require_type(build, operand, kind)
    write = build.write(0)
    reads = [build.read(index, kind) for index in range(1, count)]
    unsigned = UNSIGNED[size_of(kind)]
    product = _product(part, kind) if part else None

    def execute(block: Block, mask: Mask) -> None:
        *first, y = [read(block) for read in reads]
        x = product(*first) if product else first[0]
        x, y = x.view(unsigned), y.view(unsigned)
        result = operation(x, y)
        carry = result < x if operation is np.add else result > x
        if carry_in:
            step = _carry_of(block, mask).astype(unsigned)
            before, result = result, operation(result, step)
            carry |= result < before if operation is np.add else result > before
        write(block, result, mask)
        if carry_out:
            _set_carry(block, mask, carry)

    return execute


def _carry_of(block: Block, mask: Mask) -> np.ndarray:
    carry, known = block.state.get(_CARRY, (None, None))
    if carry is None or not known[slice(None) if mask is None else mask].all():
        raise PtxError("uninitialised", "the carry, which no instruction with .cc has set")
    return carry


def _set_carry(block: Block, mask: Mask, carry: np.ndarray) -> None:
    nothing = np.zeros(block.threads, bool)
    kept, known = block.state.get(_CARRY, (nothing, nothing))
    active = block.active(mask)
    block.state[_CARRY] = np.where(active, carry, kept), known | active
