"""Every file runs on a tiny model, and none prints a figure for a wrong result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastformer
from benchmarks import bench_ceilings, bench_dropout, bench_layer_norm, cases, ops, report
from benchmarks.command import main
from benchmarks.gate import OpGate, WrongResult
from benchmarks.harness import OURS, Options, Row, Work
from benchmarks.test_speed import BENCHMARKS

CHECKOUT = Path(__file__).resolve().parents[2]
OPS = [b for b in BENCHMARKS if not (b.of_models or b.name in ("ceilings", "host_cost"))]


@pytest.mark.parametrize("measured", OPS, ids=lambda measured: measured.name)
@pytest.mark.parametrize("case", ["tiny-gpt", "tiny-bert", "tiny-vit"])
def test_it_runs(measured, case, capsys) -> None:
    if (measured.name, case) == ("embedding", "tiny-vit"):
        pytest.skip("images have no vocabulary")
    main(measured, ["--cases", case, "--quick"])
    out = capsys.readouterr().out
    if "this version has no" not in out:
        rows = [line for line in out.splitlines() if line.startswith("|") and case in line]
        assert rows and all(re.search(r"\| \d+\.\d\dx ", row) for row in rows)


def _wrong_layer_norm(x, weight, bias):
    return fastformer.ops.layer_norm(x, weight, bias) * 1.001


def test_a_wrong_op_is_exit_1_and_no_figure(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(fastformer, "layer_norm", _wrong_layer_norm)
    arguments = ["--cases", "tiny-gpt", "--quick", "--json", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit) as caught:
        main(bench_layer_norm.BENCHMARK, arguments)
    assert "layer_norm tiny-gpt float32: wrong result, not measured: output 0" in str(caught.value)
    out = capsys.readouterr().out
    assert "| add_layer_norm tiny-gpt float32 fwd " in out
    assert "| layer_norm tiny-gpt float32" not in out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert all(row["case"].startswith("add_layer_norm") for row in rows if "float32" in row["case"])


def test_the_gate_finds_a_wrong_gradient() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2.01 * grad

    values, upstream = {"x": torch.randn(9)}, [torch.randn(9)]
    gate = OpGate(lambda x: 2 * x, values, upstream)
    gate.check(lambda x: x + x)
    with pytest.raises(WrongResult, match="gradient of x"):
        gate.check(lambda x: Wrong.apply(x))
    with pytest.raises(WrongResult, match="output 0: error nan"):
        gate.check(lambda x: x * float("nan"))


def test_the_gate_of_dropout_finds_another_mask_in_backward(monkeypatch) -> None:
    x = torch.randn(64, 64)
    bench_dropout._check(x)
    monkeypatch.setattr(
        fastformer, "dropout", lambda x, p, rng: torch.nn.functional.dropout(x.detach(), p) + 0 * x
    )
    with pytest.raises(WrongResult):
        bench_dropout._check(x)


def test_unknown_cases_are_an_error(capsys) -> None:
    with pytest.raises(SystemExit):
        main(OPS[0], ["--cases", "tiny-gpt,nosuch"])
    assert "unknown nosuch" in capsys.readouterr().err


def test_the_raised_allocator_is_in_the_json(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_dropout", "--quick"]
    command += ["--allocator", "raised", "--threads", "1", "--json", str(tmp_path / "x.json")]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    machine = json.loads((tmp_path / "x.json").read_text())["machine"]
    assert machine["allocator"] == "raised" and machine["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_benchmarks_are_refused() -> None:
    with pytest.raises(SystemExit, match="--device cuda: this machine has no NVIDIA GPU"):
        main(OPS[0], ["--device", "cuda"])


def test_on_a_gpu_the_cases_are_larger_ones() -> None:
    usual, on_gpu = (
        {case.name for benchmark in OPS for case in benchmark.cases(Options(on_gpu=gpu))}
        for gpu in (False, True)
    )
    assert on_gpu and not usual & on_gpu


def test_the_ceilings_are_rates(capsys, monkeypatch) -> None:
    # At the real sizes a CPU without instructions for bfloat16 takes minutes.
    monkeypatch.setitem(bench_ceilings._SIZES, "cpu", (256, 2**20))
    main(bench_ceilings.BENCHMARK, ["--quick"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    product, copy = rows[2:]
    assert float(product[2]) > 0 and float(copy[2]) == 0 and float(copy[3]) > 0


def test_a_table_of_a_gpu_has_rates_and_its_backends_are_no_rivals() -> None:
    samples = {OURS: [4.0], "triton": [1.0], "eager": [2.0]}
    row = Row("x", samples, work=Work(flop=3e12, bytes=2e9))
    assert report.rates(row) == pytest.approx((3000.0, 2.0))
    head, _, cells = report.op_table([row]).splitlines()
    names = [cell.strip() for cell in head.split("|")]
    assert "vs triton" not in names and "triton ms" in names
    found = dict(zip(names, (cell.strip() for cell in cells.split("|")), strict=True))
    assert found["vs best"] == "0.50x" and found["TFLOP/s"] == "3e+03" and found["TB/s"] == "2"


def test_each_backend_of_a_gpu_passes_the_gate_on_its_own(monkeypatch) -> None:
    """The backends are those of a CPU here, as there is no GPU: one is right, one cannot run."""
    monkeypatch.setattr(cases, "GPU_BACKENDS", ("reference", "triton"))
    operation = bench_layer_norm._layer_norm(cases.CASES["tiny-gpt"], torch.float32)
    upstream = [torch.randn(operation.values["x"].shape)]
    passed, failed = ops._gate(operation, upstream, "cuda")
    assert passed == ["reference"]
    assert failed["triton"].startswith("RuntimeError: layer_norm_fwd: backend 'triton' was asked")
    assert ops._gate(operation, upstream, "cpu") == ([], {})


def _plugin_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pytest-benchmark")
    except importlib.metadata.PackageNotFoundError:
        return (0,)
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.skipif(_plugin_version() < (5, 3), reason="needs pytest-benchmark 5.3")
def test_pytest_benchmark_has_the_samples(tmp_path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-k", "dropout-bert"]
    command += [f"--out={tmp_path}", f"--benchmark-json={tmp_path / 'theirs.json'}"]
    # pytest-benchmark records nothing where it sees pytest-xdist at work.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    ours = {
        f"dropout {row['case']}": row["ms"]
        for row in json.loads((tmp_path / "dropout.json").read_text())["rows"]
    }
    theirs = json.loads((tmp_path / "theirs.json").read_text())["benchmarks"]
    assert len(theirs) == sum(map(len, ours.values())) > 0
    for entry in theirs:
        ms = ours[entry["group"]][entry["params"]["variant"]]
        assert entry["stats"]["median"] == pytest.approx(ms / 1e3)
