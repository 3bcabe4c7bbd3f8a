"""Runs the same PTX on an NVIDIA GPU and in the emulator, and compares the results bit by bit.

    python -m tests.ptx.conformance [--json FILE]

Exits with 1 where results disagree, and with 2 where there is no GPU. conformance_instructions.py
and conformance_kernels.py say what is run and how close results must be, card.py talks to the
driver.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.ptx import nvcc
from tests.ptx.card import Card, CardError
from tests.ptx.comparison import Bound, Comparison
from tests.ptx.conformance_instructions import ELEMENTWISE, carries, instructions, shuffles
from tests.ptx.conformance_kernels import cuda_kernels, matrices, products
from tests.ptx.emulator import Module, PtxError
from tests.ptx.exact import FORMATS, unsigned

_SHOWN = 4  # disagreements of one kernel


class Machine(Protocol):
    """What runs PTX: card.Card, or another in its place. `load` makes a Module of it."""

    name: str
    driver: str
    capability: tuple[int, int]

    def load(self, ptx: str) -> Any: ...


def corpus() -> Iterator[Comparison]:
    """Everything that is compared."""
    for module in ELEMENTWISE:
        yield from instructions(module)
    yield from carries()
    yield from shuffles()
    yield from matrices()
    yield from products()
    if nvcc.WHY_NOT is None:
        yield from cuda_kernels()


@dataclass
class Family:
    """What has come of the kernels of one family; lists of names, and of lines to print."""

    compared: list[str] = field(default_factory=list)
    disagreed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: int = 0


def agree(emulated: np.ndarray, found: np.ndarray, kind: str, bound: Bound) -> np.ndarray:
    """Where the bits of two results are as close as they must be."""
    mask = np.array(bound.mask & (1 << 8 * emulated.itemsize) - 1, emulated.dtype)
    same = (emulated & mask) == (found & mask)
    if kind not in FORMATS:
        return same
    both_nan = _is_nan(emulated, kind) & _is_nan(found, kind)
    if bound.nan_open:
        same |= both_nan
    numbers = ~_is_nan(emulated, kind) & ~_is_nan(found, kind)
    if bound.ulps:
        same |= numbers & (_distance(emulated, found) <= bound.ulps)
    if bound.relative:
        ours, theirs = _values(emulated, kind), _values(found, kind)
        finite = np.isfinite(ours) & np.isfinite(theirs)
        largest = np.abs(ours[finite]).max(initial=0.0)
        with np.errstate(invalid="ignore"):
            same |= finite & (np.abs(ours - theirs) <= bound.relative * largest)
    return same


def _is_nan(bits: np.ndarray, kind: str) -> np.ndarray:
    return np.isnan(_values(bits, kind))


def _values(bits: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        if kind == "bf16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        name = {"f16": np.float16, "f64": np.float64}.get(kind, np.float32)
        return bits.view(name).astype(np.float64)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Units in the last place; both zeros are one number."""
    sign = np.array(1 << 8 * ours.itemsize - 1, ours.dtype)
    a, b = ((bits & ~sign).astype(np.uint64) for bits in (ours, theirs))
    return np.where((ours ^ theirs) & sign, a + b, np.maximum(a, b) - np.minimum(a, b))


def compare(comparison: Comparison, machine: Machine) -> tuple[list[str], int]:
    """A line for each disagreement, and how many values were compared.

    CardError where the card refuses the kernel, PtxError where the emulator does.
    """
    emulated = comparison.run(Module)
    found = _on(machine, comparison)
    lines, count = [], 0
    for number, (ours, theirs, kind) in enumerate(
        zip(emulated, found, comparison.kinds, strict=True)
    ):
        single = kind.removesuffix("x2") if kind in ("f16x2", "bf16x2") else kind
        dtype = np.uint8 if kind == "pred" else unsigned(single)
        ours, theirs = (np.ascontiguousarray(x).view(dtype).ravel() for x in (ours, theirs))
        good = agree(ours, theirs, single, comparison.bound)
        if comparison.defined is not None:
            good |= ~comparison.defined
        count += good.size
        bad = np.flatnonzero(~good)
        for i in bad[:_SHOWN]:
            inputs = _inputs(comparison, int(i), ours.size)
            lines.append(
                f"{comparison.name}: result {number}[{i}]{inputs}:"
                f" card {int(theirs[i]):#x}, emulator {int(ours[i]):#x}"
            )
        if len(bad) > _SHOWN:
            lines.append(f"{comparison.name}: and {len(bad) - _SHOWN} more of result {number}")
    return lines, count


