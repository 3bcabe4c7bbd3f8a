"""Dropout on residual streams.

Every implementation draws another mask, so the gate asks for the exact scale, the right rate, and a
backward pass with the mask of forward.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.cases import TrainingCase
from benchmarks.command import main
from benchmarks.gate import WrongResult
from benchmarks.ops import Operation, op_benchmark

P = 0.1


def _check(x: Tensor) -> None:
    rng = torch.tensor([1, 2])
    leaf = x.clone().requires_grad_()
    out = fastformer.dropout(leaf, P, rng=rng)
    out.backward(torch.ones_like(x))
    factor = leaf.grad
    rate = (factor == 0).float().mean().item()
    if not (torch.allclose(out, x * factor, rtol=1e-2) and abs(rate - P) < 0.01):
        raise WrongResult(f"backward has not the mask of forward, or the rate is {rate:.3f}")


def _dropout(case: TrainingCase, dtype: torch.dtype) -> Operation:
    x = torch.randn(case.B, case.T, case.C).to(dtype)
    _check(x)
    ours = partial(fastformer.dropout, dropout_p=P)
    return Operation({"x": x}, ours, lambda x: F.dropout(x, P), gated=True)


BENCHMARK = op_benchmark("dropout", f"Dropout of {P:.0%}", {"dropout": _dropout})

if __name__ == "__main__":
    main(BENCHMARK)
