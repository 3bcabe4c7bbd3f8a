"""The approximate functions, computed in float64 and rounded, and the exact reciprocal and root."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Execute
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import Operation, elementwise
from tests.ptx.emulator.rounding import from_values, to_values

_F32 = "approx[.{ftz:ftz}].{type:f32}"


def _function(build: Build, function: Operation) -> Execute:
    kind, ftz = build.type, build.has("ftz")

    def operation(x: np.ndarray) -> np.ndarray:
        return from_values(function(to_values(x, kind, ftz=ftz)), kind, ftz=ftz)

    return elementwise(build, operation, kind)


@instruction(
    f"ex2.{_F32}",
    "ex2.approx.{type:f16,f16x2}",
    "ex2.approx.{ftz:ftz}.{type:bf16,bf16x2}",
)
def ex2(build: Build) -> Execute:
    return _function(build, np.exp2)


@instruction("tanh.approx.{type:f32,f16,f16x2,bf16,bf16x2}")
def tanh(build: Build) -> Execute:
    return _function(build, np.tanh)


@instruction(f"lg2.{_F32}")
def lg2(build: Build) -> Execute:
    return _function(build, np.log2)


@instruction(f"sin.{_F32}")
def sin(build: Build) -> Execute:
    return _function(build, np.sin)


@instruction(f"cos.{_F32}")
def cos(build: Build) -> Execute:
    return _function(build, np.cos)


# Rounding the quotient or the root of float64 again gives the correctly rounded one of float32:
# neither comes so close to the middle of two float32 values without being there.


@instruction(f"rcp.{_F32}", "rcp.rn[.{ftz:ftz}].{type:f32}", "rcp.rn.{type:f64}")
def rcp(build: Build) -> Execute:
    return _function(build, lambda x: 1 / x)


@instruction(f"sqrt.{_F32}", "sqrt.rn[.{ftz:ftz}].{type:f32}", "sqrt.rn.{type:f64}")
def sqrt(build: Build) -> Execute:
    return _function(build, np.sqrt)


@instruction(f"rsqrt.{_F32}", "rsqrt.approx.{type:f64}")
def rsqrt(build: Build) -> Execute:
    return _function(build, lambda x: 1 / np.sqrt(x))
