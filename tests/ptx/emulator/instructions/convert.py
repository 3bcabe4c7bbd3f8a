"""Conversions between types, and between generic addresses and those of a state space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import (
    GLOBAL_BASE,
    LOCAL_BASE,
    PARAMETER_BASE,
    SHARED_BASE,
    Build,
)
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import (
    Operation,
    elementwise,
    expect_operands,
    require_type,
)
from tests.ptx.emulator.program import Operand, Register
from tests.ptx.emulator.rounding import from_values, relu, saturate, to_values
from tests.ptx.emulator.types import TYPES, canonical, float_to_halves, size_of

_INTEGERS = "u8,u16,u32,u64,s8,s16,s32,s64"
_WIDER_INTEGERS = "u16,u32,u64,s16,s32,s64"  # bfloat16 has no conversions to and from bytes
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_INTEGRAL = f"{{round:{','.join(_TO_INTEGER)}}}"
_ROUND = "{round:rn,rz,rm,rp}"


def _convert(build: Build, operation: Operation) -> Execute:
    """One operand to operand 0; of integers, registers may be wider than their types."""
    expect_operands(build, 2)
    for operand, kind in zip(build.operands, (build.type, build.choices["source"]), strict=True):
        _require_room(build, operand, kind)
    read, write = build.read(1, build.choices["source"]), build.write(0)
    return lambda block, mask: write(block, operation(read(block)), mask)


def _require_room(build: Build, operand: Operand, kind: str) -> None:
    if kind not in _INTEGERS.split(","):
        require_type(build, operand, kind)
    elif isinstance(operand, Register):
        own = build.entry.registers[operand.name]
        if size_of(own) < size_of(kind):
            raise build.error(f"{operand.name} is a {own}, too narrow for a {kind}")


# ---- integers


def _beyond(target: str) -> str:
    """The integers with values that a type has not: only there PTX has .sat."""
    low, high = np.iinfo(TYPES[target]).min, np.iinfo(TYPES[target]).max
    limits = {source: np.iinfo(TYPES[source]) for source in _INTEGERS.split(",")}
    return ",".join(name for name, of in limits.items() if of.min < low or of.max > high)


@instruction(
    f"cvt.{{type:{_INTEGERS}}}.{{source:{_INTEGERS}}}",
    *(f"cvt.{{sat:sat}}.{{type:{to}}}.{{source:{_beyond(to)}}}" for to in _INTEGERS.split(",")),
)
def between_integers(build: Build) -> Execute:
    target, source = TYPES[build.type], TYPES[build.choices["source"]]
    if not build.has("sat"):
        return _convert(build, lambda x: x.astype(target))
    to, of = np.iinfo(target), np.iinfo(source)
    low, high = max(int(to.min), int(of.min)), min(int(to.max), int(of.max))
    return _convert(build, lambda x: np.clip(x, source(low), source(high)).astype(target))


@instruction(
    f"cvt.{_ROUND}.{{type:f16,f32}}.{{source:{_INTEGERS}}}",
    f"cvt.{{round:rn,rz}}.{{type:bf16}}.{{source:{_WIDER_INTEGERS}}}",
    f"cvt.{{round:rn}}.{{type:f64}}.{{source:{_INTEGERS}}}",
)
def from_integer(build: Build) -> Execute:
    kind, rounding = build.type, build.choices["round"]
    if kind == "f64":
        return _convert(build, lambda x: x.astype(np.float64))
    narrow = size_of(build.choices["source"]) < 8

    def operation(x: np.ndarray) -> np.ndarray:
        return from_values((x if narrow else _to_odd(x)).astype(np.float64), kind, rounding)

    return _convert(build, operation)


def _to_odd(x: np.ndarray) -> np.ndarray:
    """Leave 64-bit integers no more bits than float64 has, the last of them odd if any was lost."""
    low = x & x.dtype.type(0x7FF)
    large = np.abs(x.astype(np.float64)) >= 2.0**53
    return np.where(large & (low != 0), (x - low) | x.dtype.type(0x800), x)


@instruction(
    f"cvt.{_INTEGRAL}[.{{ftz:ftz}}][.{{sat:sat}}].{{type:{_INTEGERS}}}.{{source:f32}}",
    f"cvt.{_INTEGRAL}[.{{sat:sat}}].{{type:{_INTEGERS}}}.{{source:f16,f64}}",
    f"cvt.{_INTEGRAL}.{{type:{_WIDER_INTEGERS}}}.{{source:bf16}}",
)
def to_integer(build: Build) -> Execute:
    """Out of range gives the nearest integer of the type, with .sat or without.

    NaN gives 0, or the highest bit alone where either type has 64 bits.
    """
    source, target, ftz = build.choices["source"], TYPES[build.type], build.has("ftz")
    integral = _TO_INTEGER[build.choices["round"]]
    low, high = (int(bound) for bound in (np.iinfo(target).min, np.iinfo(target).max))
    wide = source == "f64" or size_of(build.type) == 8
    unknown = target(0 if not wide else low or high // 2 + 1)

    def operation(bits: np.ndarray) -> np.ndarray:
        x = integral(to_values(bits, source, ftz=ftz))
        # float64 has high + 1 exactly, and high only if it is short.
        above, below = x >= float(high + 1), x < float(low)
        inside = (x >= float(low)) & ~above
        result = np.where(inside, x, 0).astype(target)
        if inside.all():
            return result
        limit = np.where(above, target(high), np.where(below, target(low), unknown))
        return np.where(inside, result, limit)

    return _convert(build, operation)


# ---- floating point


@instruction(
    f"cvt.{_INTEGRAL}[.{{ftz:ftz}}][.{{sat:sat}}].{{type:f32}}.{{source:f32}}",
    f"cvt.{_INTEGRAL}[.{{sat:sat}}].{{type:f64}}.{{source:f64}}",
    f"cvt.{_INTEGRAL}[.{{sat:sat}}].{{type:f16}}.{{source:f16}}",
    f"cvt.{_INTEGRAL}.{{type:bf16}}.{{source:bf16}}",
)
def to_integral(build: Build) -> Execute:
    return _float_to_float(build, _TO_INTEGER[build.choices["round"]])


@instruction(
    "cvt[.{ftz:ftz}][.{sat:sat}].{type:f32}.{source:f32,f16}",
    "cvt[.{ftz:ftz}][.{sat:sat}].{type:f64}.{source:f32}",
    "cvt[.{sat:sat}].{type:f64}.{source:f64,f16}",
    "cvt[.{sat:sat}].{type:f16}.{source:f16}",
    "cvt[.{ftz:ftz}].{type:f32}.{source:bf16}",
    "cvt.{type:f64}.{source:bf16}",
    f"cvt.{_ROUND}[.{{ftz:ftz}}][.{{sat:sat}}].{{type:f32}}.{{source:f64}}",
    f"cvt.{_ROUND}[.{{ftz:ftz}}][.{{sat:sat}}].{{type:f16}}.{{source:f32}}",
    f"cvt.{_ROUND}[.{{sat:sat}}].{{type:f16}}.{{source:f64}}",
    "cvt.{round:rn,rz}.{relu:relu}.{type:f16}.{source:f32}",
    "cvt.{round:rn,rz}[.{relu:relu}].{type:bf16}.{source:f32}",
    "cvt.{round:rn,rz}.{type:bf16}.{source:f16,f64}",
    "cvt.{round:rn,rz}.{type:f16}.{source:bf16}",
)
def between_floats(build: Build) -> Execute:
    if build.instruction.opcode == "cvt.rn.bf16.f32":  # as often as all the others together
        return _convert(build, lambda x: float_to_halves(x, "bf16"))
    return _float_to_float(build, lambda x: x)


def _float_to_float(build: Build, change: Operation) -> Execute:
    kind, source = build.type, build.choices["source"]
    rounding = build.choices.get("round") or "rn"
    rounding = "rn" if rounding in _TO_INTEGER else rounding
    sat, ftz, positive = build.has("sat"), build.has("ftz"), build.has("relu")

    def operation(bits: np.ndarray) -> np.ndarray:
        x = change(to_values(bits, source, ftz=ftz and source == "f32"))
        if sat:
            x = saturate(x)
        if positive:
            x = relu(x)
        return from_values(x, kind, rounding, ftz=ftz and kind == "f32")

    return _convert(build, operation)


@instruction("cvt.{round:rn,rz}[.{relu:relu}].{type:f16x2,bf16x2}.{source:f32}")
def pack(build: Build) -> Execute:
    """The first operand goes to the high half."""
    kind, rounding, positive = build.type, build.choices["round"], build.has("relu")

    def operation(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        x = np.stack([low, high], axis=1)
        if positive:
            x = relu(x)
        if rounding == "rn":
            return float_to_halves(x, kind)
        return from_values(x.astype(np.float64), kind, rounding)

    return elementwise(build, operation, "f32", "f32")


@instruction(
    "cvt.{round:rna}.{type:tf32}.{source:f32}",
    "cvt.{round:rn,rz}[.{relu:relu}].{type:tf32}.{source:f32}",
)
def to_tf32(build: Build) -> Execute:
    rounding, positive = build.choices["round"], build.has("relu")

    def operation(x: np.ndarray) -> np.ndarray:
        x = canonical(relu(x) if positive else x)
        bits = x.view(np.uint32)
        # Ties away from zero, ties to even, or none: 13 bits are cut off.
        step = {"rna": 0x1000, "rn": 0x0FFF + (bits >> 13 & 1), "rz": 0}[rounding]
        cut = (bits + np.asarray(step, np.uint32)) & np.uint32(0xFFFFE000)
        return np.where(np.isnan(x), bits, cut)

    return _convert(build, operation)


# ---- eight bits


def _values_of(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The values of the codes without a sign, as if all were finite."""
    codes = np.arange(128)
    exponents, mantissas = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    bias = (1 << exponent_bits - 1) - 1
    fraction = mantissas / 2.0**mantissa_bits + (exponents > 0)
    return fraction * 2.0 ** (np.maximum(exponents, 1) - bias)


