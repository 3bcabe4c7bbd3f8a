"""Bits: every opcode, on edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator.instructions import logic
from tests.ptx.exact import array, integer, samples, size, wrap
from tests.ptx.one_instruction import check, opcodes, run

_BITWISE = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "cnot": lambda a: int(a == 0),
}


@pytest.mark.parametrize("opcode", [op for base in _BITWISE for op in opcodes(logic, base)])
def test_logic(opcode: str) -> None:
    base, kind = opcode.split(".")
    function = _BITWISE[base]
    operands = [kind] * (1 if base in ("not", "cnot") else 2)
    ones = 1 if kind == "pred" else (1 << 8 * size(kind)) - 1
    check(opcode, operands, kind, lambda *bits: function(*bits) & ones)


@pytest.mark.parametrize("table", range(256))
def test_lop3(table: int) -> None:
    """Every table, on words that have all eight combinations of bits."""
    columns = [
        [0b11110000, 0xFFFF0000, 7],
        [0b11001100, 0xFF00FF00, 3],
        [0b10101010, 0xF0F0F0F0, 0],
    ]
    a, b, c = (array(x, "b32") for x in columns)
    (found,) = run(f"lop3.b32 d, a, b, c, {table:#x};", a=a, b=b, c=c, d=np.uint32)
    for x, y, z, result in zip(*columns, found.tolist(), strict=True):
        for bit in range(32):
            index = (x >> bit & 1) << 2 | (y >> bit & 1) << 1 | z >> bit & 1
            assert result >> bit & 1 == table >> index & 1


@pytest.mark.parametrize("opcode", [*opcodes(logic, "shl"), *opcodes(logic, "shr")])
def test_shifts(opcode: str) -> None:
    base, kind = opcode.split(".")

    def reference(a: int, amount: int) -> int:
        value = integer(a, kind)
        amount = min(amount, 100)
        return wrap(value << amount if base == "shl" else value >> amount, kind)

    check(opcode, [kind, "u32"], kind, reference)


@pytest.mark.parametrize("opcode", opcodes(logic, "shf"))
def test_funnel_shifts(opcode: str) -> None:
    _, direction, overflow, _ = opcode.split(".")

    def reference(a: int, b: int, amount: int) -> int:
        n = amount % 32 if overflow == "wrap" else min(amount, 32)
        return wrap(
            (b << n) | (a >> 32 - n) if direction == "l" else (b << 32 - n) | (a >> n), "u32"
        )

    check(opcode, ["b32", "b32", "u32"], "b32", reference)


@pytest.mark.parametrize("opcode", opcodes(logic, "bfe"))
def test_extraction_of_fields(opcode: str) -> None:
    kind = opcode.split(".")[-1]
    msb = 8 * size(kind) - 1

    def reference(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        sign = 0
        if kind[0] == "s" and length:
            sign = a >> min(position + length - 1, msb) & 1
        result = 0
        for i in range(msb + 1):
            bit = a >> position + i & 1 if i < length and position + i <= msb else sign
            result |= bit << i
        return result

    check(opcode, [kind, "u32", "u32"], kind, reference)


@pytest.mark.parametrize("opcode", opcodes(logic, "bfi"))
def test_insertion_of_fields(opcode: str) -> None:
    kind = opcode.split(".")[-1]
    msb = 8 * size(kind) - 1

    def reference(a: int, b: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        for i in range(length):
            if position + i <= msb:
                b = b & ~(1 << position + i) | (a >> i & 1) << position + i
        return b

    check(opcode, [kind, kind, "u32", "u32"], kind, reference)


@pytest.mark.parametrize(
    "opcode", [op for base in ("bfind", "clz", "popc", "brev") for op in opcodes(logic, base)]
)
def test_counts(opcode: str) -> None:
    parts = opcode.split(".")
    kind = parts[-1]
    width = 8 * size(kind)

    def reference(a: int) -> int:
        if parts[0] == "popc":
            return a.bit_count()
        if parts[0] == "clz":
            return width - a.bit_length()
        if parts[0] == "brev":
            return int(f"{a:0{width}b}"[::-1], 2)
        value = integer(a, kind)
        highest = (~value if value < 0 else value).bit_length() - 1
        if highest < 0:
            return 0xFFFFFFFF
        return width - 1 - highest if "shiftamt" in parts else highest

    check(opcode, [kind], kind if parts[0] == "brev" else "u32", reference)


def test_every_opcode_of_bits_is_tested() -> None:
    bases = (*_BITWISE, "lop3", "shl", "shr", "shf", "bfe", "bfi", "prmt")
    bases = (*bases, "bfind", "clz", "popc", "brev")
    assert set(opcodes(logic)) == {op for base in bases for op in opcodes(logic, base)}


# ---- prmt

# By the selector's two low bits, as the PTX ISA prints them: the result's highest byte first.
_MODES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def _permuted(a: int, b: int, selectors: list[int]) -> int:
    """`selectors` of the lowest byte first."""
    source = (a | b << 32).to_bytes(8, "little")
    chosen = [source[s & 7] for s in selectors]
    signs = [
        255 * (byte >> 7) if s & 8 else byte for s, byte in zip(selectors, chosen, strict=True)
    ]
    return int.from_bytes(bytes(signs), "little")


@pytest.mark.parametrize("opcode", opcodes(logic, "prmt"))
def test_permutations(opcode: str) -> None:
    mode = opcode.split(".")[-1]

    def reference(a: int, b: int, c: int) -> int:
        if mode in _MODES:
            return _permuted(a, b, [int(digit) for digit in reversed(_MODES[mode][c & 3])])
        return _permuted(a, b, [c >> 4 * k & 15 for k in range(4)])

    check(opcode, ["b32", "b32", "b32"], "b32", reference)


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x3210, 0x0000, 0xBA98, 0x8F70, 0x4321])
def test_permutations_by_a_constant(selector: int) -> None:
    a, b = samples(["b32", "b32"], seed=4)
    (found,) = run(
        f"prmt.b32 d, a, b, {selector:#x};", a=array(a, "b32"), b=array(b, "b32"), d=np.uint32
    )
    selectors = [selector >> 4 * k & 15 for k in range(4)]
    assert found.tolist() == [_permuted(x, y, selectors) for x, y in zip(a, b, strict=True)]
