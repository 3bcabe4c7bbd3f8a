"""What the machine can do at most: a large matrix product and a large copy, by PyTorch.

On a GPU the rates of all other files are read against these two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.command import main
from benchmarks.harness import Benchmark, Case, Options, Row, Settings, Variant, Work, measure

_PRODUCT, _COPY, _TORCH = "matrix product bfloat16", "copy", "torch"
_SIZES = {"cpu": (2048, 2**26), "cuda": (8192, 2**31)}  # of the product, bytes of the copy


def _product(settings: Settings) -> list[Row]:
    size, _ = _SIZES[settings.device]
    a, b = (torch.randn(size, size, device=settings.device).bfloat16() for _ in range(2))
    run = partial(torch.mm, a, b, out=torch.empty_like(a))
    return [_measured(_PRODUCT, run, settings, Work(2.0 * size**3, 6.0 * size**2))]


def _copy(settings: Settings) -> list[Row]:
    _, size = _SIZES[settings.device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    run = partial(torch.empty_like(source).copy_, source)
    return [_measured(_COPY, run, settings, Work(0.0, 2.0 * size))]


def _measured(name: str, run: Variant, settings: Settings, work: Work) -> Row:
    row = measure(name, {_TORCH: run}, settings)
    row.work = work
    return row


def _cases(options: Options) -> list[Case]:
    runs = {_PRODUCT: _product, _COPY: _copy}
    return [Case(name, (name,), (_TORCH,), run) for name, run in runs.items()]


def _table(rows: list[Row]) -> str:
    found = [[row.case, *(f"{rate:.3g}" for rate in _rates(row))] for row in rows]
    return report.markdown(["case", "TFLOP/s", "TB/s"], found)


def _record(row: Row) -> dict[str, Any]:
    return {"case": row.case, **dict(zip(("tflops", "tb_per_s"), _rates(row), strict=True))}


def _rates(row: Row) -> tuple[float, float]:
    assert row.work is not None
    return row.work.rates(row.ms[_TORCH])


BENCHMARK = Benchmark("ceilings", "Ceilings: a matrix product and a copy", _cases, _table, _record)

if __name__ == "__main__":
    main(BENCHMARK)