# The finite values; then e4m3 has NaN only, e5m2 infinity and three NaN.
_FINITE = {"e4m3x2": _values_of(4, 3)[:0x7F], "e5m2x2": _values_of(5, 2)[:0x7C]}
_DECODED = {
    "e4m3x2": np.append(_FINITE["e4m3x2"], np.nan),
    "e5m2x2": np.append(_FINITE["e5m2x2"], [np.inf, np.nan, np.nan, np.nan]),
}


def _encode_bytes(x: np.ndarray, kind: str) -> np.ndarray:
    """To nearest even; too large, and infinite, becomes the largest finite value."""
    finite = _FINITE[kind]
    magnitude = np.minimum(np.abs(x), finite[-1])
    # NaN is sorted behind all.
    above = np.minimum(np.searchsorted(finite, magnitude), len(finite) - 1)
    below = np.maximum(above - 1, 0)
    middle = (finite[below] + finite[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    codes = np.where(up, above, below) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, codes).astype(np.uint8)


@instruction("cvt.rn.satfinite[.{relu:relu}].{type:e4m3x2,e5m2x2}.{source:f32,f16x2}")
def to_bytes(build: Build) -> Execute:
    kind, source, positive = build.type, build.choices["source"], build.has("relu")

    def encode(x: np.ndarray) -> np.ndarray:
        codes = _encode_bytes(relu(x) if positive else x, kind)
        return np.ascontiguousarray(codes).view(np.uint16)[:, 0]

    if source == "f32":
        return elementwise(
            build, lambda high, low: encode(np.stack([low, high], axis=1)), "f32", "f32"
        )
    return _convert(build, lambda bits: encode(to_values(bits, source)))


@instruction("cvt.rn[.{relu:relu}].{type:f16x2}.{source:e4m3x2,e5m2x2}")
def from_bytes(build: Build) -> Execute:
    source, positive = build.choices["source"], build.has("relu")
    table = np.concatenate([_DECODED[source], -_DECODED[source]])

    def operation(bits: np.ndarray) -> np.ndarray:
        x = table[np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 2)]
        return from_values(relu(x) if positive else x, "f16x2")

    return _convert(build, operation)


