"""Attention on packed sequences, against torch's attention on one sequence at a time."""

import itertools

import pytest
import torch

from fastformer.ops import (
    attention,
    attention_varlen,
    attention_varlen_qkvpacked,
    dropout_mask,
)

OP = "attention_varlen"
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
directions = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])

# Lengths of the queries and of the keys: equal, empty on either side, longer on either side.
LENGTHS = {
    "equal": ([20, 1, 50], [20, 1, 50]),
    "empty-sequences": ([0, 13, 0, 7, 0], [0, 13, 0, 7, 0]),
    "no-keys": ([5, 4], [0, 9]),
    "no-queries": ([0, 4], [6, 9]),
    "longer-keys": ([1, 20], [63, 64]),
    "longer-queries": ([63, 20, 3], [20, 20, 1]),
    "one-sequence": ([197], [197]),
}


def cumulative(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def arguments(queries, keys, device):
    longest = max(queries), max(keys)
    return cumulative(queries, device), cumulative(keys, device), *longest


def packed(N, M, H, D, device):
    shapes = {"q": (N, H, D), "k": (M, H, D), "v": (M, H, D)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def one_at_a_time(queries, keys, causal, scale=None):
    """Matrix products and a softmax per sequence, with the bottom-right causal mask.

    Not F.scaled_dot_product_attention, which computes bfloat16 in float32 on the CPU.
    """

    def call(q, k, v):
        parts = []
        splits = q.split(queries), k.split(keys), v.split(keys)
        for q_one, k_one, v_one in zip(*splits, strict=True):
            T, S = len(q_one), len(k_one)
            visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
            visible = visible.tril(S - T) if causal else visible
            seeing = visible.any(1)
            out = q_one.new_zeros(q_one.shape) + 0 * (q_one + v.sum() + k.sum())
            if seeing.any():
                q_seeing, k_one, v_one = (x.transpose(0, 1) for x in (q_one[seeing], k_one, v_one))
                factor = q.shape[-1] ** -0.5 if scale is None else scale
                scores = q_seeing @ k_one.transpose(1, 2) * factor
                scores = scores.masked_fill(~visible[seeing], float("-inf"))
                rows = scores.softmax(-1) @ v_one
                out = out.index_put((seeing.nonzero()[:, 0],), rows.transpose(0, 1))
            parts.append(out)
        return torch.cat(parts)

    return call


@dtypes
@directions
@pytest.mark.parametrize("D", [16, 80])
@pytest.mark.parametrize("case", LENGTHS)
def test_numerics(backend, check_numerics, case, D, causal, dtype):
    queries, keys = LENGTHS[case]
    lengths = arguments(queries, keys, backend)

    def ours(q, k, v):
        return attention_varlen(q, k, v, *lengths, causal=causal)

    values = packed(sum(queries), sum(keys), 2, D, backend)
    check_numerics(ours, one_at_a_time(queries, keys, causal), dtype, values)


@directions
def test_upper_bounds_of_the_lengths_serve(backend, causal):
    queries, keys = [5, 9], [7, 8]
    starts = cumulative(queries, backend), cumulative(keys, backend)
    q, k, v = packed(14, 15, 2, 16, backend).values()
    out = attention_varlen(q, k, v, *starts, 30, 40, causal=causal)
    torch.testing.assert_close(out, one_at_a_time(queries, keys, causal)(q, k, v))


def test_scale(backend):
    q, k, v = packed(12, 12, 2, 16, backend).values()
    out = attention_varlen(q, k, v, *arguments([5, 7], [5, 7], backend), scale=0.7)
    torch.testing.assert_close(out, one_at_a_time([5, 7], [5, 7], False, scale=0.7)(q, k, v))


def test_views_of_a_packed_projection(backend):
    projection = torch.randn(12, 3 * 2 * 16, device=backend, requires_grad=True)
    copy = projection.detach().clone().requires_grad_()
    grad = torch.randn(12, 2, 16, device=backend)
    lengths = arguments([5, 7], [5, 7], backend)
    attention_varlen(*projection.view(12, 3, 2, 16).unbind(1), *lengths).backward(grad)
    one_at_a_time([5, 7], [5, 7], False)(*copy.view(12, 3, 2, 16).unbind(1)).backward(grad)
    torch.testing.assert_close(projection.grad, copy.grad)


@directions
def test_dropout_draws_the_mask_of_the_padded_op_for_equal_lengths(backend, causal):
    B, T, H, D = 3, 20, 2, 16
    rng = torch.tensor([9, 2**40], device=backend)
    options = {"causal": causal, "dropout_p": 0.3, "rng": rng, "site": 5}
    leaves = [torch.randn(B, T, H, D, device=backend, requires_grad=True) for _ in range(3)]
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in leaves]
    padded = attention(*leaves, **options)
    out = attention_varlen(*flat, *arguments([T] * B, [T] * B, backend), **options)
    torch.testing.assert_close(out.view(B, T, H, D), padded)
    grad = torch.randn_like(padded)
    padded.backward(grad)
    out.backward(grad.flatten(0, 1))
    for leaf, one in zip(leaves, flat, strict=True):
        torch.testing.assert_close(one.grad.view(B, T, H, D), leaf.grad)


def test_dropout_is_that_of_the_mask_by_hand(backend):
    """Row n * H + h of the mask for packed query n, column the key's position in its sequence."""
    queries, keys = [3, 0, 5], [4, 2, 6]
    rng, H = torch.tensor([3, 4], device=backend), 2
    q, k, v = packed(8, 12, H, 8, backend).values()
    lengths = arguments(queries, keys, backend)
    out = attention_varlen(q, k, v, *lengths, dropout_p=0.5, rng=rng, site=1)
    keep = dropout_mask(8 * H, 6, 0.5, rng, site=1).view(8, H, 6)
    for n in range(8):
        first, S = (0, 4) if n < 3 else (6, 6)
        for h in range(H):
            weights = (k[first : first + S, h] @ q[n, h] / 8**0.5).softmax(0)
            weights = weights * keep[n, h, :S] * 2
            torch.testing.assert_close(out[n, h], weights @ v[first : first + S, h])


@directions
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(backend, dropout_p, causal):
    queries, keys = [3, 0, 2], [2, 1, 4]
    lengths = arguments(queries, keys, backend)
    rng = torch.tensor([5, 6], device=backend)

    def ours(q, k, v):
        options = {"causal": causal, "dropout_p": dropout_p, "rng": rng}
        return attention_varlen(q, k, v, *lengths, **options)

    inputs = [x.double().requires_grad_() for x in packed(5, 7, 2, 8, backend).values()]
    torch.autograd.gradcheck(ours, inputs)


def test_a_second_derivative_is_an_error(backend):
    q, k, v = (x.requires_grad_() for x in packed(3, 3, 1, 8, backend).values())
    out = attention_varlen(q, k, v, *arguments([3], [3], backend))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@directions
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_projection_gives_the_bits_of_its_parts(backend, dropout_p, causal):
    qkv = torch.randn(21, 3, 2, 16, device=backend, requires_grad=True)
    starts = cumulative([5, 0, 16], backend)
    rng = torch.tensor([7, 8], device=backend)
    options = {"causal": causal, "dropout_p": dropout_p, "rng": rng}
    grad_out = torch.randn(21, 2, 16, device=backend)
    out = attention_varlen_qkvpacked(qkv, starts, 16, **options)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    expected = attention_varlen(*qkv.unbind(1), starts, starts, 16, 16, **options)
    (expected_grad,) = torch.autograd.grad(expected, qkv, grad_out)
    assert torch.equal(out, expected) and torch.equal(grad, expected_grad)


def test_packed_projection_of_another_shape_is_refused(refuses):
    starts = cumulative([5], "cpu")
    for shape in ((5, 2, 3, 8), (2, 5, 3, 2, 8)):
        words = ("(N, 3, H, D)", str(shape))
        refuses(ValueError, words, attention_varlen_qkvpacked, torch.randn(shape), starts, 5)
