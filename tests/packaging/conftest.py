"""Copies of the source tree and virtual environments for the packaging tests to break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
_NOT_SOURCE = (".*cache*", ".git", ".hypothesis", ".venv", "*.egg-info", "*.so", "__pycache__")
_NOT_SOURCE += ("build", "dist", "runs")

Run = Callable[..., subprocess.CompletedProcess[str]]


# Files whose tests share a build, and hence a worker.
_GROUPS = {"test_install": "wheel", "test_library": "wheel", "test_sanitizers": "sanitizers"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem in _GROUPS:
            item.add_marker(pytest.mark.xdist_group(_GROUPS[item.path.stem]))


@pytest.fixture(scope="session")
def run() -> Run:
    """run(*command, cwd=..., **environment): no FASTFORMER_ variable leaks in, None removes one."""

    def _run(
        *command: str | Path, cwd: Path = ROOT, **changes: str | Path | None
    ) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTFORMER_", "PYTEST_"))}
        env |= {k: str(v) for k, v in changes.items()}
        for name in (k for k, v in changes.items() if v is None):
            del env[name]
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=env, text=True, capture_output=True
        )

    return _run


@pytest.fixture(scope="session")
def copy_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a fresh, never built copy of the source tree."""

    def _copy() -> Path:
        target = tmp_path_factory.mktemp("checkout") / "fastformer-source"
        return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*_NOT_SOURCE)))

    return _copy


@pytest.fixture(scope="session")
def make_venv(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Callable[..., Path]:
    """Make an environment with the packages of this one, or only those named; return its python.

    A line in a .pth file makes a folder importable without the .pth files in it, so that an
    editable install of fastformer in the environment of the tests stays invisible.
    """

    def _make(only: tuple[str, ...] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("venv")
        made = run(sys.executable, "-m", "venv", "--without-pip", folder)
        assert made.returncode == 0, made.stderr
        python = folder / "bin" / "python"
        target = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        packages = Path(target.stdout.strip())
        if only is None:
            (packages / "packages_of_the_tests.pth").write_text(f"{SITE_PACKAGES}\n")
        for name in only or ():
            (packages / name).symlink_to(SITE_PACKAGES / name)
        return python

    return _make


@pytest.fixture(scope="session")
def wheel(run: Run, copy_checkout: Callable[[], Path]) -> Path:
    """Built as a user builds it: under pip's build isolation, with torch in the environment."""
    checkout = copy_checkout()
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", "dist")
    result = run(*pip, cwd=checkout, FASTFORMER_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def built_checkout(wheel: Path) -> Path:
    """The checkout of the wheel, with the library in place and all objects in `build`."""
    checkout = wheel.parent.parent
    (library,) = checkout.glob("build/lib*/fastformer/_C.so")
    shutil.copyfile(library, checkout / "fastformer/_C.so")
    return checkout