# ---- addresses

_SPACES = "{space:global,shared,shared::cta,shared::cluster,local,param}"
_WINDOWS = {
    "global": (GLOBAL_BASE, PARAMETER_BASE),
    "param": (PARAMETER_BASE, SHARED_BASE),
    "shared": (SHARED_BASE, LOCAL_BASE),
    "local": (LOCAL_BASE, 1 << 64),
}


def _window(build: Build) -> tuple[int, int]:
    return _WINDOWS[build.choices["space"].split("::")[0]]


def _inside(window: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    low, high = np.uint64(window[0]), np.uint64(window[1] - 1)
    return lambda addresses: (addresses >= low) & (addresses <= high)


@instruction(f"cvta.{_SPACES}.{{type:u64}}", "cvta.{space:const}.{type:u64}")
def to_generic(build: Build) -> Execute:
    # Addresses of global and constant memory are generic ones already.
    space = build.choices["space"]
    base = np.uint64(0 if space in ("global", "const") else _window(build)[0])
    return elementwise(build, lambda addresses: addresses + base, "u64")


@instruction(f"cvta.to.{_SPACES}.{{type:u64}}", "cvta.to.{space:const}.{type:u64}")
def from_generic(build: Build) -> Execute:
    if build.choices["space"] in ("global", "const"):
        return elementwise(build, lambda addresses: addresses, "u64")
    base, inside = np.uint64(_window(build)[0]), _inside(_window(build))
    read, write = build.read(1, "u64"), build.write(0)
    expect_operands(build, 2)

    def execute(block: Block, mask: Mask) -> None:
        addresses = read(block)
        outside = block.active(mask) & ~inside(addresses)
        if outside.any():
            first = int(addresses[outside][0])
            raise PtxError("bounds", f"{first:#x} is no generic address of this state space")
        write(block, addresses - base, mask)

    return execute


@instruction(f"isspacep.{_SPACES}")
def isspacep(build: Build) -> Execute:
    return elementwise(build, _inside(_window(build)), "u64", result="pred")
