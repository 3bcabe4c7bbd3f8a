"""Calls the library's launchers, host code as compiled, and executes what they launch.

launchers = Launchers(Path("csrc/cuda/mlp.cu"), folder)
names = launchers.call("fastformer_gelu_fwd", arguments, [pre, hidden], arch="90a")
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx import nvcc
from tests.ptx.cases import cuda_kernels
from tests.ptx.nvcc import FLAGS, Shifted

STUB = Path(__file__).with_name("stub_runtime.c")
_Three = ctypes.POINTER(ctypes.c_uint * 3)
_Hook = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, _Three, _Three, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)


class Launchers:
    """The extern "C" functions of a .cu file, linked with a runtime that launches nothing."""

    def __init__(self, source: Path, folder: Path) -> None:
        """Compile into `folder`."""
        self.source = source
        library = folder / f"{source.stem}.so"
        # For one architecture and without machine code: the emulator's PTX is compiled elsewhere.
        target = "-gencode=arch=compute_90a,code=compute_90a"
        command = [
            nvcc.find_nvcc(),
            *FLAGS,
            target,
            "-shared",
            "-Xcompiler",
            "-fPIC,-w",
            "-Xlinker",
            "-Bsymbolic",
        ]
        command += ["-cudart", "none", str(source), str(STUB), "-o", str(library)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))

    def call(
        self,
        launcher: str,
        arguments: ctypes.Structure,
        arrays: Sequence[np.ndarray],
        arch: str,
        *,
        seed: int = 1,
    ) -> list[str]:
        """Call a launcher, execute its launches for `arch`, return the names of the kernels.

        `arrays` are the memory that the pointers among the arguments lead into; the kernels'
        results are written into them.
        """
        kernels = cuda_kernels(self.source, arch)
        launches: list[tuple[str, tuple[int, ...], tuple[int, ...], list[bytes], int]] = []
        errors: list[Exception] = []

        def record(mangled: bytes, grid: Any, block: Any, values: Any, shared: int) -> None:
            try:
                name = _short(mangled.decode())
                sizes = kernels.parameter_bytes(name)
                raw = [ctypes.string_at(values[i], size) for i, size in enumerate(sizes)]
                launches.append((name, (*grid.contents,), (*block.contents,), raw, shared))
            except Exception as error:  # which would get lost on its way through C
                errors.append(error)

        hook = _Hook(record)
        self.library.stub_set_hook(hook)
        status = getattr(self.library, launcher)(ctypes.byref(arguments), None)
        for error in errors:
            raise error
        if status:
            raise RuntimeError(f"{launcher}: CUDA error {status}")
        for name, grid, block, raw, shared in launches:
            values = [_argument(value, arrays) for value in raw]
            kernels.launch(name, grid, block, values, dynamic_shared=shared, seed=seed)
        return [name for name, *_ in launches]


def _short(mangled: str) -> str:
    """The kernel's name with its template arguments."""
    found = re.search(r"(\w+(?:<[^()]*>)?)\(", nvcc.demangle((mangled,))[mangled])
    if found is None:
        raise LookupError(f"no name of a kernel in {mangled}")
    return found[1]


def _argument(raw: bytes, arrays: Sequence[np.ndarray]) -> Any:
    """A parameter's bytes, or where it points to."""
    if len(raw) == 8:
        address = int.from_bytes(raw, "little")
        for array in arrays:
            offset = address - array.ctypes.data
            if 0 <= offset < array.nbytes:
                return Shifted(array, offset // array.itemsize)
    return raw
