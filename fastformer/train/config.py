"""What a training run is told: one frozen dataclass per kind of data, from which the CLI is made.

The defaults of a run depend on its preset: `default_config` gives them, and whatever the user says
replaces fields of the result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastformer.presets import build_config, find_preset
from fastformer.transformer import ImageConfig, TextConfig, TransformerConfig

Kind = Literal["bert", "gpt", "vit"]


class RunError(Exception):
    """A run that cannot start or go on; the message is one line with the rule and the remedy."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options that all runs share."""

    preset: str
    """Model to train; `fastformer presets` lists them."""
    data: Path | None = None
    """Your data; None takes what ships with Python."""
    out: Path | None = None
    """Folder for the results; None takes a new one, runs/PRESET."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the settings stored there."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Sequences or images per step, on each device."""
    lr: float
    """Peak learning rate: linear warm-up, then cosine decay to a tenth."""
    dropout: float
    """Dropout of embeddings, attention weights and residual branches."""
    seed: int = 0
    """Determines weights, batches, masks, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu or cuda; auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU, float32 on a CPU."""
    workers: int = 0
    """Processes that prepare batches ahead; 0 prepares them in the training process."""
    eval_every: int
    """Steps between validations."""
    checkpoint_every: int
    """Steps between checkpoints; the newest three are kept."""
    log_every: int
    """Steps between log lines."""
    warmup_steps: int
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW decay of weight matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the running mean of gradients, and of their squares."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    shard: bool = False
    """Under torchrun: split weights and optimiser over the processes (FSDP2) instead of copying."""
    compile: bool = False
    """Run the model through torch.compile."""
    dim: int
    """Model dim C."""
    layers: int
    """Number of blocks."""
    heads: int
    """Attention heads; must divide --dim."""
    hidden_dim: int
    """Hidden dim of the MLP."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "workers": 0, "eval_every": 1, "checkpoint_every": 1}
        least |= {"log_every": 1, "warmup_steps": 0, "accumulate": 1, "grad_clip": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                flag = name.replace("_", "-")
                raise RunError(f"--{flag} must be at least {bound}, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise RunError(f"--lr must be above 0, got {self.lr}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise RunError(f"--betas must be in [0, 1), got {self.betas[0]} {self.betas[1]}")
        if self.device != "auto":
            self.torch_device()

    def torch_device(self) -> torch.device:
        """The device to train on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise RunError(f"--device must be auto, cpu or cuda, got {self.device!r}") from None
        if device.type not in ("cpu", "cuda"):
            raise RunError(f"--device must be auto, cpu or cuda, got {self.device!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RunError(
                f"--device {self.device}: this PyTorch sees no GPU;"
                " use --device cpu, or install a CUDA build of torch and a driver"
            )
        return device

    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype to autocast to, None for float32."""
        if self.precision == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else None
        return torch.bfloat16 if self.precision == "bfloat16" else None

    def model_overrides(self) -> dict[str, Any]:
        """Fields of the preset's model configuration that this run sets."""
        names = {f.name for f in dataclasses.fields(self)} - {"preset", "dropout"}
        shape = {f.name for f in dataclasses.fields(find_preset(self.preset).config) if f.init}
        overrides = {name: getattr(self, name) for name in names & shape}
        return overrides | {"dropout": self.dropout, "attention_dropout": self.dropout}

    def model_config(self, **more: Any) -> TransformerConfig:
        """The model's configuration; RunError when the settings do not fit together."""
        try:
            return build_config(self.preset, **(self.model_overrides() | more))
        except ValueError as error:
            raise RunError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig(TrainConfig):
    """A run on text: GPT or BERT."""

    data: Path | None = None
    """A text file or a folder of text files; None takes Python's language reference."""
    max_tokens: int
    """Window length T."""
    vocab_size: int
    """Largest vocabulary that the tokenizer may learn from the text."""
    tokenizer: str
    """bpe, wordpiece or char, learnt from the text, or the path of a tokenizer.json."""

    def check_text(self) -> None:
        """Raise RunError if the preset is a recipe for a text and none was named."""
        if self.data is None and self.preset in _TEXTS:
            raise RunError(
                f"--data must name a text for preset {self.preset!r} ({_TEXTS[self.preset]})"
            )


@dataclass(frozen=True, kw_only=True)
class ImageTrainConfig(TrainConfig):
    """A run on images: ViT."""

    data: Path | None = None
    """A folder with train/<class>/*.jpg and val/<class>/; None takes scikit-learn's digits."""
    image_size: int
    """Side of the square that images are cut to; must be a multiple of --patch-size."""
    patch_size: int
    """Side of a patch."""


