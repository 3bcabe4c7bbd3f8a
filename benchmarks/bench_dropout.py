"""Dropout forward + backward against eager and compiled PyTorch, on residual streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.harness import Row, main, measure

P = 0.1
SHAPES = {"bert-7.7m": (150, 20, 128), "gpt-384": (8, 256, 384), "gpt2": (1, 1024, 768)}


def _check(x: Tensor) -> None:
    """The gate: exact scale, the right rate, and backward with the mask of forward."""
    leaf = x.clone().requires_grad_()
    out = fastformer.dropout(leaf, P)
    out.backward(torch.ones_like(out))
    factor = leaf.grad
    assert factor is not None
    torch.testing.assert_close(out.detach(), x * factor)
    assert abs(float((factor == 0).float().mean()) - P) < 0.01


def _variant(dropout: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)

    def run() -> None:
        leaf.grad = None
        dropout(leaf).backward(grad)

    return run


def cases() -> list[Row]:
    """One row per shape and dtype."""
    eager: Callable[[Tensor], Tensor] = lambda x: F.dropout(x, P)  # noqa: E731
    compiled = torch.compile(eager)
    rows = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x = torch.randn(shape, dtype=dtype)
            _check(x)
            variants = {
                "fastformer": _variant(lambda x: fastformer.dropout(x, P), x),
                "eager": _variant(eager, x),
                "compile": _variant(compiled, x),
            }
            rows.append(measure(f"{name} {str(dtype).removeprefix('torch.')}", variants))
    return rows


if __name__ == "__main__":
    main("bench_dropout", cases)
