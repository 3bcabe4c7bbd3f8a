"""Conversions: every opcode, on edge cases, against exact numbers; generic addresses."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from tests.ptx.emulator import Module, PtxError
from tests.ptx.emulator.build import GLOBAL_BASE, PARAMETER_BASE, SHARED_BASE
from tests.ptx.emulator.instructions import convert
from tests.ptx.exact import (
    FORMATS,
    bounds,
    clamp,
    decode,
    encode,
    flushed,
    halfway,
    integer,
    narrowed,
    rounded,
    saturated,
    size,
    wrap,
)
from tests.ptx.one_instruction import check, opcodes, run

_BYTES = {"e4m3x2": (4, 3), "e5m2x2": (5, 2)}
_INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
_PACKED = ("f16x2", "bf16x2", "e4m3x2", "e5m2x2")


def _storage(kind: str) -> str:
    """Bytes are kept in 16-bit registers, which may be wider than the type."""
    return f"{kind[0]}16" if kind in ("u8", "s8") else kind


def _single_conversions() -> list[str]:
    return [op for op in opcodes(convert, "cvt") if not set(op.split(".")) & set(_PACKED)]


def _operand(bits: int, source: str, parts: list[str]) -> float | int:
    if source not in FORMATS:
        return integer(bits, source)
    value = decode(bits, source)
    return flushed(value, source) if "ftz" in parts and source == "f32" else value


def _to_integer(value: float | int, kind: str, source: str, parts: list[str]) -> int:
    if source not in FORMATS:
        return clamp(int(value), kind) if "sat" in parts else int(value)
    if math.isnan(value):
        wide = source == "f64" or kind in ("u64", "s64")
        return 1 << 8 * size(kind) - 1 if wide else 0
    if math.isinf(value):
        return bounds(kind)[value > 0]
    mode = next(x for x in parts if x in _INTEGRAL)
    return clamp(_INTEGRAL[mode](Fraction(value)), kind)


def _to_float(value: float | int, kind: str, parts: list[str]) -> float:
    integral = next((x for x in parts if x in _INTEGRAL), None)
    if integral and math.isfinite(value):
        value = math.copysign(float(_INTEGRAL[integral](Fraction(value))), value)
    mode = next((x for x in parts if x in ("rn", "rz", "rm", "rp", "rna")), "rn")
    if isinstance(value, int):
        result = rounded(Fraction(value), kind, mode) if value else 0.0
    else:
        result = narrowed(value, kind, mode)
    if "sat" in parts:
        result = saturated(result)
    if "relu" in parts and result <= 0:
        result = 0.0
    return flushed(result, kind) if "ftz" in parts and kind == "f32" else result


@pytest.mark.parametrize("opcode", _single_conversions())
def test_cvt(opcode: str) -> None:
    parts = opcode.split(".")
    kind, source = parts[-2:]

    def reference(bits: int) -> int:
        value = _operand(bits, source, parts)
        if kind in FORMATS:
            return encode(_to_float(value, kind, parts), kind)
        # A register that is wider than the type gets the sign, or zeros.
        result = integer(_to_integer(value, kind, source, parts), kind)
        return wrap(result, _storage(kind))

    more = halfway(source, kind) if kind in FORMATS and kind != source else []
    check(opcode, [_storage(source)], _storage(kind), reference, more=more)


@pytest.mark.parametrize("opcode", [op for op in opcodes(convert, "cvt") if op.endswith("x2.f32")])
def test_cvt_of_two(opcode: str) -> None:
    parts = opcode.split(".")
    packed = parts[-2]

    def reference(high: int, low: int) -> int:
        values = [decode(bits, "f32") for bits in (low, high)]
        if packed in _BYTES:
            low, high = (_encode_byte(x, packed, "relu" in parts) for x in values)
            return low | high << 8
        kind = packed.removesuffix("x2")
        low, high = (encode(_to_float(x, kind, parts), kind) for x in values)
        return low | high << 16

    more = [] if packed in _BYTES else halfway("f32", packed.removesuffix("x2"))
    check(opcode, ["f32", "f32"], "u16" if packed in _BYTES else packed, reference, more=more)


# ---- eight bits


@cache
def _byte_values(packed: str) -> dict[int, float]:
    """The finite values by their codes, from the definition of the formats."""
    exponent_bits, mantissa_bits = _BYTES[packed]
    bias = 2 ** (exponent_bits - 1) - 1
    values = {}
    for code in range(128):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        normal = (1 + fraction) * 2.0 ** (exponent - bias)
        values[code] = normal if exponent else fraction * 2.0 ** (1 - bias)
    last = {"e4m3x2": 0x7E, "e5m2x2": 0x7B}[packed]
    return {code: x for code, x in values.items() if code <= last}


def _encode_byte(x: float, packed: str, relu: bool) -> int:
    if math.isnan(x):
        return 0x7F
    if relu and x <= 0:
        return 0
    values = _byte_values(packed)
    largest = max(values.values())
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    magnitude = min(abs(x), largest)
    distance = {code: abs(Fraction(v) - Fraction(magnitude)) for code, v in values.items()}
    nearest = min(distance.values())
    return sign | min((code for code in distance if distance[code] == nearest), key=lambda c: c % 2)


def test_known_bytes() -> None:
    values = {"e4m3x2": _byte_values("e4m3x2"), "e5m2x2": _byte_values("e5m2x2")}
    assert max(values["e4m3x2"].values()) == 448 and max(values["e5m2x2"].values()) == 57344
    assert values["e4m3x2"][1] == 2.0**-9 and values["e5m2x2"][1] == 2.0**-16


@pytest.mark.parametrize(
    "opcode",
    [op for op in opcodes(convert, "cvt") if op.split(".")[-2] in _BYTES and op.endswith("f16x2")],
)
def test_cvt_of_two_halves_to_bytes(opcode: str) -> None:
    parts = opcode.split(".")

    def reference(bits: int) -> int:
        low, high = (
            _encode_byte(decode(bits >> shift & 0xFFFF, "f16"), parts[-2], "relu" in parts)
            for shift in (0, 16)
        )
        return low | high << 8

    check(opcode, ["f16x2"], "u16", reference)


@pytest.mark.parametrize(
    "opcode", [op for op in opcodes(convert, "cvt") if op.split(".")[-1] in _BYTES]
)
def test_cvt_of_bytes_to_halves(opcode: str) -> None:
    """Every byte."""
    parts = opcode.split(".")
    packed = parts[-1]
    codes = np.arange(256, dtype=np.uint16)
    (found,) = run(f"{opcode} d, a;", a=codes | (255 - codes) << 8, d=np.uint32)
    values = _byte_values(packed)

    def wanted(code: int) -> int:
        value = values.get(
            code & 0x7F, math.inf if packed == "e5m2x2" and code & 0x7F == 0x7C else math.nan
        )
        value = -value if code & 0x80 else value
        return encode(0.0 if "relu" in parts and value <= 0 else value, "f16")

    for code, result in enumerate(found.tolist()):
        assert result == wanted(code) | wanted(255 - code) << 16, hex(code)


def test_every_conversion_is_tested() -> None:
    left = set(opcodes(convert, "cvt")) - set(_single_conversions())
    assert all(op.endswith("x2.f32") or "e4m3x2" in op or "e5m2x2" in op for op in left)


def test_unknown_conversions_are_refused() -> None:
    a = np.zeros(1, np.uint32)
    for opcode in (
        "cvt.foo",
        "cvt.f16.f32",
        "cvt.rn.s32.f32",
        "cvt.rn.sat.bf16.f32",
        "cvt.rn.s32.u32",
        "cvt.u32.f32",
        "cvt.rn.f32.f32",
        "cvt.rn.e4m3x2.f32",
        # There is nothing to saturate; bfloat16 has no bytes, and is not saturated.
        "cvt.sat.u64.u8",
        "cvt.sat.s32.u16",
        "cvt.rn.bf16.s8",
        "cvt.rzi.u8.bf16",
        "cvt.rzi.sat.s32.bf16",
    ):
        with pytest.raises(PtxError, match=rf"at line \d+: {opcode} d, a") as error:
            run(f"{opcode} d, a;", a=a, d=np.uint32)
        assert error.value.kind == "unsupported"


def test_registers_may_be_wider_but_not_narrower() -> None:
    a = np.array([0x89ABFF80], np.uint32)
    low, sign = run("cvt.u32.u8 d, a; cvt.s32.s8 e, a;", a=a, d=np.uint32, e=np.uint32)
    assert (int(low[0]), int(sign[0])) == (0x80, 0xFFFFFF80)
    for body in ("cvt.u64.u32 d, a;", "cvt.rn.f16.f32 d, a;", "cvt.f64.f32 d, a;"):
        with pytest.raises(PtxError, match="at line") as error:
            run(body, a=a, d=np.uint32)
        assert error.value.kind == "unsupported"


# ---- addresses


def test_generic_addresses() -> None:
    """There and back, and what isspacep says of each."""
    spaces = ["global", "shared", "shared::cta", "shared::cluster", "param"]
    addresses = dict.fromkeys(spaces, 64) | {"global": GLOBAL_BASE + 4096}
    bases = {"global": 0, "param": PARAMETER_BASE}
    for space, address in addresses.items():
        tests = "".join(f"isspacep.{s} {p}, g;" for s, p in zip(spaces, "pqrst", strict=True))
        generic, back, *inside = run(
            f"cvta.{space}.u64 g, a; cvta.to.{space}.u64 b, g; {tests}",
            a=np.array([address], np.uint64),
            g=np.uint64,
            b=np.uint64,
            **dict.fromkeys("pqrst", bool),
        )
        assert int(generic[0]) == address + bases.get(space, SHARED_BASE)
        assert int(back[0]) == address
        wanted = [s.split("::")[0] == space.split("::")[0] for s in spaces]
        assert [bool(x[0]) for x in inside] == wanted


def test_a_null_pointer_is_global() -> None:
    (found,) = run("cvta.to.global.u64 d, a;", a=np.zeros(1, np.uint64), d=np.uint64)
    assert found[0] == 0


def test_generic_addresses_of_other_spaces_are_refused() -> None:
    with pytest.raises(PtxError, match="state space") as error:
        run("cvta.to.shared.u64 d, a;", a=np.array([GLOBAL_BASE], np.uint64), d=np.uint64)
    assert error.value.kind == "bounds"
    # Threads that do not execute it may hold anything.
    run(
        "setp.ne.u64 %p, a, 0; @%p cvta.to.shared.u64 d, a; @!%p mov.u64 d, 0;",
        registers=".reg .pred %p;",
        a=np.array([SHARED_BASE, 0], np.uint64),
        d=np.uint64,
    )


def test_cvta_of_a_variable() -> None:
    module = Module(
        """.version 8.4
        .target sm_90a
        .address_size 64
        .shared .align 16 .b8 first[20];
        .shared .align 16 .b8 second[16];
        .visible .entry kernel(.param .u64 out, .param .align 64 .b8 map[128]) {
        .reg .b64 %p, %a, %b;
        ld.param.u64 %p, [out];
        cvta.shared.u64 %a, second; mov.b64 %b, map; cvta.param.u64 %b, %b;
        st.global.u64 [%p], %a; st.global.u64 [%p+8], %b;
        ret;
        }"""
    )
    out = module.allocate(16, "out")
    module.launch("kernel", (1,), 1, [out])
    values = module.download(out).view(np.uint64)
    assert values.tolist() == [SHARED_BASE + 32, PARAMETER_BASE + 64]
