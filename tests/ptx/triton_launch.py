"""Runs a project's Triton wrappers on CPU tensors: the PTX of every launch is executed.

    with emulated(90) as launches:
        y = layer_norm(x, weight, bias)      # CPU tensors, the wrapper as it is

What Triton's launcher does between a kernel's Python arguments and its PTX parameters is done here
again: pointers, tensor descriptors, tuples, scratch memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from tests.ptx.emulator import Module, PtxError, TensorMap
from tests.ptx.emulator.build import GLOBAL_BASE
from tests.ptx.emulator.memory import OUTSIDE, WRITTEN
from tests.ptx.emulator.types import to_bf16
from tests.ptx.resources import SHARED_LIMIT
from tests.ptx.triton_compile import Compiled, intercepted

_DIVISIBLE = 16  # what Triton specialises addresses on, in bytes
_WARP = 32

Edit = Callable[[str, str], str]


@dataclass(frozen=True)
class Launch:
    """What was executed: the kernel, its PTX, seconds, and instructions of all blocks together."""

    name: str
    arch: int
    ptx: str
    compile_seconds: float
    run_seconds: float
    instructions: int


@contextmanager
def emulated(arch: int, *, edit: Edit | None = None, **options: Any) -> Iterator[list[Launch]]:
    """Execute every Triton launch on the CPU as compiled for `arch` (80 or 90).

    `options` are those of Module.launch: seed, checks. `edit` takes a kernel's name and its PTX,
    and returns the PTX to run: tests plant bugs with it. PtxError says what a kernel does wrong.
    """
    launches: list[Launch] = []

    def launched(compiled: Compiled) -> None:
        ptx = compiled.ptx if edit is None else edit(compiled.name, compiled.ptx)
        start = time.perf_counter()
        count = _execute(compiled, ptx, arch, options)
        seconds = time.perf_counter() - start
        launches.append(Launch(compiled.name, arch, ptx, compiled.seconds, seconds, count))

    with intercepted(arch, launched):
        yield launches


@lru_cache(maxsize=64)
def _module(ptx: str) -> Module:
    return Module(ptx)


def _execute(compiled: Compiled, ptx: str, arch: int, options: dict[str, Any]) -> int:
    metadata = compiled.kernel.metadata
    limit = SHARED_LIMIT[arch]
    if metadata.shared > limit:  # as the runtime does when it loads the kernel
        raise OutOfResources(metadata.shared, limit, "shared memory")
    memory = _Memory(_module(ptx).fresh())
    arguments = _arguments(compiled, memory)
    entry = memory.module.program.entries[metadata.name]
    blocks = compiled.blocks
    count = 0
    if 0 not in blocks:
        count = memory.module.launch(
            metadata.name,
            blocks,
            entry.threads or metadata.num_warps * _WARP,
            arguments + _scratch(metadata, blocks, memory),
            dynamic_shared=metadata.shared,
            **options,
        )
    memory.download()
    return count


class _Memory:
    """The storages of a launch's tensors in the emulator's memory, each of them once.

    Tensors may be overlapping views, as the parts of one packed gradient are: what is copied is
    what they are views of. Of that a kernel may touch what lies between the first and the last
    element of a tensor that it was given.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self._storages: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}

    def address(
        self,
        tensor: torch.Tensor,
        name: str,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> int:
        """The tensor's address, as divisible as the real one; shape and strides if others count."""
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: the emulator needs CPU tensors, got one on {tensor.device}")
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = self._upload(storage, name)
        address = self._storages[key][1] + tensor.data_ptr() - storage.data_ptr()
        shape = tensor.shape if shape is None else shape
        strides = tensor.stride() if strides is None else strides
        self._open(address, _extent(shape, strides) * tensor.element_size(), self._storages[key])
        return address

    def _open(self, address: int, count: int, storage: tuple[torch.Tensor, int]) -> None:
        """Let the kernel touch these bytes, as far as they belong to the storage."""
        data, start = storage
        begin, end = address - GLOBAL_BASE, min(address + count, start + data.numel()) - GLOBAL_BASE
        self.module.memory.state[begin:end] = WRITTEN

    def _upload(self, storage: torch.UntypedStorage, name: str) -> tuple[torch.Tensor, int]:
        data = torch.empty(0, dtype=torch.uint8).set_(storage)
        pad = storage.data_ptr() % _DIVISIBLE
        padded = np.concatenate([np.zeros(pad, np.uint8), data.numpy()])
        address = self.module.upload(padded, name).address
        start = address - GLOBAL_BASE
        self.module.memory.state[start : start + len(padded)] = OUTSIDE
        return data, address + pad

    def download(self) -> None:
        """Copy everything back to the tensors."""
        for data, address in self._storages.values():
            start = address - GLOBAL_BASE
            found = self.module.memory.data[start : start + data.numel()]
            data.copy_(torch.from_numpy(found))


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _arguments(compiled: Compiled, memory: _Memory) -> list[Any]:
    """The kernel's parameters in PTX order."""
    metadata = compiled.kernel.metadata
    maps = list(getattr(metadata, "tensordesc_meta", None) or [])
    out: list[Any] = []
    for name, type_name in compiled.kernel.src.signature.items():
        _flatten(name, type_name, compiled.arguments[name], memory, maps, out)
    return out


def _flatten(name: str, kind: Any, value: Any, memory: _Memory, maps: list, out: list) -> None:
    if isinstance(kind, tuple):
        for i, (part, part_kind) in enumerate(zip(value, kind, strict=True)):
            _flatten(f"{name}[{i}]", part_kind, part, memory, maps, out)
    elif kind == "constexpr":  # compiled in, as are None and 1
        return
    elif kind.startswith("tensordesc"):
        out.extend(_descriptor(name, value, memory, maps.pop(0) if maps else None))
    elif kind.startswith("*"):
        # triton.reinterpret wraps a tensor and keeps it as `base`.
        out.append(memory.address(getattr(value, "base", value), name))
    else:
        out.append(_number(kind, value))


def _number(kind: str, value: Any) -> int | float:
    if kind in ("fp32", "f32", "fp64"):
        return float(value)
    if kind == "bf16":
        return int(to_bf16(np.array([value], np.float32))[0])
    if kind == "fp16":
        return int(np.array([value], np.float16).view(np.uint16)[0])
    return int(value)


def _descriptor(name: str, value: Any, memory: _Memory, meta: Any) -> list[Any]:
    """A tensor descriptor's parameters: a tensor map on sm_90, else pointer, shape and strides."""
    shape, strides = [int(n) for n in value.shape], [int(n) for n in value.strides]
    address = memory.address(value.base, name, shape, strides)
    if meta is None:
        flags = [int(value.padding == "nan")]
        if hasattr(value, "round_f32_to_tf32"):
            flags.append(int(value.round_f32_to_tf32))
        return [address, *shape, *strides, *flags, *shape, *strides]
    meta = meta if isinstance(meta, dict) else meta._asdict()
    if meta.get("fp4_padded") or getattr(value, "round_f32_to_tf32", False):
        raise PtxError("unsupported", f"{name}: a tensor descriptor of fp4 or rounded to tf32")
    size = int(meta["elem_size"])
    tensor_map = TensorMap(
        address,
        size,
        tuple(shape[::-1]),
        tuple(stride * size for stride in strides[-2::-1]),
        tuple(int(n) for n in meta["block_size"])[::-1],
        int(meta["swizzle"]),
        value.padding == "nan",
    )
    return [tensor_map, *shape, *strides]


def _scratch(metadata: Any, blocks: tuple[int, int, int], memory: _Memory) -> list[Any]:
    """The last parameters: memory that a kernel works in, for all blocks together."""
    count = blocks[0] * blocks[1] * blocks[2] * getattr(metadata, "num_ctas", 1)
    out: list[Any] = []
    for name in ("global_scratch", "profile_scratch"):
        size = getattr(metadata, f"{name}_size", None)
        if size is not None:
            out.append(memory.module.allocate(size * count, name) if size else 0)
    return out
