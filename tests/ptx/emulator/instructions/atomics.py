"""atom and red. Threads that hit one word take turns in the order of their numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build, Read
from tests.ptx.emulator.clocks import Ordering
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.loads import (
    Threads,
    check_count,
    destinations,
    items,
    ordering,
    resolve,
    spread,
)
from tests.ptx.emulator.memory import Memory
from tests.ptx.emulator.types import (
    TYPES,
    UNSIGNED,
    canonical,
    float_to_halves,
    flush,
    halves_to_float,
    size_of,
)

# Semantics, scope and space come in any order: ptxas takes more than the manual's, and Triton
# writes global.gpu.acq_rel as well as global.acq_rel.gpu.
_ANY = "global,shared,shared::cta,relaxed,acquire,release,acq_rel,cta,cluster,gpu,sys"
_WHERE = "".join(f"[.{{where{i}:{_ANY}}}]" for i in range(3))
_HINT = "[.{hint:L2::cache_hint}]"
_HALVES = "f16,f16x2,bf16,bf16x2"
_NAMES = (
    f"{_WHERE}.{{op:add}}{_HINT}.{{type:u32,s32,u64,s64,f32,f64}}",
    f"{_WHERE}.{{op:min,max}}{_HINT}.{{type:u32,s32,u64,s64}}",
    f"{_WHERE}.{{op:and,or,xor}}{_HINT}.{{type:b32,b64}}",
    f"{_WHERE}.{{op:inc,dec}}{_HINT}.{{type:u32}}",
    f"{_WHERE}.{{op:add}}.noftz{_HINT}.{{type:{_HALVES}}}",
    f"{_WHERE}.{{op:add}}{_HINT}.{{vector:v2,v4}}.{{type:f32}}",
    f"{_WHERE}.{{op:add}}.noftz{_HINT}.{{vector:v2,v4,v8}}.{{type:{_HALVES}}}",
    f"{_WHERE}.{{vector:v2,v4}}.{{type:f32}}.{{op:add}}{_HINT}",
    f"{_WHERE}.{{vector:v2,v4,v8}}.{{type:{_HALVES}}}.{{op:add}}.noftz{_HINT}",
)
_EXCHANGES = (
    f"{_WHERE}.{{op:exch}}{_HINT}.{{type:b32,b64}}",
    f"{_WHERE}.{{op:cas}}{_HINT}.{{type:b16,b32,b64}}",
)
_KINDS = (
    {"global", "shared", "shared::cta"},
    {"relaxed", "acquire", "release", "acq_rel"},
    {"cta", "cluster", "gpu", "sys"},
)

Operation = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


@instruction(
    *(f"atom{name}" for name in (*_NAMES, *_EXCHANGES)), *(f"red{name}" for name in _NAMES)
)
def atomic(build: Build) -> Execute:
    returns = build.form.base == "atom"
    operation, space, order = _operation(build), build.space, _ordering(build, returns)
    at = 1 if returns else 0
    count = 2 if build.choices["op"] == "cas" else 1
    check_count(build, at + 1 + count)
    writes = destinations(build, 0) if returns else []
    address = build.address(at)
    values = [_values(build, items(build, at + 1 + i)) for i in range(count)]
    size = size_of(build.type)
    total = size * len(values[0])

    def execute(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        memory, offsets = resolve(block, space, address(block)[threads], threads)
        memory.check(offsets, total, "atomic", reads=True)
        _watch(block, memory, offsets, total, threads, order, returns)
        for k in range(len(values[0])):
            given = [value[k](block)[threads] for value in values]
            where = offsets + k * size if k else offsets
            old = _apply(memory, where, size, given, operation)
            if returns:
                writes[k](block, spread(block, old, mask), mask)
        block.progress += 1

    return execute


def _ordering(build: Build, returns: bool) -> Ordering:
    chosen = {build.choices[f"where{i}"] for i in range(3)} - {None}
    several = [kind for kind in _KINDS if len(chosen & kind) > 1]
    if several or len(chosen) != sum(build.has(f"where{i}") for i in range(3)):
        raise build.error("modifiers of one kind")
    if not returns and chosen & {"acquire", "acq_rel"}:
        raise build.error("red acquires nothing")
    if build.has("vector") and chosen & {"shared", "shared::cta"}:
        raise build.error("vectors are for global memory")
    return ordering(build, default_scope="gpu")


def _values(build: Build, operands: tuple) -> list[Read]:
    return [build.read(item, build.type) for item in operands]


def _watch(
    block: Block,
    memory: Memory,
    offsets: np.ndarray,
    size: int,
    threads: Threads,
    order: Ordering,
    returns: bool,
) -> None:
    if memory is block.shared:
        if block.races:
            block.races.atomic(offsets, size, block.warp[threads], order, reads=returns)
    elif memory is block.launch.memory:
        if block.launch.races:
            block.launch.races.atomic(block, offsets, size, order, reads=returns)
    else:
        raise PtxError("unsupported", f"an atomic on {memory.name} memory")


def _apply(
    memory: Memory,
    offsets: np.ndarray,
    size: int,
    given: list[np.ndarray],
    operation: Operation,
) -> np.ndarray:
    """Do the operation for each thread, and return the bits that it found."""
    old = np.empty(len(offsets), UNSIGNED[size])
    for turn in _turns(offsets):
        where = offsets[turn]
        found = memory.load(where, size)
        old[turn] = found
        new = operation(found, [value[turn] for value in given])
        memory.store(where, size, np.ascontiguousarray(new).view(UNSIGNED[size]))
    return old


def _turns(offsets: np.ndarray) -> list[np.ndarray | slice]:
    """Threads whose offsets differ, in groups: those that come first to theirs, second, ..."""
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    new = np.empty(len(offsets), bool)
    new[0], new[1:] = True, ordered[1:] != ordered[:-1]
    if new.all():
        return [slice(None)]
    index = np.arange(len(offsets))
    rank = index - np.maximum.accumulate(np.where(new, index, 0))
    return [order[rank == k] for k in range(int(rank.max()) + 1)]


def _operation(build: Build) -> Operation:
    """From the bits found and the operands to the new value."""
    op, type_name = build.choices["op"], build.type
    dtype = TYPES[type_name]
    if type_name in _HALVES.split(","):

        def add_halves(found: np.ndarray, given: list[np.ndarray]) -> np.ndarray:
            with np.errstate(all="ignore"):
                total = halves_to_float(found, type_name) + halves_to_float(given[0], type_name)
            return float_to_halves(total, type_name)

        return add_halves
    if op == "add" and type_name == "f32":
        # Global memory's unit flushes subnormal values, shared memory's does not.
        flushes = build.space != "shared"
        return lambda found, given: _add_floats(found.view(np.float32), given[0], flushes)
    if op == "add" and type_name == "f64":
        return lambda found, given: _add_floats(found.view(np.float64), given[0], False)
    function = _INTEGER_OPERATIONS[op]
    return lambda found, given: function(found.view(dtype), *given)


def _add_floats(x: np.ndarray, y: np.ndarray, flushes: bool) -> np.ndarray:
    with np.errstate(all="ignore"):
        if flushes:
            return canonical(flush(flush(x) + flush(y)))
        return canonical(x + y)


_INTEGER_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda x, limit: np.where(x >= limit, 0, x + 1).astype(x.dtype),
    "dec": lambda x, limit: np.where((x == 0) | (x > limit), limit, x - 1).astype(x.dtype),
    "exch": lambda x, new: new,
    "cas": lambda x, expected, new: np.where(x == expected, new, x),
}
