"""What a call of a Triton kernel's wrapper costs the host: Python, up to Triton's own launcher.

A stub stands in the place of that, so that no GPU is needed. Tensors are small and on the CPU,
where what PyTorch computes beside a kernel costs little more than the calls that start it.

Part of a call is PyTorch's: allocations, views, casts, matrix products. One call of the wrapper,
which is not timed, records them as Python makes them, and a variant that takes turns with the
wrapper makes the same calls again with the same arguments and nothing between them. What the
wrapper takes beyond that is Python of ours. Reading a shape, a stride or an address counts as ours,
and so does a call that returns what it was given, as `contiguous` mostly does. So does what a call
of torch takes longer where other code ran before it, which with matrix products is much of `its
Python`. Measure with `--threads 1`, as threads that wait for one another take longer than a call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import report
from benchmarks.command import main
from benchmarks.gate import WrongResult
from benchmarks.harness import OURS, Benchmark, Case, Options, Row, Settings, Unavailable, measure

TRITON, NOTHING, TORCH = "triton's launch", "no launch", "its calls of torch"
PYTHON = "its Python"
_ARCH = 90
_CALLS = 100  # of a variant in a turn

Op = Callable[[], Any]


def _bfloat16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def _dropout_settings() -> tuple[float, Tensor, int]:
    return 0.1, torch.tensor([1, 2]), 1


def _dropout() -> list[Op]:
    from fastformer.kernels.dropout import dropout_mask

    return [partial(dropout_mask, 16, 32, *_dropout_settings())]


def _layer_norm() -> list[Op]:
    from fastformer.kernels import layer_norm as ops

    x, weight, stats = _bfloat16(16, 32), torch.ones(32), torch.ones(16)
    drop = _dropout_settings()
    return [
        partial(ops.layer_norm_fwd, x, weight, weight, 1e-5, x.dtype),
        partial(ops.layer_norm_bwd, x, x, weight, stats, stats),
        partial(ops.add_layer_norm_fwd, x, x, weight, weight, 1e-5, x.dtype, *drop),
        partial(ops.add_layer_norm_bwd, x, x, x, weight, stats, stats, x.dtype, *drop),
    ]


def _mlp() -> list[Op]:
    from fastformer.kernels import mlp as ops

    x, w, settings = _bfloat16(16, 32), _bfloat16(32, 32), (False, *_dropout_settings())
    return [
        partial(ops.mlp_fwd, x, w, w[0], w, w[0], *settings),
        partial(ops.mlp_bwd, x, x, w, w, x, *settings, x.dtype),
    ]


def _linear_cross_entropy() -> list[Op]:
    from fastformer.kernels import linear_cross_entropy as ops

    x, weight, targets = _bfloat16(16, 32), _bfloat16(32, 32), torch.zeros(16, dtype=torch.int64)
    settings = (-100, 0.0, 0.0, True, False, x.dtype)
    return [partial(ops.linear_cross_entropy_fwd, x, weight, None, targets, *settings)]


def _attention(T: int) -> list[Op]:
    from fastformer.kernels import attention as ops

    qkv, out, lse = _bfloat16(1, T, 3, 2, 16), _bfloat16(1, T, 2, 16), torch.ones(1, 2, T)
    settings = (None, True, 0.25, *_dropout_settings())
    return [
        partial(ops.attention_fwd, *qkv.unbind(2), *settings),
        partial(ops.attention_qkvpacked_bwd, out, qkv, out, lse, *settings),
    ]


def _attention_hopper() -> list[Op]:
    from fastformer.kernels import attention_hopper as ops

    q, k, v = _bfloat16(1, 520, 3, 2, 16).unbind(2)
    return [partial(ops.forward, q, k, v, None, True, 0.25, 0.0, None, 0)]


def _attention_decode() -> list[Op]:
    from fastformer.kernels import attention as ops

    cache = _bfloat16(1, 1024, 2, 16)
    return [partial(ops.attention_fwd, cache[:, :1], cache, cache, None, True, 0.25, 0.0, None, 0)]


def _attention_varlen() -> list[Op]:
    from fastformer.kernels import attention_varlen as ops

    qkv, out, lse = _bfloat16(16, 3, 2, 16), _bfloat16(16, 2, 16), torch.ones(2, 16)
    starts, settings = torch.tensor([0, 16], dtype=torch.int32), (True, 0.25, *_dropout_settings())
    return [
        partial(ops.attention_varlen_fwd, *qkv.unbind(1), starts, starts, 16, 16, *settings),
        partial(ops.attention_varlen_qkvpacked_bwd, out, qkv, out, lse, starts, 16, *settings),
    ]


_GROUPS: dict[str, tuple[tuple[str, ...], Callable[[], list[Op]]]] = {
    "dropout": (("dropout_mask",), _dropout),
    "layer_norm": (
        ("layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd", "add_layer_norm_bwd"),
        _layer_norm,
    ),
    "mlp": (("mlp_fwd", "mlp_bwd"), _mlp),
    "linear_cross_entropy": (("linear_cross_entropy_fwd",), _linear_cross_entropy),
    "attention, short": (
        ("attention_fwd, short", "attention_qkvpacked_bwd, short"),
        partial(_attention, 16),
    ),
    "attention, long": (
        ("attention_fwd, long", "attention_qkvpacked_bwd, long"),
        partial(_attention, 520),
    ),
    "attention, Hopper": (("attention_fwd, Hopper",), _attention_hopper),
    "attention, decode": (("attention_fwd, decode",), _attention_decode),
    "attention_varlen": (
        ("attention_varlen_fwd", "attention_varlen_qkvpacked_bwd"),
        _attention_varlen,
    ),
}


class _TorchCalls(TorchFunctionMode):
    """Keeps the calls that make a tensor or change one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Op] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__
        changes = "out" in kwargs or name == "__setitem__" or name.rstrip("_") + "_" == name
        parts = result if isinstance(result, (tuple, list)) else (result,)
        makes = parts and isinstance(parts[0], Tensor) and not any(result is a for a in args)
        if changes or makes:
            self.calls.append(partial(func, *args, **kwargs))
        return result


