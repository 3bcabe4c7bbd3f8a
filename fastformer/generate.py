"""`fastformer generate`: continue a text with a GPT that a run has trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastformer.transformer import GPT
from fastformer.weights import load_model


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of `fastformer generate`."""

    out: Path
    """Folder of a finished `fastformer train gpt` run."""
    prompt: str = ""
    """Text to continue; empty starts a new one."""
    tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample from this many most likely tokens."""
    seed: int = 0
    """The same seed gives the same texts."""
    samples: int = 1
    """Number of texts."""
    device: str = "cpu"
    """cpu or cuda."""


def generate_text(config: GenerateConfig) -> Iterator[str]:
    """Yield the texts. Raises ValueError, one clear line, when the folder holds no trained GPT."""
    from fastformer.train.data.text import END_OF_TEXT, load_tokenizer

    model = load_model(config.out, config.device)
    if not isinstance(model, GPT):
        raise ValueError(f"{config.out} holds a {type(model).__name__}; only a GPT writes text")
    tokenizer = load_tokenizer(config.out / "tokenizer.json")
    stop = tokenizer.token_to_id(END_OF_TEXT)
    ids = tokenizer.encode(config.prompt).ids
    if not ids:
        ids = [0 if stop is None else stop]
    for number in range(config.samples):
        prompt = torch.tensor([ids], device=config.device)
        out = model.generate(
            prompt,
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed + number,
            stop=stop,
        )
        yield str(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
