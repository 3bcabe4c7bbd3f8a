"""How cuBLASLt is called for the feed-forward layer, on a recorder of the calls in its place.

The recorder has the documented interface and rules of the library; what it was asked to compute is
computed here in float64, and compared with the layer.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastformer
from fastformer import _library
from fastformer.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("gcc")), reason="needs gcc and g++"
)
BF16, F16 = torch.bfloat16, torch.float16
CUDA_TYPES = {14: BF16, 2: F16}
N, C, HIDDEN, C_OUT = 5, 12, 16, 10
STREAM, WORKSPACE, DEVICE = 0x5000, 0x7000, 3
GELU_AUX, GELU_AUX_BIAS, DGELU_BGRAD, BGRADB = 160, 164, 208, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cublaslt")
    shared = ["-shared", "-fPIC", "-Wall", "-Werror"]
    soname = "-Wl,-soname,libcublasLt.so.test"
    recorder = ["gcc", *shared, soname, str(HERE / "fake_cublaslt.c")]
    subprocess.run([*recorder, "-o", str(folder / "recorder.so")], check=True)
    sources = [str(HERE / "cublaslt_calls.cpp"), str(ROOT / "csrc/cuda/cublaslt.cpp")]
    calls = ["g++", "-std=c++17", *shared, f"-I{ROOT / 'csrc'}", *sources, "-ldl"]
    subprocess.run([*calls, "-o", str(folder / "calls.so")], check=True)
    empty = ["gcc", *shared, "-x", "c", os.devnull, "-o", str(folder / "empty.so")]
    subprocess.run(empty, check=True)
    return folder


class Memory(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("asked", ctypes.c_size_t))


class Library:
    """CublasLt of csrc/cuda/cublaslt.h on the libraries of these names."""

    def __init__(self, folder, first="recorder.so", second="recorder.so"):
        self.calls = ctypes.CDLL(str(folder / "calls.so"))
        self.calls.cublaslt_open.restype = ctypes.c_void_p
        self.calls.cublaslt_missing.restype = ctypes.c_char_p
        names = (os.fsencode(folder / n if n.endswith(".so") else n) for n in (first, second))
        self.self = ctypes.c_void_p(self.calls.cublaslt_open(*names))
        self.memory, self.error = Memory(WORKSPACE, 0), ""

    def missing(self):
        return self.calls.cublaslt_missing(self.self).decode()

    def description(self):
        words = ctypes.create_string_buffer(1024)
        self.calls.cublaslt_description(self.self, words, ctypes.c_size_t(len(words)))
        return words.value.decode()

    def multiply(self, which, *tensors, device=DEVICE):
        """True, False, or None for an error, whose words are in `error`."""
        sizes = (ctypes.c_int64 * 4)(N, C, HIDDEN, C_OUT)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        words = ctypes.create_string_buffer(1024)
        answer = self.calls.cublaslt_multiply(
            self.self,
            which,
            sizes,
            int(tensors[0].dtype == BF16),
            (ctypes.c_void_p * len(pointers))(*pointers),
            device,
            ctypes.c_void_p(STREAM),
            ctypes.byref(self.memory),
            words,
            ctypes.c_size_t(len(words)),  # an int would leave half of it undefined
        )
        self.error = words.value.decode()
        return {1: True, 0: False, -1: None}[answer]


@pytest.fixture
def recorder(folder):
    recorder = ctypes.CDLL(str(folder / "recorder.so"))
    recorder.fake_record.restype = ctypes.c_char_p
    recorder.fake_answer.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    recorder.fake_reset()
    return recorder


@pytest.fixture
def library(folder, recorder):
    return Library(folder)


def record(recorder):
    """The last product that was enqueued, None if there was none."""
    text = recorder.fake_record().decode()
    return json.loads(text) if text else None


def matrix(asked, name, transposed=False):
    """op(A) or op(B) in float64, from the memory and the layout that the call names."""
    pointer, kind, rows, cols, ld = asked[name]
    memory = (ctypes.c_int16 * (ld * (cols - 1) + rows)).from_address(pointer)
    bits = torch.from_numpy(np.frombuffer(memory, np.int16).copy())
    found = bits.as_strided((rows, cols), (1, ld)).view(CUDA_TYPES[kind]).double()
    return found.t() if transposed else found


def product(asked):
    """op(A) op(B), which cuBLASLt counts by columns; as rows it is the transpose."""
    a = matrix(asked, "a", asked["transa"] == 1)
    b = matrix(asked, "b", asked["transb"] == 1)
    return (a @ b).t()


def draw(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", CUDA_TYPES.values(), ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_hidden(library, recorder, dtype, has_bias):
    x, w1 = draw(N, C, dtype=dtype), draw(HIDDEN, C, dtype=dtype)
    b1 = draw(HIDDEN, dtype=dtype) if has_bias else None
    pre, hidden = draw(N, HIDDEN, dtype=dtype), draw(N, HIDDEN, dtype=dtype)
    assert library.multiply(0, x, w1, b1, pre, hidden)
    asked = record(recorder)
    torch.testing.assert_close(product(asked), F.linear(x.double(), w1.double()))
    assert asked["epilogue"] == (GELU_AUX_BIAS if has_bias else GELU_AUX)
    assert asked["bias"] == (b1.data_ptr() if has_bias else 0)
    # As many rows as out has; the bias is one number for each.
    assert asked["d"] == [hidden.data_ptr(), asked["d"][1], HIDDEN, N, HIDDEN]
    assert (asked["aux"], asked["aux_ld"]) == (pre.data_ptr(), HIDDEN)


@pytest.mark.parametrize("dtype", CUDA_TYPES.values(), ids=str)
def test_gradient_of_the_pre_activation(library, recorder, dtype):
    grad, w2, pre = (draw(*s, dtype=dtype) for s in ((N, C_OUT), (C_OUT, HIDDEN), (N, HIDDEN)))
    grad_pre, grad_b1 = draw(N, HIDDEN, dtype=dtype), draw(HIDDEN, dtype=dtype)
    assert library.multiply(1, grad, w2, pre, grad_pre, grad_b1)
    asked = record(recorder)
    torch.testing.assert_close(product(asked), grad.double() @ w2.double())
    assert asked["epilogue"] == DGELU_BGRAD
    assert asked["d"] == [grad_pre.data_ptr(), asked["d"][1], HIDDEN, N, HIDDEN]
    assert asked["bias"] == grad_b1.data_ptr()
    assert (asked["aux"], asked["aux_ld"]) == (pre.data_ptr(), HIDDEN)


@pytest.mark.parametrize("dtype", CUDA_TYPES.values(), ids=str)
def test_gradient_of_w2_and_b2(library, recorder, dtype):
    grad, hidden = draw(N, C_OUT, dtype=dtype), draw(N, HIDDEN, dtype=dtype)
    grad_w2, grad_b2 = draw(C_OUT, HIDDEN, dtype=dtype), draw(C_OUT, dtype=dtype)
    assert library.multiply(2, grad, hidden, grad_w2, grad_b2)
    asked = record(recorder)
    torch.testing.assert_close(product(asked), grad.double().t() @ hidden.double())
    assert asked["d"] == [grad_w2.data_ptr(), asked["d"][1], HIDDEN, C_OUT, HIDDEN]
    # The sums of op(B) over K: of the gradient over the rows.
    assert asked["epilogue"] == BGRADB
    sums = matrix(asked, "b", asked["transb"] == 1).sum(0)
    torch.testing.assert_close(sums, grad.double().sum(0))
    assert asked["bias"] == grad_b2.data_ptr() and asked["aux"] == 0


def weights_product(library, offset=0, **options):
    """The third product, on memory that starts so many bytes behind an aligned address."""
    grad, hidden, out, sums = (torch.empty(1024, dtype=BF16) for _ in range(4))
    views = []
    for t in (grad, hidden, out, sums):
        start = -t.data_ptr() % 256 + offset
        views.append(t[start // 2 :])
    return library.multiply(2, *views, **options)


def test_sums_and_splits_are_in_float32(library, recorder):
    assert weights_product(library)
    asked = record(recorder)
    assert (asked["compute_type"], asked["scale_type"]) == (68, 0)  # COMPUTE_32F, R_32F
    assert asked["schemes"] == 2  # COMPUTE_TYPE
    assert (asked["alpha"], asked["beta"]) == (1, 0)
    assert asked["c"] == asked["d"]


def test_stream_and_workspace_are_the_callers(library, recorder):
    assert weights_product(library)
    asked = record(recorder)
    assert (asked["stream"], asked["workspace"], asked["bytes"]) == (STREAM, WORKSPACE, 1000)
    assert library.memory.asked == 1000 and asked["limit"] == 32 << 20


def test_no_workspace_is_asked_for_where_none_is_needed(library, recorder):
    recorder.fake_answer(1, 0, 0)
    assert weights_product(library)
    assert record(recorder)["workspace"] == 0 and library.memory.asked == 0


@pytest.mark.parametrize(("offset", "aligned"), [(0, 256), (32, 32), (2, 2)])
def test_addresses_are_as_aligned_as_is_said(library, recorder, offset, aligned):
    assert weights_product(library, offset)
    assert record(recorder)["alignments"] == [aligned] * 4


def test_a_device_has_one_handle(library, recorder):
    for device in (0, 1, 0, 1):
        assert weights_product(library, device=device)
    assert recorder.fake_handles() == 2


FUNCTIONS = [
    "cublasLtCreate",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmul",
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_it_refuses_is_left_to_the_caller(library, recorder, function):
    recorder.fake_fail(function.encode(), 15)
    assert weights_product(library) is False
    assert record(recorder) is None and recorder.fake_objects() == 0
    assert f"cuBLASLt 130100, which refused ({C_OUT}, {HIDDEN}, {N})" in library.description()
    assert f"{function}: not supported" in library.description()
    recorder.fake_reset()
    assert weights_product(library) and recorder.fake_objects() == 0


@pytest.mark.parametrize("answer", [(0, 0), (1, 15)], ids=["none", "unusable"])
def test_products_without_an_algorithm_are_refused(library, recorder, answer):
    recorder.fake_answer(*answer, 1000)
    assert weights_product(library) is False
    assert "AlgoGetHeuristic: not supported" in library.description()


def test_a_launch_that_fails_is_an_error(library, recorder):
    recorder.fake_fail(b"cublasLtMatmul", 13)  # CUBLAS_STATUS_EXECUTION_FAILED
    assert weights_product(library) is None
    assert library.error == "cublasLtMatmul: another error" and recorder.fake_objects() == 0


def test_a_library_that_is_not_there_is_named(folder):
    library = Library(folder, "absent-1.so", "absent-2.so")
    assert "absent-1.so" in library.missing() and "absent-2.so" in library.missing()
    assert library.description() == library.missing()
    assert weights_product(library) is False


def test_a_library_without_a_function_is_not_used(folder):
    library = Library(folder, "empty.so", "empty.so")
    assert library.missing() == "this libcublasLt has no cublasLtGetVersion"
    assert weights_product(library) is False


def test_the_second_name_will_do(folder):
    shutil.copy(folder / "recorder.so", folder / "another.so")  # which nobody has loaded yet
    library = Library(folder, "absent.so", "another.so")
    assert not library.missing() and weights_product(library)


def test_the_library_that_the_process_has_comes_first(folder, recorder):
    """Found by its name, although no search path leads to it and the first one is there."""
    shutil.copy(folder / "empty.so", folder / "never-loaded.so")
    library = Library(folder, "never-loaded.so", "libcublasLt.so.test")
    assert not library.missing() and weights_product(library)


EXPLAIN = """
import torch, fastformer
from fastformer.ops import dispatch
dispatch._device_type = lambda args: "cuda"
def explain(dtype, F, activation="gelu_tanh", p=0.0):
    x, w1, w2 = (torch.zeros(s, dtype=dtype) for s in ((4, 8), (F, 8), (8, F)))
    print(fastformer.explain("mlp", x, w1, None, w2, None, activation=activation, dropout_p=p))
