"""Find what is not beside this package when it is imported straight from a source checkout.

With the repository root first on sys.path (`python -m pytest` does that) the Triton kernels are in
../kernels, and after a plain `pip install .` the compiled library is in site-packages. setup.py
runs this file too, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


class _KernelsFinder:
    """Maps fastformer.kernels to ../kernels, before finders that know of another checkout."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        init = ROOT / "kernels" / "__init__.py"
        if name != "fastformer.kernels" or not init.is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, init, submodule_search_locations=[str(init.parent)]
        )


def install_finder() -> None:
    """Make `import fastformer.kernels` work in a checkout."""
    if not (PACKAGE / "kernels").is_dir() and _KernelsFinder not in sys.meta_path:
        sys.meta_path.insert(0, _KernelsFinder)


def library_path() -> Path | None:
    """The compiled library beside this package, else that of an installed copy on sys.path."""
    folders = [PACKAGE, *(Path(entry or ".").resolve() / "fastformer" for entry in sys.path)]
    return next((path for f in folders if (path := f / "_C.so").is_file()), None)


def source_hash(root: Path = ROOT) -> str | None:
    """A short hash of the C++ and CUDA sources under `root`, None where there are none."""
    files = sorted(
        path
        for path in (root / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".cuh", ".h") and path.is_file()
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12] if files else None


def version() -> str:
    """The version of the installed distribution, else the one pyproject.toml states."""
    try:
        return importlib.metadata.version("fastformer")
    except importlib.metadata.PackageNotFoundError:
        stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
        return stated[1] if stated else "unknown"
