"""PTX's scalar types, and the roundings that NumPy does not have.

Values of a register are NumPy arrays with one element per thread. A type says how their bits are
read: bfloat16 and the packed types have no NumPy counterpart and stay unsigned integers.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "tf32": np.uint32,
    "e4m3x2": np.uint16,
    "e5m2x2": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
}
for _bytes in UNSIGNED:
    TYPES |= {f"{letter}{8 * _bytes}": UNSIGNED[_bytes] for letter in "bu"}
    TYPES[f"s{8 * _bytes}"] = SIGNED[_bytes]


def size_of(type_name: str) -> int:
    """Bytes of a type."""
    return np.dtype(TYPES[type_name]).itemsize


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values, to nearest even; NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def halves_to_float(bits: np.ndarray, type_name: str) -> np.ndarray:
    """float32 values of f16 or bf16 (n,), or f16x2 or bf16x2 (n, 2), the low half first."""
    halves = np.ascontiguousarray(bits).view(np.uint16)
    packed = type_name.endswith("x2")
    if type_name.startswith("b"):
        values = from_bf16(halves)
    else:
        values = halves.view(np.float16).astype(np.float32)
    return values.reshape(-1, 2) if packed else values


def float_to_halves(x: np.ndarray, type_name: str) -> np.ndarray:
    """The inverse, to nearest even: bits of one register per thread."""
    with np.errstate(all="ignore"):
        x = np.ascontiguousarray(x, np.float32)
        bits = to_bf16(x) if type_name.startswith("b") else canonical(x.astype(np.float16))
    bits = np.ascontiguousarray(bits).view(np.uint16)
    return bits.view(np.uint32).reshape(-1) if type_name.endswith("x2") else bits


def canonical(x: np.ndarray) -> np.ndarray:
    """Give every NaN the bits that NVIDIA's arithmetic produces: all ones but the sign."""
    unknown = np.isnan(x)
    if not unknown.any():
        return x
    bits = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FF8000000000000}[x.dtype.itemsize]
    nan = np.array(bits, UNSIGNED[x.dtype.itemsize]).view(x.dtype)
    return np.where(unknown, nan, x)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 values become zeros of their sign (`.ftz`)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64 values, rounded to odd where it is not exact.

    The last bit of an inexact sum is 1, so that rounding it again, to fewer bits, has the result
    of rounding once (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    total = np.atleast_1d(a + b)
    other = total - a
    lost = (a - (total - other)) + (b - other)
    inexact = np.isfinite(total) & (lost != 0)
    if not inexact.any():
        return total
    bits = total.view(np.int64)
    # Towards the lost part: away from zero where it has the sign of the sum, else to zero.
    step = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(inexact & ((bits & 1) == 0), bits + step, bits).view(np.float64)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 values, rounded once."""
    with np.errstate(all="ignore"):
        # The product is exact in float64, the sum is not.
        product = a.astype(np.float64) * b.astype(np.float64)
        c = c.astype(np.float64)
        total = np.atleast_1d(product + c)
        # Two roundings differ from one only if the first ends halfway between two float32 values.
        halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
        tiny = (np.abs(total) < 2.0**-125) & (total != 0)
        if (halfway | tiny).any():
            total = odd_sum(product, c)
        return canonical(total.reshape(product.shape).astype(np.float32))
