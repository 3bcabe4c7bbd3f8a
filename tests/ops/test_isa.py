"""The tests of the CPU kernels once more for every instruction set but the one in use here.

A process has one instruction set, chosen when the first kernel runs, so each gets a process. Matrix
products are ours there, whatever would be the faster ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer import _library

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("default", "avx2", "avx512", "avx512bf16")
CHOSEN = "cpu-cpu or test_fuzz or test_raw or (test_gemm and not pass_their_tests)"
IN_USE = "from fastformer import _library; print(_library.build_info()['cpu_isa'])"


def python(isa, *arguments):
    # What pytest-xdist tells its workers is not meant for a pytest of its own.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env | {"FASTFORMER_CPU_ISA": isa, "FASTFORMER_CPU_GEMM": "own"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))
@pytest.mark.parametrize("isa", ISAS)
def test_the_ops_pass_their_tests(isa):
    if _library.build_info()["cpu_isa"] == isa:
        pytest.skip(f"{isa} is in use here: the other tests are its tests")
    if python(isa, "-c", IN_USE).stdout.split() != [isa]:
        pytest.skip(f"this machine has no {isa}")
    pytest_here = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
    result = python(isa, *pytest_here, "-k", CHOSEN, "tests/ops")
    assert result.returncode == 0 and " passed" in result.stdout, f"{isa}:\n{result.stdout}"
