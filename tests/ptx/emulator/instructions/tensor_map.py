"""Tensor maps in memory: reading them, tensormap.replace, and the fences of the tensormap proxy.

A map that a kernel has changed in global memory is not what a copy sees until the change has been
released to the tensormap proxy, and acquired from there.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tests.ptx.emulator.block import WARP, Block, Execute, Mask
from tests.ptx.emulator.build import GLOBAL_BASE, PARAMETER_BASE, SHARED_BASE, Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction, nothing
from tests.ptx.emulator.instructions.mbarrier import by_address, shared_address
from tests.ptx.emulator.memory import Memory
from tests.ptx.emulator.program import Address, Symbol
from tests.ptx.emulator.tensor_map import BYTES, TensorMap, replace

_ALIGNMENT = 64
_PIECE = 16
_SCOPE = "{scope:cta,cluster,gpu,sys}"
_CHANGED, _RELEASED = "release", "acquire"  # the fence that is missing

_decode = lru_cache(maxsize=64)(TensorMap.decode)


def map_address(build: Build, operand: Address) -> Read:
    """A function that gives the generic addresses (T,) of a tensor map operand."""
    address = build.address(operand)
    if isinstance(operand.base, Symbol):
        if operand.base.name in build.program.shared:
            raise build.error("a tensor map in shared memory")
        return lambda block: address(block) + PARAMETER_BASE
    return address


def read_map(block: Block, address: int) -> TensorMap:
    """The tensor map at a generic address, as a copy that a block issues sees it."""
    if address % _ALIGNMENT:
        raise PtxError("alignment", f"a tensor map at {address:#x}, not 64-byte aligned")
    if PARAMETER_BASE <= address < SHARED_BASE:
        start = address - PARAMETER_BASE
        data = block.launch.parameters[start : start + BYTES]
        if len(data) != BYTES:
            raise PtxError("bounds", f"a tensor map at byte {start} of the parameters")
        return _decode(data)
    if not GLOBAL_BASE <= address < PARAMETER_BASE:
        raise PtxError("bounds", f"a tensor map at {address:#x}, not parameter or global memory")
    missing = _unseen(block).get(address)
    if missing:
        raise PtxError(
            "proxy",
            f"the tensor map at {block.launch.memory.describe(address - GLOBAL_BASE)} was changed"
            f" and no fence.proxy.tensormap::generic.{missing} followed",
        )
    return _decode(_bytes(block.launch.memory, address - GLOBAL_BASE, "a tensor map"))


def _unseen(block: Block) -> dict[int, str]:
    """The maps in global memory that a block has changed, with the fence that is missing."""
    found: dict[int, str] = block.state.setdefault("tensor_map", {})
    return found


def _pieces(offset: int) -> np.ndarray:
    return np.arange(offset, offset + BYTES, _PIECE)


def _bytes(memory: Memory, offset: int, what: str) -> bytes:
    memory.check(_pieces(offset), _PIECE, what, reads=True)
    return memory.data[offset : offset + BYTES].tobytes()


def _store(memory: Memory, offset: int, data: bytes) -> None:
    words = np.frombuffer(data, np.uint64)
    memory.store(np.arange(offset, offset + BYTES, 8), 8, words)


@instruction(
    "tensormap.replace.tile.{field:global_address}.{space:global,shared::cta}.b1024.{type:b64}",
    "tensormap.replace.tile.{field:rank,elemtype,interleave_layout,swizzle_mode,fill_mode}"
    ".{space:global,shared::cta}.b1024.{type:b32}",
    "tensormap.replace.tile.{field:box_dim,global_dim,element_stride}.{space:global,shared::cta}"
    ".b1024.{type:b32}",
    "tensormap.replace.tile.{field:global_stride}.{space:global,shared::cta}.b1024.{type:b64}",
)
def replace_field(build: Build) -> Execute:
    field, shared = str(build.choices["field"]), build.choices["space"] == "shared::cta"
    indexed = field in ("box_dim", "global_dim", "element_stride", "global_stride")
    if len(build.operands) != (3 if indexed else 2):
        raise build.error(f"tensormap.replace of {field} with {len(build.operands)} operands")
    index = build.immediate(1) if indexed else 0
    address = shared_address(build, 0, "shared") if shared else build.address(0)
    if field not in ("global_address", "rank") and not indexed:
        build.immediate(1)
    value = build.read(-1, build.type.replace("b", "u"))

    def execute(block: Block, mask: Mask) -> None:
        addresses, values = address(block), value(block)
        memory = block.shared if shared else block.launch.memory
        for t in np.flatnonzero(block.active(mask)):
            offset = int(addresses[t]) - (0 if shared else GLOBAL_BASE)
            _check_alignment(memory, offset)
            data = _bytes(memory, offset, "tensormap.replace")
            memory.check(_pieces(offset), _PIECE, "tensormap.replace", reads=False)
            if not shared:
                _unseen(block)[offset + GLOBAL_BASE] = _CHANGED
            elif block.races:
                warp = np.int64(block.warp[t])
                block.races.read(_pieces(offset), _PIECE, warp)
                block.races.write(_pieces(offset), _PIECE, warp)
            _store(memory, offset, replace(data, field, index, int(values[t])))

    return execute


def _check_alignment(memory: Memory, offset: int) -> None:
    if offset % BYTES:
        where = memory.describe(offset)
        raise PtxError("alignment", f"tensormap: {where} is not {BYTES}-byte aligned")


@instruction(
    f"tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.{_SCOPE}.sync.aligned"
)
def copy_fenceproxy(build: Build) -> Execute:
    target, source = build.address(0), shared_address(build, 1, "shared")
    _expect_size(build, 2)

    def execute(block: Block, mask: Mask) -> None:
        active = block.active(mask)
        _check_whole_warps(block, active)
        sources = source(block)
        for address, threads in by_address(target(block), active):
            starts, offset = sources[threads], address - GLOBAL_BASE
            if (starts != starts[0]).any():
                raise PtxError("warp", "tensormap.cp_fenceproxy: several sources, one target")
            start = int(starts[0])
            _check_alignment(block.shared, start)
            _check_alignment(block.launch.memory, offset)
            data = _bytes(block.shared, start, "tensormap.cp_fenceproxy")
            if block.races:
                for warp in np.unique(block.warp[threads]):
                    block.races.read(_pieces(start), _PIECE, warp)
            what = "tensormap.cp_fenceproxy"
            block.launch.memory.check(_pieces(offset), _PIECE, what, reads=False)
            _store(block.launch.memory, offset, data)
            _unseen(block)[address] = _RELEASED
        block.progress += 1

    return execute


def _check_whole_warps(block: Block, active: np.ndarray) -> None:
    counts = np.bincount(block.warp[active], minlength=block.warps)
    if ((counts > 0) & (counts < np.bincount(block.warp).clip(max=WARP))).any():
        raise PtxError("warp", "an .aligned instruction is executed by a part of a warp")


def _expect_size(build: Build, index: int) -> None:
    if build.immediate(index) != BYTES:
        raise build.error(f"the size of a tensor map is {BYTES}")


@instruction(f"fence.proxy.tensormap::generic.release.{_SCOPE}")
def fence_release(build: Build) -> Execute:
    def execute(block: Block, mask: Mask) -> None:
        unseen = _unseen(block)
        for address in unseen:
            unseen[address] = _RELEASED

    return execute


@instruction(f"fence.proxy.tensormap::generic.acquire.{_SCOPE}")
def fence_acquire(build: Build) -> Execute:
    _expect_size(build, 1)
    address = build.address(0)

    def execute(block: Block, mask: Mask) -> None:
        for one in np.unique(address(block)[block.active(mask)]):
            if _unseen(block).get(int(one)) == _RELEASED:
                del _unseen(block)[int(one)]

    return execute


instruction("prefetch[.{param,const}].tensormap")(nothing)
