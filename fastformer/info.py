"""`fastformer info`: the machine, the build and the state of every backend, in words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from fastformer import _checkout, _library
from fastformer.ops import dispatch


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none visible to this PyTorch"
    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))


def _cpu_state(build: dict[str, str]) -> str:
    if _library.WHY_NOT is not None:
        return f"missing: {_library.WHY_NOT}"
    return f"ready, instruction set {build['cpu_isa']}"


def _cuda_state(build: dict[str, str]) -> str:
    if _library.WHY_NOT is not None:
        return f"missing: {_library.WHY_NOT}"
    if build["cuda_runtime"] == "none":
        return "not built: nvcc was missing; set CUDA_HOME and reinstall"
    state = f"built for {build['cuda_archs']} with CUDA {build['cuda_runtime']}"
    return state + _of_a_gpu("cuda")


def _triton_state() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return f"kernels for {len(dispatch.ops_with('triton'))} raw ops" + _of_a_gpu("triton")


def _of_a_gpu(backend: str) -> str:
    state = ""
    if backend in dispatch.EXPERIMENTAL:
        state = ", experimental: not chosen without FASTFORMER_EXPERIMENTAL=1"
    return state if torch.cuda.is_available() else f"{state}; no GPU here"


def describe() -> str:
    """Return the text that `fastformer info` prints."""
    build = _library.build_info()
    forced = os.environ.get("FASTFORMER_BACKEND", "not set")
    rows = [
        ("fastformer", f"{_checkout.version()} ({_checkout.PACKAGE})"),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", _package("triton")),
        ("flash-attn", f"{_package('flash-attn')} (optional)"),
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"),
        ("gpu", _gpus()),
        ("library", str(_library.LOADED or "not built")),
    ]
    backends = [
        ("cpu", _cpu_state(build)),
        ("cuda", _cuda_state(build)),
        ("triton", _triton_state()),
        ("reference", "ready, on every device"),
    ]
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += ["", f"backends (FASTFORMER_BACKEND {forced})"]
    lines += [f"  {name:<10}{state}" for name, state in backends]
    for device in ("cpu", "cuda"):
        chosen: dict[str, list[str]] = {}
        for op, name in dispatch.automatic(device).items():
            chosen.setdefault(name, []).append(op)
        lines += ["", f"automatic choice for {device} tensors"]
        lines += [f"  {name:<10}{', '.join(ops)}" for name, ops in chosen.items()]
    return "\n".join(lines)
