"""Launches: memory for the arguments, and thread blocks that take turns."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import tests.ptx.emulator.instructions  # noqa: F401 (registers the handlers)
from tests.ptx.emulator.block import ENDS, RELEASES, Block, Execute
from tests.ptx.emulator.build import GLOBAL_BASE, build
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.global_races import GlobalRaces
from tests.ptx.emulator.memory import GlobalMemory
from tests.ptx.emulator.program import Entry, Parameter, Program
from tests.ptx.emulator.ptx import parse
from tests.ptx.emulator.tensor_map import TensorMap

TURN = 4000  # instructions of a block before it is the next one's turn
RESIDENT = 16  # blocks that are in turn at the same time

Argument = "Buffer | TensorMap | int | float | bytes"


@dataclass(frozen=True)
class Buffer:
    """Global memory of one argument; it counts as its address."""

    address: int
    bytes: int

    def __add__(self, offset: int) -> int:
        return self.address + offset


class Module:
    """PTX with the global memory that its kernels work on."""

    def __init__(self, text: str) -> None:
        self.program = parse(text)
        self.memory = self._new_memory()
        self._code: dict[str, list[Execute]] = {}

    def _new_memory(self) -> GlobalMemory:
        """Memory that holds the variables of the module, always at the same addresses."""
        memory = GlobalMemory()
        for variable in self.program.variables:
            size = len(variable.data)
            address = memory.allocate(
                size, variable.name, written=True, align=max(variable.align, 16)
            )
            start = address - GLOBAL_BASE
            memory.data[start : start + size] = np.frombuffer(variable.data, np.uint8)
            self.program.addresses[variable.name] = address
        return memory

    def fresh(self) -> Module:
        """The same kernels, parsed and built once, with a memory of their own."""
        other = copy.copy(self)
        other.memory = other._new_memory()
        return other

    def upload(self, array: np.ndarray, name: str = "buffer") -> Buffer:
        """Copy an array to global memory."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        buffer = self.allocate(len(data), name, written=True)
        start = buffer.address - GLOBAL_BASE
        self.memory.data[start : start + len(data)] = data
        return buffer

    def allocate(self, bytes: int, name: str = "buffer", *, written: bool = False) -> Buffer:
        """Reserve global memory, which a kernel must write before it reads it."""
        return Buffer(self.memory.allocate(bytes, name, written=written), bytes)

    def download(self, buffer: Buffer) -> np.ndarray:
        """The bytes of a buffer."""
        start = buffer.address - GLOBAL_BASE
        return self.memory.data[start : start + buffer.bytes].copy()

    def code(self, name: str) -> list[Execute]:
        """The kernel's instructions as functions, built at its first use."""
        if name not in self._code:
            entry = self.program.entries[name]
            self._code[name] = [build(self.program, entry, i) for i in entry.instructions]
        return self._code[name]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        threads: int | Sequence[int],
        arguments: Sequence[Argument],
        *,
        dynamic_shared: int = 0,
        seed: int | None = None,
        checks: bool = True,
        steps_limit: int = 50_000_000,
    ) -> int:
        """Run a kernel to its end and return the number of instructions executed.

        `arguments` come in the order of the parameters; missing ones are zero. With a `seed` blocks
        and asynchronous copies come in a random order. Without `checks` no race is looked for.
        A launch that executes more than `steps_limit` instructions counts as a deadlock.
        """
        if name not in self.program.entries:
            known = ", ".join(self.program.entries)
            raise PtxError("launch", f"no kernel {name!r} (known: {known})")
        dims = (threads,) if isinstance(threads, int) else (*threads,)
        launch = Launch(
            self, self.program.entries[name], _three(grid), _three(dims), dynamic_shared, checks
        )
        launch.steps_limit = steps_limit
        launch.random = None if seed is None else np.random.default_rng(seed)
        launch.parameters = _parameter_bytes(launch.entry, arguments)
        return launch.run()


