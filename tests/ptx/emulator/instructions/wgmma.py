"""wgmma: the asynchronous tensor cores of sm_90a, which a warpgroup of 128 threads drives.

Results are computed when the instruction is issued, from what shared memory holds then. Until the
wait for its group, though, its registers may not be used and its operands may not be written:
both are watched, per warpgroup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from tests.ptx.emulator.block import ENDS, WARP, WARPGROUP, Block, Execute, Mask
from tests.ptx.emulator.build import Build, Read
from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.forms import instruction
from tests.ptx.emulator.instructions.fragments import accumulator, matrix_a
from tests.ptx.emulator.instructions.matrix_types import BYTES, add_products, as_elements, decode
from tests.ptx.emulator.instructions.together import together
from tests.ptx.emulator.instructions.wgmma_operands import Operand, load
from tests.ptx.emulator.program import Register, Vector
from tests.ptx.emulator.types import size_of

_M = 64
_DEPTH_BYTES = 32  # of K, whatever the type
_INTEGER_N = (8, 24, *range(16, 257, 16))
_MMA = "wgmma.mma_async.sync.aligned.m64n"
_FLOAT_N = f"{{n:{','.join(map(str, range(8, 257, 8)))}}}"
_FLOAT8 = "e4m3,e5m2"


# ---- what is in flight


@dataclass(frozen=True)
class Issue:
    """One wgmma that has not been waited for. `step` is when it was issued.

    `operands` are the granules of shared memory that it reads.
    """

    shape: str
    accumulators: tuple[str, ...]
    inputs: frozenset[str]  # A, if in registers
    names: frozenset[str]  # the accumulators and the inputs
    step: int
    operands: tuple[np.ndarray, ...]


@dataclass
class Warpgroup:
    """What one warpgroup has issued: committed groups, the oldest first, and `open` ones."""

    index: int
    fenced: bool = False
    open: list[Issue] = field(default_factory=list)
    groups: list[list[Issue]] = field(default_factory=list)

    @property
    def bit(self) -> int:
        return 1 << self.index

    @property
    def threads(self) -> slice:
        return slice(self.index * WARPGROUP, (self.index + 1) * WARPGROUP)

    @property
    def warps(self) -> slice:
        per_group = WARPGROUP // WARP
        return slice(self.index * per_group, (self.index + 1) * per_group)

    def unfinished(self) -> Iterable[Issue]:
        return chain(self.open, *self.groups)

    def check_registers(
        self, block: Block, shape: str, accumulators: tuple[str, ...], inputs: frozenset[str]
    ) -> None:
        """Refuse registers that a fence has to come before, or that another wgmma is using."""
        if not self.fenced:
            raise PtxError("in flight", "wgmma.fence is missing before the first wgmma")
        for name, groups in block.written.items():
            if groups & self.bit and (name in inputs or name in accumulators):
                raise PtxError("in flight", f"wgmma.fence is missing after a write of {name}")
        for other in self.unfinished():
            others = set(other.accumulators)
            # Results that one shape adds up in the same registers are in order without a wait.
            same = other.shape == shape and other.accumulators == accumulators
            used = others & inputs | other.inputs.intersection(accumulators)
            if not same:
                used |= others.intersection(accumulators)
            if used:
                raise PtxError("in flight", f"{min(used)} is still used by an earlier wgmma")

    def issue(self, block: Block, issue: Issue) -> None:
        self.open.append(issue)
        for name in issue.names:
            block.in_flight[name] = block.in_flight.get(name, 0) | self.bit

    def finish(self, block: Block, issues: Sequence[Issue]) -> None:
        """The wait for issues that are not in `open` or `groups` any more."""
        still = frozenset().union(*(issue.names for issue in self.unfinished()))
        for name in frozenset().union(*(issue.names for issue in issues)) - still:
            block.in_flight[name] &= ~self.bit
            if not block.in_flight[name]:
                del block.in_flight[name]
        if block.races:
            for issue in issues:
                for granules in issue.operands:
                    block.races.end_matrix(granules, self.warps, issue.step)


def _warpgroups(block: Block, mask: Mask) -> list[Warpgroup]:
    """The states of the warpgroups in a mask of whole ones."""
    states = block.state.setdefault("wgmma", {})
    bits = block.warpgroups(mask)
    indices = [i for i in range(bits.bit_length()) if bits >> i & 1]
    return [states.setdefault(i, Warpgroup(i)) for i in indices]


def _refuse_unfinished(block: Block) -> None:
    for group in block.state.get("wgmma", {}).values():
        if any(True for _ in group.unfinished()):
            what = "wgmma.commit_group" if group.open else "wgmma.wait_group"
            raise PtxError("in flight", f"a block ends with wgmma in flight: {what} is missing")


ENDS.append(_refuse_unfinished)


def _per_warpgroup(build: Build, run: Callable[[Block, Warpgroup], None]) -> Execute:
    if build.program.target != "sm_90a":
        raise build.error(f"the target is {build.program.target}, not sm_90a")

    def body(block: Block, mask: Mask) -> None:
        for group in _warpgroups(block, mask):
            run(block, group)

    return together(build, WARPGROUP, body)


@instruction("wgmma.fence.sync.aligned")
def fence(build: Build) -> Execute:
    def run(block: Block, group: Warpgroup) -> None:
        group.fenced = True
        block.written = {
            name: left for name, bits in block.written.items() if (left := bits & ~group.bit)
        }

    return _per_warpgroup(build, run)


@instruction("wgmma.commit_group.sync.aligned")
def commit_group(build: Build) -> Execute:
    def run(block: Block, group: Warpgroup) -> None:
        group.groups.append(group.open)
        group.open = []

    return _per_warpgroup(build, run)


@instruction("wgmma.wait_group.sync.aligned")
def wait_group(build: Build) -> Execute:
    pending = build.immediate(0)
    if pending < 0:
        raise build.error(f"wait_group {pending}", "syntax")

    def run(block: Block, group: Warpgroup) -> None:
        count = max(len(group.groups) - pending, 0)
        done, group.groups = group.groups[:count], group.groups[count:]
        if done:
            group.finish(block, list(chain(*done)))

    return _per_warpgroup(build, run)


@instruction("setmaxnreg.{inc,dec}.sync.aligned.u32")
def setmaxnreg(build: Build) -> Execute:
    count = build.immediate(0)
    if count % 8 or not 24 <= count <= 256:
        raise build.error(f"{count} registers: a multiple of 8 from 24 to 256 is meant", "syntax")
    return _per_warpgroup(build, lambda block, group: None)


# ---- the product


@instruction(
    f"{_MMA}{_FLOAT_N}k16.{{d:f32}}.{{a:bf16}}.{{b:bf16}}",
    f"{_MMA}{_FLOAT_N}k16.{{d:f32,f16}}.{{a:f16}}.{{b:f16}}",
    f"{_MMA}{_FLOAT_N}k8.{{d:f32}}.{{a:tf32}}.{{b:tf32}}",
    f"{_MMA}{_FLOAT_N}k32.{{d:f32,f16}}.{{a:{_FLOAT8}}}.{{b:{_FLOAT8}}}",
    f"{_MMA}{{n:{','.join(map(str, _INTEGER_N))}}}k32[.{{saturate:satfinite}}]"
    ".{d:s32}.{a:s8,u8}.{b:s8,u8}",
)
def mma_async(build: Build) -> Execute:
    shape = _Shape.of(build)
    fragment = isinstance(build.operand(1), Vector)
    scale_a, scale_b, a_mn_major, b_mn_major = _constants(build, shape, fragment)
    a_matrix = Operand(_M, shape.k, shape.a_type, a_mn_major)
    b_matrix = Operand(shape.n, shape.k, shape.b_type, b_mn_major)
    registers = _names(build, 0, shape.d_count)
    inputs = _names(build, 1, 4) if fragment else ()
    if len({*registers, *inputs}) != len(registers) + len(inputs):
        raise build.error("a register is used twice", "syntax")
    input_set, names = frozenset(inputs), frozenset((*registers, *inputs))
    a_descriptor = None if fragment else build.read(1, "u64")
    b_descriptor, scale_d = build.read(2, "u64"), build.read(3, "pred")
    order_a = matrix_a(4, 4 // BYTES[shape.a_type], WARPGROUP).order(shape.k)

    def run(block: Block, group: Warpgroup) -> None:
        group.check_registers(block, shape.text, registers, input_set)
        operands = []
        if a_descriptor is None:
            bits = _registers(block, inputs, group.threads).reshape(-1)
            a = decode(as_elements(bits, shape.a_type), shape.a_type)
            a = a.take(order_a).reshape(_M, shape.k)
        else:
            bits = _uniform(block, a_descriptor, group, "descriptor of A")
            a, granules = load(block, a_matrix, bits, group.warps)
            operands.append(granules)
        bits = _uniform(block, b_descriptor, group, "descriptor of B")
        b, granules = load(block, b_matrix, bits, group.warps)
        operands.append(granules)
        with np.errstate(all="ignore"):
            product = (scale_a * a) @ (scale_b * b).T
        accumulate = bool(_uniform(block, scale_d, group, "scale-d"))
        _add(block, registers, group.threads, product, shape, accumulate)
        issue = Issue(shape.text, registers, input_set, names, block.steps, tuple(operands))
        group.issue(block, issue)

    return _per_warpgroup(build, run)


@dataclass(frozen=True)
class _Shape:
    """m64, n, k and the types; `d_count` registers of `d_width` elements hold the accumulator."""

    n: int
    k: int
    a_type: str
    b_type: str
    d_type: str
    saturate: bool

    @classmethod
    def of(cls, build: Build) -> _Shape:
        a_type, b_type, d_type = (build.choices[name] or "" for name in ("a", "b", "d"))
        n, k = int(build.choices["n"] or 0), _DEPTH_BYTES // BYTES[a_type]
        return cls(n, k, a_type, b_type, d_type, build.has("saturate"))

    @property
    def text(self) -> str:
        """What makes accumulators in the same registers the same."""
        return f"m64n{self.n}k{self.k}.{self.d_type}"

    @property
    def d_width(self) -> int:
        return 2 if self.d_type == "f16" else 1

    @property
    def d_count(self) -> int:
        return _M * self.n // (WARPGROUP * self.d_width)


def _constants(build: Build, shape: _Shape, fragment: bool) -> tuple[float, float, bool, bool]:
    """The scales of A and B, and whether they are stored MN-major (imm-trans)."""
    scales = 0 if shape.d_type == "s32" else 2
    transposes = 0 if BYTES[shape.a_type] != 2 else 1 if fragment else 2
    if len(build.operands) != 4 + scales + transposes:
        raise build.error(f"{len(build.operands)} operands", "syntax")
    values = [build.immediate(4 + i) for i in range(scales + transposes)]
    if not {*values[:scales]} <= {1, -1} or not {*values[scales:]} <= {0, 1}:
        raise build.error("a scale is 1 or -1, a transposition 0 or 1", "syntax")
    scale_a, scale_b = values[:scales] or (1, 1)
    majors = [False, False, *map(bool, values[scales:])]
    return np.float32(scale_a), np.float32(scale_b), not fragment and majors[-2], majors[-1]


def _names(build: Build, index: int, count: int) -> tuple[str, ...]:
    """The names of `count` 32-bit registers."""
    items = build.vector(index)
    if len(items) != count:
        raise build.error(f"operand {index} has {len(items)} registers, not {count}", "syntax")
    names = tuple(item.name for item in items if isinstance(item, Register))
    if len(names) != count or any(size_of(build.entry.registers[name]) != 4 for name in names):
        raise build.error(f"operand {index} must be 32-bit registers", "syntax")
    return names


def _registers(block: Block, names: Sequence[str], threads: slice) -> np.ndarray:
    """The bits of registers (registers, 128), in flight or not."""
    bits = np.concatenate([block.registers[name][threads] for name in names])
    return bits.reshape(len(names), WARPGROUP)


def _uniform(block: Block, read: Read, group: Warpgroup, what: str) -> int:
    """A value that all threads of the warpgroup must have."""
    values = read(block)[group.threads]
    if (values != values[0]).any():
        raise PtxError("warp", f"the {what} differs between threads of a warpgroup")
    return int(values[0])


def _add(
    block: Block,
    names: Sequence[str],
    threads: slice,
    product: np.ndarray,
    shape: _Shape,
    accumulate: bool,
) -> None:
    """Write the product (M, N) to the accumulators, or add it to what they hold."""
    places = accumulator(shape.d_count, shape.d_width, WARPGROUP).places(shape.n)
    products = product.take(places).reshape(shape.d_count, -1)
    if accumulate:
        bits = _registers(block, names, threads)
    else:
        bits = np.zeros((shape.d_count, WARPGROUP), np.uint32)
    bits = add_products(bits, products, shape.d_type, saturate=shape.saturate)
    for name, values in zip(names, bits, strict=True):
        block.registers[name][threads] = values
