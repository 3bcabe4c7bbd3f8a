"""LayerNorm alone and fused with the residual addition, against torch's and float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastformer
from fastformer import _library
from fastformer.ops import add_layer_norm, dropout_mask, layer_norm

OP = "layer_norm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
widths = pytest.mark.parametrize("C", [1, 8, 127, 768, 1023])
compiled = pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))


def affine(C, device):
    return {
        "weight": 1 + 0.5 * torch.randn(C, device=device),
        "bias": torch.randn(C, device=device),
    }


def eager(x, weight, bias=None, eps=1e-5):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def eager_add(x, residual, weight, bias=None, eps=1e-5, *, keep=None, dropout_p=0.0):
    if keep is not None:
        x = x * keep / (1 - round(dropout_p * 65536) / 65536)
    total = residual + x
    return eager(total, weight, bias, eps), total


def reference_mask(*args, **kwargs):
    """Not every backend has a kernel that gives the mask alone."""
    with fastformer.backend("reference"):
        return dropout_mask(*args, **kwargs)


@dtypes
@widths
@pytest.mark.parametrize("rows", [(1,), (20,), (3, 50), (2, 3, 67)], ids=str)
def test_numerics(backend, check_numerics, rows, C, dtype):
    values = {"x": 2 * torch.randn(*rows, C, device=backend) + 1, **affine(C, backend)}
    check_numerics(layer_norm, eager, dtype, values)


@dtypes
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.1])
def test_numerics_without_bias_and_with_another_eps(backend, check_numerics, eps, dtype):
    values = {"x": torch.randn(31, 127, device=backend), "weight": affine(127, backend)["weight"]}

    def ours(x, weight):
        return layer_norm(x, weight, None, eps)

    def peer(x, weight):
        return eager(x, weight, None, eps)

    check_numerics(ours, peer, dtype, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_numerics_of_float32_weights_beside_lower_precision(backend, check_numerics, dtype):
    values = {"x": torch.randn(64, 768, device=backend), **affine(768, backend)}

    def peer(x, weight, bias):
        return eager(x, weight.to(x.dtype), bias.to(x.dtype))

    check_numerics(layer_norm, peer, dtype, values, kept=("weight", "bias"))


def test_a_large_mean_does_not_swallow_the_variance(backend):
    """One pass over x and x * x would lose all digits here."""
    x = torch.randn(8, 1023, device=backend) + 3000
    weight, bias = affine(1023, backend).values()
    exact = eager(x.double(), weight.double(), bias.double())
    error = (layer_norm(x, weight, bias) - exact).abs().max()
    assert error <= 2 * (eager(x, weight, bias) - exact).abs().max() + 1e-6


def test_equal_elements_give_the_bias(backend):
    weight, bias = affine(127, backend).values()
    out = layer_norm(torch.full((5, 127), 7.0, device=backend), weight, bias)
    torch.testing.assert_close(out, bias.expand(5, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["transposed", "every other row", "expanded", "columns"])
def test_strides_do_not_matter(backend, layout):
    x = torch.randn(6, 10, 64, device=backend)
    views = {
        "transposed": x.transpose(0, 1),
        "every other row": x[:, ::2],
        "expanded": x[:, :1].expand(-1, 10, -1),
        "columns": x[..., 8:40],
    }
    view = views[layout].detach().requires_grad_()
    weight, bias = affine(view.shape[-1], backend).values()
    grad = torch.randn(64, *view.shape[:-1], device=backend)[: view.shape[-1]].movedim(0, -1)
    out = layer_norm(view, weight, bias)
    out.backward(grad)
    copy = view.detach().contiguous().requires_grad_()
    expected = eager(copy, weight, bias)
    expected.backward(grad.contiguous())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(view.grad, copy.grad)


def test_strides_of_add_do_not_matter(backend):
    shape = (6, 10, 33)
    x, residual, weight, bias, grad, grad_total = (
        torch.randn(*size, 2, device=backend)[..., 0]
        for size in (shape, shape, (33,), (33,), shape, shape)
    )
    views = [x.transpose(0, 1), residual.transpose(0, 1), weight, bias]
    leaves = [view.detach().requires_grad_() for view in views]
    copies = [view.detach().contiguous().requires_grad_() for view in views]
    grads = (grad.transpose(0, 1), grad_total.transpose(0, 1))
    found, expected = add_layer_norm(*leaves), eager_add(*copies)
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, grads)
    torch.testing.assert_close(found, expected)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)], ids=str)
def test_no_rows(backend, shape):
    x = torch.randn(shape, device=backend, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in affine(16, backend).values())
    normed, total = add_layer_norm(x, x.detach(), weight, bias)
    (layer_norm(x, weight, bias) + normed + total).sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


@dtypes
@widths
@pytest.mark.parametrize("rows", [(1,), (3, 50)], ids=str)
def test_numerics_of_add(backend, check_numerics, rows, C, dtype):
    values = {name: torch.randn(*rows, C, device=backend) for name in ("x", "residual")}
    check_numerics(add_layer_norm, eager_add, dtype, values | affine(C, backend))


@dtypes
@pytest.mark.parametrize(("dropout_p", "C"), [(0.1, 127), (0.5, 127), (0.1, 2100)])
def test_numerics_of_add_with_dropout(backend, check_numerics, dropout_p, C, dtype):
    rng = torch.tensor([11, 2**35], device=backend)
    keep = reference_mask(3 * 20, C, dropout_p, rng, site=2).view(3, 20, C)

    def ours(**tensors):
        return add_layer_norm(**tensors, dropout_p=dropout_p, rng=rng, site=2)

    def peer(**tensors):
        return eager_add(**tensors, keep=keep, dropout_p=dropout_p)

    values = {name: torch.randn(3, 20, C, device=backend) for name in ("x", "residual")}
    check_numerics(ours, peer, dtype, values | affine(C, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_float32_residual_stays_float32_beside_lower_precision(
    backend, check_numerics, dropout_p, dtype
):
    rng = torch.tensor([1, 2], device=backend)
    keep = reference_mask(64, 768, dropout_p, rng)

    def ours(**tensors):
        normed, total = add_layer_norm(**tensors, dropout_p=dropout_p, rng=rng)
        assert total.dtype == torch.float32
        assert normed.dtype == tensors["x"].dtype
        return normed, total

    def peer(x, residual, weight, bias):
        normed, total = eager_add(
            x.to(residual.dtype), residual, weight, bias, keep=keep, dropout_p=dropout_p
        )
        return normed.to(x.dtype), total

    values = {name: torch.randn(64, 768, device=backend) for name in ("x", "residual")}
    kept = ("residual", "weight", "bias")
    check_numerics(ours, peer, dtype, values | affine(768, backend), kept=kept)


@compiled
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.float32, torch.bfloat16), repeat=4)),
    ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes),
)
def test_every_mix_of_dtypes(dtypes, dropout_p):
    """Branch, residual, weights and result each in float32 or bfloat16, against the reference in
    float64: no error but the rounding of what is stored."""
    of_x, of_residual, of_weight, of_normed = dtypes
    N, C = 70, 50
    raw = torch.ops.fastformer
    x, residual, normed = torch.randn(N, C), torch.randn(N, C), torch.randn(N, C)
    x, residual, grad_normed = x.to(of_x), residual.to(of_residual), normed.to(of_normed)
    grad_total = torch.randn(N, C).to(of_residual)
    weight, bias = (p.to(of_weight) for p in affine(C, "cpu").values())
    drop = (dropout_p, torch.tensor([3, 4]) if dropout_p else None, 5)
    with fastformer.backend("cpu"):
        outs = raw.add_layer_norm_fwd(x, residual, weight, bias, 1e-5, of_normed, *drop)
        _, total, mean, rstd = outs
        alone = raw.layer_norm_fwd(total, weight, bias, 1e-5, of_normed)
        saved = (total, weight, mean, rstd)
        grads = raw.add_layer_norm_bwd(grad_normed, grad_total, *saved, of_x, *drop)
        grads_alone = raw.layer_norm_bwd(grad_normed, *saved)
    double = torch.float64
    with fastformer.backend("reference"):
        exact = raw.add_layer_norm_fwd(
            x.double(), residual.double(), weight.double(), bias.double(), 1e-5, double, *drop
        )
        exact_alone = raw.layer_norm_fwd(
            total.double(), weight.double(), bias.double(), 1e-5, double
        )
        saved = (total.double(), weight.double(), *exact_alone[1:])
        exact_grads = raw.add_layer_norm_bwd(
            grad_normed.double(), grad_total.double(), *saved, double, *drop
        )
        exact_grads_alone = raw.layer_norm_bwd(grad_normed.double(), *saved)

    float_ = torch.float32
    stored = (of_normed, of_residual, float_, float_)
    stored_grads = (of_x, of_residual, of_weight, of_weight)
    # The statistics and the result follow the sum as it was stored, not the exact one.
    for found, expected, dtype in (
        *zip(outs, (exact_alone[0], exact[1], *exact_alone[1:]), stored, strict=True),
        *zip(alone, exact_alone, (of_normed, float_, float_), strict=True),
        *zip(grads, exact_grads, stored_grads, strict=True),
        *zip(grads_alone, exact_grads_alone, stored_grads[1:], strict=True),
    ):
        assert found.dtype == dtype
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("used", ["normed", "total"])
def test_add_when_only_one_result_is_used(backend, used):
    """A post-norm block drops the sum; a loss on the stream drops the normed rows."""
    inputs = [torch.randn(6, 32, device=backend, requires_grad=True) for _ in range(2)]
    inputs += [p.requires_grad_() for p in affine(32, backend).values()]
    copies = [x.detach().double().requires_grad_() for x in inputs]
    index = ("normed", "total").index(used)
    add_layer_norm(*inputs)[index].square().sum().backward()
    eager_add(*copies)[index].square().sum().backward()
    for x, copy in zip(inputs, copies, strict=True):
        expected = torch.zeros_like(copy) if copy.grad is None else copy.grad
        torch.testing.assert_close(x.grad.double(), expected, atol=1e-4, rtol=1e-5)


def test_the_gradients_of_branch_and_residual_do_not_share_memory(backend):
    x, residual = (torch.randn(4, 8, device=backend, requires_grad=True) for _ in range(2))
    weight, bias = affine(8, backend).values()
    normed, total = add_layer_norm(x, residual, weight, bias)
    loss = normed.square().sum() + total.sum()
    grad_x, grad_residual = torch.autograd.grad(loss, (x, residual))
    assert torch.equal(grad_x, grad_residual)
    grad_x.zero_()
    assert grad_residual.any()


@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck(backend, has_bias, dtype):
    weight, bias = (p.to(dtype).requires_grad_() for p in affine(7, backend).values())
    x, residual = (
        torch.randn(2, 3, 7, dtype=dtype, device=backend, requires_grad=True) for _ in range(2)
    )
    bias = bias if has_bias else None
    rng = torch.tensor([5, 6], device=backend)
    torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))
    torch.autograd.gradcheck(
        lambda *tensors: add_layer_norm(*tensors, dropout_p=0.3, rng=rng),
        (x, residual, weight, bias),
    )


@pytest.mark.parametrize("op", [layer_norm, add_layer_norm], ids=["layer_norm", "add_layer_norm"])
def test_a_second_derivative_is_an_error(backend, op):
    x = torch.randn(3, 8, device=backend, requires_grad=True)
    weight, bias = affine(8, backend).values()
    if op is layer_norm:
        out = op(x, weight, bias)
    else:
        out, _ = op(x, torch.zeros_like(x), weight, bias)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@dtypes
def test_the_same_inputs_give_the_same_bits(backend, dtype):
    x, residual = (torch.randn(999, 127, device=backend, dtype=dtype) for _ in range(2))
    weight, bias = (p.to(dtype).requires_grad_() for p in affine(127, backend).values())
    x.requires_grad_()
    runs = []
    for _ in range(2):
        outs = add_layer_norm(x, residual, weight, bias)
        loss = sum(out.float().square().sum() for out in outs)
        runs.append((*outs, *torch.autograd.grad(loss, (x, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@compiled
@pytest.mark.parametrize("shape", [(1, 8), (65, 127), (999, 127), (5000, 8)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape):
    x, residual = torch.randn(shape), torch.randn(shape)
    leaves = [t.requires_grad_() for t in (x, residual, *affine(shape[-1], "cpu").values())]
    rng = torch.tensor([1, 2])
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastformer.backend("cpu"):
                outs = add_layer_norm(*leaves, dropout_p=0.1, rng=rng)
                runs.append((*outs, *torch.autograd.grad(outs, leaves, outs)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
