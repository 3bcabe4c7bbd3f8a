"""Comparisons, and choices by them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import (
    elementwise,
    expect_operands,
    require_type,
)
from tests.ptx.emulator.program import Pair
from tests.ptx.emulator.rounding import HALF_TYPES, flush_to_zero
from tests.ptx.emulator.types import halves_to_float, size_of

Comparison = Callable[[np.ndarray, np.ndarray], np.ndarray]

# With NaN all of these are false, and those that end in "u" true, as `nan` is.
_COMPARISONS: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_INTEGER_COMPARISONS = {
    **{name: _COMPARISONS[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

_FLOATS = ",".join(_COMPARISONS)
# (comparisons, flush, types): what PTX has.
_KINDS = (
    ("eq,ne", "", "b16,b32,b64"),
    ("eq,ne,lt,le,gt,ge", "", "s16,s32,s64"),
    ("eq,ne,lt,le,gt,ge,lo,ls,hi,hs", "", "u16,u32,u64"),
    (_FLOATS, "[.{ftz:ftz}]", "f32"),
    (_FLOATS, "", "f64"),
)
_HALF_KINDS = ((_FLOATS, "[.{ftz:ftz}]", "f16"), (_FLOATS, "", "bf16"))


def _forms(
    base: str, destination: str = "", kinds: tuple[tuple[str, str, str], ...] = _KINDS
) -> list[str]:
    return [
        f"{base}.{{compare:{names}}}[.{{combine:and,or,xor}}]{flush}{destination}.{{source:{types}}}"
        for names, flush, types in kinds
    ]


def _comparison(build: Build) -> Comparison:
    """The comparison, of registers as they are read; (T, 2) for a packed type."""
    kind, name, ftz = build.choices["source"], build.choices["compare"], build.has("ftz")
    if not kind.startswith("f") and kind not in HALF_TYPES:
        return _INTEGER_COMPARISONS[name]
    compare = _COMPARISONS[name]

    def operation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if kind in HALF_TYPES:
            a, b = halves_to_float(a, kind), halves_to_float(b, kind)
        if ftz:
            a, b = flush_to_zero(a, kind), flush_to_zero(b, kind)
        return compare(a, b)

    return operation


def _compared(build: Build) -> Callable[[Block], tuple[np.ndarray, np.ndarray | None]]:
    """The comparison's value, and the predicate that it is to be combined with."""
    kind = build.choices["source"]
    expect_operands(build, 4 if build.has("combine") else 3)
    for index in (1, 2):
        require_type(build, build.operand(index), kind)
    a, b = build.read(1, kind), build.read(2, kind)
    compare = _comparison(build)
    if not build.has("combine"):
        return lambda block: (compare(a(block), b(block)), None)
    other = build.read(3, "pred")
    return lambda block: (compare(a(block), b(block)), other(block))


@instruction(*_forms("setp"), *_forms("setp", kinds=_HALF_KINDS))
def setp(build: Build) -> Execute:
    compared = _compared(build)
    write, write_inverse = build.write_pair(0)
    combine = _COMBINE.get(build.choices["combine"])
    pair = isinstance(build.operand(0), Pair)

    def execute(block: Block, mask: Mask) -> None:
        found, other = compared(block)
        inverse = ~found if pair else found
        if combine is not None:
            found = combine(found, other)
            inverse = combine(inverse, other) if pair else inverse
        write(block, found, mask)
        if pair:
            write_inverse(block, inverse, mask)

    return execute


@instruction(
    f"setp.{{compare:{_FLOATS}}}[.{{combine:and,or,xor}}][.{{ftz:ftz}}].{{source:f16x2}}",
    f"setp.{{compare:{_FLOATS}}}[.{{combine:and,or,xor}}].{{source:bf16x2}}",
)
def setp_packed(build: Build) -> Execute:
    """p|q are the comparisons of the low and of the high halves."""
    if not isinstance(build.operand(0), Pair):
        raise build.error("a packed comparison has two destinations")
    compared = _compared(build)
    writes = build.write_pair(0)
    combine = _COMBINE.get(build.choices["combine"])

    def execute(block: Block, mask: Mask) -> None:
        found, other = compared(block)
        if combine is not None:
            found = combine(found, other[:, None])
        for half, write in enumerate(writes):
            write(block, found[:, half], mask)

    return execute


@instruction(
    *_forms("set", ".{type:u32,s32,f32}"),
    *_forms("set", ".{type:u32,s32}", _HALF_KINDS),  # set.f32 compares no halves
)
def set_(build: Build) -> Execute:
    compared = _compared(build)
    require_type(build, build.operand(0), build.type)
    write = build.write(0)
    combine = _COMBINE.get(build.choices["combine"])
    true = np.float32(1) if build.type == "f32" else np.uint32(0xFFFFFFFF)

    def execute(block: Block, mask: Mask) -> None:
        found, other = compared(block)
        if combine is not None:
            found = combine(found, other)
        write(block, np.where(found, true, true.dtype.type(0)), mask)

    return execute


@instruction("selp.{type:b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}")
def selp(build: Build) -> Execute:
    # On bits, so that NaN keeps its own.
    bits = f"b{8 * size_of(build.type)}"
    return elementwise(build, lambda a, b, c: np.where(c, a, b), bits, bits, "pred")


_SLCT = "{type:b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}"


@instruction(f"slct.{_SLCT}.{{source:s32}}", f"slct[.{{ftz:ftz}}].{_SLCT}.{{source:f32}}")
def slct(build: Build) -> Execute:
    # -0, and with .ftz a negative subnormal, counts as 0; NaN chooses the second operand.
    ftz, kind = build.has("ftz"), build.choices["source"]
    bits = f"b{8 * size_of(build.type)}"

    def operation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.where((flush_to_zero(c, kind) if ftz else c) >= 0, a, b)

    return elementwise(build, operation, bits, bits, kind)


_TESTS = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0),
}


@instruction(f"testp.{{test:{','.join(_TESTS)}}}.{{type:f32,f64}}")
def testp(build: Build) -> Execute:
    return elementwise(build, _TESTS[build.choices["test"]], build.type, result="pred")
