"""Every way to install, or not to, and from where it is then imported."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

LOOK = """
import fastformer, fastformer.kernels, torch
from fastformer import _library
from fastformer.ops.dropout import dropout_mask
dropout_mask(3, 5, 0.5, torch.tensor([1, 2]))
print(fastformer.__file__, fastformer.kernels.__file__, _library.LOADED, sep="\\n")
"""

QUICK_TEST = """
import fastformer.kernels
from fastformer import _library
def test_library():
    assert _library.LOADED is not None, _library.WHY_NOT
"""


def look(run, python: Path, cwd: Path) -> list[str]:
    result = run(python, "-c", LOOK, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def python_with_wheel(run, make_venv, wheel) -> Path:
    python = make_venv()
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    result = run(*pip)
    assert result.returncode == 0, result.stdout + result.stderr
    return python


def test_never_built_checkout_imports(run, copy_checkout, make_venv) -> None:
    checkout = copy_checkout()
    assert look(run, make_venv(), checkout) == [
        str(checkout / "fastformer/__init__.py"),
        str(checkout / "kernels/__init__.py"),
        "None",
    ]


def test_top_level_kernels_is_not_ours(run, tmp_path) -> None:
    """In a checkout `import kernels` gives the package of that name, or an empty one."""
    look = "import kernels; print(kernels.__version__); from kernels import get_kernel"
    result = run(sys.executable, "-c", look, PYTHONPATH=CHECKOUT)
    assert result.stdout == "0\n" and "ImportError: cannot import name" in result.stderr
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9'; get_kernel = print")
    result = run(sys.executable, "-c", look, PYTHONPATH=f"{CHECKOUT}:{tmp_path}")
    assert (result.stdout, result.stderr) == ("9\n", "")


@pytest.mark.slow
def test_wheel_fits_every_python_and_holds_only_the_package(wheel) -> None:
    assert wheel.name.startswith("fastformer-") and "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"fastformer/_C.so", "fastformer/kernels/__init__.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastformer"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Dist: torch>=2.11" in metadata


@pytest.mark.slow
def test_installed_wheel_is_imported_from_anywhere(run, python_with_wheel, tmp_path) -> None:
    package = next((python_with_wheel.parent.parent / "lib").glob("*/site-packages/fastformer"))
    assert look(run, python_with_wheel, tmp_path) == [
        str(package / "__init__.py"),
        str(package / "kernels/__init__.py"),
        str(package / "_C.so"),
    ]


@pytest.mark.slow
def test_installed_wheel_under_pytest_in_a_checkout(run, python_with_wheel, copy_checkout) -> None:
    checkout = copy_checkout()
    package = next((python_with_wheel.parent.parent / "lib").glob("*/site-packages/fastformer"))
    assert look(run, python_with_wheel, checkout) == [
        str(checkout / "fastformer/__init__.py"),
        str(checkout / "kernels/__init__.py"),
        str(package / "_C.so"),
    ]
    (checkout / "tests/test_quick.py").write_text(QUICK_TEST)
    result = run(python_with_wheel, "-m", "pytest", "-q", "tests/test_quick.py", cwd=checkout)
    assert "1 passed" in result.stdout, result.stdout


@pytest.mark.slow
def test_editable_install(run, copy_checkout, make_venv, tmp_path) -> None:
    checkout, python = copy_checkout(), make_venv()
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps")
    settings = {"FASTFORMER_CUDA": "0", "CXXFLAGS": "-O0", "FASTFORMER_CPU_ISAS": "default"}
    result = run(*pip, "--no-build-isolation", "-e", checkout, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert look(run, python, tmp_path) == [
        str(checkout / "fastformer/__init__.py"),
        str(checkout / "kernels/__init__.py"),
        str(checkout / "fastformer/_C.so"),
    ]
