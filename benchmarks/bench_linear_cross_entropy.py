"""The head and its loss: all tokens of a GPT, the masked ones of a BERT, the images of a ViT.

`eager` gathers the rows that count before it multiplies, `naive` ignores the others in the loss, as
Liger-Kernel does, a rival on a GPU.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.cases import DEFAULT, TrainingCase
from benchmarks.command import main
from benchmarks.gate import Function
from benchmarks.libraries import find_all
from benchmarks.ops import Operation, op_benchmark


def _ours(x: Tensor, weight: Tensor, *, targets: Tensor, mostly_ignored: bool) -> Tensor:
    return fastformer.linear_cross_entropy(x, weight, targets, mostly_ignored=mostly_ignored)


def _naive(x: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    # The loss in float32 whatever the logits are, as autocast has it; float64 stays.
    return F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), targets)


def _gathered(x: Tensor, weight: Tensor, *, targets: Tensor, counted: Tensor) -> Tensor:
    return _naive(x[counted], weight, targets=targets[counted])


def _liger(targets: Tensor) -> tuple[dict[str, Function], dict[str, str]]:
    if torch.get_default_device().type != "cuda":
        return {}, {}
    path = "liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss"
    found, absent = find_all({"liger": path})

    def bound(loss: Function) -> Function:
        return lambda x, weight: loss(weight, x, targets)

    return {name: bound(module()) for name, module in found.items()}, absent


def _head(case: TrainingCase, dtype: torch.dtype) -> Operation:
    batch = case.batch()
    targets, counted = batch.targets.flatten(), batch.counted
    x = torch.randn(targets.numel(), case.C)
    weight = torch.randn(case.V, case.C) * case.C**-0.5
    eager = naive = partial(_naive, targets=targets)
    if not counted.all():
        eager = partial(_gathered, targets=targets, counted=counted)
    libraries, absent = _liger(targets)
    return Operation(
        {"x": x.to(dtype), "weight": weight.to(dtype)},
        partial(_ours, targets=targets, mostly_ignored=case.kind == "bert"),
        eager,
        {} if eager is naive else {"naive": naive},
        libraries,
        absent,
        flop=2.0 * float(counted.sum()) * case.C * case.V,
    )


BENCHMARK = op_benchmark(
    "linear_cross_entropy",
    "Head and cross-entropy",
    {"linear_cross_entropy": _head},
    shapes=DEFAULT,
    others=("naive",),
)

if __name__ == "__main__":
    main(BENCHMARK)
