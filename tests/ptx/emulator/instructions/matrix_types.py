"""The element types of tensor cores: bits of registers or memory as float32, and back.

All products are summed in float32 in the order of NumPy's matmul; a GPU's order is not specified.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.types import UNSIGNED, canonical, from_bf16

BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}

# What a tensor core does with the low 13 bits of a tf32 operand is not specified. They are cut off.
TF32_BITS = np.uint32(0xFFFFE000)


def _e5m2_values() -> np.ndarray:
    """e5m2 is the upper byte of an f16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


def _e4m3_values() -> np.ndarray:
    """Bias 7, no infinities; NaN is all ones."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    magnitude = np.where(
        exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7)
    )
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.float32)


_TABLES = {"e4m3": _e4m3_values(), "e5m2": _e5m2_values()}


def decode(bits: np.ndarray, type_name: str) -> np.ndarray:
    """float32 values of contiguous unsigned elements."""
    if type_name == "bf16":
        return from_bf16(bits)
    if type_name == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type_name == "tf32":
        return (bits & TF32_BITS).view(np.float32)
    if type_name == "s8":
        return bits.view(np.int8).astype(np.float32)
    if type_name == "u8":
        return bits.astype(np.float32)
    return _TABLES[type_name][bits]


def as_elements(bits: np.ndarray, type_name: str) -> np.ndarray:
    """32-bit registers (..., n) as unsigned elements (..., n * width), the low one first."""
    return np.ascontiguousarray(bits, np.uint32).view(UNSIGNED[BYTES[type_name]])


def add_products(
    bits: np.ndarray, products: np.ndarray, type_name: str, *, saturate: bool = False
) -> np.ndarray:
    """Accumulators (..., n) of 32 bits plus float32 products (..., n * width), as 32 bits.

    f16 is rounded once. s32 wraps around, or saturates; its products are exact: they are sums of
    at most 32 products of bytes, below 2 to the 24.
    """
    bits = np.ascontiguousarray(bits, np.uint32)
    if type_name == "s32":
        total = bits.view(np.int32).astype(np.int64) + products.astype(np.int64)
        if saturate:
            total = total.clip(-(2**31), 2**31 - 1)
        return total.astype(np.int32).view(np.uint32)
    with np.errstate(all="ignore"):
        if type_name == "f16":
            total = bits.view(np.float16).astype(np.float32) + products
            return canonical(total.astype(np.float16)).view(np.uint32)
        return canonical(bits.view(np.float32) + products).view(np.uint32)
