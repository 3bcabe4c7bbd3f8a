"""setup.py: what it builds under which setting, and what it says when it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
BUILD_INFO = (
    "from fastformer import _library as lib; print(lib.build_info() if lib.LOADED else lib.WHY_NOT)"
)

# A fraction of the time of a build, where only the building is looked at.
QUICKLY = {"CXXFLAGS": "-O0", "FASTFORMER_CPU_ISAS": "default"}
QUICKLY["NVCC_APPEND_FLAGS"] = "-Xptxas -O0"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def complaint(result) -> str:
    """The one line that a failed build says at the end."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    return result.stderr.splitlines()[-1]


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """A CUDA toolkit whose compiler makes empty objects, for sm_80 alone."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    subprocess.run(["ar", "rcs", home / "lib64/libcudart_static.a"], check=True)
    (home / "bin/nvcc").write_text(
        "#!/bin/sh\n"
        "case $* in *compute_90a*) echo 'dropout.cu(1): error: broken' >&2; exit 1;; esac\n"
        "for out; do :; done; g++ -x c++ -c /dev/null -o $out\n"
    )
    (home / "bin/nvcc").chmod(0o755)
    return home


def test_without_torch_says_install_torch_first(run, copy_checkout, make_venv, tmp_path) -> None:
    python = make_venv(only=("setuptools", "_distutils_hack"))
    result = run(python, *BUILD, cwd=copy_checkout(), HOME=tmp_path, VIRTUAL_ENV=None)
    assert complaint(result).startswith(
        "fastformer: no torch >= 2.11 found to build against; install torch first"
    )


def test_old_torch_is_named(run, copy_checkout, tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.4.1+cpu'\n")
    result = run(
        sys.executable, *BUILD, cwd=copy_checkout(), FASTFORMER_TORCH_DIR=tmp_path / "torch"
    )
    assert "torch 2.4.1+cpu" in complaint(result)
    assert "is too old" in complaint(result)


def test_settings_that_cannot_be_met_are_named(run, copy_checkout, fake_nvcc, tmp_path) -> None:
    checkout = copy_checkout()

    def said(**environment) -> str:
        return complaint(run(sys.executable, *BUILD, cwd=checkout, **environment))

    assert "C++ compiler 'no-such-c++' was not found; install g++" in said(CXX="no-such-c++")
    assert "nvcc was not found; set CUDA_HOME" in said(FASTFORMER_CUDA="1", CUDA_HOME=tmp_path)
    assert "FASTFORMER_CUDA must be auto, 0 or 1, got 'yes'" in said(FASTFORMER_CUDA="yes")
    assert "\"80 90a\", got 'hopper'" in said(CUDA_HOME=fake_nvcc, FASTFORMER_CUDA_ARCHS="hopper")
    assert 'must be some of "default' in said(FASTFORMER_CUDA="0", FASTFORMER_CPU_ISAS="avx9")


def test_source_that_does_not_compile(run, copy_checkout, fake_nvcc) -> None:
    checkout = copy_checkout()
    settings = {"CUDA_HOME": fake_nvcc, "FASTFORMER_CUDA_ARCHS": "90a", **QUICKLY}
    result = run(sys.executable, *BUILD, cwd=checkout, FASTFORMER_CUDA="1", **settings)
    assert "error: broken" in result.stdout + result.stderr
    assert "FASTFORMER_CUDA=0 leaves out the CUDA kernels" in complaint(result)

    (checkout / "csrc/cpu/dropout.cpp").write_text("#error broken\n")
    result = run(sys.executable, *BUILD, cwd=checkout, FASTFORMER_CUDA="0", **QUICKLY)
    assert "#error broken" in result.stdout + result.stderr
    assert complaint(result).startswith("fastformer: compilation failed")
    assert "FASTFORMER_CUDA=0" not in complaint(result)


@pytest.mark.slow
def test_the_rest_goes_on_without_what_does_not_compile(
    run, copy_checkout, fake_nvcc, tmp_path
) -> None:
    """A GPU's architecture, then all of CUDA, then an instruction set."""
    checkout = copy_checkout()

    def built(**settings) -> tuple[str, bytes]:
        result = run(sys.executable, *BUILD, cwd=checkout, CUDA_HOME=fake_nvcc, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, (checkout / "fastformer/_C.so").read_bytes()

    said, library = built(FASTFORMER_CUDA_ARCHS="80 90a", **QUICKLY)
    assert "going on without kernels for sm_90a, which do not compile" in said
    assert b"cuda_archs=80" in library
    said, library = built(FASTFORMER_CUDA_ARCHS="90a", **QUICKLY)
    assert "going on without kernels for sm_90a, " in said
    assert b"cuda_archs=none" in library

    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase $* in *-mavx2*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    isas = {**QUICKLY, "FASTFORMER_CPU_ISAS": "avx2"}
    said, _ = built(FASTFORMER_CUDA="0", CXX=compiler, **isas)
    assert "going on without kernels for avx2, " in said


def test_job_count_and_architectures(run) -> None:
    look = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None\n"
        "m = runpy.run_path('setup.py'); print(m['job_count'](), m['cuda_archs']())"
    )
    result = run(sys.executable, "-c", look, MAX_JOBS="3", FASTFORMER_CUDA_ARCHS="8.0;90a, 100a")
    assert result.stdout.strip() == "3 ['80', '90a', '100a']"


def test_skip_ext_builds_nothing(run, copy_checkout) -> None:
    checkout = copy_checkout()
    assert run(sys.executable, *BUILD, cwd=checkout, FASTFORMER_SKIP_EXT="1").returncode == 0
    assert not list(checkout.rglob("*.so"))


@pytest.mark.slow
def test_without_ninja_threads_compile(run, copy_checkout, make_venv, tmp_path) -> None:
    checkout, compiler = copy_checkout(), shutil.which("g++")
    for tool in ("as", "ld"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    torch = run(sys.executable, "-c", "import torch; print(torch.__path__[0])").stdout.strip()
    python = make_venv(only=("setuptools", "_distutils_hack"))
    settings = {"PATH": tmp_path, "CXX": compiler, "FASTFORMER_TORCH_DIR": torch}
    result = run(python, *BUILD, cwd=checkout, FASTFORMER_CUDA="0", **settings, **QUICKLY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(checkout.rglob("build.ninja"))
    assert (checkout / "fastformer/_C.so").is_file()


@needs_nvcc
@pytest.mark.slow
def test_one_tree_builds_with_and_without_cuda(run, copy_checkout, make_venv) -> None:
    checkout, python = copy_checkout(), make_venv()
    archs = {"FASTFORMER_CUDA_ARCHS": "90a"}
    for settings, expected in (
        ({"FASTFORMER_CUDA": "1", **archs}, "'cuda_archs': '90a'"),
        ({"FASTFORMER_CUDA": "0"}, "'cuda_archs': 'none'"),
        ({"FASTFORMER_CUDA": "auto", **archs}, "'cuda_archs': '90a'"),
    ):
        result = run(python, *BUILD, cwd=checkout, **settings, **QUICKLY)
        assert result.returncode == 0, result.stdout + result.stderr
        assert expected in run(python, "-c", BUILD_INFO, cwd=checkout).stdout


def test_flags_of_the_environment_come_last(run) -> None:
    look = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None\n"
        "print(runpy.run_path('setup.py')['CXX_FLAGS'][-2:])"
    )
    result = run(sys.executable, "-c", look, CXXFLAGS="-O0 '-DA=\"b c\"'")
    assert result.stdout.strip() == str(["-O0", '-DA="b c"'])
