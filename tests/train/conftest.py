"""Small runs for the tests of the trainer: tiny models, tiny data, a few steps."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}

SMALL = {
    "gpt": "--dim 32 --layers 2 --heads 2 --hidden-dim 64 --max-tokens 16 --vocab-size 300",
    "bert": "--dim 32 --layers 2 --heads 2 --hidden-dim 64 --max-tokens 16 --vocab-size 300",
    "vit": "--dim 32 --layers 2 --heads 2 --hidden-dim 64",
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 kB of sentences with a grammar that a small model can learn."""
    draw = random.Random(0)
    names = ["the cat", "a dog", "one bird", "my aunt", "the old clock"]
    verbs = ["sees", "hears", "likes", "follows", "forgets"]
    lines = [
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}." for _ in range(1500)
    ]
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of 8 + 4 small pictures: dark ones and light ones."""
    draw = random.Random(0)
    root = tmp_path / "pictures"
    for side, count in (("train", 8), ("val", 4)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = root / side / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = tuple(level + draw.randrange(40) for _ in range(3))
                Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
    return root


@pytest.fixture
def arguments(text_file: Path) -> Callable[..., list[str]]:
    """`arguments("gpt", out, "--steps", 5)`: the command line of a small run."""

    def build(kind: str, out: Path, *more: object) -> list[str]:
        data = [] if kind == "vit" else ["--data", str(text_file)]
        fixed = ["--batch-size", "8", "--log-every", "1", "--eval-every", "100", "--device", "cpu"]
        extra = [str(word) for word in more]
        return ["train", kind, *data, "--out", str(out), *SMALL[kind].split(), *fixed, *extra]

    return build


@pytest.fixture
def environment() -> dict[str, str]:
    """Variables of every process that a test starts."""
    return ENVIRONMENT


Result = subprocess.CompletedProcess[str]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Result]:
    """Run `fastformer ...` in a new process in an empty folder."""
    (tmp_path / "cwd").mkdir()

    def run(args: list[str], module: str | None = "fastformer", **options: object) -> Result:
        prefix = ["-m", module] if module else []
        return subprocess.run(
            [sys.executable, *prefix, *args],
            cwd=tmp_path / "cwd",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            **options,  # type: ignore[call-overload]
        )

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
