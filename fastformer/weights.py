"""Models on disk: one safetensors file with the weights and, in its header, the configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastformer.presets import MODELS
from fastformer.transformer import BERT, GPT, ImageConfig, TextConfig, ViT

_KEY = "fastformer"


def header(model: BERT | GPT | ViT) -> dict[str, str]:
    """The metadata that says which model the weights belong to."""
    values = {
        f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config) if f.init
    }
    kind = next(name for name, model_class in MODELS.items() if isinstance(model, model_class))
    return {"format": "pt", _KEY: json.dumps({"kind": kind, "config": values})}


def tensors(model: BERT | GPT | ViT) -> dict[str, Tensor]:
    """The parameters by name on the CPU, those that two names share once."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def save_model(model: BERT | GPT | ViT, path: str | Path) -> None:
    """Write weights and configuration to one safetensors file."""
    save_file(tensors(model), path, metadata=header(model))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> BERT | GPT | ViT:
    """Rebuild a model from `save_model`'s file, or from a run folder, in evaluation mode.

    Raises ValueError when the file is missing, damaged or not one of fastformer's.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no model at {path}; a run writes model.safetensors when it ends")
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model_class: Any = MODELS[stored["kind"]]
        config_class: Any = ImageConfig if stored["kind"] == "vit" else TextConfig
        config = config_class(**stored["config"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a model of fastformer ({error})") from None
    with torch.device(device):
        model = model_class(config)
    parameters = dict(model.named_parameters())
    expected = {(name, parameter.shape) for name, parameter in parameters.items()}
    different = expected ^ {(name, value.shape) for name, value in values.items()}
    if different:
        name = min(name for name, _ in different)
        raise ValueError(f"{path} does not fit its own configuration: {name}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return model.eval()
