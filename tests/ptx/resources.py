"""What compiled kernels need of a GPU: registers, spills, shared memory, blocks per multiprocessor.

    with compile_only(90) as records:
        y = layer_norm(x, weight, bias)      # meta tensors do

Read from the machine code that ptxas wrote, without a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.ptx import ptxas, sass
from tests.ptx.triton_compile import Compiled, intercepted

KB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities")."""

    shared_bytes: int
    shared_bytes_per_block: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(164 * KB, 163 * KB),
    90: Multiprocessor(228 * KB, 227 * KB),
    100: Multiprocessor(228 * KB, 227 * KB),
}
SHARED_LIMIT = {arch: sm.shared_bytes_per_block for arch, sm in MULTIPROCESSORS.items()}
_RESERVED = KB  # shared memory that the driver takes of each block
_REGISTER_UNIT = 256  # registers are given to a warp in such pieces


def blocks_per_multiprocessor(
    arch: int, registers: int, shared_bytes: int, threads: int
) -> tuple[int, str]:
    """How many blocks run at the same time, and what limits them."""
    sm = MULTIPROCESSORS[arch]
    warps = math.ceil(threads / 32)
    limits = {"warps": sm.warps // warps, "blocks": sm.blocks}
    per_warp = math.ceil(registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    if per_warp:
        # Each of the four schedulers has a quarter of the registers and of a block's warps.
        limits["registers"] = sm.registers // per_warp // 4 * 4 // warps
    if shared_bytes > sm.shared_bytes_per_block:
        limits["shared memory"] = 0
    else:
        used = math.ceil(shared_bytes / 128) * 128 + _RESERVED
        limits["shared memory"] = sm.shared_bytes // used
    least = min(limits, key=lambda name: limits[name])
    return limits[least], least


@dataclass(frozen=True)
class Resources:
    """One kernel as compiled. `hot` is of the hot loop: the largest of the innermost loops.

    `matrix_flops` are those of a block in one turn of the hot loop, `accesses` the numbers of LDG
    and STG by their width in bytes, `counts` those of sass.CLASSES.
    """

    name: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    blocks_per_sm: int
    limited_by: str
    instructions: int
    counts: dict[str, int]
    hot: dict[str, int]
    matrix_flops: int
    accesses: dict[int, int]
    warnings: tuple[str, ...] = ()


def analyse(
    cubin: bytes,
    arch: int,
    *,
    threads: int,
    shared_bytes: int,
    function: str | None = None,
    name: str | None = None,
    warnings: tuple[str, ...] = (),
) -> Resources:
    """The resources of one kernel of a cubin, which `function` names if there are several.

    `shared_bytes` is what a launch asks for, in addition to the static ones of the kernel.
    """
    functions = sass.disassemble(cubin)
    if function is None:
        (function,) = functions
    ops, used = functions[function], sass.usage(cubin)[function]
    shared = shared_bytes + used.get("SHARED", 0)
    blocks, limit = blocks_per_multiprocessor(arch, used["REG"], shared, threads)
    loop = sass.hot_loop(ops)
    return Resources(
        name or function,
        arch,
        used["REG"],
        used.get("STACK", 0),
        shared,
        threads,
        blocks,
        limit,
        len(ops),
        sass.count(ops),
        sass.count(loop),
        sass.matrix_flops(loop, threads),
        sass.access_bytes(ops),
        warnings,
    )


@contextmanager
def compile_only(arch: int) -> Iterator[list[Resources]]:
    """Compile every Triton launch for `arch` and run nothing; CPU and meta tensors do."""
    records: list[Resources] = []

    def launched(compiled: Compiled) -> None:
        records.append(of_triton(compiled, arch))

    with intercepted(arch, launched, every_config=True):
        yield records


def of_triton(compiled: Compiled, arch: int) -> Resources:
    metadata = compiled.kernel.metadata
    required = re.search(r"\.reqntid\s+(\d+)", compiled.ptx)
    return analyse(
        compiled.kernel.asm["cubin"],
        arch,
        threads=int(required[1]) if required else metadata.num_warps * 32,
        shared_bytes=metadata.shared,
        name=compiled.name,
        warnings=ptxas.of_triton(compiled),
    )
