"""Prints what the emulator knows, what the tests execute of it, and what they find.

    pytest tests/ptx --ptx-coverage build/ptx/coverage.jsonl
    python -m tests.ptx.summary

Without that file (or another, --coverage) the figures that the tests must give are left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.forms import FORMS, find
from tests.ptx.kernels.attention import attention_fwd
from tests.ptx.one_instruction import expand
from tests.ptx.test_mutations import COMPILERS, FLOORS
from tests.ptx.triton_compile import CACHE, ROOT
from tests.ptx.triton_launch import emulated

COVERAGE = CACHE / "coverage.jsonl"
# These compare the emulator with itself, or run kernels that may be wrong.
_NO_REFERENCE = ("test_conformance", "test_summary")
_MUTANTS = ("test_mutations",)
_T, _D = 256, 64


@dataclass
class Executed:
    """What a recording has: opcodes and kernels of tests that passed, and outcomes."""

    opcodes: set[str] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)
    planted: int = 0
    found: int = 0
    false_alarms: list[str] = field(default_factory=list)
    tests: int = 0
    failed: int = 0


def read(lines: Iterable[str]) -> Executed:
    """Sum up a recording. A false alarm is a test without a bug that a PtxError ended."""
    out = Executed()
    # Recordings of several runs may be put together: of a test the last one counts.
    for line in {line["test"]: line for line in map(json.loads, lines)}.values():
        name = Path(line["test"].split("::")[0]).stem
        if line["outcome"] == "skipped" or name in _NO_REFERENCE:
            continue
        out.tests += 1
        passed = line["outcome"] == "passed"
        out.failed += not passed
        if passed:
            out.opcodes |= set(line["opcodes"])
        if line["planted"]:
            out.planted += 1
            out.found += passed
        elif line["ptx_error"]:
            out.false_alarms.append(line["test"])
        elif passed and name not in _MUTANTS:
            out.kernels |= set(line["kernels"])
    return out


def families(opcodes: set[str] | None) -> list[tuple[str, int, int, str, str]]:
    """Of each module of instructions: forms and opcodes, and those of both that were executed."""
    forms: dict[str, int] = defaultdict(int)
    known: dict[str, set[str]] = defaultdict(set)
    for form in FORMS:
        forms[_family(form.handler.__module__)] += 1
        known[_family(form.handler.__module__)] |= set(expand(form.text))
    run_forms: dict[str, set[str]] = defaultdict(set)
    run_opcodes: dict[str, set[str]] = defaultdict(set)
    for opcode in opcodes or ():
        try:
            form, _ = find(opcode)
        except PtxError:
            continue  # a recording of other code than this
        run_forms[_family(form.handler.__module__)].add(form.text)
        run_opcodes[_family(form.handler.__module__)].add(opcode)
    unknown = opcodes is None
    return [
        (
            name,
            forms[name],
            len(known[name]),
            "-" if unknown else str(len(run_forms[name])),
            "-" if unknown else str(len(run_opcodes[name])),
        )
        for name in sorted(forms)
    ]


def _family(module: str) -> str:
    name = module.split(".")[-1]
    return "without effect" if name == "forms" else name


def attention_seconds(arch: int, times: int = 3) -> float:
    """The shortest of `times` runs of attention forward of one head, races checked."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, _T, _D).bfloat16() for _ in range(3))
    seconds = []
    for _ in range(times):
        with emulated(arch, checks=True) as launches:
            attention_fwd(q, k, v, causal=True)
        seconds.append(sum(launch.run_seconds for launch in launches))
    return min(seconds)


def table(executed: Executed | None) -> str:
    """All but the seconds, as lines."""
    row = "{:18s} {:>6} {:>8} {:>15} {:>17}"
    rows = families(None if executed is None else executed.opcodes)
    out = [row.format("family", "forms", "opcodes", "forms executed", "opcodes executed")]
    out += [row.format(*columns) for columns in rows]
    sums = [sum(columns[i] for columns in rows) for i in (1, 2)]
    runs = ["-"] * 2
    if executed is not None:
        runs = [str(sum(int(columns[i]) for columns in rows)) for i in (3, 4)]
    out += [row.format("all", *sums, *runs), ""]
    if executed is None:
        out.append(f"not measured: pytest tests/ptx --ptx-coverage {COVERAGE.relative_to(ROOT)}")
    else:
        out += [
            f"tests                       {executed.tests} run, {executed.failed} failed",
            f"planted bugs                {executed.found} found of {executed.planted} tests",
            f"correct kernels             {len(executed.kernels)} run,"
            f" {len(executed.false_alarms)} false alarms",
            *(f"  {name}" for name in executed.false_alarms),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in COMPILERS.items())
    out += ["", f"mutants found (at least), of those made, as recorded with {versions}"]
    out += [f"  {name:34s} {found:3d} of {made:3d}" for name, (found, made) in FLOORS.items()]
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--coverage", type=Path, metavar="FILE", default=COVERAGE)
    file = parser.parse_args(arguments).coverage
    print(table(read(file.read_text().splitlines()) if file.exists() else None))
    print(f"\nattention forward, T {_T}, D {_D}, one head, causal, checks on, best of 3")
    for arch, name in ((80, "sm_80"), (90, "sm_90a")):
        print(f"  {name:8s} {attention_seconds(arch):.2f} s", flush=True)


if __name__ == "__main__":
    main()
