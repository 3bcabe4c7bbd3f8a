"""The matrix products inside linear, mlp and linear_cross_entropy: ours, and the libraries' too.

FASTFORMER_CPU_GEMM chooses between them once per process, so each choice gets a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastformer import _library

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def products(x, weight, grad):
    """x weight^T, grad weight and grad^T x."""
    ops = torch.ops.fastformer
    return ops.linear_fwd.cpu(x, weight, None), *ops.linear_bwd.cpu(grad, x, weight, x.dtype)[:2]


def integers(*shape, dtype):
    return torch.randint(-4, 5, shape).to(dtype)


@needs_kernels
@dtypes
@pytest.mark.parametrize("rows", [15, 16, 47, 48, 49, 200])
@pytest.mark.parametrize(
    ("C", "C_out"),
    [(1, 1), (2, 64), (15, 17), (16, 63), (64, 65), (127, 130), (256, 48), (258, 8), (1030, 80)],
)
def test_whole_numbers_give_exact_products(rows, C, C_out, dtype):
    """Their sums are exact in float32, in any order; only the result is rounded."""
    x, weight = integers(rows, C, dtype=dtype), integers(C_out, C, dtype=dtype)
    grad = integers(rows, C_out, dtype=dtype)
    exact = x.double() @ weight.double().t(), grad.double() @ weight.double()
    exact = *exact, grad.double().t() @ x.double()
    for found, expected in zip(products(x, weight, grad), exact, strict=True):
        assert torch.equal(found, expected.to(dtype))


@needs_kernels
@pytest.mark.parametrize("rows", [15, 200, 1100])
@pytest.mark.parametrize(("C", "C_out"), [(1, 1), (15, 17), (130, 127), (64, 1100)])
def test_float32_gradients_of_bfloat16_are_not_rounded(rows, C, C_out):
    """Those of our own product, that is: what the libraries give is rounded before."""
    x, weight = integers(rows, C, dtype=torch.bfloat16), integers(C_out, C, dtype=torch.bfloat16)
    grad = integers(rows, C_out, dtype=torch.bfloat16)
    results = torch.ops.fastformer.linear_bwd.cpu(grad, x, weight, torch.float32)
    for found, exact in zip(
        results[1:], (grad.double().t() @ x.double(), grad.double().sum(0)), strict=True
    ):
        rounded = exact.to(torch.bfloat16).float()
        assert found.dtype == torch.float32
        assert torch.equal(found, exact.float()) or torch.equal(found, rounded)


@needs_kernels
@dtypes
def test_strided_operands_give_the_same(dtype):
    x, weight, grad = (integers(*shape, dtype=dtype) for shape in ((70, 96), (131, 96), (70, 131)))
    expected = products(x, weight, grad)
    for layout in (
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ):
        found = products(layout(x), layout(weight), layout(grad))
        assert all(map(torch.equal, found, expected))


@needs_kernels
@dtypes
@pytest.mark.parametrize("C", [95, 96])
def test_infinities_stay_in_their_row(C, dtype):
    """Operands are padded where they are packed, and zero times infinity is NaN."""
    x, weight = integers(50, C, dtype=dtype), integers(67, C, dtype=dtype)
    grad = integers(50, 67, dtype=dtype)
    expected = products(x, weight, grad)
    x[-1], grad[-1] = torch.inf, torch.inf
    found = products(x, weight, grad)
    assert torch.equal(found[0][:-1], expected[0][:-1])
    assert torch.equal(found[1][:-1], expected[1][:-1])
    assert not found[0][-1].isfinite().any() and not found[1][-1].isfinite().any()


@needs_kernels
@dtypes
def test_threads_do_not_show(threads, dtype):
    x, weight, grad = (
        torch.randn(shape).to(dtype) for shape in ((333, 500), (777, 500), (333, 777))
    )
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(products(x, weight, grad))
    assert all(map(torch.equal, found[0], other) for other in found)


def python(choice, *arguments):
    # What pytest-xdist tells its workers is not meant for a pytest of its own.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env | {"FASTFORMER_CPU_GEMM": choice},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("choice", ["own", "library"])
def test_the_ops_pass_their_tests(choice):
    ops = ("gemm", "linear", "mlp", "linear_cross_entropy")
    files = [f"tests/ops/test_{op}.py" for op in ops]
    pytest_here = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
    chosen = ("-k", "(cpu-cpu or test_gemm) and not pass_their_tests")
    result = python(choice, *pytest_here, *chosen, *files)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout


@needs_kernels
def test_another_choice_is_an_error():
    step = "import torch, fastformer; fastformer.linear(torch.ones(20, 4), torch.ones(4, 4))"
    result = python("mkl", "-c", step)
    assert result.returncode != 0
    assert "FASTFORMER_CPU_GEMM must be own, library or unset, got mkl" in result.stdout
