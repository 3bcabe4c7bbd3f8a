"""Benchmarks of single ops at the shapes that they have in the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fastformer
from benchmarks import cases, report
from benchmarks.cases import TrainingCase
from benchmarks.gate import Function, OpGate
from benchmarks.harness import (
    OURS,
    Benchmark,
    Case,
    Options,
    Row,
    Settings,
    Variant,
    Work,
    compiled,
    first_line,
    forget_compiled,
    measure,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A library has to compute the same, not as exactly as ours: times the error of eager code.
_OF_LIBRARIES = 20.0
# A larger vocabulary changes no shape but the head's.
SHAPES = tuple(name for name in cases.DEFAULT if name != "gpt-384-v50k")


@dataclass(frozen=True)
class Operation:
    """An op on inputs that all have gradients: ours, eager code and what else competes with it.

    `libraries` are rivals that nobody compiles, `absent` the reasons why some are missing. `gated`:
    it was checked already, by a rule of its own. `flop` are the floating-point operations of the
    forward pass, `more` how many times as many both passes have.
    """

    values: dict[str, Tensor]
    ours: Function
    eager: Function
    others: dict[str, Function] = field(default_factory=dict)
    libraries: dict[str, Function] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    flop: float = 0.0
    more: float = 3.0

    def variants(self, compile: bool) -> dict[str, Function]:
        rivals = {"eager": self.eager, **self.others}
        if compile:
            rivals |= {compiled_name(name): compiled(f) for name, f in rivals.items()}
        return {OURS: self.ours, **rivals, **self.libraries}

    def work(self, outputs: tuple[Tensor, ...]) -> tuple[Work, Work]:
        """Of both passes and of forward; backward reads inputs and upstream, writes gradients."""
        inputs = sum(t.numel() * t.element_size() for t in self.values.values())
        results = sum(t.numel() * t.element_size() for t in outputs)
        forward = inputs + results
        both = forward + inputs + results + inputs
        return Work(self.more * self.flop, both), Work(self.flop, forward)


Build = Callable[[TrainingCase, torch.dtype], Operation]


def compiled_name(rival: str) -> str:
    return "compile" if rival == "eager" else f"compile-{rival}"


def _forward(function: Function, values: dict[str, Tensor]) -> Variant:
    def run() -> None:
        with torch.no_grad():
            function(**values)

    return run


def _both_ways(function: Function, values: dict[str, Tensor], upstream: list[Tensor]) -> Variant:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}

    def run() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        outputs = function(**leaves)
        torch.autograd.backward((outputs,) if isinstance(outputs, Tensor) else outputs, upstream)

    return run


def _forced(backend: str, run: Variant) -> Variant:
    def forced() -> None:
        with fastformer.backend(backend):
            run()

    return forced


def _gate(
    operation: Operation, upstream: list[Tensor], device: str
) -> tuple[list[str], dict[str, str]]:
    """The backends and libraries that may be timed, and why others may not.

    Raises WrongResult if ours, as it is chosen, is not right. Backends are for a GPU.
    """
    backends = cases.GPU_BACKENDS if device == "cuda" else ()
    if operation.gated:
        return [*backends, *operation.libraries], {}
    gate = OpGate(operation.eager, operation.values, upstream)
    gate.check(operation.ours)
    passed, failed = [], {}
    for name in (*backends, *operation.libraries):
        try:
            if name in operation.libraries:
                gate.check(operation.libraries[name], _OF_LIBRARIES)
            else:
                with fastformer.backend(name):
                    gate.check(operation.ours)
            passed.append(name)
        except Exception as error:  # WrongResult, or whatever a library raises
            failed[name] = first_line(error)
    return passed, failed


def _run(
    build: Build, shape: TrainingCase, dtype: torch.dtype, name: str, settings: Settings
) -> list[Row]:
    if settings.compile:
        forget_compiled()
    torch.manual_seed(0)
    with torch.device(settings.device):
        operation = build(shape, dtype)
    values = operation.values
    with torch.no_grad():
        outputs = operation.eager(**values)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    # A scalar is a loss, where backward starts from 1.
    upstream = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
    passed, failed = _gate(operation, upstream, settings.device)
    backends = [name for name in passed if name not in operation.libraries]
    functions = {
        name: function
        for name, function in operation.variants(settings.compile).items()
        if name not in failed
    }
    trained = {n: _both_ways(f, values, upstream) for n, f in functions.items()}
    inferred = {n: _forward(f, values) for n, f in functions.items()}
    rows = []
    for row, variants, work in zip(
        _rows(name), (trained, inferred), operation.work(outputs), strict=True
    ):
        variants |= {backend: _forced(backend, variants[OURS]) for backend in backends}
        rows.append(measure(row, variants, settings, failed))
        rows[-1].work = work if settings.device == "cuda" else None
        rows[-1].absent = operation.absent
    return rows


def _rows(name: str) -> tuple[str, str]:
    return f"{name} fwd+bwd", f"{name} fwd"


def op_cases(
    builds: dict[str, Build],
    shapes: tuple[str, ...],
    others: tuple[str, ...],
    suits: Callable[[TrainingCase], bool],
    options: Options,
) -> list[Case]:
    """A case per op, shape and dtype, with a row for both passes and one for forward alone."""
    rivals = ("eager", *others)
    variants = (OURS, *rivals, *map(compiled_name, rivals))
    dtypes = tuple(DTYPES)
    if options.on_gpu:
        shapes, dtypes = cases.GPU, ("bfloat16",)
    shapes = tuple(shape for shape in shapes if suits(cases.CASES[shape]))

    def all_cases() -> Iterator[Case]:
        for op, build in builds.items():
            for shape in options.cases or shapes:
                for dtype in dtypes:
                    name = " ".join(([op] if len(builds) > 1 else []) + [shape, dtype])
                    run = partial(_run, build, cases.CASES[shape], DTYPES[dtype], name)
                    yield Case(name, _rows(name), variants, run)

    return list(all_cases())


def op_benchmark(
    name: str,
    about: str,
    builds: dict[str, Build],
    *,
    shapes: tuple[str, ...] = SHAPES,
    others: tuple[str, ...] = (),
    suits: Callable[[TrainingCase], bool] = lambda case: True,
) -> Benchmark:
    """The usual file: `builds` has its ops by name, `others` the rivals beside eager.

    Models that do not suit have no such op.
    """
    collect = partial(op_cases, builds, shapes, others, suits)
    return Benchmark(name, about, collect, report.op_table, report.op_record)
