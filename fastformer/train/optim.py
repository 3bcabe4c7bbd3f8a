"""The optimiser of a run and its learning rate."""

from __future__ import annotations

import math

from torch import nn

from fastformer.optim import AdamW
from fastformer.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the step after `step` finished ones: linear warm-up, cosine decay to a tenth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW that decays matrices and embeddings, and leaves biases and norms alone.

    Under autocast on a CPU it keeps the matrices in low precision too.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        fused=True,
        low_precision_copies=config.autocast_dtype(),
    )
