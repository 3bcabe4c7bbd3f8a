"""Which opcodes exist, with which modifiers: every handler lists its forms, and nothing else runs.

A form is an opcode with its choices: `{a,b}` is one of them, `{name:a,b}` under a name, `[.x]` is
optional. "add[.{round:rn}][.ftz].{type:f32}" takes add.f32, add.rn.f32, add.ftz.f32 ...
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tests.ptx.emulator.errors import PtxError

if TYPE_CHECKING:
    from tests.ptx.emulator.block import Block, Execute, Mask
    from tests.ptx.emulator.build import Build

Handler = Callable[["Build"], "Execute"]


@dataclass(frozen=True)
class Form:
    """One form of an instruction, and what builds it."""

    text: str
    pattern: re.Pattern[str]
    handler: Handler

    @property
    def base(self) -> str:
        return re.split(r"[.\[{]", self.text)[0]


FORMS: list[Form] = []
_by_base: dict[str, list[Form]] = {}
_PART = re.compile(r"\{(?:(\w+):)?([^{}]*)\}|\[|\]|[^{}\[\]]+")


def _pattern(form: str) -> re.Pattern[str]:
    out, optional = "", 0
    for match in _PART.finditer(form):
        token = match[0]
        if token == "[":
            out += "(?:"
        elif token == "]":
            out += ")?"
        elif token.startswith("{"):
            choices = "|".join(
                re.escape(c) for c in sorted(match[2].split(","), key=len, reverse=True)
            )
            name = match[1]
            if name is None:
                name = f"unnamed{optional}"
                optional += 1
            out += f"(?P<{name}>{choices})"
        else:
            out += re.escape(token)
    return re.compile(out)


def instruction(*forms: str) -> Callable[[Handler], Handler]:
    """Register a handler: it takes a Build and returns what runs the instruction."""

    def register(handler: Handler) -> Handler:
        for text in forms:
            form = Form(text, _pattern(text), handler)
            FORMS.append(form)
            _by_base.setdefault(form.base, []).append(form)
        return handler

    return register


@cache
def find(opcode: str) -> tuple[Form, dict[str, str | None]]:
    """The form that an opcode has, with its choices by name; PtxError where there is none."""
    base = opcode.split(".")[0]
    for form in _by_base.get(base, ()):
        match = form.pattern.fullmatch(opcode)
        if match:
            return form, match.groupdict()
    known = "; ".join(form.text for form in _by_base.get(base, ()))
    hint = f" (known: {known})" if known else ""
    raise PtxError("unsupported", f"instruction {opcode}{hint}")


def nothing(build: Build) -> Execute:
    """A handler for what has no effect that the emulator models."""

    def execute(block: Block, mask: Mask) -> None:
        return None

    return execute
