"""A run that is killed at any step and resumed ends with the bits of one that never stopped."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastformer.train import checkpoint
from fastformer.train.report import read_log

STEPS = 40


def _kill_at(args: list[str], step: int, number: int, cwd: Path, env: dict[str, str]) -> int:
    """Start a run, send it a signal when it reports `step`; return its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastformer", *args],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        match = re.match(r"step +(\d+)/", line)
        if match and int(match[1]) >= step:
            process.send_signal(number)
            break
    process.stdout.read()
    return process.wait(timeout=120)


@pytest.mark.parametrize(
    ("kind", "workers", "precision"),
    [("gpt", 1, "float32"), ("bert", 2, "bfloat16"), ("vit", 2, "float32"), ("vit", 1, "bfloat16")],
)
def test_sigkill_and_resume_is_bit_exact(
    kind: str,
    workers: int,
    precision: str,
    arguments: Callable[..., list[str]],
    command: Callable[..., subprocess.CompletedProcess[str]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    # One in four is killed before its first checkpoint.
    step = random.choice([random.randint(1, 2), *random.sample(range(3, STEPS - 5), 3)])
    more = ("--steps", STEPS, "--dropout", 0.1, "--checkpoint-every", 3, "--seed", 3)
    more += ("--precision", precision)
    whole = command(arguments(kind, tmp_path / "whole", *more, "--workers", 3 - workers))
    assert whole.returncode == 0, whole.stderr

    args = arguments(kind, tmp_path / "killed", *more, "--workers", workers)
    code = _kill_at(args, step, signal.SIGKILL, tmp_path, environment)
    assert code == -signal.SIGKILL, f"the run ended before it could be killed at step {step}"
    resumed = command(["train", kind, "--out", str(tmp_path / "killed"), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step" in resumed.stdout or step < 3

    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "killed" / "model.safetensors")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not expected[name].equal(found[name])]
    assert not different, f"killed at step {step}: {different}"
    # The logs agree too: every step once, the same losses.
    columns = ("step", "loss", "lr", "grad_norm", "val_loss", "val_accuracy")
    logs = [read_log(tmp_path / name / "log.csv") for name in ("whole", "killed")]
    rows = [[tuple(row[c] for c in columns) for row in log] for log in logs]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(
    number: int,
    arguments: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    args = arguments("gpt", tmp_path / "run", "--steps", 2000, "--workers", 1)
    code = _kill_at(args, 5, number, tmp_path, environment)
    assert code == 128 + number
    newest, faults = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.step >= 5 and not faults


def test_data_workers_do_not_change_the_result(
    arguments: Callable[..., list[str]],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    models = []
    for workers in (0, 2):
        out = tmp_path / f"workers{workers}"
        result = command(arguments("vit", out, "--steps", 6, "--workers", workers))
        assert result.returncode == 0, result.stderr
        models.append(load_file(out / "model.safetensors"))
    assert all(models[0][name].equal(models[1][name]) for name in models[0])


def test_damaged_checkpoint_is_passed_over(
    arguments: Callable[..., list[str]],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """The newest is cut short, the one before has one bit flipped: the third serves."""
    out = tmp_path / "run"
    more = ("--steps", 8, "--checkpoint-every", 2, "--dropout", 0.1)
    assert command(arguments("gpt", out, *more)).returncode == 0
    final = load_file(out / "model.safetensors")
    files = checkpoint.list_checkpoints(out / "checkpoints")
    assert [f.name for f in files] == [f"step-{s:08d}.safetensors" for s in (8, 6, 4)]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    data = bytearray(files[1].read_bytes())
    data[-1000] ^= 1
    files[1].write_bytes(bytes(data))
    result = command(["train", "gpt", "--out", str(out), "--resume"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("passed over: ") == 2 and "going on from step 4" in result.stdout
    found = load_file(out / "model.safetensors")
    assert all(found[name].equal(final[name]) for name in final)

    before = (out / "model.safetensors").read_bytes()
    for file in checkpoint.list_checkpoints(out / "checkpoints"):
        file.write_bytes(b"not a checkpoint")
    result = command(["train", "gpt", "--out", str(out), "--resume"])
    assert result.returncode == 2
    assert "no usable checkpoint" in result.stderr and result.stderr.count("\n") == 1
    assert (out / "model.safetensors").read_bytes() == before


def test_resume_refuses_another_model_or_data(
    arguments: Callable[..., list[str]],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    assert command(arguments("gpt", out, "--steps", 2)).returncode == 0
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    other = tmp_path / "other.txt"
    other.write_text("other words, " * 2000)
    resume = ["train", "gpt", "--out", str(out), "--resume"]
    for extra, message in (
        (["--layers", "3"], "--layers was 2"),
        (["--data", str(other)], "the data is not what"),
    ):
        result = command([*resume, *extra])
        assert result.returncode == 2 and message in result.stderr, result.stderr
    result = command(["train", "bert", "--out", str(out), "--resume"])
    assert result.returncode == 2 and "holds a gpt run" in result.stderr
    assert before == {p: p.read_bytes() for p in out.rglob("*.safetensors")}


def test_more_steps_can_be_added(
    arguments: Callable[..., list[str]],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    assert command(arguments("gpt", out, "--steps", 2)).returncode == 0
    result = command(["train", "gpt", "--out", str(out), "--resume"])
    assert result.returncode == 0 and "already trained for 2 steps" in result.stdout
    result = command(["train", "gpt", "--out", str(out), "--resume", "--steps", "4"])
    assert result.returncode == 0 and "--steps 2 -> 4" in result.stdout
    assert [row["step"] for row in read_log(out / "log.csv") if row["loss"]] == list("1234")