with fastformer.backend("cuda"):
    explain(torch.bfloat16, 16)
    explain(torch.bfloat16, 16, "gelu")
    explain(torch.bfloat16, 16, p=0.5)
    explain(torch.float32, 16)
    explain(torch.bfloat16, 12)
"""
needs_cuda_kernels = pytest.mark.skipif(
    _library.WHY_NOT is not None or _library.build_info()["cuda_runtime"] == "none",
    reason="the compiled library has no CUDA kernels",
)


@needs_cuda_kernels
def test_explain_says_how_to_have_gelu_at_the_end_of_a_product(monkeypatch):
    monkeypatch.setattr(dispatch, "_device_type", lambda args: "cuda")
    x = torch.zeros(4, 8)
    with fastformer.backend("cuda"):
        lines = str(fastformer.explain("mlp", x, x, None, x.t(), None)).splitlines()
    where = "  GELU has a pass of its own: FASTFORMER_CUBLASLT=1 would let"
    assert lines[0] == "mlp_fwd: cuda (CUDA C++ kernels)" and lines[1].startswith(where)
    assert sum(line.startswith(where) for line in lines) == 2  # of mlp_bwd too


@needs_cuda_kernels
def test_explain_says_why_no_product_ends_in_gelu():
    env = os.environ | {"PYTHONPATH": str(ROOT), "FASTFORMER_CUBLASLT": "1"}
    done = subprocess.run([sys.executable, "-c", EXPLAIN], env=env, capture_output=True, text=True)
    details = [line for line in done.stdout.splitlines() if line.startswith("  GELU ends")]
    details += [line for line in done.stdout.splitlines() if line.startswith("  GELU has")]
    plain, *others = details[::2]  # forward and backward say the same
    assert details[1::2] == [plain, *others], done.stderr
    reasons = ("tanh form", "dropout", "bfloat16 and float16", "multiple of 8")
    for line, words in zip(others, reasons, strict=True):
        assert line.startswith("  GELU has a pass of its own: cuBLASLt's") and words in line
    if torch.version.cuda is None:
        assert "libcublasLt.so.13: cannot open" in plain and "libcublasLt.so.12: " in plain
    else:
        assert plain.startswith("  GELU ends products of cuBLASLt ")
