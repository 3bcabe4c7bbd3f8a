"""Compiles .cu files with nvcc, as the build does, and executes their kernels in the emulator.

kernels = CudaKernels(Path("csrc/cuda/dropout.cu"), "90a")
kernels.launch("dropout_mask_kernel", grid=4, threads=256, arguments=[array, ..., 3, 0.5])
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx import ptxas, sass
from tests.ptx.emulator import Module, TensorMap
from tests.ptx.emulator.grid import Buffer
from tests.ptx.resources import Resources, analyse
from tests.ptx.triton_compile import CACHE, ROOT

FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


WHY_NOT = None if find_nvcc() else "needs nvcc: put it on PATH or set CUDA_HOME"


@lru_cache(maxsize=1)
def version() -> str:
    """Of nvcc, as "13.0"."""
    text = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\S+?),", text)
    if found is None:
        raise RuntimeError(f"nvcc --version says nothing of a release: {text!r}")
    return found[1]


def _nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(str(WHY_NOT))
    return nvcc


@dataclass(frozen=True)
class Compiled:
    """What nvcc has written, and what ptxas said meanwhile."""

    data: bytes
    log: str

    @property
    def warnings(self) -> tuple[str, ...]:
        return ptxas.warnings(self.log)


def compile_cuda(source: Path, arch: str, kind: str, defines: Sequence[str] = ()) -> Compiled:
    """Compile to `kind` "ptx" or "cubin" for `arch` "80", "90a" or "100".

    The same is compiled once.
    """
    target = f"arch=compute_{arch},code={'compute' if kind == 'ptx' else 'sm'}_{arch}"
    options = [*FLAGS, *(f"-D{name}" for name in defines), f"-gencode={target}", f"-{kind}"]
    out = CACHE / "nvcc" / f"{source.stem}-{_key(source, options)}.{kind}"
    log = out.with_suffix(f".{kind}.log")
    if not log.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            temporary = Path(folder) / out.name
            command = [_nvcc(), *options, str(source), "-o", str(temporary)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
            (Path(folder) / "log").write_text(result.stdout + result.stderr)
            # The log comes last: another process that finds it finds the result too.
            os.replace(temporary, out)
            os.replace(Path(folder) / "log", log)
    return Compiled(out.read_bytes(), log.read_text())


def _key(source: Path, options: Sequence[str]) -> str:
    """Everything that the result depends on: sources, headers beside them, options, nvcc."""
    headers = [
        path
        for folder in (source.parent, ROOT / "csrc")
        for path in sorted(folder.rglob("*.h")) + sorted(folder.rglob("*.cuh"))
    ]
    digest = hashlib.sha256(repr((version(), [*options])).encode())
    for path in (source, *headers):
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Tiled:
    """An array that a kernel reads through a tensor map: boxes (rows, columns), contiguous last."""

    array: np.ndarray
    box: tuple[int, ...]
    swizzle: int = 3

    def map(self, address: int) -> TensorMap:
        return TensorMap(
            address,
            self.array.itemsize,
            self.array.shape[::-1],
            self.array.strides[-2::-1],
            self.box[::-1],
            self.swizzle,
        )


@dataclass(frozen=True)
class Shifted:
    """An array from its element `start` on: an address that is not aligned."""

    array: np.ndarray
    start: int


@dataclass(frozen=True)
class Struct:
    """A struct by value: the types of its fields as the module `struct` writes them, and the
    fields, where an array, or a Shifted one, stands for its address."""

    types: str
    fields: Sequence[Any]


class CudaKernels:
    """The kernels of one .cu file for one architecture: "80", "90a", or "100" without launches."""

    def __init__(self, source: Path, arch: str, *, defines: Sequence[str] = ()) -> None:
        self.source, self.arch, self.defines = source, arch, (*defines,)

    @cached_property
    def ptx(self) -> str:
        return compile_cuda(self.source, self.arch, "ptx", self.defines).data.decode()

    @cached_property
    def _module(self) -> Module:
        return Module(self.ptx)

    def with_ptx(self, ptx: str) -> CudaKernels:
        """The same kernels with other PTX: tests plant bugs with it."""
        other = copy.copy(self)
        other.ptx, other._module = ptx, Module(ptx)
        return other

    def mangled(self, name: str) -> str:
        """The entry of a demangled name with its template arguments: "copy_kernel<4, true>"."""
        return _mangled(name, self._module.program.entries)

    def parameter_bytes(self, name: str) -> list[int]:
        """The sizes of a kernel's parameters."""
        entry = self._module.program.entries[self.mangled(name)]
        return [parameter.bytes for parameter in entry.parameters]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        threads: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        machine: Callable[[str], Module] | None = None,
        **options: Any,
    ) -> int:
        """Run a kernel and return the number of instructions; `options` are those of Module.launch.

        `machine` makes what is launched of PTX, the emulator's Module if it is None.

        Arrays, also those of a Tiled, Shifted or Struct, are contiguous; the kernel's results are
        written into them.
        """
        module = self._module.fresh() if machine is None else machine(self.ptx)
        buffers: dict[int, tuple[np.ndarray, Any]] = {}

        def upload(array: np.ndarray, position: int) -> Any:
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: argument {position} is not contiguous")
            if id(array) not in buffers:
                buffers[id(array)] = array, module.upload(array, f"argument {position}")
            return buffers[id(array)][1]

        def value(argument: Any, i: int) -> Any:
            if isinstance(argument, Tiled):
                return argument.map(upload(argument.array, i).address)
            if isinstance(argument, Shifted):
                offset = argument.start * argument.array.itemsize
                return upload(argument.array, i).address + offset
            if isinstance(argument, np.ndarray):
                return upload(argument, i)
            if isinstance(argument, Struct):
                fields = [value(field, i) for field in argument.fields]
                fields = [field.address if isinstance(field, Buffer) else field for field in fields]
                return struct.pack(f"@{argument.types}0q", *fields)
            return argument

        values = [value(argument, i) for i, argument in enumerate(arguments)]
        steps = module.launch(
            self.mangled(name),
            (grid,) if isinstance(grid, int) else grid,
            threads,
            values,
            **options,
        )
        for array, buffer in buffers.values():
            array.view(np.uint8).reshape(-1)[:] = module.download(buffer)
        return steps

    def resources(self, name: str, threads: int, dynamic_shared: int = 0) -> Resources:
        """What the kernel needs when it is launched so, of the machine code nvcc makes of it."""
        cubin = compile_cuda(self.source, self.arch, "cubin", self.defines)
        return analyse(
            cubin.data,
            int(self.arch.rstrip("a")),
            threads=threads,
            shared_bytes=dynamic_shared,
            function=_mangled(name, sass.usage(cubin.data)),
            name=name,
            warnings=cubin.warnings,
        )


def _mangled(name: str, kernels: Iterable[str]) -> str:
    names = demangle(tuple(kernels))
    found = [
        mangled
        for mangled, demangled in names.items()
        if re.search(rf"(?:^|[\s:]){re.escape(name)}\(", demangled)
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} kernels {name!r} among {list(names.values())}")
    return found[0]


@lru_cache(maxsize=64)
def demangle(names: tuple[str, ...]) -> dict[str, str]:
    """C++ names by their mangled ones."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None:
        raise RuntimeError("needs c++filt (GNU binutils) to find kernels by their names")
    text = subprocess.run(
        [program], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(names, text.splitlines(), strict=True))
