"""ld and st: parameters, constants, local, shared, global and generic addresses."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import (
    GLOBAL_BASE,
    LOCAL_BASE,
    PARAMETER_BASE,
    SHARED_BASE,
    Build,
    Write,
)
from tests.ptx.emulator.clocks import GUESS, WEAK, Ordering
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.memory import Memory
from tests.ptx.emulator.program import Operand, Register
from tests.ptx.emulator.types import SIGNED, TYPES, UNSIGNED, size_of

Threads = np.ndarray | slice  # a mask as an index

_TYPE = "{type:b8,u8,s8,b16,u16,s16,b32,u32,s32,b64,u64,s64,f32,f64}"
_SPACE = "{space:global,shared,shared::cta,const,local}"
_ORDERED = "{order:relaxed,acquire}.{scope:cta,cluster,gpu,sys}"
_RELEASED = "{order:relaxed,release}.{scope:cta,cluster,gpu,sys}"
# What says how to cache, which changes no value; the policy of cache_hint is one more operand.
_L1 = "[.{l1:L1::evict_normal,L1::evict_unchanged,L1::evict_first,L1::evict_last,L1::no_allocate}]"
_HINTS = _L1 + "[.{hint:L2::cache_hint}]"
_LOAD_HINTS = f"{_HINTS}[.{{prefetch:L2::64B,L2::128B,L2::256B}}]"
_VECTOR = f"[.{{vector:v2,v4}}].{_TYPE}"


def resolve(
    block: Block, space: str, addresses: np.ndarray, threads: Threads = slice(None)
) -> tuple[Memory, np.ndarray]:
    """The memory and the offsets in it that addresses (n,) of a state space mean.

    `threads` are those the addresses belong to, which matters in local memory.
    """
    if space == "generic":
        low, high = int(addresses.min()), int(addresses.max())
        if low >= LOCAL_BASE:
            space, addresses = "local", addresses - LOCAL_BASE
        elif low >= SHARED_BASE and high < LOCAL_BASE:
            return block.shared, addresses - SHARED_BASE
        elif high >= PARAMETER_BASE:
            raise PtxError("unsupported", "generic addresses of this or of several state spaces")
        else:
            space = "global"
    if space in ("global", "const"):
        return block.launch.memory, addresses - GLOBAL_BASE
    if space == "shared":
        return block.shared, addresses
    if space == "local":
        return block.local, block.local.offsets(addresses, block.thread[threads])
    raise PtxError("unsupported", f"the state space {space}")


def watch_read(
    block: Block,
    memory: Memory,
    offsets: np.ndarray,
    size: int,
    threads: Threads,
    order: Ordering = WEAK,
) -> None:
    """Tell whoever looks for races of a read of `size` bytes by these threads."""
    if memory is block.shared:
        if block.races:
            block.races.read(offsets, size, block.warp[threads], order=order)
    elif memory is block.launch.memory and block.launch.races:
        block.launch.races.read(block, offsets, size, order)


def watch_write(
    block: Block,
    memory: Memory,
    offsets: np.ndarray,
    size: int,
    threads: Threads,
    order: Ordering = WEAK,
) -> None:
    """The same for a write."""
    if memory is block.shared:
        if block.races:
            block.races.write(offsets, size, block.warp[threads], order=order)
    elif memory is block.launch.memory and block.launch.races:
        block.launch.races.write(block, offsets, size, order)


def ordering(build: Build, default_scope: str = "") -> Ordering:
    """What the modifiers of ld, st, atom or red say about order."""
    modifiers = set(build.modifiers)
    if "volatile" in modifiers:
        return Ordering(strong=True, blocks=True)
    scopes = modifiers & {"cta", "cluster", "gpu", "sys"}
    strong = bool(scopes) or bool(default_scope)
    both = "acq_rel" in modifiers
    return Ordering(
        strong,
        acquire=both or "acquire" in modifiers,
        release=both or "release" in modifiers,
        # A cluster has one block here.
        blocks=strong and not scopes & {"cta", "cluster"},
    )


def check_count(build: Build, count: int) -> None:
    """The instruction has so many operands, and its cache policy where it has a hint."""
    if build.has("hint"):
        build.read(count, "b64")
        count += 1
    if len(build.operands) != count:
        raise build.error(f"{len(build.operands)} operands, not {count}")


def items(build: Build, index: int) -> tuple[Operand, ...]:
    """The items of a vector operand, as many as the opcode says."""
    found = build.vector(index)
    vector = build.choices.get("vector")
    if len(found) != int(vector[1:] if vector else 1):
        raise build.error(f"{len(found)} items in operand {index}")
    if len(found) * size_of(build.type) > 16:
        raise build.error("accesses of more than 16 bytes")
    return found


def destinations(build: Build, index: int) -> list[Write]:
    """Functions that write the items of an operand, which may be wider than the type."""
    for item in items(build, index):
        _check_width(build, item)
    return [build.write(item) for item in items(build, index)]


def _check_width(build: Build, item: Operand) -> None:
    if isinstance(item, Register):
        size = size_of(build.entry.registers[item.name])
        exact = build.type[0] == "f"
        if size < size_of(build.type) or (exact and size != size_of(build.type)):
            raise build.error(f"{item.name} has {size} bytes, .{build.type} {size_of(build.type)}")


def spread(block: Block, values: np.ndarray, mask: Mask) -> np.ndarray:
    """Values of the active threads as an array over all."""
    if mask is None:
        return values
    full = np.zeros(block.threads, values.dtype)
    full[mask] = values
    return full


def _integer(type_name: str) -> type[np.generic]:
    """The type whose extension a load does."""
    signed = type_name.startswith("s")
    return (SIGNED if signed else UNSIGNED)[np.dtype(TYPES[type_name]).itemsize]


@instruction(f"ld.param{_VECTOR}")
def ld_param(build: Build) -> Execute:
    check_count(build, 2)
    writes = destinations(build, 0)
    address, size = build.address(1), size_of(build.type)
    dtype = np.dtype(_integer(build.type))

    def execute(block: Block, mask: Mask) -> None:
        parameters = np.frombuffer(block.launch.parameters, np.uint8)
        offsets = address(block) if mask is None else address(block)[mask]
        offsets = np.where(offsets >= PARAMETER_BASE, offsets - PARAMETER_BASE, offsets)
        if (offsets % (size * len(writes))).any():
            raise PtxError("alignment", f"ld.param of {size * len(writes)} bytes")
        if (offsets < 0).any() or (offsets + size * len(writes) > len(parameters)).any():
            raise PtxError("bounds", f"parameters have {len(parameters)} bytes")
        for k, write in enumerate(writes):
            where = offsets[:, None] + np.arange(k * size, (k + 1) * size)
            values = np.ascontiguousarray(parameters[where]).view(dtype)[:, 0]
            write(block, spread(block, values, mask), mask)

    return execute


@instruction(
    f"ld[.{{order:weak,volatile}}][.{_SPACE}][.{{cop:ca,cg,cs,lu,cv}}]{_LOAD_HINTS}{_VECTOR}",
    f"ld.global[.{{cop:ca,cg,cs}}].nc{_LOAD_HINTS}{_VECTOR}",
    f"ld.{_ORDERED}[.{_SPACE}]{_LOAD_HINTS}{_VECTOR}",
    f"ld.{_SPACE}.{_ORDERED}{_LOAD_HINTS}{_VECTOR}",
    f"ldu[.{{space:global}}]{_VECTOR}",
)
def ld(build: Build) -> Execute:
    check_count(build, 2)
    writes = destinations(build, 0)
    address, space = build.address(1), build.space
    order = GUESS if build.instruction in build.entry.guesses else ordering(build)
    size, dtype = size_of(build.type), _integer(build.type)
    total = size * len(writes)

    def execute(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        memory, offsets = resolve(block, space, address(block)[threads], threads)
        memory.check(offsets, total, "load", reads=True)
        watch_read(block, memory, offsets, total, threads, order)
        words = memory.load_rows(offsets, size, len(writes))
        for k, write in enumerate(writes):
            write(block, spread(block, words[:, k].view(dtype), mask), mask)

    return execute


@instruction(
    f"st[.{{order:weak,volatile}}][.{_SPACE}][.{{cop:wb,cg,cs,wt}}]{_HINTS}{_VECTOR}",
    f"st.{_RELEASED}[.{_SPACE}]{_HINTS}{_VECTOR}",
    f"st.{_SPACE}.{_RELEASED}{_HINTS}{_VECTOR}",
)
def st(build: Build) -> Execute:
    check_count(build, 2)
    for item in items(build, 1):
        _check_width(build, item)
    address, space, order = build.address(0), build.space, ordering(build)
    if space == "const":
        raise build.error("a store to constant memory")
    size = size_of(build.type)
    reads = [build.read(item, f"b{8 * size}") for item in items(build, 1)]
    total = size * len(reads)

    def execute(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        memory, offsets = resolve(block, space, address(block)[threads], threads)
        memory.check(offsets, total, "store", reads=False)
        watch_write(block, memory, offsets, total, threads, order)
        values = np.stack([read(block)[threads] for read in reads], axis=1)
        lost = memory.store_rows(offsets, values)
        if lost.any():
            # Which of them stays is undefined.
            place = memory.describe(int(offsets[lost][0]))
            raise PtxError("race", f"threads store different values to {place} at the same time")

    return execute
