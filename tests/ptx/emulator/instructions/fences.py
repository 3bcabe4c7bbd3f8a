"""membar and fence: order between threads, and between ordinary stores and TMA or wgmma."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator.block import Block, Execute, Mask
from tests.ptx.emulator.build import Build
from tests.ptx.emulator.forms import instruction, nothing

_BETWEEN_BLOCKS = ("gpu", "gl", "sys")


def warps_of(block: Block, mask: Mask) -> np.ndarray:
    """The warps with an active thread."""
    return np.arange(block.warps) if mask is None else np.unique(block.warp[mask])


@instruction(
    "membar.{scope:cta,gl,sys}",
    "fence[.{sem:sc,acq_rel}].{scope:cta,cluster,gpu,sys}",
)
def fence(build: Build) -> Execute:
    between_blocks = build.choices["scope"] in _BETWEEN_BLOCKS

    def execute(block: Block, mask: Mask) -> None:
        if block.races:
            block.races.fence(warps_of(block, mask))
        if between_blocks and block.launch.races:
            block.launch.races.fence(block)

    return execute


@instruction("fence.proxy.async[.{space:shared::cta,shared::cluster}]")
def fence_proxy_async(build: Build) -> Execute:
    def execute(block: Block, mask: Mask) -> None:
        if block.races:
            block.races.fence_proxy(warps_of(block, mask))

    return execute


# Not looked at: global memory by several proxies or under several addresses, other blocks of a
# cluster (there is one).
instruction("fence.proxy.async.global", "fence.proxy.alias", "fence.mbarrier_init.release.cluster")(
    nothing
)
