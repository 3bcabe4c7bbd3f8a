"""Instructions by which the lanes of a warp exchange values and wait for each other.

A lane that is alone at such an instruction rests until all that its member mask names, and that
have not exited, are there with it. A warp whose lanes wait for each other at different places is
an error, as is reading a lane that does not take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.emulator.block import RELEASES, WARP, Block, Execute, Jump, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.elementwise import expect_operands, require_type
from tests.ptx.emulator.program import Immediate

ALL = np.uint32(0xFFFFFFFF)
_STATE = "warp"

# Runs the instruction for the threads of a mask. The last argument has, per thread, the lanes that
# take part, or is None if all 32 do in every warp that executes it.
Exchange = Callable[[Block, Mask, "np.ndarray | None"], None]


@dataclass
class Resting:
    """Threads that wait for lanes of their warp: the lanes they name, by instruction."""

    named: dict[int, np.ndarray] = field(default_factory=dict)
    stuck_at: tuple[int, int] | None = None  # steps and progress when nothing could go on


# ---- lanes


def by_warp(block: Block, values: np.ndarray) -> np.ndarray:
    """Values (T,) as (warps, 32), with zeros for threads that the last warp does not have."""
    missing = block.warps * WARP - block.threads
    if missing:
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    return values.reshape(-1, WARP)


def by_thread(block: Block, values: np.ndarray) -> np.ndarray:
    """The inverse."""
    return values.reshape(-1)[: block.threads]


def ballot(block: Block, flags: np.ndarray) -> np.ndarray:
    """The flags of each thread's warp as bits, (T,) uint32."""
    packed = np.packbits(by_warp(block, flags), axis=1, bitorder="little")
    return packed.view(np.uint32).repeat(WARP)[: block.threads]


def _own_bit(block: Block) -> np.ndarray:
    return np.uint32(1) << block.lane.astype(np.uint32)


def _named_lanes(block: Block, there: np.ndarray | None) -> np.ndarray:
    """Whether lane j takes part with lane i, (warps, 32, 32)."""
    lanes = by_warp(block, np.full(block.threads, ALL) if there is None else there)
    return (lanes[:, :, None] >> np.arange(WARP, dtype=np.uint32) & 1).astype(bool)


# ---- waiting


def together(build: Build, member_index: int, exchange: Exchange) -> Execute:
    """Run the exchange as soon as all the lanes of a member mask are at the instruction."""
    expect_operands(build, member_index + 1)
    require_type(build, build.operand(member_index), "b32")
    members = build.read(member_index, "b32")
    instructions = build.entry.instructions
    here = next(i for i, other in enumerate(instructions) if other is build.instruction)

    def execute(block: Block, mask: Mask) -> Jump | None:
        named = members(block)
        if mask is None and block.threads % WARP == 0 and (named == ALL).all():
            exchange(block, None, None)
            return None
        active = block.active(mask)
        lanes = ballot(block, active)
        if ((lanes & named == ALL) | ~active).all():
            exchange(block, mask, None)
            return None
        _check_members(block, active, lanes, named)
        missing = named & ballot(block, block.alive) & ~lanes
        waiting = active & (missing != 0)
        if not waiting.any():
            exchange(block, mask, named & lanes)
            return None
        if (active & ~waiting).any():
            exchange(block, active & ~waiting, named & lanes)
        _rest(block, here, waiting, missing, named)
        return Jump(here, waiting)

    return execute


def _check_members(block: Block, active: np.ndarray, lanes: np.ndarray, named: np.ndarray) -> None:
    """`lanes` are those that execute in each thread's warp."""
    stranger = active & (named & _own_bit(block) == 0)
    if stranger.any():
        first = int(np.flatnonzero(stranger)[0])
        raise PtxError(
            "warp", f"thread {first} is not in its own member mask {int(named[first]):#x}"
        )
    masks = named[active]
    if (masks == masks[0]).all():
        return
    masks = by_warp(block, named)
    executing = by_warp(block, active)
    both = _named_lanes(block, named & lanes) & executing[:, :, None]
    differ = (both & (masks[:, :, None] != masks[:, None, :])).any(axis=(1, 2))
    if differ.any():
        raise PtxError(
            "warp", f"lanes of warp {int(np.argmax(differ))} name each other in different masks"
        )


