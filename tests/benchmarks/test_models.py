"""The rivals are our models, the bound is their matrix products, and memory is what was used."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch import Tensor, nn

import fastformer
from benchmarks import memory, models
from benchmarks.bench_inference import BENCHMARK as INFERENCE
from benchmarks.bench_training_step import BENCHMARK as TRAINING_STEP
from benchmarks.cases import CASES
from benchmarks.command import main
from benchmarks.gate import WrongResult, check_close
from benchmarks.harness import Options, Row
from benchmarks.steps import VARIANTS, LinearProducts, Trainer, linear_layers
from benchmarks.workers import Job, Served, Worker

NAMES = ("tiny-gpt", "tiny-bert", "tiny-vit")
tiny = pytest.mark.parametrize("name", NAMES)
and_published = pytest.mark.parametrize("name", [*NAMES, "tiny-bert-base", "tiny-gpt2"])


@and_published
@pytest.mark.parametrize("rival", ["naive", "eager"])
def test_a_rival_is_our_model(name, rival) -> None:
    ours, other = (Trainer(VARIANTS[variant], CASES[name]) for variant in ("fastformer", rival))
    expected, found = ours.first_step(), other.first_step()
    naive = Trainer(VARIANTS["naive"], CASES[name]).first_step()
    assert set(found) == set(expected) == set(naive)
    assert len(found) > 2 * 7
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)
    real = ours.batch.real
    real = slice(None) if real is None else real
    torch.testing.assert_close(other.infer()[real], ours.infer()[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["fastformer", "naive", "eager", "eager-bf16"])
def test_a_step_trains_with_dropout(variant) -> None:
    trainer = Trainer(VARIANTS[variant], CASES["tiny-gpt"], dropout=0.5)
    before = trainer.first_step()["loss"]
    assert torch.equal(trainer.first_step()["loss"], before)
    losses = {trainer._run(trainer.batch.inputs, trainer.batch.targets).item() for _ in range(4)}
    assert len(losses) > 1
    for _ in range(100):
        trainer.step()
    assert trainer.first_step()["loss"] < before


@and_published
def test_the_bound_has_every_linear_layer(name) -> None:
    """Against the modules of the model: as many multiplications per row as it has weights."""
    case = CASES[name]
    model = case.model()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers = linear_layers(case)
    assert sorted(i * o for _, i, o, _ in layers) == sorted(w.numel() for w in weights)
    rows = 4 if name == "tiny-vit" else int(case.batch().counted.sum())
    assert rows == 3 * 12 or case.kind != "gpt"
    assert layers[-1][0] == rows and linear_layers(case, learns=False)[-1][0] >= rows
    for learns in (True, False):
        LinearProducts(torch.bfloat16, case, learns=learns).run()


def test_the_products_are_those_of_a_linear_layer() -> None:
    products = LinearProducts(torch.float32, CASES["tiny-gpt"])
    x, weight, out, _, _ = products.layers[-1]
    products.run()
    leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = nn.functional.linear(leaf, w)
    torch.testing.assert_close(out, y)
    y.backward(out)
    torch.testing.assert_close(products.layers[-1][3], leaf.grad)
    torch.testing.assert_close(products.layers[-1][4], w.grad)


def test_padded_rows_predict_no_padding() -> None:
    batch = CASES["tiny-bert"].batch()
    assert batch.key_lengths is not None and int(batch.key_lengths.min()) < 12
    hidden = torch.arange(12) >= batch.key_lengths[:, None]
    assert hidden.any() and (batch.targets[hidden] == -100).all() and batch.counted.any()


@pytest.mark.parametrize("key", ["loss", "blocks.0.fc1.weight"])
@pytest.mark.parametrize("value", [1.2, float("nan")])
def test_the_gate_finds_a_wrong_step(key, value) -> None:
    true = Trainer(VARIANTS["naive"], CASES["tiny-gpt"]).first_step()
    check_close(true, true, torch.float32)
    with pytest.raises(WrongResult, match=key):
        check_close(true | {key: true[key] * value}, true, torch.bfloat16)


class _Here(Served):
    """A worker without a process, which takes seconds to start."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *error: object) -> None:
        gc.enable()

    close = __exit__


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Worker", _Here)


def test_a_worker_runs_a_variant_and_says_what_is_wrong(tmp_path) -> None:
    job = Job("fastformer-bf16", CASES["tiny-gpt"])
    with Worker(job) as worker:
        worker.save_results(tmp_path / "ours.pt")
        worker.check_results(tmp_path / "ours.pt")
        for _ in range(2):
            worker.run()
        found = torch.load(tmp_path / "ours.pt")
        torch.save(found | {"loss": 1.1 * found["loss"]}, tmp_path / "wrong.pt")
        with pytest.raises(WrongResult, match="loss: relative distance"):
            worker.check_results(tmp_path / "wrong.pt")
        with pytest.raises(RuntimeError, match=r"FileNotFoundError: .*absent\.pt"):
            worker.check_results(tmp_path / "absent.pt")
    with pytest.raises(RuntimeError, match="its process ended"):
        worker.run()
    expected = Trainer(VARIANTS[job.variant], job.case).first_step()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def _arguments(tmp_path, *more: str) -> list[str]:
    return ["--cases", ",".join(NAMES), "--rounds", "1", "--no-compile", "--no-memory",
            "--json", str(tmp_path / "x.json"), "--out", str(tmp_path), *more]  # fmt: skip


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("measured", [TRAINING_STEP, INFERENCE], ids=lambda b: b.name)
def test_the_command_writes_what_it_promises(measured, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    main(measured, _arguments(tmp_path))
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["case"] for row in result["rows"]] == list(NAMES)
    for row in result["rows"]:
        ms = row["ms"]
        usual = {n for n, v in VARIANTS.items() if not (v.compile or v.is_library)}
        assert set(ms) == usual and not row["absent"]
        rivals = [ms[name] for name in ms if name.startswith(("naive", "eager"))]
        ours = min(ms["fastformer"], ms["fastformer-bf16"])
        assert row["vs_naive"] == pytest.approx(ms["naive"] / ours)
        assert row["vs_best"] == pytest.approx(min(rivals) / ours)
        assert row["vs"]["eager-bf16"] == pytest.approx(ms["eager-bf16"] / ours)
        best_float32 = min(ms["naive"], ms["eager"])
        assert row["vs_eager_fp32"] == pytest.approx(best_float32 / ms["fastformer"])
        assert row["gemm_share_bf16"] == pytest.approx(ms["gemm-bf16"] / ms["fastformer-bf16"])
        assert row["gemm_share_fp32"] == pytest.approx(ms["gemm"] / ms["fastformer"])
    assert result["machine"]["allocator"] == "default"
    assert capsys.readouterr().out.count("tiny-gpt") == 3
    assert (tmp_path / f"{measured.name}.png").exists()


