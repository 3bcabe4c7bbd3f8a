"""Writes what the kernels need of a GPU: golden files for the tests, docs/kernels.md for people.

    python -m tests.ptx.report

A golden file belongs to one version of a compiler, so that a new one is a new file and no noise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from tests.ptx import nvcc
from tests.ptx.cases import Case
from tests.ptx.corpus_cases import CORPUS
from tests.ptx.library_cases import LIBRARY
from tests.ptx.resources import Resources
from tests.ptx.triton_compile import ROOT

FOLDER = Path(__file__).parent / "golden"
TABLE = ROOT / "docs" / "kernels.md"

_HEAD = """# What the GPU kernels need

Read from the machine code, without a GPU. Written by `python -m tests.ptx.report`; the tests say
where it is no longer so. Registers, stack and spills are per thread; blocks are those that a
multiprocessor holds at the same time, and what limits them.

"""


def golden_file(compiler: str) -> Path:
    version = triton.__version__ if compiler == "triton" else nvcc.version()
    return FOLDER / f"{compiler}-{version}.json"


def entry(record: Resources) -> dict[str, Any]:
    """A record as JSON has it."""
    values = dataclasses.asdict(record)
    del values["warnings"]
    return json.loads(json.dumps(values, sort_keys=True))


def differences(record: Resources, golden: dict[str, Any]) -> list[str]:
    """What a record and its entry in the golden file disagree on, a line each."""
    now = entry(record)
    return [
        f"{name}: {now.get(name)}, golden file: {golden.get(name)}"
        for name in sorted(now.keys() | golden.keys())
        if now.get(name) != golden.get(name)
    ]


def collect(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """The entries of all launches of these cases."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        for record in case.records():
            if case.key(record) in found:
                raise ValueError(f"{case.key(record)} is launched twice: give it two cases")
            found[case.key(record)] = entry(record)
    return found


def markdown(entries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A row for each entry, which comes with what it was compiled for."""
    head = ["kernel", "compiled for", "GPU", "threads", "registers", "stack", "spills"]
    head += ["shared memory", "blocks"]
    rows = [head, ["-" * len(name) for name in head]]
    for inputs, e in entries:
        rows.append(
            [
                f"`{e['name']}`",
                inputs,
                f"sm_{e['arch']}",
                str(e["threads"]),
                str(e["registers"]),
                f"{e['stack_bytes']} B",
                str(e["counts"].get("spills", 0)),
                f"{e['shared_bytes']} B",
                f"{e['blocks_per_sm']} ({e['limited_by']})",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)) + " |"
        for row in rows
    )


def table(golden: dict[str, dict[str, Any]], cases: Iterable[Case]) -> str:
    """docs/kernels.md, from the entries of the library's kernels."""
    by_id = {case.id: case for case in cases}
    chosen = [(by_id[name], golden[key]) for key in golden if (name := key.split("/")[0]) in by_id]
    chosen.sort(key=lambda one: (one[0].compiler, one[0].name, one[1]["name"], one[0].arch))
    return _HEAD + markdown([(case.inputs or case.name, e) for case, e in chosen]) + "\n"


def write(cases: Sequence[Case] = (*LIBRARY, *CORPUS)) -> None:
    """Compile these cases, write a golden file per compiler and the table of the library."""
    everything: dict[str, dict[str, Any]] = {}
    FOLDER.mkdir(exist_ok=True)
    for compiler in sorted({case.compiler for case in cases}):
        found = collect(case for case in cases if case.compiler == compiler)
        path = golden_file(compiler)
        path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(found)} kernels")
        everything |= dict(sorted(found.items()))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(everything, LIBRARY))
    print(TABLE.relative_to(ROOT))


if __name__ == "__main__":
    write()
