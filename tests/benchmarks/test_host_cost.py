"""The benchmark of what launches cost the host."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from benchmarks import bench_host_cost
from benchmarks.gate import WrongResult
from benchmarks.harness import QUICK, Options
from fastformer.kernels.launch import Launch


def test_the_host_cost_of_launches_is_measured_if_they_are_those_of_triton(monkeypatch) -> None:
    case = next(c for c in bench_host_cost.BENCHMARK.cases(Options()) if c.name == "layer_norm")
    rows = case.run(QUICK)
    assert tuple(row.case for row in rows) == case.rows
    table = bench_host_cost.BENCHMARK.table(rows).splitlines()[2:]
    for line in table:
        ours, of_torch, python = map(float, line.split("|")[2:5])
        assert ours > 0 and of_torch > 0
        # The difference in the one turn that there is; beside other processes it may be negative.
        assert python == pytest.approx(ours - of_torch, abs=0.16)  # each has one decimal

    def on_another_grid(launch, *tensors):
        grid = launch.grid[0] + 1, 1, 1
        launch.kernel.function[grid](*launch.arguments(tensors), **launch.options)

    monkeypatch.setattr(Launch, "__call__", on_another_grid)
    with pytest.raises(WrongResult, match="layer_norm_fwd: other launches than Triton's"):
        case.run(QUICK)