# What differs from `_GENERIC` below. Learning rates are those at which the runs end lowest.
_RECIPES: dict[str, dict[str, Any]] = {
    "gpt-tiny": {"steps": 500, "batch_size": 32, "lr": 3e-3, "eval_every": 100},
    # Karpathy's: https://github.com/karpathy/nanoGPT, "I only have a macbook".
    "shakespeare-char-cpu": {
        "steps": 2000,
        "batch_size": 12,
        "lr": 1e-3,
        "warmup_steps": 100,
        "betas": (0.9, 0.99),
        "eval_every": 250,
        "tokenizer": "char",
    },
    "bert-tiny": {"steps": 600, "batch_size": 64, "lr": 3e-3, "eval_every": 100},
    "vit-digits": {"steps": 1500, "batch_size": 64, "lr": 2e-3, "eval_every": 200},
    "vit-tiny": {"steps": 1000, "batch_size": 32, "lr": 1e-3, "eval_every": 200},
    "bert-7.7m": {"batch_size": 150, "lr": 1e-3},
}
# Presets whose recipe is for one text, and where that is found: it does not ship with Python.
_TEXTS = {
    "shakespeare-char-cpu": "tinyshakespeare, https://raw.githubusercontent.com/karpathy/char-rnn"
    "/master/data/tinyshakespeare/input.txt"
}
_GENERIC: dict[str, Any] = {"steps": 5000, "batch_size": 32, "lr": 3e-4, "eval_every": 500}


def default_preset(kind: Kind, data: Path | None) -> str:
    """The preset of `fastformer train <kind>` when none is named: one that suits the machine."""
    if kind == "vit":
        if data is None:
            return "vit-digits"
        return "vit-s16" if torch.cuda.is_available() else "vit-tiny"
    if torch.cuda.is_available():
        return {"gpt": "gpt-63.5m", "bert": "bert-7.7m"}[kind]
    return f"{kind}-tiny"


def default_config(kind: Kind, preset: str) -> TrainConfig:
    """The settings of a run of `preset`. Raises RunError for an unknown preset or another kind."""
    try:
        found = find_preset(preset)
    except ValueError as error:
        raise RunError(str(error)) from None
    if found.kind != kind:
        raise RunError(
            f"preset {preset!r} is a {found.kind} model; use `fastformer train {found.kind}`"
        )
    model = found.config
    recipe = _GENERIC | _RECIPES.get(preset, {})
    steps = recipe["steps"]
    settings: dict[str, Any] = {
        "preset": preset,
        "checkpoint_every": recipe["eval_every"],
        "log_every": max(1, steps // 60),
        "warmup_steps": max(1, steps // 20),
        "dropout": model.dropout,
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "hidden_dim": model.hidden_dim,
    } | recipe
    if isinstance(model, TextConfig):
        text = {
            "max_tokens": model.max_tokens,
            "vocab_size": model.vocab_size,
            "tokenizer": "bpe" if kind == "gpt" else "wordpiece",
        }
        return TextTrainConfig(**(text | settings))
    assert isinstance(model, ImageConfig)
    return ImageTrainConfig(image_size=model.image_size, patch_size=model.patch_size, **settings)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def from_json(kind: Kind, values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`; RunError names a field that is missing or unknown."""
    config_class = ImageTrainConfig if kind == "vit" else TextTrainConfig
    typed: dict[str, Any] = {n: Path(values[n]) for n in ("data", "out") if values.get(n)}
    if "betas" in values:
        typed["betas"] = tuple(values["betas"])
    try:
        return config_class(**(values | typed))
    except TypeError as error:
        raise RunError(f"config.json does not describe a {kind} run: {error}") from None


# A resumed run may change what does not decide what the model is or what it is taught.
_FIXED = {"preset", "dim", "layers", "heads", "hidden_dim", "max_tokens", "vocab_size"}
_FIXED |= {"tokenizer", "image_size", "patch_size"}


def check_resumable(stored: TrainConfig, asked: TrainConfig) -> list[str]:
    """Compare a run's stored settings with those asked for now.

    Returns a line per change that is allowed; raises RunError for one that is not.
    """
    changes = []
    for field in dataclasses.fields(stored):
        before, now = getattr(stored, field.name), getattr(asked, field.name)
        if before == now or field.name in ("out", "resume"):
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name in _FIXED:
            raise RunError(
                f"--resume: {flag} was {before} when the run began and cannot become {now};"
                " leave the flag out, or start anew with another --out"
            )
        changes.append(f"{flag} {before} -> {now}")
    return changes
