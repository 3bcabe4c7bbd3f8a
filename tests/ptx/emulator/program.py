"""What a module of PTX consists of: entries with their registers, instructions and operands."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """`kind` "int", or "f32" and "f64", whose value is the bits."""

    value: int
    kind: str = "int"


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A shared variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int = 0


@dataclass(frozen=True)
class TensorAddress:
    """[map, {coordinates}]."""

    map: Address
    coordinates: Vector


@dataclass(frozen=True)
class Pair:
    """a|b: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p."""

    predicate: Register


@dataclass(frozen=True)
class Sink:
    """_: a destination that is not wanted."""


Operand = (
    Register | Immediate | Special | Symbol | Vector | Address | TensorAddress | Pair | Not | Sink
)


@dataclass(frozen=True)
class Instruction:
    """`guard` is (register, negated).

    `target` is the index that a branch goes to, `targets` are those that brx chooses from.
    """

    opcode: str
    operands: tuple[Operand, ...]
    text: str
    line: int
    guard: tuple[Register, bool] | None = None
    target: int | None = None
    targets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    name: str
    type_name: str
    bytes: int
    offset: int


@dataclass
class Entry:
    """A kernel: registers by name with their types, instructions in order."""

    name: str
    parameters: tuple[Parameter, ...]
    threads: int | None  # of .reqntid or .maxntid
    cluster: int = 1  # blocks, of .reqnctapercluster
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    local: dict[str, int] = field(default_factory=dict)  # offsets of local variables
    local_bytes: int = 0

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.bytes for p in self.parameters), default=0)

    @cached_property
    def matrix_registers(self) -> frozenset[str]:
        """The accumulators of wgmma, and A where it lies in registers."""
        return frozenset(
            item.name
            for instruction in self.instructions
            if instruction.opcode.startswith("wgmma.mma_async")
            for operand in instruction.operands
            if isinstance(operand, Vector)
            for item in operand.items
            if isinstance(item, Register)
        )

    @cached_property
    def guesses(self) -> frozenset[Instruction]:
        """Loads whose value a compare-and-swap puts to the test."""
        from tests.ptx.emulator.guesses import find

        return find(self)


@dataclass(frozen=True)
class Variable:
    """A variable of the module in global or constant memory."""

    name: str
    align: int
    data: bytes


@dataclass
class Program:
    """`shared` maps variables to offsets, those of dynamic size to the end of the static ones.

    `addresses` are those that a Module gives to its variables.
    """

    target: str
    shared: dict[str, int]
    shared_bytes: int
    entries: dict[str, Entry]
    variables: tuple[Variable, ...] = ()
    addresses: dict[str, int] = field(default_factory=dict)
