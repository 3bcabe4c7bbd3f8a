"""Reads machine code: the instructions of a cubin's kernels, their loops, registers and stack."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Op:
    """`name` is the opcode without its modifiers: HGMMA of HGMMA.64x64x16.F32.BF16."""

    address: int
    name: str
    modifiers: tuple[str, ...]
    operands: str


# The counts that are looked at, by what matches an opcode's name.
CLASSES = {
    "UTCMMA": r"UTC[A-Z]*MMA",
    "HGMMA": r"[HQI]GMMA",
    "HMMA": r"[HQI]MMA",
    "TMA load": r"UTMALDG|UBLKCP",
    "TMA store": r"UTMASTG|UTMAREDG",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG",
    "STG": r"STG",
    "LDS": r"LDS",
    "STS": r"STS",
    "LDSM": r"LDSM",
    "spills": r"LDL|STL",
    "MUFU": r"MUFU",
    "SHFL": r"SHFL",
    "atomics": r"ATOMG?|REDG?",
    "BAR": r"BAR",
    "FFMA": r"FFMA2?",
}
_CLASS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
_PRODUCTS = ("UTCMMA", "HGMMA", "HMMA")
_OP = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*([^;]*);", re.M
)
_USAGE = re.compile(r"Function\s+(\S+?):\s*\n?(.*)")


def tool(name: str) -> str:
    """A program that comes with Triton: CUDA toolkits may lack them."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), option, file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


@lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> dict[str, tuple[Op, ...]]:
    """The instructions of each kernel, by its mangled name."""
    _, *functions = re.split(r"Function : (?=\S)", _cuobjdump("-sass", cubin))
    found = {}
    for text in functions:
        name, body = text.split(None, 1)
        found[name] = tuple(
            Op(int(m[1], 16), m[2], tuple(m[3].split(".")[1:]), m[4]) for m in _OP.finditer(body)
        )
    return found


@lru_cache(maxsize=64)
def usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED ... of each kernel, by its mangled name."""
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in _USAGE.findall(_cuobjdump("-res-usage", cubin))
    }


def hot_loop(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The largest of the innermost loops, of those with matrix products if there are any.

    Empty where there is no loop.
    """
    loops = []
    for op in ops:
        target = re.search(r"0x([0-9a-f]+)", op.operands) if op.name == "BRA" else None
        # A kernel ends with a branch to itself, which is no loop.
        if target and int(target[1], 16) < op.address:
            start = int(target[1], 16)
            loops.append(tuple(o for o in ops if start <= o.address <= op.address))
    loops = [loop for loop in loops if _has_products(loop)] or loops
    inner = [
        loop for loop in loops if not any(o is not loop and set(o) <= set(loop) for o in loops)
    ]
    return max(inner, key=len, default=())


def _has_products(ops: Iterable[Op]) -> bool:
    return any(_CLASS[name].fullmatch(op.name) for op in ops for name in _PRODUCTS)


def count(ops: Iterable[Op]) -> dict[str, int]:
    """How many instructions of each class; those that do not occur are left out."""
    found: dict[str, int] = {}
    for op in ops:
        for name, pattern in _CLASS.items():
            if pattern.fullmatch(op.name):
                found[name] = found.get(name, 0) + 1
    return found


def access_bytes(ops: Iterable[Op]) -> dict[int, int]:
    """How many LDG and STG there are by their width in bytes."""
    found: dict[int, int] = {}
    for op in ops:
        if op.name in ("LDG", "STG"):
            widths = [int(m) // 8 for m in op.modifiers if m in ("64", "128")]
            widths += [1 for m in op.modifiers if m in ("U8", "S8")]
            widths += [2 for m in op.modifiers if m in ("U16", "S16")]
            width = widths[0] if widths else 4
            found[width] = found.get(width, 0) + 1
    return found


def matrix_flops(ops: Iterable[Op], threads: int) -> int:
    """Floating-point operations of a block's tensor cores if each instruction runs once.

    UTCMMA are left out: their shapes lie in descriptors.
    """
    warps, total = threads // 32, 0
    for op in ops:
        if _CLASS["HGMMA"].fullmatch(op.name):
            m, n, k = next(map(int, s.split("x")) for s in op.modifiers if s.count("x") == 2)
            total += 2 * m * n * k * (warps // 4)
        elif _CLASS["HMMA"].fullmatch(op.name):
            shape = next(s for s in op.modifiers if s.startswith("16") and len(s) >= 4)
            total += 2 * 16 * 8 * int(shape[3:]) * warps
    return total