def _torch_calls(op: Op) -> list[Op]:
    with _TorchCalls() as mode:
        op()
    return mode.calls


def _nothing(*args: Any, **options: Any) -> None:
    pass


@contextmanager
def _launches_of(variant: str) -> Iterator[None]:
    from fastformer.kernels.launch import CachedLaunch, Launch

    if variant == TRITON:

        def item(kernel: CachedLaunch, grid: tuple[int, ...]) -> Any:
            return kernel.function[grid]

        def call(launch: Launch, *tensors: Tensor | None) -> None:
            function, args = launch.kernel.function, launch.arguments(tensors)
            function[launch.grid](*args, **launch.options)

    elif variant == NOTHING:

        def item(kernel: CachedLaunch, grid: tuple[int, ...]) -> Any:
            return _nothing

        call = _nothing
    else:
        yield
        return
    with patch.object(CachedLaunch, "__getitem__", item), patch.object(Launch, "__call__", call):
        yield


def _check(name: str, op: Op, stub: Callable[..., Any]) -> None:
    """The same launches as Triton's: grid, machine code and numbers."""
    calls: list[tuple[Any, ...]] = []
    with stub(_ARCH, lambda *call: calls.append(call)):
        found = []
        for variant in (OURS, OURS, TRITON):
            del calls[:]
            with _launches_of(variant):
                op()
            found.append(
                [[c for c in call if isinstance(c, (int, float, bytes))] for call in calls]
            )
    if not calls or found[1] != found[2]:
        raise WrongResult(f"{name}: other launches than Triton's")


def _measured(group: str, settings: Settings) -> list[Row]:
    try:
        from tests.ptx.triton_compile import stub_launcher
    except ImportError as error:
        raise Unavailable(f"Triton is needed: {error}") from None
    names, build = _GROUPS[group]
    rows = []
    for name, op in zip(names, build(), strict=True):
        _check(name, op, stub_launcher)

        def calls(variant: str, op: Op = op) -> None:
            with _launches_of(variant):
                for _ in range(_CALLS):
                    op()

        with stub_launcher(_ARCH, _nothing):
            of_torch = _torch_calls(op)

            def calls_of_torch(of_torch: list[Op] = of_torch) -> None:
                for _ in range(_CALLS):
                    for call in of_torch:
                        call()

            variants = {variant: partial(calls, variant) for variant in (OURS, TRITON, NOTHING)}
            rows.append(measure(name, variants | {TORCH: calls_of_torch}, settings))
    return rows


def _us(row: Row) -> dict[str, float]:
    """Of a call, and of the Python in it: the difference of each turn, as clocks change."""
    us = {variant: 1e3 * ms / _CALLS for variant, ms in row.ms.items()}
    turns = zip(row.samples[OURS], row.samples[TORCH], strict=True)
    return us | {PYTHON: 1e3 * statistics.median(ours - torchs for ours, torchs in turns) / _CALLS}


def _cases(options: Options) -> list[Case]:
    variants = (OURS, TRITON, NOTHING, TORCH)
    return [
        Case(group, names, variants, partial(_measured, group))
        for group, (names, _) in _GROUPS.items()
    ]


def _table(rows: list[Row]) -> str:
    columns = (OURS, TORCH, PYTHON, TRITON, NOTHING)
    found = [[row.case, *(f"{_us(row)[column]:.1f}" for column in columns)] for row in rows]
    return report.markdown(["us of a call", *columns], found)


def _record(row: Row) -> dict[str, Any]:
    return {"case": row.case, "us": _us(row)}


BENCHMARK = Benchmark("host_cost", "Host cost of Triton launches", _cases, _table, _record)

if __name__ == "__main__":
    main(BENCHMARK)