@dataclass
class Launch:
    """One kernel launch, and what its blocks share."""

    module: Module
    entry: Entry
    grid: tuple[int, int, int]
    block_dims: tuple[int, int, int]
    dynamic_shared: int
    checks: bool
    random: np.random.Generator | None = None
    parameters: bytes = b""
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    kept: list[np.ndarray] = field(default_factory=list)
    steps_limit: int = 50_000_000

    def __post_init__(self) -> None:
        self.threads = int(np.prod(self.block_dims))
        self.program: Program = self.module.program
        self.memory = self.module.memory
        self.shared_bytes = self.program.shared_bytes + self.dynamic_shared
        if not 0 < self.threads <= 1024:
            raise PtxError("launch", f"a block has 1 to 1024 threads, got {self.block_dims}")
        if self.entry.threads is not None and self.threads > self.entry.threads:
            raise PtxError(
                "launch", f"{self.threads} threads, the kernel is for {self.entry.threads}"
            )
        self.code = self.module.code(self.entry.name)
        several = int(np.prod(self.grid)) > 1
        self.races = GlobalRaces(self) if self.checks and several else None

    def choose(self, count: int) -> int:
        """Which of `count` things that may happen in any order happens next."""
        return int(self.random.integers(count)) if self.random is not None else 0

    def after_group(self, block: Block) -> None:
        """Called when a group of threads has stopped: barriers may be complete."""
        for release in RELEASES:
            release(block)

    def release(self, block: Block) -> bool:
        """Let waiting threads go where their wait is over; return whether any went."""
        went = [release(block) for release in RELEASES]
        return any(went)

    @np.errstate(all="ignore")  # a GPU has no floating-point exceptions
    def run(self) -> int:
        indices = [
            (x, y, z)
            for z in range(self.grid[2])
            for y in range(self.grid[1])
            for x in range(self.grid[0])
        ]
        if self.random is not None:
            self.random.shuffle(indices)
            indices = [tuple(map(int, index)) for index in indices]
        waiting = indices[::-1]
        resident: list[Block] = []
        room, steps = RESIDENT, 0
        while waiting or resident:
            while waiting and len(resident) < room:
                resident.append(Block(self, waiting.pop()))
            before = sum(block.steps for block in resident)
            moved = [block.run(TURN) for block in resident]
            steps += sum(block.steps for block in resident) - before
            done = [block for block in resident if not block.alive.any()]
            for block in done:
                for finish in ENDS:
                    finish(block)
            resident = [block for block in resident if block.alive.any()]
            # These may be waiting for a later block, as they must not: a GPU may have no room.
            room = RESIDENT if done else room + 1
            if not (any(moved) or done or waiting):
                raise PtxError("deadlock", f"no thread can go on:\n  {self._where(resident)}")
            if steps > self.steps_limit:
                where = self._where(resident)
                raise PtxError("deadlock", f"{steps} instructions and no end:\n  {where}")
        return steps

    @staticmethod
    def _where(blocks: Sequence[Block]) -> str:
        return "\n  ".join(block.where() for block in blocks)


def _three(dims: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*dims, 1, 1)[:3]
    return int(x), int(y), int(z)


def _parameter_bytes(entry: Entry, arguments: Sequence[Argument]) -> bytes:
    if len(arguments) > len(entry.parameters):
        raise PtxError(
            "launch",
            f"{entry.name} has {len(entry.parameters)} parameters, got {len(arguments)} arguments",
        )
    data = bytearray(entry.parameter_bytes)
    for parameter, argument in zip(entry.parameters, arguments, strict=False):
        raw = argument_bytes(parameter, argument)
        data[parameter.offset : parameter.offset + parameter.bytes] = raw
    return bytes(data)


def argument_bytes(parameter: Parameter, argument: Argument) -> bytes:
    """An argument as the bytes of its parameter."""
    if isinstance(argument, TensorMap):
        raw = argument.encode()
    elif isinstance(argument, Buffer):
        raw = struct.pack("<Q", argument.address)
    elif isinstance(argument, bytes):
        raw = argument
    elif isinstance(argument, float) or parameter.type_name in ("f32", "f64"):
        raw = struct.pack("<d" if parameter.bytes == 8 else "<f", argument)
    else:
        mask = (1 << 8 * parameter.bytes) - 1
        raw = (int(argument) & mask).to_bytes(parameter.bytes, "little")
    if len(raw) != parameter.bytes:
        raise PtxError(
            "launch", f"{parameter.name} has {parameter.bytes} bytes, its argument {len(raw)}"
        )
    return raw
