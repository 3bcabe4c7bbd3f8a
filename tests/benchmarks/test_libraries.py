"""The models of other libraries are ours, and what is not here is named."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import library_models, models, ops
from benchmarks.bench_training_step import BENCHMARK as TRAINING_STEP
from benchmarks.cases import CASES
from benchmarks.command import main
from benchmarks.gate import WrongResult
from benchmarks.harness import QUICK, Options, Row
from benchmarks.libraries import find_all
from benchmarks.library_models import library_model, why_absent
from benchmarks.report import notes
from benchmarks.steps import VARIANTS, Trainer
from tests.benchmarks.test_models import no_processes  # noqa: F401
from tests.interop import optional

MODELS = [
    ("hugging-face", "tiny-bert-base"),
    ("hugging-face", "tiny-gpt"),
    ("hugging-face", "tiny-gpt2"),
    ("hugging-face", "tiny-vit"),
    ("timm", "tiny-vit"),
    ("torchvision", "tiny-vit"),
]
PACKAGES = {"hugging-face": "transformers"}


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_a_model_of_a_library_is_our_model(library, name) -> None:
    optional(PACKAGES.get(library, library))
    ours, theirs = (Trainer(VARIANTS[v], CASES[name]) for v in ("fastformer", library))
    expected, found = ours.first_step(), theirs.first_step()
    assert set(found) == set(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)
    real = slice(None) if ours.batch.real is None else ours.batch.real
    torch.testing.assert_close(theirs.infer()[real], ours.infer()[real], atol=1e-5, rtol=1e-5)
    for _ in range(20):
        theirs.step()
    assert theirs.first_step()["loss"] < expected["loss"]


def test_weights_that_have_no_place_are_an_error() -> None:
    optional("timm")
    case = CASES["tiny-vit"]
    weights = dict(case.model().named_parameters()) | {"more": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"timm: .* weights have places"):
        library_model("timm", "vit", case.config, weights)


def test_what_others_do_not_publish_is_named() -> None:
    optional("transformers")
    config = CASES["tiny-bert-base"].config
    assert why_absent("hugging-face", "bert", config) is None
    reason = why_absent("hugging-face", "bert", replace(config, pre_norm=True, tied_head=False))
    assert reason == "it has no model with pre_norm=True, tied_head=False"
    optional("torchvision")
    image = replace(CASES["tiny-vit"].config, channels=1)
    assert why_absent("torchvision", "vit", image) == "it has no model with channels=1"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is here")
def test_what_is_not_installed_is_named() -> None:
    found, absent = find_all({"a": "json:loads", "b": "flash_attn:f", "c": "json:nothing"})
    assert found == {"a": json.loads}
    assert absent["b"] == "ModuleNotFoundError: No module named 'flash_attn'"
    assert "no attribute 'nothing'" in absent["c"]


def test_the_notes_name_an_absent_rival_once() -> None:
    rows = [Row("x", {}, absent={"a": "no", "b": "why"}), Row("y", {}, absent={"a": "no"})]
    assert notes(rows) == ["a is absent: no", "b is absent from x: why"]


@pytest.mark.usefixtures("no_processes")
def test_the_command_compares_with_libraries(monkeypatch, tmp_path, capsys) -> None:
    optional("timm")
    optional("transformers")
    kinds = ("ours", "naive", "hugging-face", "timm", "torchvision")
    monkeypatch.setitem(library_models.LIBRARIES, "torchvision", (("no_such_library:x",), None))
    few = {n: v for n, v in VARIANTS.items() if v.kind in kinds and not v.compile}
    monkeypatch.setattr(models, "VARIANTS", few)
    arguments = ["--cases", "tiny-vit,tiny-bert", "--rounds", "1", "--no-memory", "--libraries"]
    main(TRAINING_STEP, [*arguments, "--json", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    vit, bert = json.loads((tmp_path / "x.json").read_text())["rows"]
    names = {"hugging-face", "hugging-face-bf16", "timm", "timm-bf16"}
    assert names < set(vit["vs"]) and not names & set(bert["vs"])
    assert "no_such_library" in vit["absent"]["torchvision"]
    assert set(bert["absent"]) == {"hugging-face", "hugging-face-bf16"}
    out = capsys.readouterr().out
    assert "- hugging-face is absent from tiny-bert: it has no model with pre_norm=True" in out
    assert "| hugging-face-bf16 " in out


def test_on_a_gpu_the_libraries_always_take_part_and_naive_float32_does_not() -> None:
    on_gpu = models.chosen(Options(on_gpu=True, precision="bfloat16"), True, "vit")
    assert {"timm-bf16", "hugging-face-bf16", "compile-eager-bf16", "naive-bf16"} < set(on_gpu)
    assert not {"naive", "compile-naive-bf16", "timm"} & set(on_gpu)
    usual = models.chosen(Options(precision="bfloat16"), True, "vit")
    assert "naive" in usual and not any(v.is_library for v in usual.values())
    text = models.chosen(Options(libraries=True), True, "gpt")
    assert "hugging-face" in text and "timm" not in text


@pytest.mark.usefixtures("no_processes")
def test_what_is_not_timed_is_still_compared_with(monkeypatch) -> None:
    few = {n: v for n, v in VARIANTS.items() if not (v.compile or v.is_library)}
    monkeypatch.setattr(models, "VARIANTS", few)
    options = Options(on_gpu=True, precision="bfloat16")
    (row,) = models._run(CASES["tiny-gpt"], options, True, QUICK)
    assert set(row.samples) == {"fastformer-bf16", "naive-bf16", "eager-bf16", "gemm-bf16"}
    wrong = lambda self, path: torch.save({"loss": torch.tensor(9.0)}, path)  # noqa: E731
    monkeypatch.setattr(models.Worker, "save_results", wrong)
    with pytest.raises(WrongResult, match="loss"):
        models._run(CASES["tiny-gpt"], options, True, QUICK)


def test_a_library_that_computes_something_else_is_not_timed() -> None:
    def build(case, dtype) -> ops.Operation:
        libraries = {
            "right": lambda x: 2 * x,
            "wrong": lambda x: 2.1 * x,
            "raises": lambda x: 1 / 0,
        }
        values = {"x": torch.randn(9)}
        return ops.Operation(
            values, lambda x: x + x, lambda x: 2 * x, libraries=libraries, absent={"z": "no"}
        )

    rows = ops._run(build, CASES["tiny-vit"], torch.float32, "x", QUICK)
    for row in rows:
        assert set(row.samples) == {"fastformer", "eager", "right"} and row.absent == {"z": "no"}
        assert row.failed["wrong"].startswith("WrongResult: output 0: error")
        assert row.failed["raises"].startswith("ZeroDivisionError")
