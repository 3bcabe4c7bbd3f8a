"""Bad input ends a run with one clear line and exit code 2, and overwrites nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastformer.train import checkpoint
from fastformer.train.config import default_config
from fastformer.train.loop import Diverged, train

Arguments = Callable[..., list[str]]
Command = Callable[..., subprocess.CompletedProcess[str]]


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The run ended with exit code 2 and one line on stderr that holds all `words`."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("fastformer: error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def _text(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("no such file", "nothing.txt")),
        (b"", ("is empty",)),
        (b"\xff\xfe\x00\x01", ("not UTF-8",)),
        (b"only a few words", ("needs", "--max-tokens")),
    ],
    ids=["missing", "empty", "binary", "too-short"],
)
def test_bad_text(
    content: bytes | None, words: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "nothing.txt"
    if content is not None:
        _text(tmp_path, "nothing.txt", content)
    out = tmp_path / "run"
    refused(command(["train", "gpt", "--data", str(path), "--out", str(out)]), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("gpt", "--heads 3", ("heads must divide dim", "32", "3")),
        ("gpt", "--heads 8", ("multiple of 8", "got 4")),
        ("gpt", "--preset gpt-tinny", ("unknown preset", "did you mean 'gpt-tiny'?")),
        ("gpt", "--preset bert-tiny", ("is a bert model", "fastformer train bert")),
        ("gpt", "--tokenizer words", ("--tokenizer must be",)),
        ("gpt", "--steps 0", ("--steps must be at least 1", "got 0")),
        ("gpt", "--lr -1", ("--lr must be above 0",)),
        ("gpt", "--betas 0.9 1", ("--betas must be in [0, 1)", "0.9 1")),
        ("gpt", "--dropout 1.5", ("dropout must be in [0, 1)", "1.5")),
        ("gpt", "--device gpu", ("--device must be auto, cpu or cuda", "'gpu'")),
        ("gpt", "--resume", ("no such folder",)),
        ("vit", "--patch-size 3", ("image_size must be a multiple of patch_size", "8 and 3")),
        ("vit", "--data /nowhere", ("no such folder", "/nowhere")),
    ],
)
def test_bad_settings(
    kind: str,
    flags: str,
    words: tuple[str, ...],
    arguments: Arguments,
    command: Command,
    tmp_path: Path,
) -> None:
    refused(command(arguments(kind, tmp_path / "run", *flags.split())), *words)
    assert not (tmp_path / "run").exists()


def test_a_recipe_for_a_text_asks_for_it(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--data must name a text", "'shakespeare-char-cpu'", "tinyshakespeare", "https://")
    args = ["train", "gpt", "--preset", "shakespeare-char-cpu", "--out", str(out)]
    refused(command(args), *words)
    assert not out.exists()


def test_misspelt_words_are_corrected(command: Command) -> None:
    refused(command(["trian", "gpt"]), "did you mean 'train'?")
    refused(command(["train", "gtp"]), "did you mean 'gpt'?")
    result = command(["train", "gpt", "--step", "5"])
    assert result.returncode == 2 and "--steps" in result.stderr


def test_token_id_out_of_range(arguments: Arguments, command: Command, tmp_path: Path) -> None:
    """A tokenizer with a hole gives ids beyond its own size."""
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "the": 700}, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        tokenizer[key] = None
    tokenizer["added_tokens"] = []
    path = tmp_path / "holes.json"
    path.write_text(json.dumps(tokenizer))
    out = tmp_path / "run"
    result = command(arguments("gpt", out, "--tokenizer", path))
    refused(result, "token ids must be below the vocabulary size 2", "700")
    assert not out.exists()


def test_corrupt_images_are_named_skipped_and_counted(
    image_folder: Path, arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    size = ["--data", str(image_folder), "--image-size", "16", "--patch-size", "8"]
    broken = image_folder / "train" / "dark" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (image_folder / "val" / "light" / "0.png").write_bytes(b"")
    result = command(arguments("vit", tmp_path / "run", *size, "--steps", 3))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("skipped ") == 2
    assert "dark/3.png" in result.stdout and "light/0.png" in result.stdout
    assert "15 training and 7 validation images" in result.stdout

    for picture in (image_folder / "val" / "dark").iterdir():
        picture.write_bytes(b"no picture")
    refused(command(arguments("vit", tmp_path / "run2", *size)), "val/dark")
    assert not (tmp_path / "run2").exists()


def test_a_folder_with_a_run_is_not_overwritten(
    arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert command(arguments("gpt", out, "--steps", 2)).returncode == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused(command(arguments("gpt", out, "--steps", 2)), "is not empty", "--resume")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(command(arguments("gpt", tmp_path / "mine")), "is not empty")
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_folder_in_use_is_refused(
    arguments: Arguments, command: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    args = arguments("gpt", tmp_path / "run", "--steps", 100000)
    pipe = subprocess.PIPE
    first = subprocess.Popen(
        [sys.executable, "-m", "fastformer", *args], stdout=pipe, env=environment
    )
    try:
        assert first.stdout is not None
        while b"step " not in first.stdout.readline():
            assert first.poll() is None
        refused(command(args), "in use by another run")
        refused(command([*args, "--resume"]), "in use by another run")
    finally:
        first.kill()
        first.communicate()


def test_full_disk_keeps_earlier_checkpoints(
    arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a disk that fills up during the run."""
    out = tmp_path / "run"
    assert command(arguments("gpt", out, "--steps", 4, "--checkpoint-every", 2)).returncode == 0
    before = {p.name: p.read_bytes() for p in (out / "checkpoints").iterdir()}
    size = max(len(data) for data in before.values())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    resume = ["train", "gpt", "--out", str(out), "--resume", "--steps", "6"]
    result = command(resume, preexec_fn=limit)
    refused(result, "cannot write", "--resume")
    assert before == {p.name: p.read_bytes() for p in (out / "checkpoints").iterdir()}
    assert command(resume).returncode == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_disk_without_room_is_refused_at_once(
    arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        result = command(arguments("gpt", disk / "run", "--steps", 2))
        refused(result, "not enough space", "MB")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_out_that_cannot_be_made(arguments: Arguments, command: Command, tmp_path: Path) -> None:
    blocked = _text(tmp_path, "file", b"in the way")
    refused(command(arguments("gpt", blocked / "run")), "--out")
    assert blocked.read_bytes() == b"in the way"


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 6 on the loss is NaN; checkpoints are due at 2, 4, 6, ..."""
    import dataclasses

    from fastformer.train import loop

    config = dataclasses.replace(
        default_config("gpt", "gpt-tiny"),
        data=text_file,
        out=tmp_path / "run",
        steps=20,
        batch_size=4,
        dim=32,
        layers=1,
        heads=2,
        hidden_dim=64,
        max_tokens=16,
        vocab_size=300,
        log_every=5,
        checkpoint_every=2,
        device="cpu",
    )
    honest = loop.learning_rate
    monkeypatch.setattr(
        loop, "learning_rate", lambda c, step: float("nan") if step == 4 else honest(c, step)
    )
    with pytest.raises(Diverged, match=r"loss became nan at step 6; .*step-00000004") as caught:
        train("gpt", config)
    assert caught.value.exit_code == 1
    newest, faults = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.step == 4 and not faults
    assert all(t.isfinite().all() for t in newest.tensors.values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_generate_refuses_what_it_cannot_use(
    arguments: Arguments, command: Command, tmp_path: Path
) -> None:
    refused(command(["generate", "--out", str(tmp_path / "none")]), "no model at")
    out = tmp_path / "run"
    assert command(arguments("bert", out, "--steps", 1)).returncode == 0
    refused(command(["generate", "--out", str(out)]), "holds a BERT")
    shutil.copy(out / "model.safetensors", tmp_path / "whole")
    (out / "model.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:-10])
    refused(command(["generate", "--out", str(out)]), "is damaged")
