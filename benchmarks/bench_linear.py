"""One linear layer, the packed projection of queries, keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import TrainingCase
from benchmarks.command import main
from benchmarks.harness import Unavailable
from benchmarks.ops import Operation, op_benchmark
from fastformer import ops


def _linear(case: TrainingCase, dtype: torch.dtype) -> Operation:
    values = {
        "x": torch.randn(case.B, case.T, case.C),
        "weight": torch.randn(3 * case.C, case.C) * case.C**-0.5,
        "bias": torch.randn(3 * case.C),
    }
    ours = getattr(ops, "linear", None)
    if ours is None:
        raise Unavailable("this version has no fastformer.ops.linear")
    return Operation(
        {n: v.to(dtype) for n, v in values.items()},
        ours,
        F.linear,
        flop=6.0 * case.B * case.T * case.C**2,
    )


BENCHMARK = op_benchmark("linear", "Linear layer (queries, keys and values)", {"linear": _linear})

if __name__ == "__main__":
    main(BENCHMARK)
