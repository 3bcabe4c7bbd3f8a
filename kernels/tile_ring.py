"""A ring of tiles in shared memory, which one warpgroup fills by TMA and others read (sm_90).

Tiles are numbered as they are copied, and tile `n` lies in slot n modulo their number. Each slot
has two barriers: `full` when the copy has arrived, `empty` when all readers have handed the slot
back. Their parity changes with each turn of the ring.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def copy(descriptor, corner, ring, full, empty, n):
    """Start to copy the box at `corner` as tile `n`, when its slot is free."""
    SLOTS: gl.constexpr = ring.shape[0]
    slot = n % SLOTS
    mbarrier.wait(empty.index(slot), (n // SLOTS & 1) ^ 1)
    mbarrier.expect(full.index(slot), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, corner, full.index(slot), ring.index(slot))


@gluon.jit
def wait(full, n):
    """Wait until tile `n` has arrived."""
    SLOTS: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(n % SLOTS), n // SLOTS & 1)


@gluon.jit
def release(empty, n):
    """Hand the slot of tile `n` back; before that, the compiler has the warps of a group meet."""
    mbarrier.arrive(empty.index(n % empty.shape[0]), count=1)


@gluon.jit
def tile(ring, n):
    """Tile `n`, whose last two dimensions are all there is, as a matrix."""
    return ring.index(n % ring.shape[0]).reshape([ring.shape[3], ring.shape[4]])
