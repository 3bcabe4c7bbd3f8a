"""One thread block, run as one vector.

A register is an array over all threads of the block. The threads with the lowest program counter
run together until they branch apart, wait, or reach the others (min-PC reconvergence), so that an
instruction costs the same for one warp and for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.memory import LocalMemory, SharedMemory
from tests.ptx.emulator.shared_races import SharedRaces
from tests.ptx.emulator.types import TYPES, UNSIGNED

if TYPE_CHECKING:
    from tests.ptx.emulator.grid import Launch

Mask = np.ndarray | None
Execute = Callable[["Block", Mask], object]
WARP = 32
WARPGROUP = 128
_PATIENCE = 64  # turns of the threads of lowest program counter before others have one

# What an instruction's function returns instead of None (go on to the next instruction).
STOP = object()  # the threads have ended, or wait; they go on after this instruction


# The modules of instructions add what has to happen when threads have stopped, returning whether a
# wait is over, and at the end of a block.
RELEASES: list[Callable[[Block], bool]] = []
ENDS: list[Callable[[Block], None]] = []


@dataclass(frozen=True)
class Jump:
    """Go to instruction `target`: all threads, or those of a mask while the others go on.

    These may go to a target each, in the order of the threads.
    """

    target: int | np.ndarray
    taken: np.ndarray | None = None


@dataclass
class Block:
    """The state of a thread block. Arrays have one element per thread, unless said otherwise."""

    launch: Launch
    index: tuple[int, int, int]
    registers: dict[str, np.ndarray] = field(init=False)
    # Registers of wgmma, with a bit per warpgroup: in use until its wait; written since its fence.
    in_flight: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    pending: list[Callable[[], None]] = field(default_factory=list)  # asynchronous deliveries
    state: dict[str, Any] = field(default_factory=dict)  # of instructions, by their modules
    steps: int = 0
    progress: int = 1  # counts what spinning threads may be waiting for

    def __post_init__(self) -> None:
        launch, T = self.launch, self.launch.threads
        self.threads = T
        self.shared = SharedMemory(launch.shared_bytes)
        self.local = LocalMemory(T, launch.entry.local_bytes)
        self.registers = {
            name: np.zeros(T, np.bool_ if type_name == "pred" else _unsigned(type_name))
            for name, type_name in launch.entry.registers.items()
        }
        self.thread = np.arange(T)
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        self.warps = -(-T // WARP)
        self.pc = np.zeros(T, np.int64)
        self.alive = np.ones(T, bool)
        self.waits_at = np.full(T, -1)  # the barrier, -1 for none
        self.spun_at = np.zeros(T, np.int64)  # the progress that a failed wait saw last
        self.races = SharedRaces(self) if launch.checks else None
        self.running: Mask = None  # the threads of the instruction that is being executed
        self._masked: tuple[Mask, int] = (None, 0)
        self._turns = 0
        self._specials: dict[str, np.ndarray] = {}

    # ---- what instructions use

    def active(self, mask: Mask) -> np.ndarray:
        """The mask as an array."""
        return np.ones(self.threads, bool) if mask is None else mask

    def register(self, name: str) -> np.ndarray:
        """The bits of a register that no asynchronous instruction is writing."""
        if self.in_flight and name in self.in_flight:
            self._refuse_in_flight(name, self.running)
        return self.registers[name]

    def note_write(self, name: str, mask: Mask) -> None:
        """Called before an instruction other than wgmma writes a register that wgmma uses."""
        if name in self.in_flight:
            self._refuse_in_flight(name, mask)
        self.written[name] = self.written.get(name, 0) | self.warpgroups(mask)

    def warpgroups(self, mask: Mask) -> int:
        """The warpgroups that have threads in a mask, as bits."""
        if mask is None:
            return (1 << -(-self.threads // WARPGROUP)) - 1
        if self._masked[0] is not mask:
            found = np.unique(self.thread[mask] // WARPGROUP)
            self._masked = mask, sum(1 << int(group) for group in found)
        return self._masked[1]

    def _refuse_in_flight(self, name: str, mask: Mask) -> None:
        if self.in_flight[name] & self.warpgroups(mask):
            raise PtxError("in flight", f"{name} is used before the wgmma.wait_group it needs")

    def constant(self, value: np.ndarray) -> np.ndarray:
        """A value repeated for every thread; not to be written to."""
        cached = self.launch.constants.get(id(value))
        if cached is None:
            cached = np.full(self.threads, value)
            # Keeping `value` keeps its id from being used again.
            self.launch.constants[id(value)] = cached
            self.launch.kept.append(value)
        return cached

    def special(self, name: str) -> np.ndarray:
        """A special register as int64 per thread."""
        if name in ("%clock", "%clock64", "%globaltimer"):
            return np.full(self.threads, self.steps)
        if name not in self._specials:
            self._specials[name] = self._special(name)
        return self._specials[name]

    def _special(self, name: str) -> np.ndarray:
        base, _, axis = name.partition(".")
        dimension = {"x": 0, "y": 1, "z": 2, "": 0}.get(axis)
        dims, launch = self.launch.block_dims, self.launch
        if dimension is None:
            raise PtxError("unsupported", f"special register {name}")
        one = 1 << self.lane.astype(np.int64)
        threads = np.unravel_index(self.thread, dims[::-1])[::-1]
        whole = {
            "%tid": threads[dimension],
            "%ntid": dims[dimension],
            "%ctaid": self.index[dimension],
            "%nctaid": launch.grid[dimension],
            "%laneid": self.lane,
            "%warpid": self.warp,
            "%nwarpid": self.warps,
            "%lanemask_eq": one,
            "%lanemask_lt": one - 1,
            "%lanemask_le": 2 * one - 1,
            "%lanemask_gt": 0xFFFFFFFF & ~(2 * one - 1),
            "%lanemask_ge": 0xFFFFFFFF & ~(one - 1),
            "%smid": 0,
            "%cluster_ctarank": 0,
            "%cluster_nctarank": 1,
            "%cluster_ctaid": 0,
            "%cluster_nctaid": 1,
            "%clusterid": self.index[dimension],
            "%nclusterid": launch.grid[dimension],
            "%is_explicit_cluster": 0,
            "%dynamic_smem_size": launch.dynamic_shared,
            "%total_smem_size": launch.shared_bytes,
        }.get(base)
        if whole is None:
            raise PtxError("unsupported", f"special register {name}")
        return np.broadcast_to(np.asarray(whole, np.int64), (self.threads,))

    def spin(self, mask: np.ndarray) -> None:
        """Let threads whose wait has failed rest until something has made progress."""
        self.spun_at[mask] = self.progress

    def wait_at(self, barrier: int, mask: Mask) -> object:
        """Let threads rest until something sets their `waits_at` to -1."""
        self.waits_at[slice(None) if mask is None else mask] = barrier
        return STOP

    def end(self, mask: Mask) -> object:
        """The threads are done."""
        self.alive[slice(None) if mask is None else mask] = False
        self.progress += 1
        return STOP

    # ---- running

    def run(self, budget: int) -> bool:
        """Run at most about `budget` instructions; return whether any was run.

        False means that nothing can go on before another block does something.
        """
        start = self.steps
        while self.alive.any() and self.steps - start < budget:
            ready = self.alive & (self.waits_at < 0) & (self.spun_at != self.progress)
            if ready.any():
                self._run_group(self._fair(ready))
                self.launch.after_group(self)
            elif self.launch.release(self):
                self.progress += 1
            elif self.pending:
                self.pending.pop(self.launch.choose(len(self.pending)))()
                self.progress += 1
            else:
                break
        return self.steps > start

    def _fair(self, ready: np.ndarray) -> np.ndarray:
        """Leave out, now and then, the warps that are behind.

        They may be spinning until one that is ahead has done something. Warps stay whole: those
        parts of one that are ahead wait for the others.
        """
        self._turns += 1
        if self._turns % _PATIENCE:
            return ready
        behind = np.zeros(self.warps, bool)
        behind[self.warp[ready & (self.pc == self.pc[ready].min())]] = True
        ahead = ready & ~behind[self.warp]
        return ahead if ahead.any() else ready

    def _run_group(self, ready: np.ndarray) -> None:
        """Run the threads of lowest program counter until they part, wait or meet others."""
        counters = self.pc[ready]
        pc = int(counters.min())
        group = ready & (self.pc == pc)
        others = counters[counters != pc]
        limit = int(others.min()) if others.size else len(self.launch.code) + 1
        mask = None if group.all() else group
        self.running = mask
        code = self.launch.code
        while True:
            if pc >= len(code):
                self.alive[group] = False
                return
            self.steps += 1
            try:
                result = code[pc](self, mask)
            except PtxError as error:
                raise self._located(error, pc) from None
            before = pc
            if result is None:
                pc += 1
            elif isinstance(result, Jump):
                if result.taken is not None:
                    self.pc[group] = pc + 1
                    self.pc[result.taken] = result.target
                    return
                pc = int(result.target)
            else:
                self.pc[group] = pc + 1
                return
            # After a jump the others may be behind, and a loop must not starve them.
            if pc >= limit or pc <= before or (result is not None and others.size):
                self.pc[group] = pc
                return

    def _located(self, error: PtxError, pc: int) -> PtxError:
        instruction = self.launch.entry.instructions[pc]
        return error.located(instruction.text, instruction.line, f", block {self.index}")

    def where(self) -> str:
        """Where the threads stand, for a report of a deadlock."""
        lines = []
        for pc in np.unique(self.pc[self.alive]):
            count = int((self.alive & (self.pc == pc)).sum())
            # A waiting thread has gone past the instruction that it waits at.
            waiting = (self.waits_at >= 0) & self.alive & (self.pc == pc)
            at = self.launch.entry.instructions[max(int(pc) - int(waiting.any()), 0)]
            lines.append(f"{count} threads of block {self.index} at line {at.line}: {at.text}")
        return "\n  ".join(lines)


def _unsigned(type_name: str) -> type[np.generic]:
    return UNSIGNED[np.dtype(TYPES[type_name]).itemsize]
