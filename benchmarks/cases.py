"""The models whose training step is measured, and the batches they are measured on.

The ops are measured at the shapes that they have in these models.

B batch, T tokens, H heads, D head dim, C model dim, F hidden dim, V vocabulary (or classes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastformer.presets import MODELS, build_config
from fastformer.transformer import BERT, GPT, IGNORE_INDEX, ImageConfig, TextConfig, ViT

GPU_BACKENDS = ("triton", "cuda")  # which are also timed on their own there
MASKED = 0.15  # the share of its tokens that BERT predicts


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T) or images, what to predict, and the lengths (B,) of padded rows."""

    inputs: Tensor
    targets: Tensor
    key_lengths: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """Which tokens (B, T) are no padding; None where none is."""
        if self.key_lengths is None:
            return None
        tokens = torch.arange(self.inputs.shape[1], device=self.inputs.device)
        return tokens < self.key_lengths[:, None]

    @property
    def counted(self) -> Tensor:
        """Which rows of the flattened targets enter the loss."""
        return self.targets.flatten() != IGNORE_INDEX


@dataclass(frozen=True)
class TrainingCase:
    """A model and a batch size; padded rows have lengths uniform in [T / 3, T]."""

    name: str
    kind: str
    config: TextConfig | ImageConfig
    B: int
    padded: bool = False

    @property
    def T(self) -> int:
        return self.config.max_tokens

    @property
    def C(self) -> int:
        return self.config.dim

    @property
    def D(self) -> int:
        return self.config.dim // self.config.heads

    @property
    def V(self) -> int:
        config = self.config
        return config.num_classes if isinstance(config, ImageConfig) else config.vocab_size

    def model(self, dropout: float = 0.0) -> BERT | GPT | ViT:
        """Our model with fresh weights, the same at every call."""
        torch.manual_seed(0)
        config = replace(self.config, dropout=dropout, attention_dropout=dropout)
        return MODELS[self.kind](config)  # type: ignore[arg-type]

    def batch(self) -> Batch:
        """Random data on torch's default device, the same at every call."""
        draw = torch.Generator(torch.get_default_device()).manual_seed(1)
        if isinstance(self.config, ImageConfig):
            size = self.config.image_size
            images = torch.randn(self.B, self.config.channels, size, size, generator=draw)
            return Batch(images, torch.randint(self.V, (self.B,), generator=draw))
        ids = torch.randint(self.V, (self.B, self.T + 1), generator=draw)
        ids, following = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        lengths = random_lengths(self, draw) if self.padded else None
        if self.kind == "gpt":
            return Batch(ids, following, lengths)
        predicted = torch.rand(ids.shape, generator=draw) < MASKED
        if lengths is not None:
            predicted &= torch.arange(self.T) < lengths[:, None]
        return Batch(ids, ids.masked_fill(~predicted, IGNORE_INDEX), lengths)


def random_lengths(case: TrainingCase, draw: torch.Generator) -> Tensor:
    """Lengths (B,) uniform in [T / 3, T]."""
    return torch.randint(case.T // 3, case.T + 1, (case.B,), generator=draw, dtype=torch.int32)


def _gpt(name: str, B: int, T: int, **settings: int) -> TrainingCase:
    return TrainingCase(name, "gpt", TextConfig(causal=True, max_tokens=T, **settings), B)


def _vit(name: str, B: int, **settings: int) -> TrainingCase:
    return TrainingCase(name, "vit", ImageConfig(**_SMALL, **settings), B)


def _bert(name: str, B: int, T: int, padded: bool = False) -> TrainingCase:
    return TrainingCase(name, "bert", build_config("bert-7.7m", max_tokens=T), B, padded)


_SMALL = {"dim": 384, "layers": 6, "heads": 6, "hidden_dim": 1536}
_BLOCK = {"dim": 768, "layers": 1, "heads": 12, "hidden_dim": 3072}

_CASES = (
    _bert("bert-7.7m", B=150, T=20),
    _gpt("gpt-384", B=8, T=256, vocab_size=5000, **_SMALL),
    _gpt("gpt-384-v50k", B=8, T=256, vocab_size=50257, **_SMALL),
    _vit("vit-384-t65", B=32, image_size=32, patch_size=4, num_classes=100),
    _vit("vit-384-t197", B=32, image_size=224, patch_size=16, num_classes=1000),
    # One block, so the vocabulary is only large enough to have a loss.
    _gpt("gpt2-block", B=1, T=1024, vocab_size=64, **_BLOCK),
    _bert("bert-7.7m-padded", B=64, T=64, padded=True),
)
# For a GPU: published models, then what courses train from scratch, the most telling ones first.
# The batches fill it, and yet the memory of all variants of a model fits into it at the same time.
# gpt-63.5m has biases of queries, keys and values, as GPT-2 has.
_GPU_CASES = (
    TrainingCase("gpt2", "gpt", build_config("gpt2"), 16),
    TrainingCase("bert-base-t128", "bert", build_config("bert-base", max_tokens=128), 128),
    TrainingCase("vit-b16", "vit", build_config("vit-b16", num_classes=1000), 128),
    TrainingCase("bert-base-t512", "bert", build_config("bert-base"), 32),
    TrainingCase("gpt-63.5m", "gpt", build_config("gpt-63.5m", qkv_bias=True), 256),
    TrainingCase("bert-7.7m-t20", "bert", build_config("bert-7.7m"), 2048),
    TrainingCase("vit-43m", "vit", build_config("vit-43m"), 128),
)
CASES = {case.name: case for case in (*_CASES, *_GPU_CASES)}
# What runs where no case is named: all without padding.
DEFAULT = tuple(case.name for case in _CASES if not case.padded)
GPU = tuple(case.name for case in _GPU_CASES)
SMALLEST = "bert-7.7m"
