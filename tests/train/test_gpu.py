"""Training on a GPU: it learns, resumes to the bit, and draws the dropout of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("kind", ["gpt", "bert", "vit"])
def test_training_learns_and_resumes_to_the_bit(
    kind: str, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    from fastformer import cli

    more = ("--device", "cuda", "--dropout", "0.1", "--lr", "0.005", "--checkpoint-every", "20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(arguments(kind, whole, *more, "--steps", 40)) == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val_loss"] < summary["val_loss_start"]

    assert cli.main(arguments(kind, parts, *more, "--steps", 40)) == 0
    (parts / "checkpoints" / "step-00000040.safetensors").unlink()
    assert cli.main(["train", kind, "--out", str(parts), "--resume"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("preset", ["gpt-tiny", "bert-tiny"])
def test_loss_with_dropout_equals_that_of_the_cpu(preset: str) -> None:
    torch.manual_seed(0)
    model = fastformer.from_preset(preset, dropout=0.2, attention_dropout=0.2, mlp_dropout=0.2)
    ids = torch.randint(0, 2048, (4, 64))
    rng = torch.tensor([7, 3 << 32])
    expected = model(ids, ids, rng=rng)
    found = model.cuda()(ids.cuda(), ids.cuda(), rng=rng.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
