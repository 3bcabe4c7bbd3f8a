"""What a run computes and leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import fastformer
from fastformer.train import loop
from fastformer.train.config import TrainConfig, default_config, from_json, to_json
from fastformer.train.data.text import load_tokenizer
from fastformer.train.data.windows import CausalWindows
from fastformer.train.folder import RunFolder
from fastformer.train.loop import evaluate
from fastformer.train.optim import build_optimizer, learning_rate
from fastformer.train.processes import Share
from fastformer.train.report import Log, Screen, duration, read_log
from fastformer.train.tasks import build_task

Arguments = Callable[..., list[str]]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("kind", ["gpt", "bert", "vit"])
def test_a_run_leaves_everything_behind(
    kind: str, arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = arguments(kind, out, "--steps", 60, "--checkpoint-every", 15, "--dropout", 0.1)
    result = command([*args, "--eval-every", "20", "--lr", "0.01"])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    summary = json.loads((out / "summary.json").read_text())
    unit = "images" if kind == "vit" else "tokens"
    assert summary["steps"] == 60 and summary["seconds"] > 0
    assert summary[f"{unit}_per_second"] > 0 and summary["peak_memory_mb"] > 50
    assert summary["versions"]["torch"] == torch.__version__
    # Sentences from a grammar are learnt at once; ten digits are at least begun.
    gain = 1.5 if kind != "vit" else 0.1
    assert summary["val_loss"] < summary["val_loss_start"] - gain
    assert ("val_accuracy" in summary) == (kind != "gpt")

    rows = read_log(out / "log.csv")
    assert [int(r["step"]) for r in rows if r["loss"]] == list(range(1, 61))
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [0, 20, 40, 60]
    assert math.isclose(float(rows[-1]["val_loss"]), summary["val_loss"], rel_tol=1e-5)
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}.safetensors" for s in (30, 45, 60)]
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors() or []) > 10
    samples = (out / "samples.txt").read_text()
    assert [f"=== step {s} ===" in samples for s in (0, 20, 40, 60)] == [True] * 4
    assert (out / "tensorboard").is_dir()
    for name in ("model.safetensors", "log.csv", "curves.png", "samples.txt", "summary.json"):
        assert str(out / name) in result.stdout
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()

    model = fastformer.load_model(out)
    assert type(model).__name__.lower() == kind
    newest = load_file(out / "checkpoints" / names[-1])
    assert all(newest[f"model/{n}"].equal(p) for n, p in model.named_parameters())


def _umask() -> int:
    os.umask(value := os.umask(0))
    return value


def test_generate_continues_the_prompt(
    arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert command(arguments("gpt", out, "--steps", 80, "--lr", "0.01")).returncode == 0
    ask = ["generate", "--out", str(out), "--prompt", "the cat", "--tokens", "30"]
    first, again = command(ask), command(ask)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout and first.stdout.startswith("the cat ")
    known = {"cat", "dog", "bird", "aunt", "clock", "sees", "hears", "likes", "follows"}
    assert known & set(first.stdout.removeprefix("the cat").replace(".", " ").split())


def small_config(kind: str, out: Path, **changes: object) -> TrainConfig:
    preset = {"gpt": "gpt-tiny", "bert": "bert-tiny", "vit": "vit-digits"}[kind]
    shape = {"dim": 32, "layers": 2, "heads": 2, "hidden_dim": 64, "batch_size": 8}
    if kind != "vit":
        shape |= {"max_tokens": 16, "vocab_size": 300}
    default = default_config(kind, preset)  # type: ignore[arg-type]
    return dataclasses.replace(default, out=out, device="cpu", **(shape | changes))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_metrics_weigh_every_example_the_same(kind: str, text_file: Path, tmp_path: Path) -> None:
    """A last batch of another size must not count more: compare with one pass over all examples."""
    data = {} if kind == "vit" else {"data": text_file}
    config = small_config(kind, tmp_path / "run", batch_size=7, **data)
    screen = Screen(silent=True)
    with RunFolder(tmp_path / "run", resume=False) as folder:
        task = build_task(kind, config, folder, Share(), screen)  # type: ignore[arg-type]
    loss, accuracy = evaluate(task, config, Share(), torch.device("cpu"), screen)
    batches = [task.validation[i] for i in range(len(task.validation))]
    sizes = [len(next(iter(b.values()))) for b in batches]
    assert sizes[-1] != sizes[0], "the test needs an uneven last batch"
    inputs, targets = (torch.cat([list(b.values())[i] for b in batches]) for i in (0, 1))
    with torch.no_grad():
        logits = task.model.eval()(inputs)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = targets != -100
    expected = F.cross_entropy(logits, targets, ignore_index=-100)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    right = (logits.argmax(-1) == targets)[counted].float().mean()
    assert accuracy == pytest.approx(float(right), abs=1e-6)


def test_learning_rate_warms_up_and_decays_to_a_tenth(tmp_path: Path) -> None:
    config = small_config("gpt", tmp_path, steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_accumulation_equals_one_large_batch(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch is made the same one, so that the mean of two gradients is that of one."""
    honest = CausalWindows.__getitem__
    monkeypatch.setattr(CausalWindows, "__getitem__", lambda self, step: honest(self, 0))
    weights = []
    for name, changes in (("large", {}), ("small", {"accumulate": 2})):
        settings = {"data": text_file, "steps": 1, "lr": 1e-2, "warmup_steps": 0}
        loop.train("gpt", small_config("gpt", tmp_path / name, **settings, **changes))
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_weight_decay_spares_vectors() -> None:
    model = fastformer.from_preset("gpt-tiny", layers=1)
    config = default_config("gpt", "gpt-tiny")
    matrices, vectors = build_optimizer(model, config).param_groups
    assert matrices["weight_decay"] == config.weight_decay and vectors["weight_decay"] == 0.0
    assert {p.dim() for p in vectors["params"]} == {1}
    assert matrices["betas"] == vectors["betas"] == config.betas == (0.9, 0.95)
    count = len(matrices["params"]) + len(vectors["params"])
    assert count == len(list(model.parameters()))


