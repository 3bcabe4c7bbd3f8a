"""The raw op behind `fastformer.AdamW`: one step of many parameters and their low-precision copies.

It is bound by memory, so everything happens in one pass (Loshchilov and Hutter, "Decoupled Weight
Decay Regularization", ICLR 2019, algorithm 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.ops import dispatch, reference


def _fake(*args: Any) -> None:
    return None


dispatch.define(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] copies, float lr, float beta1,"
    " float beta2, float eps, float weight_decay) -> ()",
    reference=reference.adamw_step,
    fake=_fake,
    native=("cpu",),
)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update float32 parameters on the CPU and, unless the list is empty, their bfloat16 copies.

    `steps` count the steps each parameter has had. Everything but the gradients must be contiguous.
    Autograd sees the parameters and the copies change.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, copies)
    torch.ops.fastformer.adamw_step.default(*lists, lr, beta1, beta2, eps, weight_decay)
    torch.autograd.graph.increment_version([*params, *copies])
