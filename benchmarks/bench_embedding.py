"""The embedding of tokens, whose gradient is a table of the vocabulary's size."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import DEFAULT, TrainingCase
from benchmarks.command import main
from benchmarks.ops import Operation, op_benchmark
from fastformer import ops
from fastformer.transformer import TextConfig


def _reads_text(case: TrainingCase) -> bool:
    return isinstance(case.config, TextConfig)


def _embedding(case: TrainingCase, dtype: torch.dtype) -> Operation:
    if not _reads_text(case):
        raise ValueError(f"{case.name}: images have no vocabulary")
    weight = torch.randn(case.V, case.C)
    ids = case.batch().inputs
    return Operation(
        {"weight": weight.to(dtype)}, partial(ops.embedding, ids), partial(F.embedding, ids)
    )


BENCHMARK = op_benchmark(
    "embedding", "Embedding", {"embedding": _embedding}, shapes=DEFAULT, suits=_reads_text
)

if __name__ == "__main__":
    main(BENCHMARK)