def _rest(
    block: Block, here: int, waiting: np.ndarray, missing: np.ndarray, named: np.ndarray
) -> None:
    """Let threads wait at instruction `here`, unless those missing rest there already."""
    resting = block.alive & (block.pc == here) & (block.spun_at == block.progress)
    missing = missing & ~ballot(block, resting)
    if (missing[waiting] == 0).any():
        block.progress += 1  # wakes them, and all run it together
        return
    state = block.state.setdefault(_STATE, Resting())
    names = state.named.setdefault(here, np.zeros(block.threads, np.uint32))
    names[waiting] = named[waiting]
    block.spin(waiting)


def _release(block: Block) -> bool:
    """Raise where lanes wait for lanes that will not come; never releases any."""
    state = block.state.get(_STATE)
    if state is None or block.pending:
        return False
    idle = block.alive & (block.spun_at == block.progress)
    if (block.alive & (block.waits_at < 0) & ~idle).any():
        return False
    now = (block.steps, block.progress)
    if state.stuck_at == now:  # the other modules had their turn to release threads
        _report(block, state, idle & (block.waits_at < 0))
    state.stuck_at = now
    return False


def _report(block: Block, state: Resting, idle: np.ndarray) -> None:
    at_exchange = idle & np.isin(block.pc, list(state.named))
    for here, named in state.named.items():
        rest = at_exchange & (block.pc == here)
        missing = named & ballot(block, block.alive & ~rest)
        # A lane that spins elsewhere may be waiting for another block.
        spinning = ballot(block, idle & ~at_exchange)
        hopeless = rest & (missing != 0) & (missing & spinning == 0)
        if hopeless.any():
            first = int(np.flatnonzero(hopeless)[0])
            error = PtxError(
                "warp",
                f"lanes {int(missing[first]):#x} of warp {int(block.warp[first])} do not come to"
                f" an instruction whose member mask {int(named[first]):#x} names them",
            )
            at = block.launch.entry.instructions[here]
            raise error.located(at.text, at.line, f", block {block.index}")


RELEASES.append(_release)


# ---- exchanges


@instruction("shfl.sync.{mode:up,down,bfly,idx}.{type:b32}")
def shfl(build: Build) -> Execute:
    expect_operands(build, 5)
    require_type(build, build.operand(1), "b32")
    values = build.read(1, "b32")
    distance, clamp = build.read(2, "u32"), build.read(3, "u32")
    write, write_inside = build.write_pair(0)
    mode = build.choices["mode"]
    fixed = isinstance(build.operand(2), Immediate) and isinstance(build.operand(3), Immediate)
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the block's size

    def sources(block: Block) -> tuple[np.ndarray, np.ndarray]:
        if fixed and block.threads in known:
            return known[block.threads]
        found = _source(mode, block.lane, distance(block), clamp(block))
        if fixed:
            known[block.threads] = found
        return found

    def exchange(block: Block, mask: Mask, there: np.ndarray | None) -> None:
        lane, inside = sources(block)
        source = block.warp * WARP + lane
        if there is not None:
            absent = block.active(mask) & (there >> lane.astype(np.uint32) & 1 == 0)
            if absent.any():
                first = int(np.flatnonzero(absent)[0])
                raise PtxError(
                    "warp",
                    f"thread {first} reads lane {int(lane[first])}, which does not take part",
                )
            source = np.minimum(source, block.threads - 1)  # of threads that do not execute
        write(block, values(block)[source], mask)
        write_inside(block, inside, mask)

    return together(build, 4, exchange)


