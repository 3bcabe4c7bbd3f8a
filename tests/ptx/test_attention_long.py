"""The Triton kernels of attention over long sequences, executed as compiled."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer.kernels import attention_long
from fastformer.kernels.attention_blocks import aligned
from fastformer.ops import dropout_mask
from tests.ops.test_attention import eager, qkv, with_options

SITE = 3


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, lse = attention_long.forward(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in saved[:3])
        attention_long.backward(grad_out, *saved, *ctx.settings, *grads)
        return *grads, None, None, None, None, None, None


def attention(
    q, k, v, *, key_lengths=None, causal=False, scale=None, dropout_p=0.0, rng=None, site=0
):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, key_lengths, causal, scale, dropout_p, rng, site)


@pytest.fixture
def check(target, check_numerics):
    """The rule of numerics for these sizes and options, with races looked for."""

    def run(B, T, S, H, D, dtype, *, keep=None, **options):
        values = {name: t.to(target.device) for name, t in qkv(B, T, S, H, D, "cpu").items()}
        shared = {name: options[name] for name in options.keys() - {"rng", "site"}}
        ours = with_options(attention, **options)
        with target.run(checks=True) as launches:
            check_numerics(ours, with_options(eager, keep=keep, **shared), dtype, values)
        names = [launch.name for launch in launches]
        forward = "_attention_long_fwd_kernel"
        backward = ["_attention_long_bwd_q_kernel", "_attention_long_bwd_kv_kernel"]
        assert names in ([], [forward, forward, *backward])

    return run


# Sizes of sequences and batches are not compiled in; head dim, dtype and what is masked are.
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (63, 63), (64, 64), (197, 197), (3, 150), (150, 3), (63, 64)], ids=str
)
def test_numerics(check, T, S):
    """Where T > S the first T - S queries see no key."""
    check(1, T, S, 1, 64, torch.bfloat16, causal=True)


@pytest.mark.parametrize(
    ("T", "S", "D", "dtype", "causal"),
    [
        (63, 197, 80, torch.float16, False),
        (150, 260, 128, torch.bfloat16, True),
        (63, 64, 16, torch.float32, True),
        (1, 20, 16, torch.float32, True),
        (70, 90, 128, torch.float32, True),
        (50, 33, 80, torch.float32, False),
    ],
    ids=str,
)
def test_numerics_of_other_heads(check, T, S, D, dtype, causal):
    check(1, T, S, 2, D, dtype, causal=causal)


@pytest.mark.parametrize(
    ("D", "dtype", "causal"), [(16, torch.float32, True), (64, torch.float16, False)], ids=str
)
def test_numerics_with_key_lengths(target, check, D, dtype, causal):
    lengths = torch.tensor([140, 0, 1, 64], dtype=torch.int32, device=target.device)
    check(4, 70, 140, 1, D, dtype, causal=causal, key_lengths=lengths)


@pytest.mark.parametrize(
    ("D", "dtype", "causal", "padded"),
    [
        (16, torch.float32, False, False),
        (64, torch.bfloat16, True, False),
        (64, torch.bfloat16, False, True),
        (128, torch.float16, True, False),
        (128, torch.float16, False, False),
        (128, torch.float32, True, False),
        (80, torch.float32, False, True),
    ],
    ids=str,
)
def test_numerics_with_dropout(target, check, D, dtype, causal, padded):
    B, T, S, H = 2, 70, 75, 2
    rng = torch.tensor([-(2**61) + 12345, 2**35 + 7], device=target.device)
    with fastformer.backend("reference"):
        mask = dropout_mask(B * T * H, S, 0.3, rng, SITE)
    keep = mask.view(B, T, H, S).permute(0, 2, 1, 3)
    options = {"causal": causal, "dropout_p": 0.3, "rng": rng, "site": SITE}
    if padded:
        options["key_lengths"] = torch.tensor([75, 9], dtype=torch.int32, device=target.device)
    check(B, T, S, H, D, dtype, keep=keep, **options)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.5])
def test_numerics_of_another_scale(check, scale):
    check(1, 40, 40, 1, 16, torch.float32, causal=True, scale=scale)


def test_numerics_of_a_long_sequence(check):
    check(1, 1000, 1000, 1, 64, torch.bfloat16, causal=True)


def gradients(target, inputs, grad_out, grads, seed=1, **options):
    """out, lse and the gradients, which are written to `grads`."""
    settings = {"key_lengths": None, "causal": True, "scale": 0.2, "dropout_p": 0.0, "rng": None}
    settings = (*(settings | options).values(), SITE)
    with target.run(checks=True, seed=seed):
        out, lse = attention_long.forward(*inputs, *settings)
        attention_long.backward(grad_out, *inputs, out, lse, *settings, *grads)
    return [t.clone() for t in (out, lse, *grads)]


@pytest.mark.parametrize("layout", ["packed", "heads first", "one key for all", "unaligned"])
def test_strides_do_not_matter(target, layout):
    B, T, H, D = 2, 40, 2, 16
    grads = torch.full((B, T, 3, H, D), math.nan, device=target.device).unbind(2)
    if layout == "packed":
        inputs = torch.randn(B, T, 3, H, D).to(target.device).unbind(2)
    elif layout == "heads first":
        inputs = tuple(torch.randn(B, H, T, D).to(target.device).transpose(1, 2) for _ in range(3))
    elif layout == "one key for all":
        q, *kv = (torch.randn(B, T, H, D).to(target.device) for _ in range(3))
        inputs = (q, *(t[:1, :1].expand(B, T, H, D) for t in kv))
    else:
        inputs = tuple(torch.randn(B, T, H, D + 1).to(target.device)[..., 1:] for _ in range(3))
    grad_out = torch.randn(T, B, H, D).to(target.device).transpose(0, 1)
    found = gradients(target, inputs, grad_out, grads)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
    expected = gradients(target, copies, grad_out, [torch.empty_like(t) for t in copies])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    exact = [t.double().requires_grad_() for t in copies]
    eager(*exact, causal=True, scale=0.2).backward(grad_out.double())
    for gradient, leaf in zip(found[2:], exact, strict=True):
        torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-5, rtol=1e-5)


def test_what_is_aligned_is_read_where_it_lies():
    """However far apart sequences and heads are; other views are copied."""
    packed = torch.empty(2, 16384, 3, 12, 64, device="meta")
    for view in (packed[:, :, 1], packed[:, 5:9, 2, 3:], packed.flatten(0, 1)[:, 0]):
        assert aligned(view) is view
    heads_first = torch.empty(2, 12, 2**20, 24, device="meta").transpose(1, 2)
    assert aligned(heads_first) is heads_first
    for view in (packed[:, :, 0, :, ::2], torch.empty(2, 5, 3, 12, device="meta")[..., :8]):
        assert aligned(view).is_contiguous()


def test_the_same_inputs_give_the_same_bits(target):
    """Whatever the order in which blocks run."""
    inputs = [torch.randn(1, 150, 2, 64).to(target.device, torch.bfloat16) for _ in range(3)]
    grad_out = torch.randn(1, 150, 2, 64).to(target.device, torch.bfloat16)
    rng = torch.tensor([1, 2], device=target.device)
    runs = []
    for seed in (1, 2):
        grads = [torch.empty_like(t) for t in inputs]
        runs.append(gradients(target, inputs, grad_out, grads, seed, dropout_p=0.1, rng=rng))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_that_see_no_key(target):
    B, T, S, H, D = 2, 70, 65, 1, 16
    inputs = [t.to(target.device) for t in qkv(B, T, S, H, D, "cpu").values()]
    lengths = torch.tensor([0, S], dtype=torch.int32, device=target.device)
    grads = [torch.empty_like(t) for t in inputs]
    out, lse, grad_q, grad_k, grad_v = gradients(
        target, inputs, torch.ones_like(inputs[0]), grads, key_lengths=lengths
    )
    assert not out[0].any() and not out[1, :5].any() and out[1, 5:].all()
    assert torch.equal(lse.isneginf(), (out == 0).all(-1).transpose(1, 2))
    assert not grad_q[0].any() and not grad_k[0].any() and not grad_v[0].any()
    assert not grad_q[1, :5].any()
    assert all(grad[1].isfinite().all() for grad in (grad_q, grad_k, grad_v))


def test_the_log_sum_exp_is_that_of_the_scores(target):
    q, k, v = (t.to(target.device) for t in qkv(2, 70, 90, 2, 16, "cpu").values())
    lengths = torch.tensor([90, 33], dtype=torch.int32, device=target.device)
    with target.run():
        _, lse = attention_long.forward(q, k, v, lengths, True, 0.5, 0.0, None, 0)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * 0.5
    scores[1, :, :, 33:] = -math.inf
    unseen = torch.ones(70, 90, dtype=torch.bool, device=q.device).triu(90 - 70 + 1)
    scores.masked_fill_(unseen, -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-6)


def test_padded_keys_may_hold_anything(target):
    q, k, v = (t.to(target.device) for t in qkv(1, 5, 90, 1, 16, "cpu").values())
    lengths = torch.tensor([70], dtype=torch.int32, device=target.device)
    runs = []
    for value in (0.0, math.nan):
        k[:, 70:], v[:, 70:] = value, value
        grads = [torch.empty_like(t) for t in (q, k, v)]
        grad_out = torch.ones_like(q)
        runs.append(gradients(target, (q, k, v), grad_out, grads, key_lengths=lengths))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not runs[0][3][:, 70:].any() and not runs[0][4][:, 70:].any()


@pytest.mark.parametrize(
    ("B", "T", "S", "H"), [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)]
)
def test_empty_inputs(target, B, T, S, H):
    inputs = [t.to(target.device) for t in qkv(B, T, S, H, 16, "cpu").values()]
    grads = [torch.empty_like(t) for t in inputs]
    out, lse, *grads = gradients(target, inputs, torch.ones_like(inputs[0]), grads)
    assert torch.equal(out, torch.zeros(B, T, H, 16, device=target.device))
    assert lse.isneginf().all()
    assert not any(grad.any() for grad in grads)
