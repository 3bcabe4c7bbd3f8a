"""Bits: logic, shifts, fields, permutations, counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.emulator.block import Execute
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import (
    Operation,
    elementwise,
    expect_operands,
    require_type,
)
from tests.ptx.emulator.program import Immediate
from tests.ptx.emulator.types import SIGNED, UNSIGNED, size_of

_LOGIC = "{type:pred,b16,b32,b64}"


@instruction(f"and.{_LOGIC}")
def bitwise_and(build: Build) -> Execute:
    return elementwise(build, np.bitwise_and, build.type, build.type)


@instruction(f"or.{_LOGIC}")
def bitwise_or(build: Build) -> Execute:
    return elementwise(build, np.bitwise_or, build.type, build.type)


@instruction(f"xor.{_LOGIC}")
def bitwise_xor(build: Build) -> Execute:
    return elementwise(build, np.bitwise_xor, build.type, build.type)


@instruction(f"not.{_LOGIC}")
def bitwise_not(build: Build) -> Execute:
    return elementwise(build, np.invert, build.type)


@instruction("cnot.{type:b16,b32,b64}")
def cnot(build: Build) -> Execute:
    return elementwise(build, lambda a: (a == 0).astype(a.dtype), build.type)


@instruction("lop3.{type:b32}")
def lop3(build: Build) -> Execute:
    expect_operands(build, 5)
    table = build.immediate(4)
    if not 0 <= table < 256:
        raise build.error(f"the table of lop3 has 8 bits, got {table:#x}")
    for operand in build.operands[:4]:
        require_type(build, operand, "b32")
    a, b, c = (build.read(index) for index in (1, 2, 3))
    write = build.write(0)
    operation = _lookup(table)
    return lambda block, mask: write(block, operation(a(block), b(block), c(block)), mask)


def _lookup(table: int) -> Operation:
    """Bit 4 i + 2 j + k of the table is the result for bits i, j, k of the operands."""
    # Few terms, if need be of the complement.
    inverted = table.bit_count() > 4
    terms = [k for k in range(8) if (table >> k & 1) != inverted]

    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for k in terms:
            first = a if k & 4 else ~a
            result |= first & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return ~result if inverted else result

    return operation


# ---- shifts: the amount is unsigned and clamped to the width


def _shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount < bits, shifted, a.dtype.type(0))


def _shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(amount < bits, shifted, a.dtype.type(0))


@instruction("shl.{type:b16,b32,b64}")
def shl(build: Build) -> Execute:
    return elementwise(build, _shift_left, build.type, "u32")


@instruction("shr.{type:b16,b32,b64,u16,u32,u64,s16,s32,s64}")
def shr(build: Build) -> Execute:
    return elementwise(build, _shift_right, build.type, "u32")


@instruction("shf.{direction:l,r}.{overflow:clamp,wrap}.{type:b32}")
def shf(build: Build) -> Execute:
    left, wrap = build.choices["direction"] == "l", build.choices["overflow"] == "wrap"

    def operation(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        pair = high.astype(np.uint64) << 32 | low
        n = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        return (pair << n >> 32 if left else pair >> n).astype(np.uint32)

    return elementwise(build, operation, "b32", "b32", "u32")


# ---- fields: position and length are the low bytes of their operands


def _low_ones(count: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Words whose lowest `count` bits are set."""
    return ~_shift_left(np.full(count.shape, ~dtype.type(0)), count)


