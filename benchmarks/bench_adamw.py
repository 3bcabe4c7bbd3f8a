"""A step of AdamW on the float32 parameters of each model, gradients given.

`eager` is torch's default, `fused` its fused kernel, `compile` the compiled default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastformer
from benchmarks import report
from benchmarks.cases import CASES, DEFAULT, TrainingCase
from benchmarks.command import main
from benchmarks.gate import WrongResult
from benchmarks.harness import (
    OURS,
    Benchmark,
    Case,
    Options,
    Row,
    Settings,
    Unavailable,
    Variant,
    compiled,
    forget_compiled,
    measure,
)

_STEPS = 3  # before the gate compares
_SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}


def _ours(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return fastformer.AdamW(parameters, **_SETTINGS)


def _eager(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **_SETTINGS)


def _fused(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **_SETTINGS, fused=True)


def _parameters(case: TrainingCase, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights with gradients whose sizes span several orders of magnitude, as in training."""
    draw = torch.Generator().manual_seed(2)
    parameters = [p.detach().to(dtype).requires_grad_() for p in case.model().parameters()]
    for parameter in parameters:
        scale = 10 ** (-4 * torch.rand((), generator=draw))
        parameter.grad = (scale * torch.randn(parameter.shape, generator=draw)).to(dtype)
    return parameters


def _check(case: TrainingCase) -> None:
    """The rule of numerics for the weights after a few steps."""

    def trained(build: Callable, dtype: torch.dtype) -> list[Tensor]:
        parameters = _parameters(case, dtype)
        optimizer = build(parameters)
        for _ in range(_STEPS):
            optimizer.step()
        return [p.detach().double() for p in parameters]

    exact = trained(_eager, torch.float64)
    found, eager = (trained(build, torch.float32) for build in (_ours, _eager))
    for a, b, true in zip(found, eager, exact, strict=True):
        error, allowed = (a - true).abs().max(), 2 * (b - true).abs().max() + 1e-6
        if not error <= allowed:
            raise WrongResult(f"weights: error {error:.3g}, allowed {allowed:.3g}")


def _run(case: TrainingCase, settings: Settings) -> list[Row]:
    if not hasattr(fastformer, "AdamW"):
        raise Unavailable("this version has no fastformer.AdamW")
    if settings.compile:
        forget_compiled()
    _check(case)
    builds = {OURS: _ours, "eager": _eager, "fused": _fused}
    variants: dict[str, Variant] = {n: build(_parameters(case)).step for n, build in builds.items()}
    if settings.compile:
        variants["compile"] = compiled(_eager(_parameters(case)).step)
    return [measure(case.name, variants, settings)]


def _cases(options: Options) -> list[Case]:
    if options.on_gpu:  # where the step is torch's own
        return []
    variants = (OURS, "eager", "fused", "compile")
    return [
        Case(name, (name,), variants, partial(_run, CASES[name]))
        for name in options.cases or DEFAULT
    ]


BENCHMARK = Benchmark("adamw", "AdamW", _cases, report.op_table, report.op_record)

if __name__ == "__main__":
    main(BENCHMARK)
