"""Floating-point arithmetic: every result is rounded once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tests.ptx.emulator.block import Execute
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import Operation, elementwise
from tests.ptx.emulator.rounding import (
    HALF_TYPES,
    flush_to_zero,
    from_values,
    relu,
    saturate,
    to_values,
)
from tests.ptx.emulator.types import (
    UNSIGNED,
    canonical,
    float_to_halves,
    fused,
    halves_to_float,
    odd_sum,
    size_of,
)

_F32 = "[.{ftz:ftz}][.{sat:sat}].{type:f32}"
_F16 = "[.{ftz:ftz}][.{sat:sat}].{type:f16,f16x2}"
_ROUND = "{round:rn,rz,rm,rp}"


def _arithmetic_forms(base: str) -> tuple[str, ...]:
    return (
        f"{base}[.{_ROUND}]{_F32}",
        f"{base}[.{{round:rn}}].{{type:f64}}",
        f"{base}[.{{round:rn}}]{_F16}",
        f"{base}[.{{round:rn}}].{{type:bf16,bf16x2}}",
    )


def _rounded(build: Build, exact: Operation, native: Operation, count: int) -> Execute:
    """`exact` gives float64 that are exact or rounded to odd; `native` rounds to nearest itself,
    in float32 or float64, and is faster."""
    kind, rounding = build.type, build.choices.get("round") or "rn"
    ftz, sat = build.has("ftz"), build.has("sat")

    def natively(*operands: np.ndarray) -> np.ndarray:
        if ftz:
            operands = tuple(flush_to_zero(x, kind) for x in operands)
        result = canonical(native(*operands))
        if sat:
            result = saturate(result)
        return flush_to_zero(result, kind) if ftz else result

    def exactly(*operands: np.ndarray) -> np.ndarray:
        result = exact(*(to_values(x, kind, ftz=ftz) for x in operands))
        if sat:
            result = saturate(result)
        if build.has("relu"):
            result = relu(result)
        return from_values(result, kind, rounding, ftz=ftz)

    fast = kind in ("f32", "f64") and rounding == "rn"
    return elementwise(build, natively if fast else exactly, *[kind] * count)


def _sum(build: Build) -> Operation:
    """The sum of two float64 values for one more rounding."""
    down = build.choices.get("round") == "rm"

    def total(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = odd_sum(a, b).reshape(a.shape)
        if down:  # the only direction in which x - x is -0
            result = np.where((result == 0) & (np.signbit(a) != np.signbit(b)), -0.0, result)
        return result

    return total


@instruction(*_arithmetic_forms("add"))
def add(build: Build) -> Execute:
    return _rounded(build, _sum(build), np.add, 2)


@instruction(*_arithmetic_forms("sub"))
def sub(build: Build) -> Execute:
    total = _sum(build)
    return _rounded(build, lambda a, b: total(a, -b), np.subtract, 2)


@instruction(*_arithmetic_forms("mul"))
def mul(build: Build) -> Execute:
    return _rounded(build, np.multiply, np.multiply, 2)


@instruction(
    f"fma.{_ROUND}{_F32}",
    "fma.{round:rn}.{type:f64}",
    f"fma.{{round:rn}}{_F16}",
    "fma.{round:rn}[.{ftz:ftz}].{relu:relu}.{type:f16,f16x2}",
    "fma.{round:rn}[.{relu:relu}].{type:bf16,bf16x2}",
    f"mad.{_ROUND}{_F32}",
    "mad.{round:rn}.{type:f64}",
)
def fma(build: Build) -> Execute:
    total = _sum(build)
    native = fused if build.type == "f32" else _fused_f64
    return _rounded(build, lambda a, b, c: total(a * b, c), native, 3)


def _fused_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """By exact fractions, thread by thread: no kernel has much of it."""
    finite = np.isfinite(a) & np.isfinite(b)
    # An infinite addend wins over a finite product, even one that would overflow.
    result = np.where(finite & np.isinf(c), c, a * b + c)
    for i in np.flatnonzero(finite & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            result[i] = _nearest_f64(exact)
        elif a[i] and b[i]:
            result[i] = 0.0  # the product and the addend cancel
    return result


def _nearest_f64(exact: Fraction) -> float:
    try:
        value = float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else -float("inf")
    return value if value else (0.0 if exact > 0 else -0.0)


# ---- quotients


@instruction("div.{round:rn}[.{ftz:ftz}].{type:f32}", "div.{round:rn}.{type:f64}")
def div(build: Build) -> Execute:
    return _rounded(build, np.divide, np.divide, 2)


@instruction("div.full[.{ftz:ftz}].{type:f32}")
def div_full(build: Build) -> Execute:
    return _rounded(build, np.divide, np.divide, 2)


@instruction("div.approx[.{ftz:ftz}].{type:f32}")
def div_approx(build: Build) -> Execute:
    def operation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # The divisor's reciprocal is subnormal here, and the hardware makes it zero.
        large = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(large, a * np.copysign(np.float32(0), b), a / b)

    return _rounded(build, operation, operation, 2)


# ---- minimum and maximum


def _extreme_forms(base: str) -> tuple[str, ...]:
    xorsign = "[.{nan:NaN}][.{xorsign:xorsign.abs}]"
    return (
        f"{base}[.{{ftz:ftz}}]{xorsign}.{{type:f32,f16,f16x2}}",
        f"{base}{xorsign}.{{type:bf16,bf16x2}}",
        f"{base}.{{type:f64}}",
    )


@instruction(*_extreme_forms("min"))
def minimum(build: Build) -> Execute:
    return _extreme(build, np.fmin, np.minimum, np.bitwise_or)


@instruction(*_extreme_forms("max"))
def maximum(build: Build) -> Execute:
    return _extreme(build, np.fmax, np.maximum, np.bitwise_and)


def _extreme(build: Build, number: np.ufunc, nan: np.ufunc, signs: np.ufunc) -> Execute:
    """`number` prefers a number to NaN, `nan` NaN; `signs` combines the bits of equal operands.

    Those differ in zeros only, where PTX has -0 below +0 and NumPy takes either.
    """
    kind, ftz, xorsign = build.type, build.has("ftz"), build.has("xorsign")
    pick = nan if build.has("nan") else number

    def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ftz:
            a, b = flush_to_zero(a, kind), flush_to_zero(b, kind)
        if xorsign:
            negative = np.signbit(a) ^ np.signbit(b)
            a, b = np.abs(a), np.abs(b)
        unsigned = UNSIGNED[a.dtype.itemsize]
        equal = signs(a.view(unsigned), b.view(unsigned)).view(a.dtype)
        result = np.where(a == b, equal, pick(a, b))
        return canonical(np.where(negative, -result, result) if xorsign else result)

    def operation(a: np.ndarray, *others: np.ndarray) -> np.ndarray:
        for b in others:
            a = combine(a, b)
        return a

    def on_halves(*operands: np.ndarray) -> np.ndarray:
        return float_to_halves(operation(*(halves_to_float(x, kind) for x in operands)), kind)

    # Three operands: of f32, and without the exchange of signs, which is defined for two.
    count = 3 if len(build.operands) == 4 and kind == "f32" and not xorsign else 2
    return elementwise(build, on_halves if kind in HALF_TYPES else operation, *[kind] * count)


# ---- signs

_SIGN = {"f32": 1 << 31, "f64": 1 << 63, "f16": 0x8000, "bf16": 0x8000}
_EXPONENT = {"f32": 0x7F800000, "f16": 0x7C00}


def _sign_forms(base: str) -> tuple[str, ...]:
    return (
        f"{base}[.{{ftz:ftz}}].{{type:f32,f16,f16x2}}",
        f"{base}.{{type:f64,bf16,bf16x2}}",
    )


@instruction(*_sign_forms("neg"))
def neg(build: Build) -> Execute:
    return _on_bits(build, lambda bits, sign: bits ^ sign)


@instruction(*_sign_forms("abs"))
def absolute(build: Build) -> Execute:
    return _on_bits(build, lambda bits, sign: bits & ~sign)


def _on_bits(build: Build, operation: Operation) -> Execute:
    """NaN keeps its bits here but for the sign."""
    kind = build.type.removesuffix("x2")
    part = UNSIGNED[size_of(kind)]
    sign = part(_SIGN[kind])

    def run(bits: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(bits).view(part)
        if build.has("ftz"):
            x = np.where(x & part(_EXPONENT[kind]), x, x & sign)
        return operation(x, sign).view(bits.dtype)

    return elementwise(build, run, build.type)


@instruction("copysign.{type:f32,f64}")
def copysign(build: Build) -> Execute:
    # The first operand has the sign, the second the magnitude.
    return elementwise(build, lambda a, b: np.copysign(b, a), build.type, build.type)
