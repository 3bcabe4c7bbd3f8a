"""Builds tests/native/module.cpp, once for all workers of a test run and for the runs after it.

The library itself stays free of Python's C API, and what its users do not need stays out of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("module.cpp")
CACHE = ROOT / "build" / "native"
INCLUDE = Path(sysconfig.get_path("include"))
# Optimising would double the time, for functions that take none.
FLAGS = ("-std=c++17", "-O0", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def why_not() -> str | None:
    """Why the module cannot be built here, or None."""
    compiler = _compiler()[0]
    if shutil.which(compiler) is None:
        return f"needs the C++ compiler {compiler!r}: install g++ or set CXX"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11: pip install pybind11"
    if not (INCLUDE / "Python.h").is_file():
        return f"needs Python.h in {INCLUDE}: install Python's development files"
    return None


def build() -> Path:
    """Compile unless an earlier call has; return the library."""
    import pybind11

    command = [*_compiler(), *FLAGS, f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", pybind11.get_include(), "-isystem", str(INCLUDE), str(SOURCE)]
    digest = hashlib.sha256(repr((command, pybind11.__version__)).encode())
    for path in (SOURCE, *sorted((ROOT / "csrc").rglob("*.h"))):
        digest.update(path.read_bytes())
    library = CACHE / f"native-{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait for the first
        if not library.exists():
            unfinished = library.with_suffix(".part")
            command += ["-o", str(unfinished)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
            os.replace(unfinished, library)
    return library


def load() -> ModuleType:
    """The module; raises RuntimeError with the compiler's words where it does not compile."""
    spec = importlib.util.spec_from_file_location("native", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
