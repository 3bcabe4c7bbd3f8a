"""Plain loads that begin a loop of compare-and-swap, whose value is but a guess.

Where a GPU has no atomic addition of a type, compilers load the old value, add, and swap if the
word still has it, else try again with what the swap has found. The load is weak and races with the
swaps of others. PTX gives races between accesses of one size a meaning (PTX ISA, "Data-races"): the
load reads what some write has left. An outdated value makes the swap fail, and nothing else comes
of it, if:

- the load and the swap have the same address, in the same register, and the same size;
- the swap compares with the loaded value, or with what the swap before has found;
- what is computed from the value goes to the swap and to the test of its success, not to memory;
- the loop goes on where the swap has failed.

Any other load is an access like all others, and so is this one as to plain stores. That other
atomics on the word have its size too is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.ptx.emulator.program import (
    Address,
    Entry,
    Instruction,
    Not,
    Operand,
    Pair,
    Register,
    TensorAddress,
    Vector,
)
from tests.ptx.emulator.types import TYPES, size_of

# What may be done with the value: registers in, registers out.
_COMPUTES = {
    *("abs", "add", "and", "bfe", "bfi", "cvt", "fma", "lop3", "mad", "max", "min", "mov", "mul"),
    *("neg", "not", "or", "prmt", "selp", "set", "setp", "shf", "shl", "shr", "slct", "sub", "xor"),
}


def find(entry: Entry) -> frozenset[Instruction]:
    """The loads of an entry that are guesses."""
    code = entry.instructions
    swaps = [i for i, one in enumerate(code) if _is_swap(one)]
    loads = [i for i, one in enumerate(code) if _is_plain_load(one)] if swaps else []
    return frozenset(
        code[load] for load in loads if any(_is_guess(code, load, swap) for swap in swaps)
    )


def _is_swap(one: Instruction) -> bool:
    base, *modifiers = one.opcode.split(".")
    return base == "atom" and "cas" in modifiers and len(one.operands) == 4


def _is_plain_load(one: Instruction) -> bool:
    """Weak, of one register, and coherent: not with .nc."""
    base, *modifiers = one.opcode.split(".")
    known = {"weak", "global", "shared", "shared::cta", *TYPES}
    return base == "ld" and {*modifiers} <= known and len(one.operands) == 2


def _is_guess(code: list[Instruction], at: int, swap_at: int) -> bool:
    load, swap = code[at], code[swap_at]
    value, source = load.operands
    found, target, compared, _ = swap.operands
    carriers = {value, found, compared}
    if not (
        at < swap_at
        and found != compared
        and all(isinstance(carrier, Register) for carrier in carriers)
        and source == target
        and isinstance(source, Address)
        and isinstance(source.base, Register)
        and _place(load) == _place(swap)
        and sum(source.base in _written(one) for one in code) <= 1
    ):
        return False
    # They hold what the load or a swap has found, and nothing else.
    others = [one for one in code if one not in (load, swap) and carriers & _written(one)]
    if not all(_is_move(one) and one.operands[1] in carriers for one in others):
        return False
    return _stays_inside(code, swap_at, {value, compared})


def _place(one: Instruction) -> tuple[str, int]:
    """The state space and the size of an access."""
    _, *modifiers = one.opcode.split(".")
    spaces = [m.split("::")[0] for m in modifiers if m.split("::")[0] in ("global", "shared")]
    return "".join(spaces), size_of(modifiers[-1])


def _is_move(one: Instruction) -> bool:
    return one.opcode.split(".")[0] == "mov" and len(one.operands) == 2


def _stays_inside(code: list[Instruction], swap_at: int, guessed: set[Operand]) -> bool:
    """Whether what depends on the guess goes to the swap and to the test of its success only."""
    depend: set[Operand] = set()
    while not guessed <= depend:
        depend |= guessed
        guessed = set()
        for i, one in enumerate(code):
            if i == swap_at or not depend & _read(one):
                continue
            if _tests(code, i, swap_at):
                uses = [j for j, other in enumerate(code) if one.operands[0] in _read(other)]
                if not uses or not all(_tries_again(code, i, j, swap_at) for j in uses):
                    return False
            elif one.opcode.split(".")[0] in _COMPUTES and one.guard is None:
                guessed |= _written(one)
            else:
                return False
    return any(_tests(code, i, swap_at) for i in range(swap_at + 1, len(code)))


def _tests(code: list[Instruction], i: int, swap_at: int) -> bool:
    """Whether an instruction compares the swap's result with what the swap has compared."""
    one, (found, _, compared, _) = code[i], code[swap_at].operands
    base, *modifiers = one.opcode.split(".")
    return (
        base == "setp"
        and len(modifiers) == 2
        and modifiers[0] in ("eq", "ne")
        and i > swap_at
        and {*one.operands[1:]} == {found, compared}
        and one.guard is None
        and sum(one.operands[0] in _written(other) for other in code) == 1
        and not any({found, compared} & _written(other) for other in code[swap_at + 1 : i])
    )


def _tries_again(code: list[Instruction], test_at: int, i: int, swap_at: int) -> bool:
    """Whether an instruction is the jump back that is taken wherever the swap has failed."""
    jump, fails = code[i], "ne" in code[test_at].opcode.split(".")
    if jump.target is None or jump.guard is None or not test_at < i:
        return False
    straight = not any(_jumps(one) for one in code[swap_at + 1 : i])
    targets = {target for one in code for target in (one.target, *one.targets)}
    entered = any(target is not None and swap_at < target <= i for target in targets)
    return straight and not entered and jump.target <= swap_at and jump.guard[1] is not fails


def _jumps(one: Instruction) -> bool:
    return one.target is not None or one.opcode.split(".")[0] in ("ret", "exit", "brx", "call")


def _registers(operand: Operand) -> Iterator[Operand]:
    """Those of which an operand consists."""
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
    elif isinstance(operand, TensorAddress):
        yield from _registers(operand.map)
        yield from _registers(operand.coordinates)
    elif isinstance(operand, Pair):
        yield from _registers(operand.first)
        yield from _registers(operand.second)
    elif isinstance(operand, Not):
        yield operand.predicate


def _written(one: Instruction) -> set[Operand]:
    """At most these: an operand that comes first and is no address."""
    first = one.operands[0] if one.operands else None
    return set() if first is None or isinstance(first, Address) else {*_registers(first)}


def _read(one: Instruction) -> set[Operand]:
    """At least these: of instructions that may read their first operand, that too."""
    skipped = 1 if one.opcode.split(".")[0] in (*_COMPUTES, "ld", "atom") else 0
    found = {r for operand in one.operands[skipped:] for r in _registers(operand)}
    return found | ({one.guard[0]} if one.guard else set())
