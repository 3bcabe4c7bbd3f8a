"""Argument rules that several ops share: dtypes, dropout and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_one_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {places}")


def check_float(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are floating point, ValueError unless all are on one device."""
    for name, t in tensors.items():
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}"
            )
    check_one_device(op, **tensors)


def check_same_dtype(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors have one dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise TypeError(f"{op}: dtypes must match, got {found}; cast them or use torch.autocast")


def check_dropout(op: str, dropout_p: float, rng: Tensor | None, like: Tensor) -> Tensor | None:
    """Check a dropout probability and its generator state; return the state to use, None for p = 0.

    Without `rng` a state is drawn from torch's default generator of the device, so that
    torch.manual_seed governs it and activation checkpointing replays it.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if rng is None:
        return torch.randint(2**62, (2,), dtype=torch.int64, device=like.device)
    if rng.dtype != torch.int64 or rng.shape != (2,) or rng.device != like.device:
        raise ValueError(
            f"{op}: rng must be an int64 tensor (seed, offset) of shape (2,) on {like.device},"
            f" got {rng.dtype} {tuple(rng.shape)} on {rng.device}"
        )
    return rng


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on the device of `x`, or None outside autocast."""
    device = x.device.type
    if device == "meta":  # torch knows no autocast there, and raises
        return None
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a view of every tensor that was given before, as cu_seqlens often is: torch.compile
    refuses an autograd.Function that takes one tensor twice."""
    if not torch.compiler.is_compiling():
        return args
    out: list[Any] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is other for other in out)
        out.append(arg.view_as(arg) if again else arg)
    return tuple(out)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