@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["copied", "sharded"])
def test_two_processes_train_as_one(
    more: list[str], arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    """torchrun with 2 batches of 4 on each of two processes equals one process with batch 16.

    The two are stopped after step 3 and go on from their checkpoint.
    """
    common = ["--lr", "0.01", "--dropout", "0"]
    two = arguments("gpt", tmp_path / "two", *common, "--accumulate", "2", *more, "--steps", "5")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    launch += [str(20000 + os.getpid() % 20000), "-m", "fastformer", *two, "--batch-size", "4"]
    for extra in (["--checkpoint-every", "3"], ["--resume"]):
        result = command([*launch, *extra], module=None)
        assert result.returncode == 0, result.stderr
        newest = tmp_path / "two" / "checkpoints" / "step-00000005.safetensors"
        if extra[0] != "--resume":
            newest.unlink()
    assert "going on from step 3" in result.stdout

    one = arguments("gpt", tmp_path / "one", *common, "--accumulate", "2", "--steps", "5")
    assert command(one).returncode == 0
    expected, found = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    logs = [read_log(tmp_path / name / "log.csv") for name in ("one", "two")]
    losses = [[float(r["val_loss"]) for r in log if r["val_loss"]] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_shard_needs_processes(arguments: Arguments, command: Command, tmp_path: Path) -> None:
    result = command(arguments("gpt", tmp_path / "run", "--shard"))
    assert result.returncode == 2 and "--shard needs several processes" in result.stderr


def test_bfloat16_and_compile_train(arguments: Arguments, command: Command, tmp_path: Path) -> None:
    flags = ["--precision", "bfloat16", "--compile", "--steps", "30", "--lr", "0.01"]
    result = command(arguments("gpt", tmp_path / "run", *flags, "--dropout", "0.1"))
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss"] < summary["val_loss_start"] - 1.0
    assert "bfloat16 on cpu" in result.stdout


def test_image_folder_trains(
    image_folder: Path, arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    """Dark and light pictures are told apart, whatever their size and shape."""
    flags = ["--data", str(image_folder), "--image-size", "16", "--patch-size", "8"]
    result = command(arguments("vit", tmp_path / "run", *flags, "--steps", 30, "--lr", "0.003"))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] == 1.0
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["dark", "light"]


def test_character_tokenizer_gives_the_text_back(
    text_file: Path, arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = command(arguments("gpt", out, "--tokenizer", "char", "--steps", 2))
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(out / "tokenizer.json")
    line = text_file.read_text().splitlines()[0]
    assert tokenizer.decode(tokenizer.encode(line).ids) == line
    assert len(tokenizer.encode(line).ids) == len(line)


def test_nanogpt_recipe_is_nanogpts(text_file: Path, command: Command, tmp_path: Path) -> None:
    """The settings of its README for a CPU; the rate decays to a tenth, as with min_lr=1e-4."""
    preset = "shakespeare-char-cpu"
    config = default_config("gpt", preset)
    shape = {"layers": 4, "heads": 4, "dim": 128, "max_tokens": 64, "dropout": 0.0}
    optimiser = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "betas": (0.9, 0.99)}
    schedule = {"steps": 2000, "warmup_steps": 100, "batch_size": 12, "accumulate": 1}
    for name, value in {**shape, **optimiser, **schedule}.items():
        assert getattr(config, name) == value, name

    out = tmp_path / "run"
    args = ["train", "gpt", "--preset", preset, "--data", str(text_file), "--out", str(out)]
    assert command([*args, "--steps", "2"]).returncode == 0
    text = text_file.read_text()
    vocabulary = load_tokenizer(out / "tokenizer.json").get_vocab().keys()
    assert vocabulary == {"<unk>", "<|endoftext|>", *text[: int(0.9 * len(text))]}


def test_config_round_trip(tmp_path: Path) -> None:
    for kind in ("gpt", "bert", "vit"):
        config = small_config(kind, tmp_path / "run", data=tmp_path)
        text = json.dumps(to_json(config))
        assert from_json(kind, json.loads(text)) == config  # type: ignore[arg-type]


def test_log_of_a_resumed_run_forgets_later_rows(tmp_path: Path) -> None:
    columns = ("step", "loss")
    with RunFolder(tmp_path / "run", resume=False) as folder:
        log = Log(folder, columns, 0)
        for step in range(1, 6):
            log.row(step=step, loss=1.0 / step)
            log.sample(step, f"text {step}")
        log.close()
        with open(folder / "log.csv", "a") as file:
            file.write("6,0.1")  # cut short by a crash, without its line end
        log = Log(folder, columns, 3)
        log.row(step=4, loss=0.5)
        log.close()
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["loss"]) for r in rows][-2:] == [("3", "0.333333"), ("4", "0.5")]
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert "text 3" in samples and "text 4" not in samples


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (11045, "3:04:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
