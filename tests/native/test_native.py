"""The module that the tests build: when it is built, and limits that Python and C++ both state."""

from __future__ import annotations

import subprocess

import pytest

from fastformer.ops.attention import _CUDA_MAX_QUERIES
from fastformer.ops.layer_norm import _CUDA_MAX_COLS
from tests.native import build


def test_python_knows_the_limits_of_the_kernels(native):
    assert native.attention_decode.max_queries == _CUDA_MAX_QUERIES
    assert native.layer_norm.max_cols == _CUDA_MAX_COLS


def test_what_is_built_is_built_once(native, monkeypatch):
    def compile_again(*args, **kwargs):
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(subprocess, "run", compile_again)
    assert build.build().is_file()


def test_without_a_compiler_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -O1")
    assert "'no-such-c++'" in build.why_not()


def test_what_does_not_compile_raises_the_words_of_the_compiler(native, monkeypatch, tmp_path):
    (tmp_path / "broken.cpp").write_text("#error broken\n")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "broken.cpp")
    monkeypatch.setattr(build, "CACHE", tmp_path)
    with pytest.raises(RuntimeError, match="#error broken"):
        build.load()
    assert not list(tmp_path.glob("*.so"))
