"""The Triton kernels of attention within packed sequences, through the public functions."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer import attention_varlen, attention_varlen_qkvpacked
from tests.ops.test_attention_varlen import (
    LENGTHS,
    arguments,
    cumulative,
    one_at_a_time,
    packed,
)

SITE = 5
FORWARD = "_attention_long_fwd_kernel"
BACKWARD = ["_attention_long_bwd_q_kernel", "_attention_long_bwd_kv_kernel"]


@pytest.fixture
def check(target, triton, check_numerics):
    def run(queries, keys, D, dtype, causal):
        lengths = arguments(queries, keys, target.device)

        def ours(q, k, v):
            return attention_varlen(q, k, v, *lengths, causal=causal)

        values = packed(sum(queries), sum(keys), 2, D, "cpu")
        values = {name: t.to(target.device) for name, t in values.items()}
        with triton(checks=True) as launches:
            check_numerics(ours, one_at_a_time(queries, keys, causal), dtype, values)
        assert [launch.name for launch in launches] in ([], [FORWARD, FORWARD, *BACKWARD])

    return run


# Equal lengths, empty sequences, more keys, more queries, all in one; then several blocks of each.
_SHORT = [lengths for name, lengths in LENGTHS.items() if name != "one-sequence"]
CASES = {
    "short": tuple([*chain.from_iterable(side)] for side in zip(*_SHORT, strict=True)),
    "blocks": ([0, 150, 3], [0, 140, 66]),
}


@pytest.mark.parametrize(
    ("D", "dtype", "causal"), [(64, torch.bfloat16, True), (16, torch.float32, False)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_numerics(check, case, D, dtype, causal):
    check(*CASES[case], D, dtype, causal)


def test_numerics_of_a_padded_head(check):
    check([70, 0, 5], [66, 3, 90], 80, torch.float16, False)


def test_upper_bounds_of_the_lengths_serve(target, triton):
    """Whole blocks of programs have nothing to do."""
    queries, keys = [5, 9], [7, 8]
    starts = cumulative(queries, target.device), cumulative(keys, target.device)
    leaves = [t.to(target.device).requires_grad_() for t in packed(14, 15, 2, 16, "cpu").values()]
    copies = [t.detach().requires_grad_() for t in leaves]
    with triton(checks=True):
        out = attention_varlen(*leaves, *starts, 300, 400)
        out.sum().backward()
    expected = one_at_a_time(queries, keys, False)(*copies)
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad, atol=1e-5, rtol=1e-5)


def test_dropout_draws_the_mask_of_the_reference(target, triton):
    queries, keys = [3, 0, 70], [4, 2, 66]
    starts = arguments(queries, keys, target.device)
    rng = torch.tensor([9, 2**40], device=target.device)
    options = {"causal": True, "dropout_p": 0.3, "rng": rng, "site": SITE}
    leaves = [t.to(target.device).requires_grad_() for t in packed(73, 72, 2, 16, "cpu").values()]
    copies = [t.detach().double().requires_grad_() for t in leaves]
    grad_out = torch.randn(73, 2, 16).to(target.device)
    with triton(checks=True):
        out = attention_varlen(*leaves, *starts, **options)
        out.backward(grad_out)
    with fastformer.backend("reference"):
        expected = attention_varlen(*copies, *starts, **options)
        expected.backward(grad_out.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad.double(), copy.grad, atol=1e-5, rtol=1e-5)


def test_packed_projection_gives_the_bits_of_its_parts(target, triton):
    qkv = torch.randn(91, 3, 2, 16).to(target.device).requires_grad_()
    starts = cumulative([5, 0, 86], target.device)
    rng = torch.tensor([7, 8], device=target.device)
    options = {"causal": True, "dropout_p": 0.3, "rng": rng}
    grad_out = torch.randn(91, 2, 16).to(target.device)
    with triton(checks=True):
        out = attention_varlen_qkvpacked(qkv, starts, 86, **options)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        expected = attention_varlen(*qkv.unbind(1), starts, starts, 86, 86, **options)
        (expected_grad,) = torch.autograd.grad(expected, qkv, grad_out)
    assert torch.equal(out, expected) and torch.equal(grad, expected_grad)


def test_what_the_kernels_refuse(target, triton):
    q = torch.randn(4, 2, 16, dtype=torch.float64, device=target.device)
    starts = arguments([4], [4], target.device)
    with triton(), pytest.raises(RuntimeError, match="got float64"):
        attention_varlen(q, q, q, *starts)
    q = torch.randn(4, 2, 20, device=target.device)
    raw = torch.ops.fastformer.attention_varlen_fwd.default
    with triton(), pytest.raises(RuntimeError, match="multiple of 8 and at most 128, got 20"):
        raw(q, q, q, *starts, False, 1.0, 0.0, None, 0)
    q = torch.zeros(1, 1, 8, device=target.device).expand(4, 2**20, 8)
    with triton(), pytest.raises(RuntimeError, match="less than 5592405 elements in a token"):
        attention_varlen(q, q, q, *starts)