@instruction("bfe.{type:u32,u64,s32,s64}")
def bfe(build: Build) -> Execute:
    signed, size = build.type.startswith("s"), size_of(build.type)
    bits = 8 * size

    def operation(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        a = a.view(UNSIGNED[size])
        position, length = position & 0xFF, length & 0xFF
        inside = np.minimum(length, bits - np.minimum(position, bits))
        ones = _low_ones(inside, a.dtype)
        field = _shift_right(a, position) & ones
        if not signed:
            return field
        # What the field does not reach is the sign: its last bit, or the word's if it goes beyond.
        last = np.minimum(position + length - (length > 0), bits - 1)
        negative = (length > 0) & (_shift_right(a, last) & 1 == 1)
        return np.where(negative, field | ~ones, field)

    return elementwise(build, operation, build.type, "u32", "u32")


@instruction("bfi.{type:b32,b64}")
def bfi(build: Build) -> Execute:
    def operation(
        a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        position, length = position & 0xFF, length & 0xFF
        field = _shift_left(_low_ones(length, a.dtype), position)
        return (b & ~field) | (_shift_left(a, position) & field)

    return elementwise(build, operation, build.type, build.type, "u32", "u32")


# ---- counts


def _length(a: np.ndarray) -> np.ndarray:
    """The number of bits up to the highest one, as uint32."""
    shift = 1
    while shift < 8 * a.dtype.itemsize:
        a = a | a >> shift
        shift *= 2
    return np.bitwise_count(a).astype(np.uint32)


@instruction("bfind[.{amount:shiftamt}].{type:u32,u64,s32,s64}")
def bfind(build: Build) -> Execute:
    bits = np.uint32(8 * size_of(build.type))
    amount = build.has("amount")

    def operation(a: np.ndarray) -> np.ndarray:
        if a.dtype.kind == "i":
            a = np.where(a < 0, ~a, a).view(UNSIGNED[a.dtype.itemsize])
        length = _length(a)
        found = bits - length if amount else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), found)

    return elementwise(build, operation, build.type, result="u32")


@instruction("clz.{type:b32,b64}")
def clz(build: Build) -> Execute:
    bits = np.uint32(8 * size_of(build.type))
    return elementwise(build, lambda a: bits - _length(a), build.type, result="u32")


@instruction("popc.{type:b32,b64}")
def popc(build: Build) -> Execute:
    def operation(a: np.ndarray) -> np.ndarray:
        return np.bitwise_count(a).astype(np.uint32)

    return elementwise(build, operation, build.type, result="u32")


_REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)


@instruction("brev.{type:b32,b64}")
def brev(build: Build) -> Execute:
    def operation(a: np.ndarray) -> np.ndarray:
        backwards = a.view(np.uint8).reshape(len(a), -1)[:, ::-1]
        return _REVERSED[backwards].copy().view(a.dtype)[:, 0]

    return elementwise(build, operation, build.type)


# ---- permutations

# The bytes that a mode takes from {b, a}, the result's lowest byte first, by the selector's value.
_MODES = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


@instruction("prmt.{type:b32}[.{mode:f4e,b4e,rc8,ecl,ecr,rc16}]")
def prmt(build: Build) -> Execute:
    selector = build.operand(3)
    mode = build.choices["mode"]
    if mode is None and isinstance(selector, Immediate):
        nibbles = [build.immediate(3) >> 4 * k & 15 for k in range(4)]
        return elementwise(build, _permute(nibbles), "b32", "b32", "b32")
    table = np.array(_MODES[mode]) if mode else None

    def operation(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        if table is not None:
            chosen = table[selectors & 3]
        else:
            chosen = (selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)).astype(int) & 15
        found = np.take_along_axis(_bytes(a, b), chosen & 7, axis=1)
        signs = np.where(found & 0x80, 0xFF, 0).astype(np.uint8)
        return _word(np.where(chosen & 8, signs, found))

    return elementwise(build, operation, "b32", "b32", "b32")


def _permute(nibbles: Sequence[int]) -> Operation:
    columns = [nibble & 7 for nibble in nibbles]
    replicated = [k for k, nibble in enumerate(nibbles) if nibble & 8]

    def operation(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        found = _bytes(a, b)[:, columns]
        for k in replicated:
            found[:, k] = found[:, k].view(SIGNED[1]) >> 7
        return _word(found)

    return operation


def _bytes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([a, b], axis=1).view(np.uint8)


def _word(found: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(found).view(np.uint32)[:, 0]
