"""The feed-forward layer, against two linear layers and torch's GELU."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastformer
from fastformer import _library
from fastformer.ops import dropout_mask, mlp

OP = "mlp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
activations = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
compiled = pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))
NAMES = ("x", "w1", "b1", "w2", "b2")


def inputs(rows, C, F_, C_out, device):
    shapes = {"x": (*rows, C), "w1": (F_, C), "b1": (F_,), "w2": (C_out, F_), "b2": (C_out,)}
    fan_in = {"w1": C, "w2": F_}
    return {
        name: torch.randn(shape, device=device) / math.sqrt(fan_in.get(name, 1))
        for name, shape in shapes.items()
    }


def eager(x, w1, b1, w2, b2, *, activation="gelu", keep=None, dropout_p=0.0):
    hidden = F.linear(x, w1, b1)
    hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    if keep is not None:
        hidden = hidden * keep / (1 - round(dropout_p * 65536) / 65536)
    return F.linear(hidden, w2, b2)


@dtypes
@activations
@pytest.mark.parametrize(
    ("rows", "C", "hidden", "C_out"),
    [
        ((1,), 16, 64, 16),
        ((50,), 127, 63, 80),
        ((2, 20), 64, 257, 64),
        ((2, 3, 7), 64, 128, 64),
        ((64,), 768, 1023, 127),
    ],
    ids=str,
)
def test_numerics(backend, check_numerics, rows, C, hidden, C_out, activation, dtype):
    values = inputs(rows, C, hidden, C_out, backend)
    check_numerics(
        lambda **tensors: mlp(**tensors, activation=activation),
        lambda **tensors: eager(**tensors, activation=activation),
        dtype,
        values,
    )


@dtypes
@pytest.mark.parametrize("missing", [("b1",), ("b2",), ("b1", "b2")], ids="-".join)
def test_numerics_without_biases(backend, check_numerics, missing, dtype):
    values = {n: v for n, v in inputs((20,), 64, 80, 64, backend).items() if n not in missing}
    none = dict.fromkeys(missing)
    check_numerics(
        lambda **tensors: mlp(**tensors, **none),
        lambda **tensors: eager(**tensors, **none),
        dtype,
        values,
    )


@dtypes
@activations
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_numerics_with_dropout(backend, check_numerics, dropout_p, activation, dtype):
    rng = torch.tensor([4, 2**34], device=backend)
    keep = dropout_mask(2 * 20, 63, dropout_p, rng, site=6).view(2, 20, 63)
    options = {"activation": activation, "dropout_p": dropout_p}
    check_numerics(
        lambda **tensors: mlp(**tensors, **options, rng=rng, site=6),
        lambda **tensors: eager(**tensors, **options, keep=keep),
        dtype,
        inputs((2, 20), 64, 63, 80, backend),
    )


def test_gelu_in_closed_form(backend):
    """With identity weights the layer is GELU itself: x * (1 + erf(x / sqrt 2)) / 2."""
    x = torch.linspace(-8, 8, 257, device=backend).view(-1, 1)
    one = torch.ones(1, 1, device=backend)
    erf = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.flatten().tolist()]
    tanh = [
        v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2
        for v in x.flatten().tolist()
    ]
    for activation, expected in (("gelu", erf), ("gelu_tanh", tanh)):
        out = mlp(x, one, None, one, None, activation=activation).flatten()
        torch.testing.assert_close(
            out, torch.tensor(expected, device=backend), atol=1e-6, rtol=1e-5
        )


def gelu(x, activation):
    """The layer with one hidden unit and unit weights is the activation alone."""
    one = torch.ones(1, 1, device=x.device, dtype=x.dtype)
    return mlp(x.view(-1, 1), one, None, one, None, activation=activation).flatten()


def value_and_slope(x, activation):
    x = x.detach().requires_grad_()
    out = gelu(x, activation)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def exact_value_and_slope(x, activation):
    x = x.detach().double().requires_grad_()
    out = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@activations
def test_gelu_on_a_dense_grid(backend, activation):
    x = torch.cat([torch.linspace(-14, 14, 200_001), torch.linspace(-0.01, 0.01, 2001)])
    x = x.to(backend)
    exact = exact_value_and_slope(x, activation)
    for found, expected in zip(value_and_slope(x, activation), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=1.5e-6)


@activations
def test_gelu_in_bfloat16_is_gelu_rounded(backend, activation):
    x = torch.arange(-(2**15), 2**15, device=backend).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 1000]
    exact = exact_value_and_slope(x, activation)
    for found, expected in zip(value_and_slope(x, activation), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


@activations
def test_gelu_far_from_zero(backend, activation):
    x = torch.tensor([20.0, 100.0, 1e4, 1e10], device=backend)
    for found, expected in zip(value_and_slope(x, activation), (x, x / x), strict=True):
        assert torch.equal(found, expected)
    for found in value_and_slope(-x, activation):
        assert found.abs().max() < 1e-20


@activations
def test_nan_comes_through(backend, activation):
    for found in value_and_slope(torch.full((40,), torch.nan, device=backend), activation):
        assert found.isnan().all()


@compiled
@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_infinities_have_the_values_of_the_limits(activation, dtype):
    """Where torch's own functions give NaN."""
    with fastformer.backend("cpu"):
        value, slope = value_and_slope(
            torch.tensor([torch.inf, -torch.inf], dtype=dtype), activation
        )
    assert value[0] == torch.inf and value[1].abs() < 1e-20
    assert slope[0] == 1 and slope[1].abs() < 1e-20


