"""cp.async.bulk.tensor: copies of boxes of a tensor (TMA), and reductions into them.

The bytes of a box lie in shared memory in the tensor's order, the contiguous dimension first; a
swizzle exchanges 16-byte chunks by the bits of their address (PTX ISA, "Swizzling modes").
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import GLOBAL_BASE, Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction, nothing
from tests.ptx.emulator.instructions.bulk_copy import (
    Combine,
    Transfer,
    combiner,
    expect_operands,
    load,
    store,
)
from tests.ptx.emulator.instructions.mbarrier import deliver_early, shared_address
from tests.ptx.emulator.instructions.tensor_map import map_address, read_map
from tests.ptx.emulator.program import TensorAddress
from tests.ptx.emulator.tensor_map import TensorMap

_ALIGNMENT = 128  # of a box in shared memory
_RANK = "{rank:1d,2d,3d,4d,5d}"
_OPERATION = "{op:add,min,max,and,or,xor}"


@lru_cache(maxsize=64)
def _swizzled(start: int, bytes: int, item: int, swizzle: int) -> np.ndarray:
    """Where in shared memory the items of a box are, in the tensor's order."""
    offsets = np.arange(start, start + bytes, item)
    return offsets ^ ((offsets >> 7) & ((1 << swizzle) - 1)) << 4


def _transfer(block: Block, tensor: TensorMap, corner: tuple[int, ...], start: int) -> Transfer:
    """The box whose first element is at `corner`, coordinates in PTX's order."""
    if len(corner) != len(tensor.box):
        raise PtxError("launch", f"{len(corner)} coordinates for a tensor map of {tensor.box}")
    bytes = int(np.prod(tensor.box)) * tensor.item_size
    if start % _ALIGNMENT:
        where = block.shared.describe(start)
        raise PtxError("alignment", f"a box at {where}, not 128-byte aligned")
    if start < 0 or start + bytes > len(block.shared.data):
        raise PtxError("bounds", f"a box of {bytes} bytes at {block.shared.describe(start)}")
    if bytes % (16 << tensor.swizzle):
        # Its last chunks would be swizzled to where the box does not reach.
        raise PtxError("unsupported", f"a box of {bytes} bytes with swizzle {tensor.swizzle}")
    outer, inside = np.zeros(1, np.int64), np.ones(1, bool)
    strides = (tensor.item_size, *tensor.strides)
    for first, extent, size, stride in reversed(
        list(zip(corner, tensor.box, tensor.sizes, strides, strict=True))
    ):
        position = first + np.arange(extent)
        exists = (position >= 0) & (position < size)
        outer = (outer[:, None] + position * stride).ravel()
        inside = (inside[:, None] & exists).ravel()
    fill = (1 << 8 * tensor.item_size) - 1 if tensor.nan_fill else 0
    return Transfer(
        start,
        bytes,
        tensor.item_size,
        _swizzled(start, bytes, tensor.item_size, tensor.swizzle),
        tensor.address - GLOBAL_BASE + outer,
        None if inside.all() else inside,
        fill,
    )


def _tensor_operand(build: Build, index: int) -> tuple[Read, list[Read]]:
    """Functions that give the map's address and the coordinates."""
    operand = build.operand(index)
    if not isinstance(operand, TensorAddress):
        raise build.error(f"operand {index} must be [map, {{coordinates}}]")
    coordinates = operand.coordinates.items
    if len(coordinates) != int(str(build.choices["rank"])[0]):
        raise build.error(f"{len(coordinates)} coordinates for {build.choices['rank']}")
    return map_address(build, operand.map), [build.read(c, "s32") for c in coordinates]


@instruction(
    f"cp.async.bulk.tensor.{_RANK}.{{space:shared::cluster,shared::cta}}.global[.tile]"
    ".mbarrier::complete_tx::bytes[.{hint:L2::cache_hint}]"
)
def tensor_load(build: Build) -> Execute:
    expect_operands(build, 3)
    shared, barrier = (shared_address(build, k, build.choices["space"]) for k in (0, 2))
    tensor_map, coordinates = _tensor_operand(build, 1)

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        starts, maps, bars = shared(block), tensor_map(block), barrier(block)
        corners = np.stack([read(block) for read in coordinates], axis=1)
        for t in np.flatnonzero(block.active(mask)):
            tensor, corner = read_map(block, int(maps[t])), tuple(corners[t].tolist())
            load(block, _transfer(block, tensor, corner, int(starts[t])), int(bars[t]), int(t))

    return execute


@instruction(
    f"cp.async.bulk.tensor.{_RANK}.global.shared::cta[.tile].bulk_group[.{{hint:L2::cache_hint}}]",
    f"cp.reduce.async.bulk.tensor.{_RANK}.global.shared::cta.{_OPERATION}[.tile].bulk_group"
    "[.{hint:L2::cache_hint}]",
)
def tensor_store(build: Build) -> Execute:
    expect_operands(build, 2)
    tensor_map, coordinates = _tensor_operand(build, 0)
    shared = shared_address(build, 1, "shared")
    operation = str(build.choices["op"]) if build.has("op") else ""

    def execute(block: Block, mask: Mask) -> None:
        deliver_early(block)
        starts, maps = shared(block), tensor_map(block)
        corners = np.stack([read(block) for read in coordinates], axis=1)
        for t in np.flatnonzero(block.active(mask)):
            tensor, corner = read_map(block, int(maps[t])), tuple(corners[t].tolist())
            if min(corner) < 0:
                raise PtxError("bounds", f"a box is stored at {corner}: negative coordinates")
            transfer = _transfer(block, tensor, corner, int(starts[t]))
            store(block, transfer, int(t), _combine(build, operation, tensor))

    return execute


def _combine(build: Build, operation: str, tensor: TensorMap) -> Combine | None:
    if not operation:
        return None
    bits = {4: "b32", 8: "b64"}
    if operation in ("and", "or", "xor"):
        return combiner(build, operation, bits.get(tensor.item_size, tensor.type))
    if tensor.type == "f64":
        raise build.error(f"the reduction {operation} of boxes of f64")
    return combiner(build, operation, tensor.type)


instruction(f"cp.async.bulk.prefetch.tensor.{_RANK}.L2.global[.tile][.L2::cache_hint]")(nothing)
