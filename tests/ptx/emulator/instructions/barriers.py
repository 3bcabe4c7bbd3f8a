"""bar and barrier: the sixteen named barriers of a block.

A warp has arrived when all its threads have that are still alive, as the hardware counts warps. An
.aligned barrier (bar is one) must be the same instruction for all of them; those that are still on
another path may come later.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.emulator.block import RELEASES, WARP, Block, Execute, Mask
from tests.ptx.emulator.build import Build, Write
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.program import Immediate

_BARRIERS = 16
_sites = itertools.count(1)


@dataclass(frozen=True)
class _Site:
    """A barrier instruction."""

    number: int  # its own
    text: str
    waits: bool
    aligned: bool
    reduction: str = ""  # "popc", "and" or "or"
    write: Write | None = None  # of the reduction's result


@dataclass
class _Phase:
    """A barrier from its first arrival until it is complete. Arrays have one item per thread."""

    number: int
    count: int
    alone: bool  # every participant has named the count: threads that have ended do not count
    reduction: str
    arrived: np.ndarray
    waiting: np.ndarray
    votes: np.ndarray
    site: np.ndarray  # where a thread has arrived or must arrive, 0 for none
    results: list[tuple[Write, np.ndarray]] = field(default_factory=list)

    def error(self, message: str) -> PtxError:
        return PtxError("barrier", f"barrier {self.number}: {message}")


@instruction(
    "bar[.cta].{kind:sync,arrive}",
    "bar[.cta].red.{reduction:popc}.u32",
    "bar[.cta].red.{reduction:and,or}.pred",
    "barrier[.cta].{kind:sync,arrive}[.{aligned:aligned}]",
    "barrier[.cta].red.{reduction:popc}[.{aligned:aligned}].u32",
    "barrier[.cta].red.{reduction:and,or}[.{aligned:aligned}].pred",
)
def bar(build: Build) -> Execute:
    reduction = build.choices.get("reduction") or ""
    arrives = build.choices.get("kind") == "arrive"
    first = 1 if reduction else 0
    rest = len(build.operands) - first - bool(reduction)
    if not (rest == 2 or (rest == 1 and not arrives)):
        raise build.error(f"{len(build.operands)} operands")
    aligned = build.form.base == "bar" or build.has("aligned")
    write = build.write(0) if reduction else None
    text = f"{build.instruction.text} (line {build.instruction.line})"
    site = _Site(next(_sites), text, not arrives, aligned, reduction, write)
    number = build.read(first, "u32")
    count = build.read(first + 1, "u32") if rest == 2 else None
    vote = build.read(-1, "pred") if reduction else None
    whole = isinstance(build.operand(first), Immediate) and 0 <= build.immediate(first) < _BARRIERS
    whole = whole and rest == 1 and not reduction

    def execute(block: Block, mask: Mask) -> object:
        if whole and mask is None and not block.state.get("barriers"):
            if block.races:
                block.races.clocks.join(np.arange(block.warps))
            return None
        active = slice(None) if mask is None else mask
        numbers = number(block)[active]
        votes = vote(block) if vote else None
        for one in np.unique(numbers).tolist():
            here = block.active(mask) & (number(block) == one)
            counts = np.unique(count(block)[here]).tolist() if count else [None]
            if len(counts) > 1:
                raise PtxError("barrier", f"barrier {one}: threads name counts {counts}")
            _arrive(block, int(one), counts[0], here, site, votes)
        if not site.waits:
            # These threads may come to the barrier again before they stop.
            release(block)
            return None
        return block.wait_at(numbers.astype(np.int64), mask)

    return execute


def _arrive(
    block: Block,
    number: int,
    count: int | None,
    threads: np.ndarray,
    site: _Site,
    votes: np.ndarray | None,
) -> None:
    phases: dict[int, _Phase] = block.state.setdefault("barriers", {})
    phase = _phase(block, phases, number, count, site)
    if (phase.arrived & threads).any():
        raise phase.error("threads arrive twice before it is complete")
    if site.aligned:
        _check_aligned(block, phase, threads, site)
    phase.arrived |= threads
    if site.waits:
        phase.waiting |= threads
    elif block.races:
        block.races.clocks.release(("barrier", number), np.unique(block.warp[threads]))
    if site.write and votes is not None:
        phase.votes[threads] = votes[threads]
        phase.results.append((site.write, threads))


def _phase(
    block: Block, phases: dict[int, _Phase], number: int, count: int | None, site: _Site
) -> _Phase:
    """The barrier's phase, which all participants must see in the same way."""
    everyone = block.warps * WARP
    wanted = everyone if count is None else count
    phase = phases.get(number)
    if phase is None:
        if not 0 <= number < _BARRIERS:
            raise PtxError("barrier", f"barrier {number}: there are {_BARRIERS}")
        if wanted % WARP or not 0 < wanted <= everyone:
            raise PtxError("barrier", f"barrier {number}: {count} threads of {block.threads}")
        fresh = (np.zeros(block.threads, bool) for _ in range(3))
        where = np.zeros(block.threads, np.int64)
        phase = _Phase(number, wanted, count is not None, site.reduction, *fresh, where)
        phases[number] = phase
    if wanted != phase.count:
        raise phase.error(f"one participant counts {phase.count} threads, another {wanted}")
    if site.reduction != phase.reduction:
        raise phase.error("reductions mix with other kinds")
    phase.alone &= count is not None
    return phase


