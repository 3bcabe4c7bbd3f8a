"""Choose the kernel that runs each op: one table, one rule per kernel, and words for the choice.

Every raw op (`torch.ops.fastformer.<name>.default`) is a router registered here. At each call it
asks `choose`, which walks the row of `_PREFERENCE` for this device and op and takes the first
kernel that is able to run on these arguments. `backend` or the environment variable
FASTFORMER_BACKEND force one; a forced kernel that cannot run is an error, never a silent
fallback. What is EXPERIMENTAL is passed over unless FASTFORMER_EXPERIMENTAL=1.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastformer import _library

BACKENDS = {
    "cpu": "C++ kernels for the CPU",
    "cuda": "CUDA C++ kernels",
    "triton": "Triton kernels",
    "reference": "plain PyTorch",
}

# device type -> op -> kernels, the one measured fastest first. Ops without a row run the reference.
_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "dropout_mask": ("cpu", "reference"),
        "embedding_bwd": ("cpu", "reference"),
        "attention_fwd": ("cpu", "reference"),
        "attention_bwd": ("cpu", "reference"),
        "attention_qkvpacked_bwd": ("cpu", "reference"),
        "attention_varlen_qkvpacked_bwd": ("cpu", "reference"),
        "attention_varlen_fwd": ("cpu", "reference"),
        "attention_varlen_bwd": ("cpu", "reference"),
        "layer_norm_fwd": ("cpu", "reference"),
        "layer_norm_bwd": ("cpu", "reference"),
        "add_layer_norm_fwd": ("cpu", "reference"),
        "add_layer_norm_bwd": ("cpu", "reference"),
        "mlp_fwd": ("cpu", "reference"),
        "mlp_bwd": ("cpu", "reference"),
        "linear_fwd": ("cpu", "reference"),
        "linear_bwd": ("cpu", "reference"),
        "linear_cross_entropy_fwd": ("cpu", "reference"),
        "adamw_step": ("cpu", "reference"),
    },
    "cuda": {  # every entry is unmeasured: their order is a guess until a GPU has timed them
        "dropout_mask": ("triton", "cuda", "reference"),
        "layer_norm_fwd": ("triton", "cuda", "reference"),
        "layer_norm_bwd": ("triton", "cuda", "reference"),
        "add_layer_norm_fwd": ("triton", "cuda", "reference"),
        "add_layer_norm_bwd": ("triton", "cuda", "reference"),
        "attention_fwd": ("triton", "cuda", "reference"),
        "attention_bwd": ("triton", "cuda", "reference"),
        "attention_qkvpacked_bwd": ("triton", "cuda", "reference"),
        "attention_varlen_fwd": ("triton", "cuda", "reference"),
        "attention_varlen_bwd": ("triton", "cuda", "reference"),
        "attention_varlen_qkvpacked_bwd": ("triton", "cuda", "reference"),
        "mlp_fwd": ("triton", "cuda", "reference"),
        "mlp_bwd": ("triton", "cuda", "reference"),
        "linear_cross_entropy_fwd": ("triton", "reference"),
    },
}
# Backends whose kernels were executed only by an emulator so far. One leaves this set when its
# tests (pytest -m gpu) and benchmarks have been through a GPU.
EXPERIMENTAL = frozenset({"cuda", "triton"})
_FALLBACK = ("reference",)


@dataclass(frozen=True)
class Kernel:
    """One implementation of a raw op; `refuse(*args)` is the reason it cannot run, or None.

    `describe(*args)` has what an explanation adds to the backend's name.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    describe: Callable[..., str] | None = None


_kernels: dict[str, dict[str, Kernel]] = {}
_explainers: dict[str, Callable[..., list[tuple[str, tuple[Any, ...]]]]] = {}
_forced: str | None = None
_tries_experimental = os.environ.get("FASTFORMER_EXPERIMENTAL", "0") not in ("", "0")
_warned: set[str] = set()


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source}: unknown backend {name!r}{hint} (known: {', '.join(BACKENDS)})")
    return name


