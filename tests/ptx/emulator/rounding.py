"""Floating-point registers as float64 values, and back with one rounding in any direction.

A result that float64 cannot hold is rounded to odd (types.odd_sum), so that the rounding to the
narrower type is the only one that counts.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.types import canonical, halves_to_float, to_bf16

HALF_TYPES = ("f16", "bf16", "f16x2", "bf16x2")
_SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126}
_TOWARDS = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}


def flush_to_zero(x: np.ndarray, type_name: str) -> np.ndarray:
    """Make zeros, with their sign, of what is subnormal in the type (`.ftz`)."""
    small = np.abs(x) < _SMALLEST_NORMAL[type_name.removesuffix("x2")]
    return np.where(small, x * 0, x) if small.any() else x


def saturate(x: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1]; NaN becomes +0 (`.sat`)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x: np.ndarray) -> np.ndarray:
    """Make +0 of what is not positive; NaN stays."""
    return np.where(x <= 0, x.dtype.type(0), x)


def to_values(bits: np.ndarray, type_name: str, *, ftz: bool = False) -> np.ndarray:
    """float64 values of a register, (T,), or (T, 2) for a packed type, the low half first."""
    if type_name in ("f32", "f64"):
        x = bits.astype(np.float64)
    else:
        x = halves_to_float(bits, type_name).astype(np.float64)
    return flush_to_zero(x, type_name) if ftz else x


def from_values(
    x: np.ndarray, type_name: str, rounding: str = "rn", *, ftz: bool = False
) -> np.ndarray:
    """The inverse: bits for one register per thread, NaN in its canonical form."""
    kind = type_name.removesuffix("x2")
    if kind == "f64":
        return canonical(x)
    if kind == "bf16":
        bits = _round_to_bf16(x, rounding)
        if ftz:
            bits = np.where(bits & 0x7F80, bits, bits & 0x8000).astype(np.uint16)
    else:
        rounded = canonical(round_to(x, np.float32 if kind == "f32" else np.float16, rounding))
        bits = flush_to_zero(rounded, kind) if ftz else rounded
    if type_name.endswith("x2"):
        return np.ascontiguousarray(bits).view(np.uint32).reshape(-1)
    return bits


def round_to(x: np.ndarray, dtype: type[np.floating], rounding: str) -> np.ndarray:
    """Round float64 to float32 or float16: rn, rz, rm or rp."""
    nearest = x.astype(dtype)
    if rounding == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if rounding == "rz":
        beyond = np.abs(back) > np.abs(x)
    else:
        beyond = back > x if rounding == "rm" else back < x
    return np.where(beyond, np.nextafter(nearest, dtype(_TOWARDS[rounding])), nearest)


def _round_to_bf16(x: np.ndarray, rounding: str) -> np.ndarray:
    narrow = x.astype(np.float32)
    if rounding == "rn" and (narrow == x).all():
        return to_bf16(narrow)
    cut = round_to(x, np.float32, "rz")
    if rounding == "rz":
        high = (cut.view(np.uint32) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), high)
    # The last bit says that something was cut off, which decides between halfway and above.
    odd = cut.view(np.uint32) | (cut.astype(np.float64) != x)
    return to_bf16(odd.view(np.float32))