def _check_aligned(block: Block, phase: _Phase, threads: np.ndarray, site: _Site) -> None:
    """All live threads of a warp have to come to the same instruction."""
    touched = np.zeros(block.warps, bool)
    touched[block.warp[threads]] = True
    members = block.alive & touched[block.warp]
    elsewhere = members & (phase.site != 0) & (phase.site != site.number)
    if elsewhere.any():
        raise phase.error(f"divergent, a part of a warp is at {site.text}, a part at another one")
    phase.site[members] = site.number


def release(block: Block) -> bool:
    """Complete the barriers where everyone has arrived; return whether there was one."""
    phases: dict[int, _Phase] | None = block.state.get("barriers")
    if not phases:
        return False
    complete = [phase for phase in phases.values() if _is_complete(block, phase)]
    for phase in complete:
        del phases[phase.number]
        _finish(block, phase)
    return bool(complete)


def _is_complete(block: Block, phase: _Phase) -> bool:
    missing = block.alive & ~phase.arrived
    lost = ~block.alive & ~phase.arrived & (phase.site != 0)
    if lost.any():
        raise phase.error(f"divergent, {int(lost.sum())} threads have ended instead of arriving")
    if not phase.alone:
        return not missing.any()
    touched, lacking = np.zeros(block.warps, bool), np.zeros(block.warps, bool)
    touched[block.warp[phase.arrived]] = True
    lacking[block.warp[missing]] = True
    if int(touched.sum()) * WARP > phase.count:
        raise phase.error(f"more than {phase.count} threads arrive")
    return int((touched & ~lacking).sum()) * WARP == phase.count


def _finish(block: Block, phase: _Phase) -> None:
    block.waits_at[phase.waiting] = -1
    block.progress += 1
    votes = phase.votes[phase.arrived]
    for write, threads in phase.results:
        result = {
            "popc": np.uint32(np.count_nonzero(votes)),
            "and": votes.all(),
            "or": votes.any(),
        }[phase.reduction]
        write(block, np.full(block.threads, result), threads)
    if block.races:
        clocks, place = block.races.clocks, ("barrier", phase.number)
        warps = np.unique(block.warp[phase.waiting])
        if warps.size:
            clocks.acquire(place, warps)
            clocks.join(warps)
        clocks.forget(place)


RELEASES.append(release)
