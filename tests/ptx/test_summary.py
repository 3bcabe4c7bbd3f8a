"""The figures of summary.py, from recordings of which it is known what they should give."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton, whose kernels are timed")

from tests.ptx import summary
from tests.ptx.emulator.forms import FORMS, find
from tests.ptx.one_instruction import expand
from tests.ptx.triton_compile import ROOT

RECORDED = """
import pytest
from tests.ptx.emulator import PtxError
from tests.ptx.one_instruction import run
import numpy as np

A = np.arange(4, dtype=np.uint32)

def test_correct():
    run("xor.b32 d, a, 1;", a=A, d=np.uint32)

def test_correct_again():
    run("xor.b32 d, a, 1;", a=A, d=np.uint32)

@pytest.mark.planted_bug
def test_found():
    with pytest.raises(PtxError):
        run("addc.u32 d, a, a;", a=A, d=np.uint32)

@pytest.mark.planted_bug
def test_missed():
    with pytest.raises(PtxError):
        run("add.u32 d, a, a;", a=A, d=np.uint32)

def test_false_alarm():
    run("popc.b32 d, a; addc.u32 d, a, a;", a=A, d=np.uint32)
"""


def line(test: str, outcome: str = "passed", **changes: object) -> str:
    plain = {"planted": False, "ptx_error": False, "opcodes": [], "kernels": []}
    return json.dumps({"test": test, "outcome": outcome, **plain, **changes})


def test_what_counts():
    found = summary.read(
        [
            line("tests/ptx/test_a.py::a", opcodes=["not.b32"], kernels=["1", "2"]),
            line("tests/ptx/test_a.py::b", opcodes=["not.b32", "clz.b32"], kernels=["2"]),
            line("tests/ptx/test_a.py::c", opcodes=["shl.b32"], kernels=["7"]),
            line("tests/ptx/test_a.py::c", "failed", opcodes=["brev.b32"], kernels=["3"]),
            line("tests/ptx/test_a.py::d", "failed", ptx_error=True),
            line("tests/ptx/test_a.py::e", "skipped"),
            line("tests/ptx/test_a.py::f", planted=True, kernels=["4"]),
            line("tests/ptx/test_a.py::g", "failed", planted=True, ptx_error=True),
            line("tests/ptx/test_conformance.py::h", opcodes=["popc.b32"], kernels=["5"]),
            line("tests/ptx/test_mutations.py::i", opcodes=["bra"], kernels=["6"]),
        ]
    )
    assert found.opcodes == {"not.b32", "clz.b32", "bra"}
    assert found.kernels == {"1", "2"}
    assert (found.found, found.planted) == (1, 2)
    assert found.false_alarms == ["tests/ptx/test_a.py::d"]
    assert (found.tests, found.failed) == (7, 3)


def test_families():
    rows = {row[0]: row[1:] for row in summary.families({"not.b32", "not.b16", "mov.b32"})}
    assert rows["logic"][2:] == ("1", "2") and rows["move"][2:] == ("1", "1")
    assert rows["mma"][2:] == ("0", "0")
    assert sum(row[0] for row in rows.values()) == len(FORMS)
    assert {row[2:] for row in [r[1:] for r in summary.families(None)]} == {("-", "-")}


def test_expanded_opcodes_are_those_that_are_taken():
    """A sample of each form: what it expands to is its own, or that of one before it."""
    for form in FORMS:
        expanded = expand(form.text)
        assert len(expanded) > 0
        for opcode in expanded[:: max(1, len(expanded) // 20)]:
            assert find(opcode)[0].base == form.base


def test_a_recording(tmp_path):
    """Of tests that pass and fail, by pytest itself."""
    folder = tmp_path / "test_recorded.py"
    folder.write_text(RECORDED)
    file = tmp_path / "coverage.jsonl"
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={ROOT}"]
    command += ["-p", "tests.ptx.conftest", f"--ptx-coverage={file}", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    found = summary.read(file.read_text().splitlines())
    assert (found.found, found.planted) == (1, 2), result.stdout
    assert [name.split("::")[-1] for name in found.false_alarms] == ["test_false_alarm"]
    assert len(found.kernels) == 1  # twice the same
    assert "xor.b32" in found.opcodes
    assert not {"addc.u32", "add.u32", "popc.b32"} & found.opcodes


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(summary, "attention_seconds", lambda arch: arch / 100)
    file = tmp_path / "coverage.jsonl"
    summary.main(["--coverage", str(file)])
    assert "not measured" in capsys.readouterr().out
    file.write_text(line("test_a.py::a", planted=True, opcodes=["not.b32"]) + "\n")
    summary.main(["--coverage", str(file)])
    out = capsys.readouterr().out
    assert "1 found of 1 tests" in out and "0 false alarms" in out
    assert "sm_90a   0.90 s" in out and "13 of  19" in out
