"""What is compiled and judged: a wrapper's launches, or a CUDA kernel, and the rules they obey.

`library_cases.py` has those of the library, `corpus_cases.py` those of tests/ptx/kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tests.ptx import gates, nvcc
from tests.ptx.resources import Resources, compile_only

# Compiled and judged for all of them; the emulator executes what is for the first two.
TRITON_ARCHS = (80, 90, 100)


CUDA_ARCHS = ("80", "90a", "100")


Rule = Callable[[Resources], list[str]]


@dataclass(frozen=True)
class Case:
    """A wrapper, or a CUDA kernel, for one architecture. `compiler` is "triton" or "nvcc".

    `inputs` say in docs/kernels.md what it is compiled for, where the name does not. Those of one
    `group` come from one compilation.
    """

    name: str
    arch: int
    compiler: str
    records: Callable[[], list[Resources]]
    rules: tuple[Rule, ...] = ()
    inputs: str = ""
    group: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-sm_{self.arch}"

    def key(self, record: Resources) -> str:
        """Of a record in the golden file."""
        return f"{self.id}/{record.name}"

    def violations(self, record: Resources) -> list[str]:
        return [found for rule in (*gates.ALWAYS, *self.rules) for found in rule(record)]


def triton_case(
    name: str, arch: int, launch: Callable[[], object], *rules: Rule, inputs: str = ""
) -> Case:
    def records() -> list[Resources]:
        with compile_only(arch) as found:
            launch()
        return found

    return Case(name, arch, "triton", records, rules, inputs)


@lru_cache(maxsize=4)
def cuda_kernels(source: Path, arch: str) -> nvcc.CudaKernels:
    """Kept: a file of many kernels is slow to read."""
    return nvcc.CudaKernels(source, arch)


def cuda_case(
    name: str,
    arch: str,
    source: Path,
    kernel: str,
    threads: int,
    *rules: Rule,
    dynamic_shared: int = 0,
    inputs: str = "",
) -> Case:
    def records() -> list[Resources]:
        return [cuda_kernels(source, arch).resources(kernel, threads, dynamic_shared)]

    group = f"{source.stem}-{arch}"
    return Case(name, int(arch.rstrip("a")), "nvcc", records, rules, inputs, group)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PRODUCTS = (gates.uses_tensor_cores, gates.copies_asynchronously)