def test_rivals_may_stay_in_float32() -> None:
    names = set(models.chosen(Options(precision="float32-rivals"), compile=True))
    rivals = {"naive", "eager", "compile-naive", "compile-eager"}
    assert names == rivals | {"fastformer", "fastformer-bf16", "gemm"}


@pytest.mark.usefixtures("no_processes")
def test_one_precision_still_has_naive_float32(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    main(TRAINING_STEP, _arguments(tmp_path, "--precision", "bfloat16", "--dropout", "0.1"))
    row = json.loads((tmp_path / "x.json").read_text())["rows"][0]
    assert set(row["ms"]) == {"fastformer-bf16", "naive", "naive-bf16", "eager-bf16", "gemm-bf16"}
    assert row["vs_eager_fp32"] is None and row["dropout"] == 0.1


@pytest.mark.usefixtures("no_processes")
def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    wrong = {"eager": 1.5}
    true_step = Trainer.first_step

    def first_step(self: Trainer) -> dict[str, Tensor]:
        found = true_step(self)
        return found | {"loss": found["loss"] * wrong.get(self.variant.kind, 1.0)}

    monkeypatch.setattr(Trainer, "first_step", first_step)
    main(TRAINING_STEP, _arguments(tmp_path))
    row = json.loads((tmp_path / "x.json").read_text())["rows"][0]
    assert "eager" not in row["ms"] and "relative distance" in row["failed"]["eager"]
    out = capsys.readouterr().out
    assert "tiny-gpt: eager failed, WrongResult" in out


@pytest.mark.usefixtures("no_processes")
def test_ours_being_wrong_is_exit_1_and_no_figure(monkeypatch, tmp_path, capsys) -> None:
    true = fastformer.ops.linear_cross_entropy
    wrong = lambda *args, **kwargs: 1.01 * true(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(fastformer.ops, "linear_cross_entropy", wrong)
    with pytest.raises(SystemExit) as caught:
        main(TRAINING_STEP, _arguments(tmp_path))
    assert str(caught.value).count("wrong result, not measured") == len(NAMES)
    assert not list(tmp_path.iterdir()) and "x" not in capsys.readouterr().out


def test_peak_memory_is_that_of_the_steps(monkeypatch) -> None:
    class Greedy:
        """Holds 40 MB from its first step on and 80 MB more during each."""

        def __init__(self, *args, **kwargs) -> None:
            self.state: Tensor | None = None

        def step(self) -> None:
            self.state = torch.ones(10 * 2**20) if self.state is None else self.state
            torch.ones(20 * 2**20)

    monkeypatch.setattr(memory, "Trainer", Greedy)
    try:
        peak = memory.measure_peak("eager", "tiny-gpt", 0.0, learns=True)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"the system does not tell the peak: {error}")
    assert 110 < peak < 140


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peak = memory.peak_mb("eager", "gpt2-block", 0.0, learns=False)
    assert peak is not None and 1 < peak < 1000


def test_the_record_of_known_times() -> None:
    times = {"fastformer": 4.0, "fastformer-bf16": 2.0, "naive": 12.0, "naive-bf16": 7.0}
    times |= {"eager": 10.0, "compile-eager": 8.0, "compile-eager-bf16": 5.0}
    times |= {"gemm": 3.0, "gemm-bf16": 1.5}
    row = Row("x", {name: [ms] for name, ms in times.items()})
    found = models.record(row)
    assert found["vs_naive"] == 6.0
    assert (found["vs_best"], found["best"]) == (2.5, "compile-eager-bf16")
    assert (found["vs_eager_fp32"], found["best_fp32"]) == (2.0, "compile-eager")
    assert found["gemm_share_fp32"] == found["gemm_share_bf16"] == 0.75


def test_memory_of_all_cases_makes_a_table(monkeypatch, tmp_path, capsys) -> None:
    peaks = {"fastformer": 10.0, "naive": 30.0}
    monkeypatch.setattr(memory, "DEFAULT", ("tiny-gpt",))
    monkeypatch.setattr(memory, "peak_mb", lambda name, *rest: peaks.get(name))
    monkeypatch.setattr("sys.argv", ["memory", "--all", "--out", str(tmp_path)])
    memory.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if "tiny-gpt" in line)
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["10", "failed", "30"]
    assert json.loads((tmp_path / "memory.json").read_text())["peak_mb"] == {"tiny-gpt": peaks}
    assert row in (tmp_path / "memory.md").read_text()


def test_memory_wants_a_case_or_all(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["memory", "eager"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "name a variant and a case, or give --all" in capsys.readouterr().err
