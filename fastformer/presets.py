"""Named models: small ones for a CPU, the published sizes, and four that courses train."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from fastformer.transformer import BERT, GPT, ImageConfig, TextConfig, TransformerConfig, ViT

MODELS: dict[str, type[BERT] | type[GPT] | type[ViT]] = {"bert": BERT, "gpt": GPT, "vit": ViT}


@dataclass(frozen=True)
class Preset:
    """A kind of model ("bert", "gpt" or "vit"), its configuration and a line about it."""

    kind: str
    about: str
    config: TransformerConfig


def _text(kind: str, about: str, **settings: Any) -> Preset:
    return Preset(kind, about, TextConfig(causal=kind == "gpt", **settings))


def _image(about: str, **settings: Any) -> Preset:
    settings = {"image_size": 224, "patch_size": 16, "num_classes": 1000, "eps": 1e-6} | settings
    return Preset("vit", about, ImageConfig(**settings))


def _shape(dim: int, layers: int, heads: int, hidden_dim: int) -> dict[str, int]:
    return {"dim": dim, "layers": layers, "heads": heads, "hidden_dim": hidden_dim}


PRESETS: dict[str, Preset] = {
    # For a CPU: each trains in minutes on two cores.
    "gpt-tiny": _text(
        "gpt",
        "decoder for a CPU",
        **_shape(128, 4, 4, 512),
        vocab_size=2048,
        max_tokens=64,
        tied_head=True,
    ),
    "shakespeare-char-cpu": _text(
        "gpt",
        "nanoGPT's CPU recipe: characters of tinyshakespeare",
        **_shape(128, 4, 4, 512),
        vocab_size=256,
        max_tokens=64,
        tied_head=True,
    ),
    "bert-tiny": _text(
        "bert",
        "encoder for a CPU",
        **_shape(128, 4, 4, 512),
        vocab_size=4096,
        max_tokens=64,
        tied_head=True,
        head_bias=True,
    ),
    "vit-digits": _image(
        "classifier of 8x8 digits for a CPU",
        **_shape(64, 4, 4, 256),
        image_size=8,
        patch_size=2,
        channels=1,
        num_classes=10,
        dropout=0.1,
    ),
    "vit-tiny": _image(
        "classifier of small photos for a CPU",
        **_shape(128, 6, 4, 512),
        image_size=64,
        patch_size=8,
        num_classes=10,
    ),
    # The sizes that courses train from scratch.
    "bert-7.7m": _text(
        "bert",
        "encoder of 20-token windows, head dim 16",
        **_shape(128, 8, 8, 512),
        vocab_size=23948,
        max_tokens=20,
    ),
    "gpt-63.5m": _text(
        "gpt",
        "decoder of 64-token windows, head dim 128, narrow MLP",
        **_shape(768, 6, 6, 256),
        vocab_size=30522,
        max_tokens=64,
        qkv_bias=False,
    ),
    "vit-43m": _image(
        "ViT-B/16 with six layers, 3 classes", **_shape(768, 6, 12, 3072), num_classes=3
    ),
    "vit-b16": _image("ViT-B/16, 3 classes", **_shape(768, 12, 12, 3072), num_classes=3),
    # Published sizes, compatible with the published weights.
    "bert-base": _text(
        "bert",
        "BERT-base, uncased, with its masked-token head",
        **_shape(768, 12, 12, 3072),
        vocab_size=30522,
        max_tokens=512,
        pre_norm=False,
        eps=1e-12,
        token_types=2,
        embedding_norm=True,
        head_transform=True,
        tied_head=True,
        head_bias=True,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "gpt2": _text(
        "gpt",
        "GPT-2 (124M)",
        **_shape(768, 12, 12, 3072),
        vocab_size=50257,
        max_tokens=1024,
        activation="gelu_tanh",
        tied_head=True,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "vit-s16": _image("ViT-S/16, 1000 classes", **_shape(384, 12, 6, 1536)),
    "vit-l16": _image("ViT-L/16, 1000 classes", **_shape(1024, 24, 16, 4096)),
}


def find_preset(name: str) -> Preset:
    """Return the preset `name`; raise ValueError with the nearest name when there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown preset {name!r}{hint} (known: {', '.join(PRESETS)})")
    return PRESETS[name]


def build_config(name: str, **overrides: Any) -> TransformerConfig:
    """Return the configuration of preset `name` with the fields in `overrides` replaced.

    Raises ValueError for an unknown preset or field, or values that do not fit together.
    """
    config = find_preset(name).config
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    for key in overrides:
        if key not in values:
            near = difflib.get_close_matches(key, values, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"preset {name!r} has no field {key!r}{hint} (it has: {', '.join(values)})"
            )
    return type(config)(**(values | overrides))


def from_preset(name: str, **overrides: Any) -> BERT | GPT | ViT:
    """Build the model of preset `name` with fresh weights.

    `overrides` replace fields of its configuration: from_preset("vit-b16", num_classes=1000). The
    names are listed by `fastformer presets`. Raises ValueError for an unknown preset (with the
    nearest name), an unknown field, or values that do not fit together.
    """
    config: Any = build_config(name, **overrides)
    return MODELS[find_preset(name).kind](config)
