"""Integer and floating-point arithmetic: every opcode, on edge cases, against exact numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.instructions import arithmetic, floating, special_functions
from tests.ptx.exact import (
    added,
    array,
    clamp,
    decode,
    divided,
    encode,
    flushed,
    integer,
    multiplied,
    root,
    samples,
    saturated,
    size,
    unsigned,
    wrap,
)
from tests.ptx.one_instruction import check, opcodes, run

# ---- integers

_CARRIES = ("addc", "subc", "madc")


def _plain_integer_opcodes() -> list[str]:
    everything = [op for op in opcodes(arithmetic) if not op.startswith("dp4a")]
    return [op for op in everything if ".cc" not in op and op.split(".")[0] not in _CARRIES]


def _integer_result(parts: list[str], kind: str, a: int, b: int = 0, c: int = 0) -> int | None:
    base, width = parts[0], 8 * size(kind)
    if base in ("mul", "mad"):
        product = a * b >> width if parts[1] == "hi" else a * b
        if base == "mul":
            return product
        return clamp(product + c, kind) if "sat" in parts else product + c
    if base in ("div", "rem"):
        if b == 0:
            return None
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return quotient if base == "div" else a - quotient * b
    value = {
        "add": a + b,
        "sub": a - b,
        "min": min(a, b),
        "max": max(a, b),
        "neg": -a,
        "abs": abs(a),
        "sad": c + abs(a - b),
    }[base]
    if "relu" in parts:
        return max(value, 0)
    return clamp(value, kind) if "sat" in parts else value


_OPERANDS = {"neg": 1, "abs": 1, "sad": 3, "mad": 3, "fma": 3}


@pytest.mark.parametrize("opcode", _plain_integer_opcodes())
def test_integers(opcode: str) -> None:
    parts = opcode.split(".")
    kind = parts[-1]
    result = f"{kind[0]}{16 * size(kind)}" if "wide" in parts else kind
    kinds = [kind] * _OPERANDS.get(parts[0], 2)
    if len(kinds) == 3:
        kinds[2] = result

    def reference(*bits: int) -> int | None:
        values = [integer(x, k) for x, k in zip(bits, kinds, strict=True)]
        value = _integer_result(parts, kind, *values)
        return None if value is None else wrap(value, result)

    check(opcode, kinds, result, reference)


@pytest.mark.parametrize("opcode", opcodes(arithmetic, "dp4a"))
def test_dp4a(opcode: str) -> None:
    _, first, second = opcode.split(".")

    def reference(a: int, b: int, c: int) -> int:
        for k in range(4):
            c += integer(a >> 8 * k, f"{first[0]}8") * integer(b >> 8 * k, f"{second[0]}8")
        return wrap(c, "u32")

    check(opcode, ["b32", "b32", "b32"], "u32", reference)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("base", ["add", "sub"])
def test_carries_make_wide_sums(base: str, kind: str) -> None:
    """Numbers of three words."""
    words = samples([kind] * 6, seed=1)
    body = f"{base}.cc.{kind} r, a, d; {base}c.cc.{kind} s, b, e; {base}c.{kind} t, c, f;"
    arrays = {name: array(x, kind) for name, x in zip("abcdef", words, strict=True)}
    outputs = {name: unsigned(kind) for name in "rst"}
    found = run(body, **arrays, **outputs)
    width = 8 * size(kind)
    for i in range(len(words[0])):
        x, y = (sum(words[k + n][i] << width * n for n in range(3)) for k in (0, 3))
        wanted = (x + y if base == "add" else x - y) % (1 << 3 * width)
        assert sum(int(found[n][i]) << width * n for n in range(3)) == wanted


@pytest.mark.parametrize("kind", ["u32", "u64", "s32", "s64"])
def test_carries_make_wide_products(kind: str) -> None:
    """a * b + c of two words, each way to the carry."""
    a, b, low, high = samples([kind] * 4, seed=2)
    body = f"""
        mad.lo.cc.{kind} r, a, b, c; madc.hi.{kind} s, a, b, d;
        mad.hi.cc.{kind} t, a, b, c; madc.lo.cc.{kind} u, a, b, d; addc.{kind} v, 0, 0;
        sub.cc.{kind} w, c, d; madc.hi.cc.{kind} x, a, b, c; madc.lo.{kind} y, a, b, d;
    """
    arrays = {name: array(x, kind) for name, x in zip("abcd", (a, b, low, high), strict=True)}
    found = run(body, **arrays, **{name: unsigned(kind) for name in "rstuvwxy"})
    width = 8 * size(kind)
    r, s, t, u, v, w, x, y = (column.tolist() for column in found)
    for i, (p, q, c, d) in enumerate(zip(a, b, low, high, strict=True)):
        product = integer(p, kind) * integer(q, kind)
        lower, upper = wrap(product, kind), wrap(product >> width, kind)
        assert r[i] | s[i] << width == (product + c + (d << width)) % (1 << 2 * width)
        assert t[i] | u[i] << width | v[i] << 2 * width == upper + c + (lower + d << width)
        assert w[i] == wrap(c - d, kind)
        second = upper + c + (c < d)
        assert x[i] | y[i] << width == (second + (lower + d << width)) % (1 << 2 * width)


def test_a_carry_must_be_set() -> None:
    with pytest.raises(PtxError, match=r"uninitialised.*\n.*addc\.u32") as error:
        run("addc.u32 d, a, a;", a=np.arange(4, dtype=np.uint32), d=np.uint32)
    assert error.value.kind == "uninitialised"


def test_every_carry_opcode_is_tested() -> None:
    """Those above, by the ways they can be combined."""
    everything = set(opcodes(arithmetic)) - set(_plain_integer_opcodes())
    carries = {op for op in everything if not op.startswith("dp4a")}
    bases = [
        *("add.cc", "addc.cc", "addc", "sub.cc", "subc.cc", "subc"),
        *(f"mad.{part}.cc" for part in ("lo", "hi")),
        *(f"madc.{part}{out}" for part in ("lo", "hi") for out in ("", ".cc")),
    ]
    assert carries == {f"{b}.{kind}" for b in bases for kind in ("u32", "s32", "u64", "s64")}


# ---- floating point


def _extreme(base: str, parts: list[str], operands: list[float]) -> float:
    result, *others = operands
    for other in others:
        sign = math.copysign(1, result) * math.copysign(1, other)
        pair = [result, other]
        if "xorsign" in parts:
            pair = [abs(x) for x in pair]
        numbers = [x for x in pair if not math.isnan(x)]
        if not numbers or ("NaN" in parts and len(numbers) < 2):
            result = math.nan
            continue
        result = (min if base == "min" else max)(numbers, key=lambda x: (x, math.copysign(1, x)))
        if "xorsign" in parts:
            result = math.copysign(result, sign)
    return result


def _float_result(parts: list[str], kind: str, operands: list[float]) -> float:
    base = parts[0]
    mode = next((x for x in parts if x in ("rn", "rz", "rm", "rp")), "rn")
    a, b = operands[:2]
    if base in ("min", "max"):
        return _extreme(base, parts, operands)
    if base == "add":
        return added(a, b, kind, mode)
    if base == "sub":
        return added(a, -b, kind, mode)
    if base == "mul":
        return multiplied(a, b, kind, mode)
    if base == "div":
        if "approx" in parts and 2.0**126 < abs(b) < math.inf:
            return a * math.copysign(0.0, b)
        return divided(a, b, kind)
    return added(a, operands[2], kind, mode, product=b)


def _check_floats(opcode: str, count: int) -> None:
    parts = opcode.split(".")
    packed = parts[-1]
    kind = packed.removesuffix("x2")

    def reference(*bits: int) -> int:
        operands = [decode(x, kind) for x in bits]
        if "ftz" in parts:
            operands = [flushed(x, kind) for x in operands]
        value = _float_result(parts, kind, operands)
        if "sat" in parts:
            value = saturated(value)
        if "relu" in parts and value <= 0:
            value = 0.0
        return encode(flushed(value, kind) if "ftz" in parts else value, kind)

    def halves(*bits: int) -> int:
        low, high = (reference(*(x >> shift & 0xFFFF for x in bits)) for shift in (0, 16))
        return low | high << 16

    check(opcode, [packed] * count, packed, halves if packed != kind else reference)


@pytest.mark.parametrize(
    "opcode",
    [op for op in opcodes(floating) if op.split(".")[0] not in ("neg", "abs", "copysign")],
)
def test_floats(opcode: str) -> None:
    _check_floats(opcode, _OPERANDS.get(opcode.split(".")[0], 2))


@pytest.mark.parametrize("opcode", ["min.f32", "max.f32", "min.NaN.f32", "max.ftz.NaN.f32"])
def test_extremes_of_three(opcode: str) -> None:
    _check_floats(opcode, 3)


@pytest.mark.parametrize("opcode", [*opcodes(floating, "neg"), *opcodes(floating, "abs")])
def test_signs(opcode: str) -> None:
    parts = opcode.split(".")
    packed = parts[-1]
    kind = packed.removesuffix("x2")
    sign = 1 << 8 * size(kind) - 1

    def reference(bits: int) -> int:
        if "ftz" in parts and abs(decode(bits, kind)) < 2.0 ** (-14 if kind == "f16" else -126):
            bits &= sign
        return bits ^ sign if parts[0] == "neg" else bits & ~sign

    def halves(bits: int) -> int:
        return reference(bits & 0xFFFF) | reference(bits >> 16) << 16

    check(opcode, [packed], packed, halves if packed != kind else reference)


@pytest.mark.parametrize("opcode", opcodes(floating, "copysign"))
def test_copysign(opcode: str) -> None:
    kind = opcode.split(".")[-1]
    sign = 1 << 8 * size(kind) - 1
    check(opcode, [kind, kind], kind, lambda a, b: (a & sign) | (b & ~sign))


def test_fma_rounds_once() -> None:
    """1 + 2^-24 + 2^-60, which two roundings bring to 1."""
    a, b = np.float32(2.0**-30), np.float32(2.0**-30)
    c = np.float32(1 + 2.0**-23)
    halfway = np.float32(2.0**-12)
    arrays = [np.full(1, x) for x in (halfway, halfway, a, b, c)]
    (exact,) = run(
        "fma.rn.f32 %r, p, q, 0f00000000; fma.rn.f32 d, a, b, c;",
        registers=".reg .b32 %r;",
        **dict(zip("pqabc", arrays, strict=True)),
        d=np.float32,
    )
    assert exact[0] == c
    x = np.array([1 + 2.0**-12], np.float32)  # x * x = 1 + 2^-11 + 2^-24
    tiny = np.array([2.0**-60], np.float32)
    above, at, below = run(
        "fma.rn.f32 d, x, x, t; fma.rn.f32 e, x, x, 0f00000000;"
        " neg.f32 %n, t; fma.rn.f32 f, x, x, %n;",
        registers=".reg .b32 %n;",
        x=x,
        t=tiny,
        d=np.float32,
        e=np.float32,
        f=np.float32,
    )
    even = np.float32(1 + 2.0**-11)
    assert (above[0], at[0], below[0]) == (np.nextafter(even, np.float32(2)), even, even)


# ---- special functions

_FUNCTIONS = {
    "ex2": lambda x: 2.0**x if x < 1000 else math.inf,
    "lg2": lambda x: math.log2(x) if x > 0 else (-math.inf if x == 0 else math.nan),
    "sin": lambda x: math.sin(x) if math.isfinite(x) else math.nan,
    "cos": lambda x: math.cos(x) if math.isfinite(x) else math.nan,
    "tanh": math.tanh,
    "rcp": lambda x: divided(1.0, x, "f64"),
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rsqrt": lambda x: (
        divided(1.0, math.copysign(math.sqrt(abs(x)), x), "f64") if x >= 0 else math.nan
    ),
}
_ULP = {"f16": 2.0**-10, "bf16": 2.0**-7, "f32": 2.0**-23, "f64": 2.0**-52}
_SMALLEST = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149, "f64": 2.0**-1074}
# From here on a value is rounded to infinity.
_LARGEST = {
    "f16": 65520.0,
    "bf16": float.fromhex("0x1.ffp127"),
    "f32": float.fromhex("0x1.ffffffp127"),
    "f64": math.inf,
}


@pytest.mark.parametrize("opcode", [op for op in opcodes(special_functions) if ".approx" in op])
def test_approximate_functions(opcode: str) -> None:
    """Within a unit in the last place, with the limits where they belong."""
    parts = opcode.split(".")
    packed = parts[-1]
    kind = packed.removesuffix("x2")
    (operands,) = samples([packed], count=512, seed=3)
    (found,) = run(f"{opcode} d, a;", a=array(operands, packed), d=unsigned(packed))
    shifts = (0, 16) if packed != kind else (0,)
    part = (1 << 8 * size(kind)) - 1
    for bits, result in zip(operands, found.tolist(), strict=True):
        for shift in shifts:
            x, y = decode(bits >> shift & part, kind), decode(result >> shift & part, kind)
            if "ftz" in parts:
                x = flushed(x, kind)
            wanted = math.nan if math.isnan(x) else _FUNCTIONS[parts[0]](x)
            if "ftz" in parts:
                wanted = flushed(wanted, kind)
            message = f"{opcode} of {x}: {y}, not {wanted}"
            if math.isnan(wanted):
                assert result >> shift & part == encode(math.nan, kind), message
            elif math.isinf(wanted) or abs(wanted) > _LARGEST[kind] or wanted == 0:
                limit = math.copysign(math.inf if wanted else 0.0, wanted)
                assert (y, math.copysign(1, y)) == (limit, math.copysign(1, limit)), message
            else:
                tolerance = max(_ULP[kind] * abs(wanted), _SMALLEST[kind])
                assert abs(y - wanted) <= tolerance, message


@pytest.mark.parametrize("opcode", [op for op in opcodes(special_functions) if ".rn" in op])
def test_exact_functions(opcode: str) -> None:
    parts = opcode.split(".")
    kind = parts[-1]

    def reference(bits: int) -> int:
        x = decode(bits, kind)
        x = flushed(x, kind) if "ftz" in parts else x
        y = divided(1.0, x, kind) if parts[0] == "rcp" else root(x, kind)
        return encode(flushed(y, kind) if "ftz" in parts else y, kind)

    check(opcode, [kind], kind, reference)


# ---- what is not known


@pytest.mark.parametrize(
    "opcode",
    ["add.rz.u32", "add.rz.f64", "add.sat.u32", "mul.u32", "fma.f32", "div.f32", "min.s8"],
)
def test_unknown_modifiers_are_refused(opcode: str) -> None:
    kind = opcode.split(".")[-1]
    body = f"// a comment\n{opcode} d, a, a;"
    with pytest.raises(PtxError, match=rf"at line \d+: {opcode} d, a, a") as error:
        run(body, a=np.zeros(1, f"u{8 if kind == 'f64' else 4}"), d=np.uint32)
    assert error.value.kind == "unsupported"


def test_operands_must_fit() -> None:
    one = np.zeros(1, np.uint32)
    for body in (
        "add.u32 d, a;",
        "add.u32 d, a, a, a;",
        "add.u64 d, a, a;",
        "add.f16 d, a, a;",
        "add.bf16x2 d, a, 0;",
        "add.u32 d, %p, a;",
        "add.u32 d, a, nothing;",
    ):
        with pytest.raises(PtxError, match="at line") as error:
            run(body, registers=".reg .pred %p;", a=one, d=np.uint32)
        assert error.value.kind == "unsupported", body