def _inputs(comparison: Comparison, i: int, results: int) -> str:
    if not comparison.inputs:
        return ""
    count = len(next(iter(comparison.inputs.values())))
    at = i * count // results  # a register may hold two results
    values = ", ".join(f"{name}={int(x[at]):#x}" for name, x in comparison.inputs.items())
    return f" of {values}"


def _on(machine: Machine, comparison: Comparison) -> list[np.ndarray]:
    modules: list[Any] = []

    def load(ptx: str) -> Any:
        modules.append(machine.load(ptx))
        return modules[-1]

    try:
        return comparison.run(load)
    finally:
        for module in modules:
            if hasattr(module, "close"):
                module.close()


def _needs_hopper(comparison: Comparison) -> bool:
    return comparison.family == "wgmma" or comparison.name.endswith("sm_90a")


def run(comparisons: Iterable[Comparison], machine: Machine) -> dict[str, Family]:
    """Compare everything; a family's lines are printed as they come, then one that sums it up."""
    families: dict[str, Family] = {}
    for comparison in comparisons:
        family = families.setdefault(comparison.family, Family())
        if _needs_hopper(comparison) and machine.capability != (9, 0):
            family.left_out.append(comparison.name)
            continue
        try:
            lines, count = compare(comparison, machine)
        except (CardError, PtxError) as error:
            family.refused.append(comparison.name)
            lines, count = [f"{comparison.name}: {type(error).__name__}: {error}"], 0
        else:
            family.compared.append(comparison.name)
            if lines:
                family.disagreed.append(comparison.name)
        family.values += count
        family.lines += lines
        for line in lines:
            print(line)
    return families


def table(families: dict[str, Family]) -> str:
    """A line per family."""
    out = [
        f"{'family':18s} {'kernels':>8s} {'values':>9s} {'disagree':>9s} {'refused':>8s}"
        f" {'left out':>9s}"
    ]
    for name, f in families.items():
        out.append(
            f"{name:18s} {len(f.compared):8d} {f.values:9d} {len(f.disagreed):9d}"
            f" {len(f.refused):8d} {len(f.left_out):9d}"
        )
    return "\n".join(out)


def record(machine: Machine, families: dict[str, Family]) -> dict[str, Any]:
    """What the JSON file has."""
    return {
        "card": machine.name,
        "capability": ".".join(map(str, machine.capability)),
        "driver": machine.driver,
        "nvcc": nvcc.version() if nvcc.WHY_NOT is None else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "families": {
            name: {
                "compared": len(f.compared),
                "values": f.values,
                "disagreed": f.disagreed,
                "refused": f.refused,
                "left_out": f.left_out,
                "lines": f.lines,
            }
            for name, f in families.items()
        },
    }


def main(
    arguments: Sequence[str] | None = None,
    *,
    open_card: Callable[[], Machine] = Card,
    comparisons: Callable[[], Iterable[Comparison]] = corpus,
) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    options = parser.parse_args(arguments)
    try:
        machine = open_card()
    except CardError as error:
        print(f"conformance: needs an NVIDIA GPU and its driver: {error}")
        return 2
    print(f"{machine.name}, driver {machine.driver}")
    if nvcc.WHY_NOT is not None:
        print(f"kernels: left out, {nvcc.WHY_NOT}")
    families = run(comparisons(), machine)
    print(table(families))
    if options.json:
        options.json.write_text(json.dumps(record(machine, families), indent=1) + "\n")
    # What one of them refuses and the other runs is a disagreement too.
    return int(any(f.disagreed or f.refused for f in families.values()))


if __name__ == "__main__":
    sys.exit(main())
