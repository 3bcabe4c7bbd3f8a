"""Models so small that a benchmark of them takes no time."""

from __future__ import annotations

import pytest

from benchmarks import cases
from benchmarks.cases import TrainingCase
from fastformer import ImageConfig, TextConfig

_SHAPE = {"dim": 32, "layers": 2, "heads": 2, "hidden_dim": 64}
_TEXT = _SHAPE | {"max_tokens": 12, "vocab_size": 50}
_PUBLISHED = {"pre_norm": False, "token_types": 2, "embedding_norm": True, "head_transform": True}
_PUBLISHED |= {"tied_head": True, "head_bias": True}
TINY = {
    "tiny-bert-base": TrainingCase(
        "tiny-bert-base", "bert", TextConfig(**_TEXT, **_PUBLISHED), 5, padded=True
    ),
    "tiny-gpt2": TrainingCase(
        "tiny-gpt2",
        "gpt",
        TextConfig(causal=True, activation="gelu_tanh", tied_head=True, **_TEXT),
        3,
    ),
    "tiny-gpt": TrainingCase("tiny-gpt", "gpt", TextConfig(causal=True, **_TEXT), 3),
    "tiny-bert": TrainingCase("tiny-bert", "bert", TextConfig(**_TEXT), 5, padded=True),
    "tiny-vit": TrainingCase(
        "tiny-vit", "vit", ImageConfig(image_size=8, patch_size=4, num_classes=5, **_SHAPE), 4
    ),
}


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, case in TINY.items():
        monkeypatch.setitem(cases.CASES, name, case)
