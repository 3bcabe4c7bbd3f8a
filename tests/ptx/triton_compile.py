"""Compiles a project's Triton launches for a GPU that is not there, through its own wrappers.

JITFunction.run is replaced: every launch becomes a compilation with exactly the specialisation that
the runtime would choose (arguments equal to 1, addresses and integers divisible by 16, constants),
and what is to be done with the kernel then is up to whoever replaced it.
"""

from __future__ import annotations

import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
# Compiled kernels, which the workers of a test run share and the next run finds again.
CACHE = ROOT / "build" / "ptx"


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled: Triton's kernel, the arguments by name, the grid, the seconds."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    grid: Any
    seconds: float

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The grid's three sizes."""
        grid = self.grid(self.arguments) if callable(self.grid) else self.grid
        return tuple(int(size) for size in (*grid, 1, 1)[:3])


class _Driver:
    """As much of Triton's driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of kernels per architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name


_DEVICES = itertools.count(1000)


class _LoadingDriver(_Driver):
    """Also as much as loading a kernel needs; its machine code stands for the loaded kernel."""

    def __init__(self, arch: int, launch: Callable[..., None]) -> None:
        super().__init__(arch)
        self.utils = self
        self.launcher_cls = lambda src, metadata: launch
        self._device = next(_DEVICES)

    def get_current_device(self) -> int:
        return self._device  # that of no other: Triton keeps what is loaded on a device

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, binary, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}


@contextmanager
def _active(chosen: _Driver) -> Iterator[None]:
    """Compile for this driver, into a cache of our own."""
    folder = os.environ.get("TRITON_CACHE_DIR") or str(CACHE / f"triton-{triton.__version__}")
    before = driver._active
    try:
        driver.set_active(chosen)
        with patch.dict(os.environ, TRITON_CACHE_DIR=folder):
            yield
    finally:
        driver._active = before


@contextmanager
def stub_launcher(arch: int, launch: Callable[..., None]) -> Iterator[None]:
    """Launches go all the way that they go on a GPU, and end in `launch` instead of Triton's
    launcher: the grid's three sizes, stream, machine code, metadata of three kinds, two hooks, and
    the arguments."""
    with _active(_LoadingDriver(arch, launch)):
        yield


@contextmanager
def intercepted(
    arch: int, launched: Callable[[Compiled], None], *, every_config: bool = False
) -> Iterator[None]:
    """Compile launches for `arch` (80, 90 ...) and hand them to `launched` instead of a GPU.

    An autotuned kernel is launched with its first configuration, and with `every_config` before
    that once with each.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: Triton would interpret and not compile")
    original = JITFunction.run

    def run(function: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kw: Any):
        start = time.perf_counter()
        kernel = original(function, *args, grid=grid, warmup=True, **kw)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        seconds = time.perf_counter() - start
        named = {name: value for name, value in kw.items() if name in function.arg_names}
        bound = inspect.signature(function.fn).bind(*args, **named)
        bound.apply_defaults()
        if not warmup:
            launched(Compiled(function.fn.__name__, kernel, dict(bound.arguments), grid, seconds))
        return kernel

    def benchmark(call: Callable[[], None], quantiles: Any = None) -> list[float]:
        if every_config:
            call()
        return [1.0, 1.0, 1.0]

    with (
        _active(_Driver(arch)),
        patch.object(JITFunction, "run", run),
        patch.object(Autotuner, "do_bench", property(lambda tuner: benchmark)),
    ):
        yield
