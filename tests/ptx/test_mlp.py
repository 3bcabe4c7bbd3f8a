"""The Triton kernels of the feed-forward layer, executed as compiled, through the public op."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer import mlp
from fastformer.kernels import mlp as kernels
from fastformer.ops import dropout_mask

SITE = 6
FORWARD, BACKWARD = "_mlp_fwd_kernel", "_mlp_bwd_kernel"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
activations = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])


def inputs(rows, C, hidden, C_out, device):
    shapes = {
        "x": (rows, C),
        "w1": (hidden, C),
        "b1": (hidden,),
        "w2": (C_out, hidden),
        "b2": (C_out,),
    }
    fan_in = {"w1": C, "w2": hidden}
    return {
        name: torch.randn(shape).to(device) / math.sqrt(fan_in.get(name, 1))
        for name, shape in shapes.items()
    }


def eager(x, w1, b1, w2, b2, *, activation="gelu", keep=None, dropout_p=0.0):
    hidden = F.linear(x, w1, b1)
    hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    if keep is not None:
        hidden = hidden * keep / (1 - round(dropout_p * 65536) / 65536)
    return F.linear(hidden, w2, b2)


# dtype, activation, rows, C, hidden, C_out: tiles that end within, and strides of any alignment.
SIZES = {
    "one-row": (BF16, "gelu", 1, 64, 256, 64),
    "bfloat16": (BF16, "gelu", 197, 192, 256, 192),
    "bfloat16-tanh-odd": (BF16, "gelu_tanh", 20, 127, 129, 63),
    "float16-tanh": (FP16, "gelu_tanh", 50, 64, 256, 64),
    "float32": (FP32, "gelu", 50, 96, 128, 96),
    "float32-tanh-odd": (FP32, "gelu_tanh", 67, 127, 129, 63),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_numerics(target, triton, check_numerics, size):
    dtype, activation, *sizes = size
    with triton(checks=True) as launches:
        check_numerics(
            lambda **tensors: mlp(**tensors, activation=activation),
            lambda **tensors: eager(**tensors, activation=activation),
            dtype,
            inputs(*sizes, target.device),
        )
    assert [launch.name for launch in launches] in ([], [FORWARD, FORWARD, BACKWARD])


@pytest.mark.parametrize(
    ("dtype", "activation", "hidden"),
    [(BF16, "gelu", 128), (FP32, "gelu_tanh", 65)],
    ids=["bfloat16", "float32-odd"],
)
def test_numerics_with_dropout_and_without_biases(
    target, triton, check_numerics, dtype, activation, hidden
):
    rng = torch.tensor([-(2**61) + 12345, 2**35 + 7], device=target.device)
    with fastformer.backend("reference"):
        keep = dropout_mask(2 * 20, hidden, 0.3, rng, SITE).view(2, 20, hidden)
    options = {"activation": activation, "dropout_p": 0.3, "b1": None, "b2": None}
    values = inputs(40, 64, hidden, 64, target.device)
    values["x"] = values["x"].view(2, 20, 64)
    values = {name: value for name, value in values.items() if name not in options}
    with triton(checks=True):
        check_numerics(
            lambda **tensors: mlp(**tensors, **options, rng=rng, site=SITE),
            lambda **tensors: eager(**tensors, **options, keep=keep),
            dtype,
            values,
        )


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 32 in groups of 2 rows, so that few elements are many of them."""
    options = kernels._launch_options(FP32, False) | {"BLOCK_M": 16, "BLOCK_N": 32, "GROUP": 2}
    monkeypatch.setattr(kernels, "_launch_options", lambda dtype, tma: options)
    kernels._launch.cache_clear()
    yield
    kernels._launch.cache_clear()


def gradients(triton, values, grad, seed=1, **options):
    leaves = [value.detach().clone().requires_grad_() for value in values.values()]
    with triton(seed=seed, checks=True):
        out = mlp(*leaves, **options)
        out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_many_tiles_in_any_order_give_the_same_bits(target, triton, check_numerics, small_tiles):
    """Five rows of tiles, the last group of one; the columns end within a tile."""
    values = inputs(75, 48, 48, 48, target.device)
    with triton():
        check_numerics(lambda **t: mlp(**t), lambda **t: eager(**t), FP32, values)
    grad = torch.randn(75, 48).to(target.device)
    rng = torch.tensor([1, 2], device=target.device)
    runs = [gradients(triton, values, grad, seed, dropout_p=0.1, rng=rng) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@activations
def test_gelu_in_closed_form(target, triton, small_tiles, activation):
    """With unit weights the layer is GELU itself: far from zero x, or nothing, and of NaN NaN."""
    near, far = torch.linspace(-14, 14, 51), torch.tensor([20.0, 100.0, 1e4, 1e10])
    x = torch.cat([torch.tensor([torch.nan]), near, far, -far]).to(target.device)
    one = torch.ones(1, 1, device=target.device)
    leaf = x.view(-1, 1).requires_grad_()
    with triton():
        out = mlp(leaf, one, None, one, None, activation=activation)
        out.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh" if activation == "gelu_tanh" else "none")
    expected.sum().backward()
    for found, wanted in ((out.detach(), expected.detach()), (leaf.grad, exact.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1.5e-6, equal_nan=True)
    assert leaf.grad[-4:].abs().max() < 1e-20 and out[-4:].abs().max() < 1e-20


def test_strides_do_not_matter(target, triton, small_tiles):
    """Weights by columns, rows with gaps, and an upstream gradient that is one number."""
    x, w1, b1, w2, b2 = inputs(40, 16, 32, 24, target.device).values()
    views = [
        torch.stack((x, x), -1)[..., 0].view(2, 20, 16).transpose(0, 1),
        w1.t().contiguous().t(),
        torch.stack((b1, b1), -1)[..., 0],
        w2.t().contiguous().t(),
        b2,
    ]
    leaves = [view.detach().requires_grad_() for view in views]
    exact = [view.detach().double().contiguous().requires_grad_() for view in views]
    with triton(checks=True):
        out = mlp(*leaves)
        out.sum().backward()
    expected = eager(*exact)
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for leaf, copy in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), copy.grad, atol=1e-4, rtol=1e-5)


def test_no_rows(target, triton, small_tiles):
    values = inputs(0, 48, 48, 48, target.device)
    out, *grads = gradients(triton, values, torch.ones(0, 48, device=target.device))
    assert out.shape == (0, 48)
    assert [grad.shape for grad in grads] == [value.shape for value in values.values()]
    assert not any(grad.any() for grad in grads)


def test_float64_is_refused(target, triton):
    values = inputs(2, 8, 8, 8, target.device).values()
    with triton(), pytest.raises(RuntimeError, match="got float64"):
        mlp(*(value.double() for value in values))
