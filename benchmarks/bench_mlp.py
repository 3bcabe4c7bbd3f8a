"""The feed-forward layer: linear, GELU, linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.cases import TrainingCase
from benchmarks.command import main
from benchmarks.ops import Operation, op_benchmark


def _eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _mlp(case: TrainingCase, dtype: torch.dtype) -> Operation:
    C, hidden = case.C, case.config.hidden_dim
    shapes = {
        "x": (case.B, case.T, C),
        "w1": (hidden, C),
        "b1": (hidden,),
        "w2": (C, hidden),
        "b2": (C,),
    }
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    # Activations of order one, as in a model.
    values["w1"] *= C**-0.5
    values["w2"] *= hidden**-0.5
    return Operation(
        {n: v.to(dtype) for n, v in values.items()},
        fastformer.mlp,
        _eager,
        flop=4.0 * case.B * case.T * C * hidden,
    )


BENCHMARK = op_benchmark("mlp", "MLP: linear, GELU, linear", {"mlp": _mlp})

if __name__ == "__main__":
    main(BENCHMARK)
