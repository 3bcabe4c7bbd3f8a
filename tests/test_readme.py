"""What README.md shows is run as it is written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastformer
from fastformer import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
BEFORE, AFTER, MODEL = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.partition("#")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("fastformer ")
]


def _run(code: str) -> dict[str, Any]:
    torch.manual_seed(0)
    C, V = 32, 50
    scope: dict[str, Any] = {"F": F, "C": C, "fastformer": fastformer}
    scope |= {name: torch.randn(2, 9, 4, 8) for name in "qkv"}
    scope |= {"x": torch.randn(2, 9, C), "targets": torch.randint(V, (2, 9))}
    scope |= {"proj": nn.Linear(C, C), "norm": nn.LayerNorm(C), "head": nn.Linear(C, V, bias=False)}
    exec(code, scope)
    return scope


def test_before_and_after_compute_the_same() -> None:
    """Without dropout, whose masks differ by design."""
    before = _run(BEFORE.replace(", 0.1)", ", 0.0)"))
    after = _run(AFTER.replace("dropout_p=0.1", "dropout_p=0.0"))
    for name in ("x", "h", "loss"):
        torch.testing.assert_close(after[name], before[name])
    assert _run(AFTER)["loss"].isfinite() and _run(BEFORE)["loss"].isfinite()


def test_the_model_example_runs() -> None:
    scope = _run(MODEL)
    assert scope["text"].shape == (1, 25)
    assert all(p.grad is not None for p in scope["model"].parameters())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option exists; what the command does is tested elsewhere."""
    from fastformer import generate
    from fastformer.train import loop

    monkeypatch.setattr(loop, "train", lambda kind, config: {})
    monkeypatch.setattr(generate, "generate_text", lambda config: [])
    assert cli.main(shlex.split(command)[1:]) == 0
