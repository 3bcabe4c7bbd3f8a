"""Runs instructions on arrays through kernels of a few lines; lists the opcodes of a module."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from tests.ptx.emulator import Module
from tests.ptx.emulator.forms import FORMS
from tests.ptx.exact import array, samples, unsigned

_HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def run(
    body: str,
    *,
    threads: int | None = None,
    registers: str = "",
    machine: Callable[[str], Module] = Module,
    **operands: np.ndarray | type,
) -> list[np.ndarray]:
    """Run statements on registers that have the names of `operands`.

    An array is loaded, an element per thread; a dtype stands for an output of that type. Returns
    the outputs in order. `threads` is the size of the blocks, of which there are as many as
    the arrays need, and `machine` makes a Module of PTX.
    """
    inputs = {name: x for name, x in operands.items() if isinstance(x, np.ndarray)}
    outputs = {name: x for name, x in operands.items() if name not in inputs}
    count = len(next(iter(inputs.values()))) if inputs else threads
    threads = threads or min(count, 256)
    blocks = -(-count // threads)
    module = machine(kernel(body, inputs, outputs, registers))
    arguments = [
        module.upload(np.resize(_stored(x), blocks * threads), name) for name, x in inputs.items()
    ]
    results = [
        module.allocate(blocks * threads * _size(dtype), name) for name, dtype in outputs.items()
    ]
    module.launch("kernel", (blocks,), threads, [*arguments, *results])
    return [
        _loaded(module.download(buffer), dtype)[:count]
        for buffer, dtype in zip(results, outputs.values(), strict=True)
    ]


def kernel(
    body: str, inputs: dict[str, np.ndarray], outputs: dict[str, type], registers: str = ""
) -> str:
    """The kernel's PTX: loads, the body, stores."""
    names = [*inputs, *outputs]
    parameters = ", ".join(f".param .u64 p_{name}" for name in names)
    lines = [
        f".visible .entry kernel({parameters}) {{",
        ".reg .b32 %n, %index, %word;",
        ".reg .b64 %base, %address;",
        registers,
        "mov.u32 %n, %ntid.x; mov.u32 %word, %ctaid.x; mov.u32 %index, %tid.x;",
        "mad.lo.u32 %index, %n, %word, %index;",
    ]
    for name, x in inputs.items():
        lines += [_declaration(name, x.dtype), *_address(name, x.dtype)]
        if x.dtype == bool:
            lines += ["ld.global.u32 %word, [%address];", f"setp.ne.u32 {name}, %word, 0;"]
        else:
            lines.append(f"ld.global.b{8 * x.dtype.itemsize} {name}, [%address];")
    lines += [_declaration(name, np.dtype(x)) for name, x in outputs.items()]
    lines.append(body)
    for name, x in outputs.items():
        lines += _address(name, np.dtype(x))
        if np.dtype(x) == bool:
            lines += [f"selp.u32 %word, 1, 0, {name};", "st.global.u32 [%address], %word;"]
        else:
            lines.append(f"st.global.b{8 * np.dtype(x).itemsize} [%address], {name};")
    return _HEADER + "\n".join([*lines, "ret;", "}"])


def _declaration(name: str, dtype: np.dtype) -> str:
    return f".reg .{'pred' if dtype.kind == 'b' else f'b{8 * dtype.itemsize}'} {name};"


def _size(dtype: type) -> int:
    return 4 if np.dtype(dtype) == bool else np.dtype(dtype).itemsize


def _address(name: str, dtype: np.dtype) -> list[str]:
    return [
        f"ld.param.u64 %base, [p_{name}];",
        f"mad.wide.u32 %address, %index, {_size(dtype)}, %base;",
    ]


def _stored(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32) if x.dtype == bool else x


def _loaded(data: np.ndarray, dtype: type) -> np.ndarray:
    return data.view(np.uint32) != 0 if np.dtype(dtype) == bool else data.view(dtype)


def opcodes(module: ModuleType, base: str | None = None) -> list[str]:
    """Every opcode that a module of instructions takes, of one base if that is given."""
    found = [
        opcode
        for form in FORMS
        if form.handler.__module__ == module.__name__ and base in (None, form.base)
        for opcode in expand(form.text)
    ]
    return list(dict.fromkeys(found))


def expand(text: str) -> list[str]:
    """The opcodes of a form."""
    found = [""]
    for part in re.findall(r"\[[^\[\]]*\]|[^\[\]]+", text):
        choices = _alternatives(part.strip("[]")) + ([""] if part.startswith("[") else [])
        found = [before + choice for before in found for choice in choices]
    return found


def _alternatives(part: str) -> list[str]:
    pieces = [
        re.sub(r"^\w+:(?!:)", "", choice[1:-1]).split(",") if choice.startswith("{") else [choice]
        for choice in re.findall(r"\{[^{}]*\}|[^{}]+", part)
    ]
    return ["".join(pieces) for pieces in itertools.product(*pieces)]


def check(
    opcode: str,
    kinds: list[str],
    result: str,
    reference: Callable[..., int | None],
    *,
    more: Sequence[int] = (),
) -> None:
    """Compare `opcode d, a, b, ...` with a function of the operands' bits.

    `kinds` are the operands' types, `more` further values of each operand. Where the reference
    gives None, any result will do.
    """
    columns = samples(kinds, seed=zlib.crc32(opcode.encode()))
    columns = [[*column, *more[k:], *more[:k]] for k, column in enumerate(columns)]
    names = "abce"[: len(kinds)]
    operands = {name: array(x, kind) for name, x, kind in zip(names, columns, kinds, strict=True)}
    output = bool if result == "pred" else unsigned(result)
    (found,) = run(f"{opcode} d, {', '.join(names)};", **operands, d=output)
    for values, bits in zip(zip(*columns, strict=True), found, strict=True):
        wanted = reference(*values)
        assert wanted is None or int(bits) == wanted, (
            f"{opcode} of {', '.join(map(hex, values))}: {int(bits):#x}, not {wanted:#x}"
        )