if os.environ.get("FASTFORMER_BACKEND"):
    _forced = _checked_backend(os.environ["FASTFORMER_BACKEND"], "FASTFORMER_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the `with` block, forward and backward.

    `name` is "cpu", "cuda", "triton" or "reference". The setting is global to the process, not per
    thread: autograd runs backward passes of CUDA tensors on threads of its own. An op that the
    backend cannot run raises a RuntimeError naming the rule. FASTFORMER_BACKEND sets the default
    at import.
    """
    global _forced
    before = _forced
    _forced = _checked_backend(name, "backend")
    try:
        yield
    finally:
        _forced = before


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Sequence[str] = (),
    limits: Mapping[str, Callable[..., str | None]] | None = None,
    descriptions: Mapping[str, Callable[..., str]] | None = None,
) -> None:
    """Define the raw op `schema`: its router, its fake implementation and its reference kernel.

    `native` lists the backends ("cpu", "cuda") whose C++ kernel is the overload `<name>.<backend>`;
    `limits` has what else a backend refuses, as `add_kernel` has it, and `descriptions` what
    `Kernel.describe` says of its kernel.
    """
    name, _, signature = schema.partition("(")
    signature = "(" + signature
    _library.library.define(name + signature)
    _kernels[name] = {"reference": Kernel(reference, lambda *args: None)}
    for key in native:
        _library.library.define(f"{name}.{key}{signature}")
        packet = getattr(torch.ops.fastformer, name)
        refuse = _refuse_native(name, key, (limits or {}).get(key))
        describe = (descriptions or {}).get(key)
        _kernels[name][key] = Kernel(getattr(packet, key), refuse, describe)

    def route(*args: Any) -> Any:
        # Autograd is the business of the public functions; a raw op records nothing.
        with torch._C._AutoDispatchBelowAutograd():
            return choose(name, args)[1].run(*args)

    _library.library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _library.library.impl(name, route, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastformer::{name}", fake, lib=_library.library)


def add_kernel(
    op: str, backend: str, run: Callable[..., Any], refuse: Callable[..., str | None]
) -> None:
    """Add a kernel to the raw op `op`; it is used where `_PREFERENCE` or the user says so."""
    _kernels[op][backend] = Kernel(run, refuse)


def add_triton(op: str, module: str) -> None:
    """Add the kernel `fastformer.kernels.<module>.<op>`.

    Beside what no Triton kernel takes, the module's `refuse`, if it has one, says what this one
    does not. The module, and Triton with it, is imported when tensors on a GPU first ask for it.
    """

    @functools.cache
    def kernels() -> Any:
        return importlib.import_module(f"fastformer.kernels.{module}")

    @functools.cache
    def is_installed() -> bool:
        return importlib.util.find_spec("triton") is not None

    def run(*args: Any) -> Any:
        return getattr(kernels(), op)(*args)

    def refuse(*args: Any) -> str | None:
        if _device_type(args) != "cuda":
            return f"it takes cuda tensors, these are on {_device_type(args)}"
        if not is_installed():
            return "triton is not installed: pip install triton"
        reason = _refuse_dtype("triton", args)
        if reason is not None:
            return reason
        limit = getattr(kernels(), "refuse", None)
        return None if limit is None else limit(*args)

    add_kernel(op, "triton", run, refuse)


def _refuse_native(
    op: str, key: str, limit: Callable[..., str | None] | None = None
) -> Callable[..., str | None]:
    dispatch_key = key.upper()
    qualified = f"fastformer::{op}.{key}"

    @functools.cache  # the question costs as much as the rest of the choice
    def is_compiled() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, dispatch_key)

    def refuse(*args: Any) -> str | None:
        if _device_type(args) != key:
            return f"it takes {key} tensors, these are on {_device_type(args)}"
        reason = _refuse_dtype(key, args)
        if reason is not None:
            return reason
        if _library.WHY_NOT is not None:
            return _library.WHY_NOT
        if not is_compiled():
            return (
                f"the compiled library has no {BACKENDS[key]}"
                " (nvcc was missing when it was built); reinstall with CUDA_HOME set"
            )
        return None if limit is None else limit(*args)

    return refuse


# Backend -> what its kernels take, and what of the rest there are ops for. "cuda" differs by op.
_DTYPES: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "cpu": ("float32 and bfloat16", (torch.float16, torch.float64)),
    "triton": ("float32, bfloat16 and float16", (torch.float64,)),
}


def _refuse_dtype(backend: str, args: Sequence[Any]) -> str | None:
    taken, refused = _DTYPES.get(backend, ("", ()))
    for arg in args if refused else ():
        dtype = arg.dtype if isinstance(arg, torch.Tensor) else arg
        if dtype in refused:
            return f"it takes {taken}, got {str(dtype)[6:]}"
    return None


def _device_type(args: Sequence[Any]) -> str:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
    return "cpu"


def _refusal(op: str, name: str, args: Sequence[Any]) -> str | None:
    kernel = _kernels[op].get(name)
    if kernel is None:
        return f"there is no {name} kernel for {op} in this version"
    return kernel.refuse(*args)


def choose(op: str, args: Sequence[Any]) -> tuple[str, Kernel]:
    """Return (backend, kernel) for one call of the raw op `op`."""
    if _forced is not None:
        reason = _refusal(op, _forced, args)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend {_forced!r} was asked for but cannot run: {reason}."
                f" Available here: {', '.join(_kernels[op])}"
            )
        return _forced, _kernels[op][_forced]
    row = _row(_device_type(args), op)
    for name in row:
        kernel = _kernels[op].get(name)
        if kernel is not None and kernel.refuse(*args) is None:
            if name != row[0]:
                _warn_slow(op, row[0], name, args)
            return name, kernel
    raise RuntimeError(f"{op}: no kernel can run; {'; '.join(_reasons(op, row, args))}")


@functools.cache
def _row(device_type: str, op: str) -> tuple[str, ...]:
    """The kernels that may be chosen automatically, the one to prefer first."""
    row = _PREFERENCE.get(device_type, {}).get(op, _FALLBACK)
    return row if _tries_experimental else tuple(name for name in row if name not in EXPERIMENTAL)


def _reasons(op: str, names: Sequence[str], args: Sequence[Any]) -> list[str]:
    return [f"{name}: {_refusal(op, name, args)}" for name in names]


def _warn_slow(op: str, better: str, used: str, args: Sequence[Any]) -> None:
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"fastformer: {op} runs on the slower {used!r} kernel because {better!r} cannot run:"
            f" {_refusal(op, better, args)}",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: per raw op, the backend that would run and why no other would.

    `details` has what some kernels add: how they would go about these arguments.
    """

    op: str
    chosen: dict[str, str]
    reasons: dict[str, dict[str, str]]
    details: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for raw, chosen in self.chosen.items():
            lines.append(f"{raw}: {chosen} ({BACKENDS.get(chosen, 'nothing can run')})")
            lines += [f"  {self.details[raw]}"] if raw in self.details else []
            lines += [f"  not {name}: {why}" for name, why in self.reasons[raw].items()]
        return "\n".join(lines)

    __repr__ = __str__


def explainer(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function that turns a public call of `op` into its raw ops' calls."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _explainers[op] = function
        return function

    return register


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Tell which kernel would run for `op` with these arguments, and why the others would not.

    `explain("attention", q, k, v, causal=True)` takes the arguments of `fastformer.attention`,
    checks them the same way (ValueError, TypeError), and runs nothing. Print the result.
    """
    if op not in _explainers:
        near = difflib.get_close_matches(op, _explainers, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"explain: unknown op {op!r}{hint} (known: {', '.join(_explainers)})")
    chosen: dict[str, str] = {}
    reasons: dict[str, dict[str, str]] = {}
    details: dict[str, str] = {}
    for raw, raw_args in _explainers[op](*args, **kwargs):
        preferred = _row(_device_type(raw_args), raw)
        row = (_forced,) if _forced else preferred
        chosen[raw] = next((b for b in row if _refusal(raw, b, raw_args) is None), "none")
        kernel = _kernels[raw].get(chosen[raw])
        if kernel is not None and kernel.describe is not None:
            details[raw] = kernel.describe(*raw_args)
        reasons[raw] = {}
        for name in BACKENDS:
            if name == chosen[raw]:
                continue
            why = _refusal(raw, name, raw_args)
            if why is None and _forced:
                why = f"{_forced!r} is forced"
            elif why is None and name in preferred:
                why = f"{chosen[raw]} is preferred here"
            elif why is None and name in EXPERIMENTAL:
                why = (
                    "it has never run on a GPU; FASTFORMER_EXPERIMENTAL=1 lets it be chosen,"
                    " fastformer.backend forces it"
                )
            elif why is None:
                why = "it is not the automatic choice here; force it with fastformer.backend"
            reasons[raw][name] = why
    return Explanation(op, chosen, reasons, details)


def automatic(device_type: str) -> dict[str, str]:
    """Per raw op, the backend to prefer for tensors on `device_type`."""
    return {op: _row(device_type, op)[0] for op in _kernels}


def ops_with(backend: str) -> list[str]:
    """The raw ops that have a kernel of this backend."""
    return [op for op, kernels in _kernels.items() if backend in kernels]
