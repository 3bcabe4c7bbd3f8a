"""The linear layer, against torch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import linear

OP = "linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


def inputs(rows, C, C_out, device, *, bias=True):
    values = {
        "x": torch.randn(*rows, C, device=device),
        "weight": torch.randn(C_out, C, device=device) / math.sqrt(C),
    }
    return values | ({"bias": torch.randn(C_out, device=device)} if bias else {})


@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("rows", "C", "C_out"),
    [
        ((1,), 16, 64),
        ((50,), 127, 63),
        ((63,), 1, 1),
        ((2, 20), 64, 1023),
        ((2, 3, 7), 64, 128),
        ((1000,), 80, 50),
        ((), 64, 127),
    ],
    ids=str,
)
def test_numerics(backend, check_numerics, rows, C, C_out, bias, dtype):
    check_numerics(linear, F.linear, dtype, inputs(rows, C, C_out, backend, bias=bias))


def test_many_rows_sum_to_an_exact_bias_gradient(backend):
    """Halves and whole numbers: every sum is exact in float32, whatever its order."""
    x, weight = torch.zeros(5000, 4, device=backend), torch.zeros(37, 4, device=backend)
    bias = torch.zeros(37, device=backend, requires_grad=True)
    grad = torch.randint(-9, 9, (5000, 37), device=backend) / 2
    linear(x, weight, bias).backward(grad)
    assert torch.equal(bias.grad, grad.double().sum(0).float())


def test_strides_do_not_matter(backend):
    x, weight, bias = inputs((20, 6), 16, 24, backend).values()
    views = [x.transpose(0, 1), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]]
    views = [v.detach().requires_grad_() for v in views]
    copies = [v.detach().contiguous().clone().requires_grad_() for v in views]
    for grad in (
        torch.randn(20, 6, 24, device=backend).transpose(0, 1),
        torch.ones(1, 1, 1, device=backend).expand(6, 20, 24),
    ):
        out, expected = linear(*views), F.linear(*copies)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out, views, grad)
        for one, other in zip(found, torch.autograd.grad(expected, copies, grad), strict=True):
            torch.testing.assert_close(one, other)


@dtypes
@pytest.mark.parametrize(("N", "C"), [(0, 16), (3, 0)])
def test_sizes_of_zero(backend, N, C, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in inputs((N,), C or 1, 24, backend).values()]
    x, weight, bias = leaves
    out = linear(x[:, :C], weight[:, :C], bias)
    out.sum().backward()
    assert torch.equal(out, bias.expand(N, 24))
    assert not x.grad.any() and not weight.grad.any()
    assert torch.equal(bias.grad, torch.full_like(bias, N))


def test_the_result_is_no_view(backend):
    x, weight, bias = inputs((2, 3), 8, 8, backend).values()
    assert linear(x, weight, bias)._base is None


def test_gradcheck(backend):
    leaves = [t.double().requires_grad_() for t in inputs((2, 3), 4, 5, backend).values()]
    torch.autograd.gradcheck(linear, leaves)


def test_a_second_derivative_is_an_error(backend):
    x, *weights = (t.requires_grad_() for t in inputs((3,), 8, 8, backend).values())
    (grad,) = torch.autograd.grad(linear(x, *weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@dtypes
@pytest.mark.parametrize("N", [1, 65, 999, 5000])
def test_threads_do_not_show_in_the_bias_gradient(backend, threads, N, dtype):
    """The products are the libraries' own; the sum over rows is ours."""
    x, weight, bias = (t.to(dtype) for t in inputs((N,), 8, 257, backend).values())
    grad = torch.randn(N, 257, device=backend).to(dtype)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(torch.autograd.grad(linear(x, weight, bias.requires_grad_()), bias, grad)[0])
    assert all(torch.equal(found[0], other) for other in found)
