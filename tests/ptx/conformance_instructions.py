"""The comparisons of conformance.py of one instruction each, on edge cases and random numbers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from tests.ptx import one_instruction
from tests.ptx.comparison import EXACT, Bound, Comparison, Load
from tests.ptx.emulator.instructions import (
    arithmetic,
    compare,
    convert,
    floating,
    logic,
    special_functions,
    warp,
)
from tests.ptx.exact import array, samples, unsigned
from tests.ptx.one_instruction import opcodes

# Approximate functions, by opcode and type. The PTX ISA bounds the error against the exact value,
# to which the emulator rounds, so one is added for that rounding. The errors that are absolute
# there (sin, cos, lg2) hold in a range from which the samples are drawn.
APPROXIMATE = {
    "ex2.f32": Bound(ulps=3),
    "ex2.f16": Bound(ulps=2),
    "ex2.bf16": Bound(ulps=2),
    "lg2.f32": Bound(ulps=3),
    "sin.f32": Bound(ulps=9),  # 2^-20.5, of values from 1/2
    "cos.f32": Bound(ulps=9),
    "tanh.f32": Bound(ulps=2**13 + 1),  # 2^-11
    "tanh.f16": Bound(ulps=2),
    "tanh.bf16": Bound(ulps=2),
    "rcp.f32": Bound(ulps=2),
    "sqrt.f32": Bound(ulps=3),
    "rsqrt.f32": Bound(ulps=3),
    "rsqrt.f64": Bound(ulps=2**24, nan_open=True),  # the ISA gives no bound
    "div.f32": Bound(ulps=3),
}
# Angles whose sine and cosine are at least a half, and logarithms' operands away from 1.
_RANGES = {"sin": (0.6, 1.5), "cos": (-1.0, 1.0), "lg2": (2.0, 2.0**60)}
_OPEN_NAN = ("neg", "abs")  # "NaN inputs yield an unspecified NaN"
ELEMENTWISE = (arithmetic, floating, special_functions, convert, compare, logic)
_COUNTS = {
    **dict.fromkeys(["neg", "abs", "not", "cnot", "bfind", "clz", "popc", "brev", "testp"], 1),
    **dict.fromkeys(["ex2", "tanh", "lg2", "sin", "cos", "rcp", "sqrt", "rsqrt"], 1),
    **dict.fromkeys(["mad", "fma", "sad", "dp4a", "prmt", "shf"], 3),
}
_WORDS = ("bfind", "clz", "popc")
_CARRIES = ("addc", "subc", "madc")
_COMBINE = ("and", "or", "xor")


def signature(opcode: str) -> tuple[list[str], str]:
    """The types of the operands and of the result, as exact.py names them."""
    parts = opcode.split(".")
    base, kind = parts[0], parts[-1]
    if base == "cvt":
        if parts[-2] in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and kind == "f32":
            return ["f32", "f32"], _stored(parts[-2])
        return [_stored(kind)], _stored(parts[-2])
    if base == "setp":
        return [kind, kind, *_third(parts)], "pred"
    if base == "set":
        return [kind, kind, *_third(parts)], parts[-2]
    if base == "selp":
        return [kind, kind, "pred"], kind
    if base == "slct":
        return [parts[-2], parts[-2], kind], parts[-2]
    if base == "testp":
        return [kind], "pred"
    if base == "dp4a":
        return ["b32"] * 3, "u32"
    if base in ("shl", "shr"):
        return [kind, "u32"], kind
    if base == "bfe":
        return [kind, "u32", "u32"], kind
    if base == "bfi":
        return [kind, kind, "u32", "u32"], kind
    if base == "prmt":
        return ["b32"] * 3, "b32"
    if "wide" in parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return ([kind, kind] if base == "mul" else [kind, kind, wide]), wide
    return [kind] * _COUNTS.get(base, 2), "u32" if base in _WORDS else kind


def _third(parts: list[str]) -> list[str]:
    return ["pred"] if set(parts) & set(_COMBINE) else []


def _stored(kind: str) -> str:
    """Bytes are kept in 16-bit registers."""
    if kind in ("e4m3x2", "e5m2x2"):
        return "u16"
    return f"{kind[0]}16" if kind in ("u8", "s8") else kind


def of_registers(module: ModuleType) -> list[str]:
    """The opcodes of a module that take registers and give one."""
    return [
        opcode
        for opcode in opcodes(module)
        if opcode.split(".")[0] not in (*_CARRIES, "cvta", "isspacep", "lop3")
        and ".cc" not in opcode
        # A packed comparison has two destinations.
        and not (opcode.startswith("setp") and opcode.endswith("x2"))
    ]


def instructions(module: ModuleType) -> Iterator[Comparison]:
    """A comparison for each of these opcodes."""
    family = module.__name__.split(".")[-1]
    for opcode in of_registers(module):
        yield one(family, opcode)
    if module is logic:
        for table in range(0, 256, 5):
            yield one(family, "lop3.b32", ["b32"] * 3, "b32", tail=f", {table:#x}")


def one(
    family: str,
    opcode: str,
    kinds: list[str] | None = None,
    result: str = "",
    *,
    tail: str = "",
) -> Comparison:
    """An instruction on edge cases and random numbers, `tail` after its operands."""
    if kinds is None:
        kinds, result = signature(opcode)
    base, *rest = opcode.split(".")
    columns = samples(kinds, seed=zlib.crc32(opcode.encode()))
    arrays = [array(x, kind) for x, kind in zip(columns, kinds, strict=True)]
    if base in _RANGES:
        low, high = _RANGES[base]
        values = np.linspace(low, high, len(arrays[0]), dtype=np.float32)
        arrays = [values.view(np.uint32)]
    inputs = dict(zip("abce", arrays, strict=False))
    defined = None
    if base in ("div", "rem") and result[0] in "us":
        defined = inputs["b"] != 0
    elif base == "div" and "approx" in rest:  # by a subnormal number it has no bound
        magnitude = inputs["b"] & np.uint32(0x7FFFFFFF)
        defined = (magnitude == 0) | (magnitude >= 1 << 23)
    output = bool if result == "pred" else unsigned(result)

    def run(load: Load) -> list[np.ndarray]:
        body = f"{opcode} d, {', '.join(inputs)}{tail};"
        return one_instruction.run(body, machine=load, **inputs, d=output)

    bound = EXACT
    if "approx" in rest or "full" in rest:
        bound = APPROXIMATE[f"{base}.{result.removesuffix('x2')}"]
    elif base in _OPEN_NAN or result == "f64":
        bound = Bound(nan_open=True)
    elif result == "tf32":
        bound = Bound(mask=0xFFFFE000)  # a tensor core ignores the others
    return Comparison(family, opcode + tail, run, (result,), bound, inputs, defined)


def _several(
    family: str, name: str, body: str, kinds: list[str], results: dict[str, str], **options: Any
) -> Comparison:
    columns = samples(kinds, seed=zlib.crc32(name.encode()))
    inputs = {n: array(x, k) for n, x, k in zip("abcd", columns, kinds, strict=False)}
    outputs = {n: bool if k == "pred" else unsigned(k) for n, k in results.items()}

    def run(load: Load) -> list[np.ndarray]:
        return one_instruction.run(body, machine=load, **options, **inputs, **outputs)

    return Comparison(family, name, run, tuple(results.values()), inputs=inputs)


def carries() -> Iterator[Comparison]:
    """Sums and products of two words, by the carry."""
    for kind in ("u32", "s32", "u64", "s64"):
        for base in ("add", "sub"):
            body = f"{base}.cc.{kind} r, a, b; {base}c.cc.{kind} s, c, d; {base}c.{kind} t, a, d;"
            results = dict.fromkeys("rst", kind)
            yield _several("arithmetic", f"{base}.cc.{kind}", body, [kind] * 4, results)
        body = f"mad.lo.cc.{kind} r, a, b, c; madc.hi.{kind} s, a, b, d;"
        yield _several(
            "arithmetic", f"mad.lo.cc.{kind}", body, [kind] * 4, dict.fromkeys("rs", kind)
        )


def shuffles() -> Iterator[Comparison]:
    """What the lanes of whole warps tell each other."""
    for mode, clamp in (("up", 0), ("down", 31), ("bfly", 31), ("idx", 31), ("down", 0x181F)):
        for distance in (1, 3, 16):
            body = f"shfl.sync.{mode}.b32 r|s, a, {distance}, {clamp:#x}, -1;"
            name = f"shfl.sync.{mode}.b32 {distance}, {clamp:#x}"
            yield _several("warp", name, body, ["b32"], {"r": "b32", "s": "pred"})
    for opcode in one_instruction.opcodes(warp, "redux"):
        kind = "b32" if opcode.endswith("b32") else opcode[-3:]
        yield _several("warp", opcode, f"{opcode} r, a, -1;", [kind], {"r": kind})
    for mode in ("all", "any", "uni", "ballot"):
        result = "b32" if mode == "ballot" else "pred"
        opcode = f"vote.sync.{mode}.{result}"
        yield _several("warp", opcode, f"{opcode} r, a, -1;", ["pred"], {"r": result})