@pytest.mark.parametrize("cols", [5, 127, 2100])
def test_dropped_units_are_those_of_the_mask(backend, cols):
    rng = torch.tensor([9, 2**40], device=backend)
    keep = dropout_mask(67, cols, 0.3, rng, site=3)
    x = torch.rand(67, cols, device=backend) + 1
    eye = torch.eye(cols, device=backend)
    x.requires_grad_()
    out = mlp(x, eye, None, eye, None, dropout_p=0.3, rng=rng, site=3)
    out.sum().backward()
    assert torch.equal(out != 0, keep)
    assert torch.equal(x.grad != 0, keep)


def test_strides_do_not_matter(backend):
    tensors = list(inputs((20, 6), 16, 32, 24, backend).values())
    views = [tensors[0].transpose(0, 1), *tensors[1:]]
    views[1] = views[1].t().contiguous().t()
    views[3] = views[3].t().contiguous().t()
    views = [v.detach().requires_grad_() for v in views]
    copies = [v.detach().contiguous().clone().requires_grad_() for v in views]
    grad = torch.randn(20, 6, 24, device=backend).transpose(0, 1)
    out, expected = mlp(*views), eager(*copies)
    out.backward(grad)
    expected.backward(grad.contiguous())
    torch.testing.assert_close(out, expected)
    for name, view, copy in zip(NAMES, views, copies, strict=True):
        torch.testing.assert_close(view.grad, copy.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_no_rows(backend):
    tensors = inputs((0,), 16, 32, 24, backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    out = mlp(*leaves)
    out.sum().backward()
    assert out.shape == (0, 24)
    assert not any(leaf.grad.any() for leaf in leaves)


@activations
@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(backend, dropout_p, dtype, activation):
    rng = torch.tensor([5, 6], device=backend)
    leaves = [t.to(dtype).requires_grad_() for t in inputs((2, 3), 4, 5, 3, backend).values()]
    torch.autograd.gradcheck(
        lambda *tensors: mlp(*tensors, activation=activation, dropout_p=dropout_p, rng=rng), leaves
    )


def test_a_second_derivative_is_an_error(backend):
    x, *weights = (t.requires_grad_() for t in inputs((3,), 8, 8, 8, backend).values())
    (grad,) = torch.autograd.grad(mlp(x, *weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@dtypes
def test_the_same_inputs_give_the_same_bits(backend, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in inputs((333,), 64, 127, 64, backend).values()]
    rng = torch.tensor([1, 2], device=backend)
    runs = []
    for _ in range(2):
        out = mlp(*leaves, dropout_p=0.1, rng=rng)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@compiled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 65, 999])
def test_the_number_of_threads_does_not_change_a_bit(rows, dtype):
    """The passes between the products; one column keeps the products themselves sequential sums."""
    leaves = [t.to(dtype).requires_grad_() for t in inputs((rows,), 1, 300, 1, "cpu").values()]
    rng = torch.tensor([1, 2])
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastformer.backend("cpu"):
                out = mlp(*leaves, dropout_p=0.1, rng=rng)
                _, _, grad_b1, _, grad_b2 = torch.autograd.grad(out, leaves, torch.ones_like(out))
            runs.append((grad_b1, grad_b2))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
