"""What instructions should give, from Python's integers and fractions alone; and edge cases.

Registers are Python integers here, the bits of a type.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np

# Significant bits, exponents of the smallest normal and of the largest value.
FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "tf32": (11, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}
SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}
_CODES = {"f16": "<e", "f32": "<f", "f64": "<d"}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x7FFFFFFF, "f32": 0x7FFFFFFF}


def size(kind: str) -> int:
    return SIZES[kind] if kind in SIZES else int(kind[1:]) // 8


def unsigned(kind: str) -> type:
    return np.dtype(f"u{size(kind)}").type


# ---- integers


def integer(bits: int, kind: str) -> int:
    """The value of bits in an integer type."""
    width = 8 * size(kind)
    bits &= (1 << width) - 1
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def wrap(value: int, kind: str) -> int:
    return value & ((1 << 8 * size(kind)) - 1)


def bounds(kind: str) -> tuple[int, int]:
    width = 8 * size(kind)
    return (
        (-(1 << (width - 1)), (1 << (width - 1)) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    )


def clamp(value: int, kind: str) -> int:
    low, high = bounds(kind)
    return max(low, min(high, value))


# ---- floating point


def decode(bits: int, kind: str) -> float:
    if kind == "bf16":
        bits, kind = bits << 16, "f32"
    kind = "f32" if kind == "tf32" else kind
    return struct.unpack(_CODES[kind], bits.to_bytes(SIZES[kind], "little"))[0]


def encode(value: float, kind: str) -> int:
    """The bits of a value that the type has."""
    if math.isnan(value):
        return _NAN.get(kind, 0x7FF8000000000000)
    stored = "f32" if kind in ("bf16", "tf32") else kind
    bits = int.from_bytes(struct.pack(_CODES[stored], value), "little")
    assert kind != "bf16" or bits & 0xFFFF == 0
    return bits >> 16 if kind == "bf16" else bits


def largest(kind: str) -> float:
    precision, _, top = FORMATS[kind]
    return float((2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** top)


def rounded(value: Fraction, kind: str, mode: str = "rn") -> float:
    """rn, rz, rm, rp, or rna: to nearest, ties away from zero. Not for zero, which has a sign."""
    precision, lowest, _ = FORMATS[kind]
    sign = -1 if value < 0 else 1
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    steps = value / unit
    whole = {
        "rn": round,
        "rz": math.trunc,
        "rm": math.floor,
        "rp": math.ceil,
        "rna": lambda x: sign * math.floor(abs(x) + Fraction(1, 2)),
    }[mode](steps)
    result = whole * unit
    if abs(result) > Fraction(largest(kind)):
        finite = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return math.copysign(largest(kind) if finite else math.inf, sign)
    return math.copysign(float(result), sign)


def narrowed(value: float, kind: str, mode: str = "rn") -> float:
    """A float64 in another type."""
    if value == 0 or not math.isfinite(value):
        return value
    return rounded(Fraction(value), kind, mode)


def added(
    a: float, b: float, kind: str, mode: str = "rn", *, product: float | None = None
) -> float:
    """a + b; or a * product + b."""
    factor = 1.0 if product is None else product
    if math.isfinite(a) and math.isfinite(factor) and not math.isfinite(b):
        return b
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(factor)):
        return a * factor + b
    exact = Fraction(a) * Fraction(factor) + Fraction(b)
    if exact:
        return rounded(exact, kind, mode)
    negative = math.copysign(1, a) * math.copysign(1, factor) < 0
    if negative == (math.copysign(1, b) < 0):
        return -0.0 if negative else 0.0
    return -0.0 if mode == "rm" else 0.0


def multiplied(a: float, b: float, kind: str, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
        return a * b
    return rounded(Fraction(a) * Fraction(b), kind, mode)


def divided(a: float, b: float, kind: str) -> float:
    if math.isfinite(a) and math.isfinite(b) and a and b:
        return rounded(Fraction(a) / Fraction(b), kind)
    if math.isnan(a) or math.isnan(b) or (a == 0 == b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    return math.copysign(math.inf if math.isinf(a) or b == 0 else 0.0, sign)


def root(a: float, kind: str) -> float:
    """Rounded to nearest: no root is a subnormal number, nor halfway between two."""
    if math.isnan(a) or a < 0:
        return math.nan
    if a == 0 or math.isinf(a):
        return a
    exact = Fraction(a)
    shift = 300 + 2 * exact.denominator.bit_length()
    return rounded(Fraction(math.isqrt(math.floor(exact * 4**shift)), 2**shift), kind)


def flushed(value: float, kind: str) -> float:
    small = abs(value) < 2.0 ** FORMATS[kind][1]
    return math.copysign(0.0, value) if small else value


def saturated(value: float) -> float:
    return min(value, 1.0) if value > 0 else 0.0


# ---- edge cases


def specials(kind: str) -> list[int]:
    """Zeros, infinities, NaN, the ends of the ranges, and values that give halfway cases."""
    if kind in FORMATS:
        precision, lowest, _ = FORMATS[kind]
        ulp = 2.0 ** (1 - precision)
        values = [
            *(0.0, 1.0, 1.5, 2.0, 3.0, 0.5, 0.1, 100.25, 2.5, 126.5, 127.5, 255.5, 32768.0),
            *(math.inf, largest(kind), largest(kind) / 2, 1 + ulp, 1 - ulp / 2, 1 + 3 * ulp),
            *(ulp, ulp / 2, 3 * ulp / 2, 2.0**lowest, 2.0**lowest * (1 - ulp)),
            *(2.0**lowest * ulp, 2.0 ** (lowest + 1), 2.0 ** (lowest // 2), 1 / ulp, 2 / ulp - 1),
        ]
        bits = [encode(narrowed(x, kind), kind) for x in values]
        sign = 1 << (8 * SIZES[kind] - 1)
        # The second NaN has not the canonical bits.
        return [
            *bits,
            *(x | sign for x in bits),
            encode(math.nan, kind),
            encode(math.inf, kind) + 1,
        ]
    if kind.endswith("x2"):
        single = specials(kind.removesuffix("x2"))
        return [a | b << 16 for a, b in zip(single, single[7:] + single[:7], strict=True)]
    width = 8 * size(kind)
    top = 1 << (width - 1)
    small = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 100, 127, 128, 255]
    patterns = [0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, 0xF0E1D2C3B4A59687]
    large = [top, top - 1, top + 1, 2 * top - 1, 2 * top - 2, top >> 1, 2 * top - 7]
    return [x & (2 * top - 1) for x in [*small, *patterns, *large]]


def samples(kinds: list[str], count: int = 256, seed: int = 0) -> list[list[int]]:
    """Tuples of operands, mostly edge cases: a list per operand."""
    random = np.random.default_rng(seed)
    columns = []
    for kind in kinds:
        if kind == "pred":
            columns.append([int(x) for x in random.integers(0, 2, count)])
            continue
        edges = specials(kind)
        bits = np.frombuffer(random.bytes(count * size(kind)), unsigned(kind))
        picked = random.integers(0, len(edges), count)
        edge = random.random(count) < 0.7
        columns.append(
            [edges[p] if e else int(b) for p, e, b in zip(picked, edge, bits, strict=True)]
        )
    return columns


def halfway(source: str, target: str) -> list[int]:
    """Values of a wider type, or an integer type, halfway between two of the target, and beside."""
    found = []
    precision = FORMATS[target][0]
    for significand in (1 << precision - 1, (1 << precision - 1) + 1, (1 << precision) - 1):
        for more in range(2, 64 - precision):
            middle = (2 * significand + 1) << more
            for value in (middle - 1, middle, middle + 1):
                if source in FORMATS:
                    x = value * 2.0 ** -(more + precision + 1)  # about one half
                    if narrowed(x, source) == x:
                        found += [encode(x, source), encode(-x, source)]
                elif value <= bounds(source)[1]:
                    found += [value, wrap(-value, source)]
    return found


def array(bits: list[int], kind: str) -> np.ndarray:
    return np.array(bits, bool if kind == "pred" else unsigned(kind))