def _source(
    mode: str | None, lane: np.ndarray, distance: np.ndarray, clamp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads, and whether that is in its segment; if not, it is itself."""
    distance, limit = distance.astype(np.int64) & 31, clamp.astype(np.int64) & 31
    segment = clamp.astype(np.int64) >> 8 & 31
    first = lane & segment
    last = first | (limit & ~segment)
    if mode == "up":
        source = lane - distance
        inside = source >= last
    else:
        source = {
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | (distance & ~segment),
        }[mode]
        inside = source <= last
    return np.where(inside, source, lane), inside


@instruction("vote.sync.{mode:all,any,uni}.{type:pred}", "vote.sync.{mode:ballot}.{type:b32}")
def vote(build: Build) -> Execute:
    predicate, write, mode = build.read(1, "pred"), build.write(0), build.choices["mode"]
    require_type(build, build.operand(0), build.type)

    def exchange(block: Block, mask: Mask, there: np.ndarray | None) -> None:
        everyone = ALL if there is None else there
        true = ballot(block, predicate(block)) & everyone
        if mode == "ballot":
            result = true
        elif mode == "any":
            result = true != 0
        elif mode == "all":
            result = true == everyone
        else:
            result = (true == everyone) | (true == 0)
        write(block, result, mask)

    return together(build, 2, exchange)


@instruction("match.{mode:any,all}.sync.{type:b32,b64}")
def match(build: Build) -> Execute:
    require_type(build, build.operand(1), build.type)
    values, everywhere = build.read(1), build.choices["mode"] == "all"
    write, write_equal = build.write_pair(0)

    def exchange(block: Block, mask: Mask, there: np.ndarray | None) -> None:
        named, found = _named_lanes(block, there), by_warp(block, values(block))
        same = (found[:, :, None] == found[:, None, :]) & named
        if everywhere:
            equal = by_thread(block, (same == named).all(axis=2))
            lanes = ALL if there is None else there
            write(block, np.where(equal, lanes, np.uint32(0)), mask)
            write_equal(block, equal, mask)
            return
        lanes = np.packbits(same, axis=2, bitorder="little").view(np.uint32)
        write(block, by_thread(block, lanes), mask)

    return together(build, 2, exchange)


@instruction(
    "redux.sync.{mode:add,min,max}.{type:u32,s32}", "redux.sync.{mode:and,or,xor}.{type:b32}"
)
def redux(build: Build) -> Execute:
    require_type(build, build.operand(1), build.type)
    values, write = build.read(1), build.write(0)
    bounds = np.iinfo(np.int32 if build.type == "s32" else np.uint32)
    reduction, neutral = {
        "add": (np.add, 0),
        "min": (np.minimum, bounds.max),
        "max": (np.maximum, bounds.min),
        "and": (np.bitwise_and, bounds.max),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[build.choices["mode"] or ""]

    def exchange(block: Block, mask: Mask, there: np.ndarray | None) -> None:
        named, found = _named_lanes(block, there), by_warp(block, values(block))
        taking_part = np.where(named, found[:, None, :], found.dtype.type(neutral))
        result = reduction.reduce(taking_part, axis=2, dtype=found.dtype)
        write(block, by_thread(block, result), mask)

    return together(build, 2, exchange)


@instruction("elect.sync")
def elect(build: Build) -> Execute:
    """The leader is the lowest lane."""
    write, write_leader = build.write_pair(0)

    def exchange(block: Block, mask: Mask, there: np.ndarray | None) -> None:
        lanes = np.full(block.threads, ALL) if there is None else there
        leader = np.bitwise_count((lanes & (~lanes + np.uint32(1))) - np.uint32(1))
        leader = leader.astype(np.uint32)
        write(block, leader, mask)
        write_leader(block, leader == block.lane, mask)

    return together(build, 1, exchange)


@instruction("activemask.{type:b32}")
def activemask(build: Build) -> Execute:
    expect_operands(build, 1)
    write = build.write(0)
    return lambda block, mask: write(block, ballot(block, block.active(mask)), mask)


@instruction("bar.warp.sync")
def bar_warp(build: Build) -> Execute:
    return together(build, 0, lambda block, mask, there: None)
