"""mma.sync: the tensor cores' product of a warp, for all warps of a block at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.emulator.block import WARP, Block, Execute, Mask
from tests.ptx.emulator.build import Build, Read
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.fragments import accumulator, matrix_a, matrix_b
from tests.ptx.emulator.instructions.matrix_types import BYTES, add_products, as_elements, decode
from tests.ptx.emulator.instructions.together import together

_M, _N = 16, 8
_MMA = "mma.sync.aligned.m16n8k"
_BYTE = "s8,u8"
_FLOAT8 = "e4m3,e5m2"


@instruction(
    f"{_MMA}{{k:8,16}}.row.col.{{d:f32}}.{{a:bf16}}.{{b:bf16}}.f32",
    f"{_MMA}{{k:8,16}}.row.col.{{d:f32}}.{{a:f16}}.{{b:f16}}.f32",
    f"{_MMA}{{k:8,16}}.row.col.{{d:f16}}.{{a:f16}}.{{b:f16}}.f16",
    f"{_MMA}{{k:4,8}}.row.col.{{d:f32}}.{{a:tf32}}.{{b:tf32}}.f32",
    f"{_MMA}{{k:32}}.row.col.{{d:f32}}.{{a:{_FLOAT8}}}.{{b:{_FLOAT8}}}.f32",
    f"{_MMA}{{k:16,32}}.row.col[.{{saturate:satfinite}}].{{d:s32}}.{{a:{_BYTE}}}.{{b:{_BYTE}}}.s32",
)
def mma(build: Build) -> Execute:
    k = int(build.choices["k"] or 0)
    a_type, b_type, d_type = (build.choices[name] or "" for name in ("a", "b", "d"))
    width = 4 // BYTES[a_type]
    d_width = 2 if d_type == "f16" else 1
    a_count, b_count = _M * k // (WARP * width), _N * k // (WARP * width)
    d_count = _M * _N // (WARP * d_width)
    writes = [build.write(item) for item in _items(build, 0, d_count)]
    read_a, read_b, read_c = (
        [build.read(item, "b32") for item in _items(build, index, count)]
        for index, count in ((1, a_count), (2, b_count), (3, d_count))
    )
    saturate = build.has("saturate")

    def body(block: Block, mask: Mask) -> None:
        T = block.threads
        a = decode(as_elements(_gather(block, read_a), a_type), a_type)
        b = decode(as_elements(_gather(block, read_b), b_type), b_type)
        a = a.take(matrix_a(a_count, width, T).order(k)).reshape(-1, _M, k)
        b = b.take(matrix_b(b_count, width, T).order(_N)).reshape(-1, k, _N)
        with np.errstate(all="ignore"):
            products = (a @ b).take(accumulator(d_count, d_width, T).places(_N))
        bits = add_products(_gather(block, read_c), products, d_type, saturate=saturate)
        for write, values in zip(writes, bits.reshape(d_count, T), strict=True):
            write(block, values, mask)

    return together(build, WARP, body)


def _items(build: Build, index: int, count: int) -> Sequence:
    items = build.vector(index)
    if len(items) != count:
        raise build.error(f"operand {index} has {len(items)} registers, not {count}", "syntax")
    return items


def _gather(block: Block, reads: Sequence[Read]) -> np.ndarray:
    """The bits of registers (registers * threads,)."""
    return np.concatenate([read(block) for read in reads])
