"""Parses PTX text into the parts of program.py; knows no instruction's meaning."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Iterator
from typing import TypeVar

from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.program import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Not,
    Operand,
    Pair,
    Parameter,
    Program,
    Register,
    Sink,
    Special,
    Symbol,
    TensorAddress,
    Variable,
    Vector,
)
from tests.ptx.emulator.types import TYPES, size_of

T = TypeVar("T")
_SHARED = re.compile(
    r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d*)\])?\s*;"
)
_VARIABLE = re.compile(
    r"^[ \t]*(?:\.(?:visible|weak)\s+)?\.(?:const|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)"
    r"\s+([\w$]+)((?:\[\d+\])*)\s*(?:=\s*(\{[^{}]*\}|[\w-]+))?\s*;",
    re.M,
)
_LOCAL = re.compile(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?$")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?\s*((?:\.\w+[^{;]*?)?)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)"
    r"(?:\s+\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?"
)
_LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_OPCODE = re.compile(r"([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTER_RANGE = re.compile(r"([%\w$]+)<(\d+)>")
_BASE_AND_OFFSET = re.compile(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?$")
_BRACE = re.compile(r"[{}]")
_BRACKET = re.compile(r"[][{}()]")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_HEX_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
_DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][+-]?\d+)?")


def parse(text: str) -> Program:
    """Parse a module. Raises PtxError ("syntax") where it is not understood."""
    text = _without_comments(text)
    target = re.search(r"\.target\s+(sm_\w+)", text)
    if target is None:
        raise PtxError("syntax", "no .target directive")
    shared, shared_bytes = _shared_variables(text)
    entries = {}
    for match in _ENTRY.finditer(text):
        end = _closing_brace(text, match.end())
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)((?:\s*,\s*\d+)*)", match[3])
        count = None
        if threads:
            count = int(threads[1])
            for other in re.findall(r"\d+", threads[2]):
                count *= int(other)
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)((?:\s*,\s*\d+)*)", match[3])
        blocks = [int(n) for n in re.findall(r"\d+", cluster[0])] if cluster else []
        entry = Entry(match[1], tuple(_parameters(match[2] or "")), count, math.prod(blocks))
        _Body(entry, text, match.end(), end).parse()
        entries[entry.name] = entry
    return Program(target[1], shared, shared_bytes, entries, tuple(_variables(text)))


def _without_comments(text: str) -> str:
    """Blank out comments and debug directives, keeping every line where it is."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*\.(?:loc|file|pragma)\b[^\n]*$", blank, text, flags=re.M)
    return re.sub(r"^[ \t]*\.section\s+\.debug.*?\n[ \t]*\}", blank, text, flags=re.S | re.M)


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    dynamic: list[tuple[str, int]] = []
    end = 0
    for extern, align, type_name, name, count in _SHARED.findall(text):
        alignment = max(int(align or 0), size_of(type_name))
        if extern:
            dynamic.append((name, alignment))
            continue
        offsets[name] = -(-end // alignment) * alignment
        end = offsets[name] + size_of(type_name) * int(count or 1)
    alignment = max([16, *(a for _, a in dynamic)])
    end = -(-end // alignment) * alignment
    return offsets | {name: end for name, _ in dynamic}, end


def _variables(text: str) -> Iterator[Variable]:
    """Those whose initial values are plain numbers; without any, they are zero."""
    for align, type_name, name, dims, initial in _VARIABLE.findall(text):
        if type_name not in TYPES:
            continue
        size = size_of(type_name)
        items = [item.strip() for item in initial.strip("{}").split(",")] if initial else []
        if not all(_INTEGER.match(i) or _HEX_FLOAT.fullmatch(i) for i in items):
            continue
        values = [int(i[2:], 16) if _HEX_FLOAT.fullmatch(i) else _integer(i) for i in items]
        low = (1 << 8 * size) - 1
        data = b"".join((value & low).to_bytes(size, "little") for value in values)
        count = math.prod(int(n) for n in re.findall(r"\d+", dims))
        yield Variable(name, max(int(align or 0), size), data.ljust(size * count, b"\0"))


def _parameters(text: str) -> Iterator[Parameter]:
    offset = 0
    for part in split(text):
        match = _PARAMETER.search(part)
        if match is None:
            raise PtxError("syntax", f"parameter {part!r}")
        size = size_of(match[2])
        alignment = int(match[1] or size)
        offset = -(-offset // alignment) * alignment
        count = size * int(match[4] or 1)
        yield Parameter(match[3], match[2], count, offset)
        offset += count


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("syntax", "a body has no closing brace")


def _integer(text: str) -> int:
    return int(text.rstrip("U"), 0)


def split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    if not _BRACKET.search(text):
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return parts + ([current.strip()] if current.strip() else [])


class _Body:
    """The statements of one entry. Registers and labels belong to the block they stand in."""

    def __init__(self, entry: Entry, text: str, begin: int, end: int) -> None:
        self.entry, self.text, self.begin, self.end = entry, text, begin, end
        self.scopes, self.number_of_scopes = [0], 0
        self.declared: dict[int, set[str]] = {0: set()}
        self.labels: dict[tuple[str, int], int] = {}
        self.branches: list[tuple[int, str, tuple[int, ...]]] = []
        self.lists: dict[tuple[str, int], list[str]] = {}  # of .branchtargets, by their labels
        self.label = ""  # the last one
        self.line = text.count("\n", 0, begin) + 1

    def parse(self) -> None:
        i = self.begin
        while i < self.end:
            c = self.text[i]
            if c.isspace() or c in "{}":
                self._brace_or_space(c)
                i += 1
                continue
            label = _LABEL.match(self.text, i, self.end)
            stop = label.end() if label else self.text.find(";", i, self.end) + 1
            if stop == 0:
                raise PtxError("syntax", f"line {self.line}: no semicolon")
            if label:
                self.label = label[1]
                self.labels[self.label, self.scopes[-1]] = len(self.entry.instructions)
            else:
                self._statement(" ".join(self.text[i : stop - 1].split()))
            self.line += self.text.count("\n", i, stop)
            i = stop
        self._resolve_branches()

    def _brace_or_space(self, c: str) -> None:
        if c == "{":
            self.number_of_scopes += 1
            self.scopes.append(self.number_of_scopes)
            self.declared[self.number_of_scopes] = set()
        elif c == "}":
            self.scopes.pop()
        self.line += c == "\n"

    def _statement(self, text: str) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            self._declare(text)
            return
        if text.startswith((".shared", ".extern")):
            return  # read by _shared_variables
        if text.startswith(".local"):
            self._declare_local(text)
            return
        if text.startswith(".branchtargets"):
            self.lists[self.label, self.scopes[-1]] = split(text.split(None, 1)[1])
            return
        if text.startswith("."):
            raise PtxError("unsupported", f"line {self.line}: {text}")
        guard = None
        match = _GUARD.match(text)
        rest = text
        if match:
            guard = (Register(self._scoped(match[2])), match[1] == "!")
            rest = text[match.end() :]
        match = _OPCODE.match(rest)
        if match is None:
            raise PtxError("syntax", f"line {self.line}: {text}")
        if match[1] == "bra" or match[1].startswith("bra."):
            self.branches.append((len(self.entry.instructions), match[2].strip(), (*self.scopes,)))
            operands: tuple[Operand, ...] = ()
        else:
            operands = tuple(self._operand(part) for part in split(match[2]))
            if match[1].startswith("brx."):
                place = len(self.entry.instructions), split(match[2])[-1], (*self.scopes,)
                self.branches.append(place)
        self.entry.instructions.append(Instruction(match[1], operands, text, self.line, guard))

    def _declare(self, text: str) -> None:
        _, type_name, names = text.split(None, 2)
        if type_name[1:] not in TYPES:
            raise PtxError("unsupported", f"line {self.line}: {text}")
        for name in names.replace(" ", "").split(","):
            several = _REGISTER_RANGE.match(name)
            numbered = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
            for one in numbered:
                self.declared[self.scopes[-1]].add(one)
                self.entry.registers[self._scoped(one)] = type_name[1:]

    def _declare_local(self, text: str) -> None:
        match = _LOCAL.match(text)
        if match is None or match[2] not in TYPES:
            raise PtxError("unsupported", f"line {self.line}: {text}")
        size = size_of(match[2])
        align = max(int(match[1] or 0), size)
        start = -(-self.entry.local_bytes // align) * align
        self.entry.local[match[3]] = start
        self.entry.local_bytes = start + size * int(match[4] or 1)

    def _scoped(self, name: str) -> str:
        """The register's name made unique: inline assembly declares the same ones again."""
        for scope in reversed(self.scopes):
            if name in self.declared[scope]:
                return f"{name}@{scope}" if scope else name
        return name

    def _operand(self, text: str) -> Operand:
        if text.startswith("%") and (name := self._scoped(text)) in self.entry.registers:
            return Register(name)
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in split(text[1:-1])))
        if text.startswith("["):
            first, *rest = split(text[1:-1])
            address = self._address(first)
            if not rest:
                return address
            coordinates = self._operand(rest[0])
            if len(rest) > 1 or not isinstance(coordinates, Vector):
                raise PtxError("unsupported", f"line {self.line}: address {text}")
            return TensorAddress(address, coordinates)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if text.startswith("!"):
            return Not(Register(self._scoped(text[1:].strip())))
        if text == "_":
            return Sink()
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(int(text[2:], 16), "f32")
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16), "f64")
        if _INTEGER.match(text):
            return Immediate(_integer(text))
        if _DECIMAL.fullmatch(text):
            return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"), "f64")
        name = self._scoped(text)
        if name in self.entry.registers:
            return Register(name)
        return Special(text) if text.startswith("%") else Symbol(text)

    def _address(self, text: str) -> Address:
        match = _BASE_AND_OFFSET.match(text)
        base = self._operand(match[1]) if match else None
        if match is None or not isinstance(base, Register | Immediate | Symbol):
            raise PtxError("unsupported", f"line {self.line}: address [{text}]")
        return Address(base, int(match[2], 0) if match[2] else 0)

    def _resolve_branches(self) -> None:
        for index, label, scopes in self.branches:
            old = self.entry.instructions[index]
            if old.opcode.startswith("brx"):
                labels = self._innermost(self.lists, label, scopes, old)
                targets = tuple(self._innermost(self.labels, one, scopes, old) for one in labels)
                new = dataclasses.replace(old, operands=old.operands[:1], targets=targets)
            else:
                target = self._innermost(self.labels, label, scopes, old)
                new = dataclasses.replace(old, target=target)
            self.entry.instructions[index] = new

    def _innermost(
        self, known: dict[tuple[str, int], T], label: str, scopes: tuple[int, ...], at: Instruction
    ) -> T:
        """What a label stands for where an instruction names it."""
        for scope in reversed(scopes):
            if (label, scope) in known:
                return known[label, scope]
        raise PtxError("syntax", f"line {at.line}: no label {label!r}: {at.text}")
