"""barrier.cluster, for clusters of one block: a barrier of all its threads, in two halves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.emulator.block import RELEASES, STOP, Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.fences import warps_of

_NUMBER = 16  # after the named barriers of a block
_PLACE = "cluster"


@dataclass
class _Cluster:
    """Arrays have one item per thread."""

    arrived: np.ndarray  # in this phase
    passed: np.ndarray  # in the phase before, whose end the thread has not waited for yet
    waiting: np.ndarray


def _cluster(block: Block) -> _Cluster:
    if "cluster" not in block.state:
        block.state["cluster"] = _Cluster(*(np.zeros(block.threads, bool) for _ in range(3)))
    return block.state["cluster"]


def _check_size(build: Build) -> None:
    if build.entry.cluster != 1:
        raise build.error(f"a cluster of {build.entry.cluster} blocks")
    if build.operands:
        raise build.error("operands")


@instruction("barrier.cluster.arrive[.{order:release,relaxed}][.aligned]")
def arrive(build: Build) -> Execute:
    _check_size(build)
    releases = build.choices["order"] != "relaxed"

    def execute(block: Block, mask: Mask) -> None:
        cluster, threads = _cluster(block), block.active(mask)
        if ((cluster.arrived | cluster.passed) & threads).any():
            raise PtxError("barrier", "barrier.cluster.arrive twice without a wait")
        cluster.arrived |= threads
        if releases and block.races:
            block.races.clocks.release(_PLACE, warps_of(block, mask))
        release(block)

    return execute


@instruction("barrier.cluster.wait[.acquire][.aligned]")
def wait(build: Build) -> Execute:
    _check_size(build)

    def execute(block: Block, mask: Mask) -> object:
        cluster, threads = _cluster(block), block.active(mask)
        if (threads & ~cluster.arrived & ~cluster.passed).any():
            raise PtxError("barrier", "barrier.cluster.wait without an arrive")
        _pass(block, cluster, threads & cluster.passed)
        rest = threads & cluster.arrived
        if not rest.any():
            return None
        cluster.waiting |= rest
        block.waits_at[rest] = _NUMBER
        return STOP

    return execute


def _pass(block: Block, cluster: _Cluster, threads: np.ndarray) -> None:
    cluster.passed &= ~threads
    if block.races and threads.any():
        block.races.clocks.acquire(_PLACE, np.unique(block.warp[threads]))


def release(block: Block) -> bool:
    """End the phase if every thread that is alive has arrived."""
    cluster: _Cluster | None = block.state.get("cluster")
    if cluster is None or not cluster.arrived.any() or (block.alive & ~cluster.arrived).any():
        return False
    cluster.passed |= cluster.arrived
    cluster.arrived[:] = False
    block.waits_at[cluster.waiting] = -1
    block.progress += 1
    _pass(block, cluster, cluster.waiting)
    cluster.waiting = np.zeros(block.threads, bool)
    return True


RELEASES.append(release)
