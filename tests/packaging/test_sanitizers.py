"""The CPU kernels pass the tests of the ops under the address and undefined-behaviour sanitizers.

The best instruction set passes all of them, the most general one, whose code differs most, those
that search for the unexpected.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer import _library

SANITIZERS = ("asan", "ubsan")
SETTINGS = {
    # Python leaks on purpose.
    "ASAN_OPTIONS": "detect_leaks=0",
    "FASTFORMER_CPU_CACHE": "0",  # each result in a block of its own, whose ends are watched
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "FASTFORMER_CPU_GEMM": "own",
    "OMP_NUM_THREADS": "1",
}
SEARCHING = "test_fuzz or test_raw or (test_gemm and not pass_their_tests)"
# What stands between a report's first frames, which are ours, and the next thing it says.
FOREIGN_FRAME = re.compile(r"\s+#\d+ .* in (?!.*csrc/)")


def runtime(name: str) -> Path | None:
    """The sanitizer's runtime that belongs to the compiler; the bare name means it has none."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, f"-print-file-name=lib{name}.so"]
    try:
        path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    except FileNotFoundError:
        return None
    return path if path.is_absolute() and path.exists() else None


@pytest.fixture(scope="module")
def instrumented(run, copy_checkout) -> Path:
    """A checkout whose library is built with both sanitizers."""
    missing = [name for name in SANITIZERS if runtime(name) is None]
    if missing:
        pytest.skip(f"the C++ compiler has no lib{', lib'.join(missing)}")
    checkout = copy_checkout()
    build = ("setup.py", "--quiet", "build_ext", "--inplace")
    settings = {"FASTFORMER_CUDA": "0", "FASTFORMER_SANITIZE": "address,undefined"}
    settings["FASTFORMER_CPU_ISAS"] = _library.build_info()["cpu_isa"] if _library.LOADED else ""
    result = run(sys.executable, *build, cwd=checkout, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    symbols = run("nm", "-D", "--undefined-only", checkout / "fastformer/_C.so").stdout
    assert "__asan_report" in symbols and "__ubsan_handle" in symbols
    return checkout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "tests"),
    [("", f"cpu-cpu or {SEARCHING}"), ("default", SEARCHING)],
    ids=["best", "default"],
)
def test_no_sanitizer_complains(run, instrumented, make_venv, isa, tests) -> None:
    environment = SETTINGS | {"LD_PRELOAD": " ".join(str(runtime(name)) for name in SANITIZERS)}
    environment["FASTFORMER_CPU_ISA"] = isa
    # -s: a sanitizer ends the process, and with it what pytest has captured.
    pytest_there = ("-m", "pytest", "-sv", "--no-header", "-p", "no:cacheprovider")
    selected = ("-k", tests, "tests/ops")
    result = run(make_venv(), *pytest_there, *selected, cwd=instrumented, **environment)
    lines = (result.stdout + result.stderr).splitlines()
    told = "\n".join([line for line in lines if not FOREIGN_FRAME.match(line)][-60:])
    assert result.returncode == 0 and " passed" in result.stdout, told
