"""LayerNorm alone and with the residual addition, as the blocks of the models use them.

On a GPU Liger-Kernel is a rival of the first; it has no LayerNorm with an addition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.cases import TrainingCase
from benchmarks.command import main
from benchmarks.gate import Function
from benchmarks.libraries import find_all
from benchmarks.ops import Operation, op_benchmark


def _affine(C: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": torch.rand(C).to(dtype) + 0.5, "bias": torch.randn(C).to(dtype)}


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _liger() -> tuple[dict[str, Function], dict[str, str]]:
    if torch.get_default_device().type != "cuda":
        return {}, {}
    found, absent = find_all({"liger": "liger_kernel.transformers.functional:liger_layer_norm"})
    eps = 1e-5

    def bound(function: Function) -> Function:
        return lambda x, weight, bias: function(x, weight, bias, eps)

    return {name: bound(function) for name, function in found.items()}, absent


def _layer_norm(case: TrainingCase, dtype: torch.dtype) -> Operation:
    x = torch.randn(case.B, case.T, case.C).to(dtype)
    libraries, absent = _liger()
    values = {"x": x, **_affine(case.C, dtype)}
    return Operation(values, fastformer.layer_norm, _eager, libraries=libraries, absent=absent)


def _eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _eager(total, weight, bias).to(x.dtype), total


def _add_layer_norm(case: TrainingCase, dtype: torch.dtype) -> Operation:
    """In bfloat16 as under autocast: the stream and the weights stay float32."""
    shape = (case.B, case.T, case.C)
    values = {"x": torch.randn(shape).to(dtype), "residual": torch.randn(shape)}
    values |= _affine(case.C, torch.float32)
    return Operation(values, fastformer.add_layer_norm, _eager_add)


BENCHMARK = op_benchmark(
    "layer_norm",
    "LayerNorm, and residual addition + LayerNorm",
    {"layer_norm": _layer_norm, "add_layer_norm": _add_layer_norm},
)

if __name__ == "__main__":
    main(BENCHMARK)
