"""The Triton kernels that generate: one query, or a few, against a long cache."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer.kernels import attention_decode, attention_long
from fastformer.ops import dropout_mask, reference
from tests.ops.test_attention import eager, qkv

SITE = 3
NAMES = ["_attention_long_fwd_kernel", "_attention_decode_combine_kernel"]


def error(found, exact):
    return (found.double() - exact).abs().max().item()


@pytest.fixture
def check(target):
    """The rule of numerics for the output, and the log-sum-exp against float64."""

    def run(inputs, launched, *, key_lengths=None, causal=True, dropout_p=0.0, rng=None):
        q, k, v = (t.to(target.device) for t in inputs)
        scale = q.shape[-1] ** -0.5
        settings = (key_lengths, causal, scale, dropout_p, rng, SITE)
        with target.run(checks=True) as launches:
            out, lse = attention_decode.forward(q, k, v, *settings)
        assert [launch.name for launch in launches] in ([], launched)
        doubles = [t.double() for t in (q, k, v)]
        with fastformer.backend("reference"):
            exact, exact_lse = reference.attention_fwd(*doubles, *settings)
        options = {"key_lengths": key_lengths, "causal": causal, "dropout_p": dropout_p}
        if rng is not None:
            (B, T, H, _), S = q.shape, k.shape[1]
            mask = dropout_mask(B * T * H, S, dropout_p, rng, SITE)
            options["keep"] = mask.view(B, T, H, S).permute(0, 2, 1, 3)
        allowed = 2 * error(eager(q, k, v, **options), exact) + 1e-6
        assert error(out, exact) <= allowed
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)

    return run


@pytest.mark.parametrize(
    ("B", "T", "D", "dtype"),
    [
        (1, 1, 64, torch.bfloat16),
        (2, 3, 80, torch.float16),
        (1, 16, 16, torch.float32),
        (1, 20, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_numerics(check, B, T, D, dtype):
    inputs = [t.to(dtype) for t in qkv(B, T, 1000, 1, D, "cpu").values()]
    check(inputs, NAMES)


@pytest.mark.parametrize("S", [1, 100, 257, 300])
def test_few_keys_are_one_chunk_or_end_within_one(check, S):
    inputs = [t.to(torch.bfloat16) for t in qkv(2, 1, S, 3, 64, "cpu").values()]
    check(inputs, NAMES if S >= 256 else NAMES[:1])


def test_chunks_beyond_the_keys_of_a_sequence(target, check):
    """Of 520 keys in four chunks: none, one, one chunk and a part of the next, all."""
    lengths = torch.tensor([0, 1, 150, 520], dtype=torch.int32, device=target.device)
    inputs = [t.to(torch.float16) for t in qkv(4, 2, 520, 1, 80, "cpu").values()]
    check(inputs, NAMES, key_lengths=lengths)


def test_dropout(target, check):
    rng = torch.tensor([77, 2**33 + 5], device=target.device)
    inputs = list(qkv(2, 3, 400, 2, 16, "cpu").values())
    check(inputs, NAMES, causal=False, dropout_p=0.2, rng=rng)


def test_a_cache_that_is_part_of_a_larger_one(target):
    """Behind the tokens so far there is NaN; the strides are those of the whole."""
    room = torch.full((2, 2, 700, 2, 16), math.nan)
    room[:, :, :513] = torch.randn(2, 2, 513, 2, 16)
    k, v = room.to(target.device)[:, :, :513]
    q = torch.randn(2, 1, 2, 16).to(target.device)
    settings = (None, True, 0.25, 0.0, None, 0)
    with target.run(checks=True):
        out, lse = attention_decode.forward(q, k, v, *settings)
        copied, copied_lse = attention_decode.forward(q, k.clone(), v.clone(), *settings)
        whole, whole_lse = attention_long.forward(q, k, v, *settings)
    assert torch.equal(out, copied) and torch.equal(lse, copied_lse)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_the_same_inputs_give_the_same_bits(target):
    inputs = [t.to(target.device) for t in qkv(1, 1, 700, 2, 16, "cpu").values()]
    runs = []
    for seed in (1, 2):
        with target.run(seed=seed):
            runs.append(attention_decode.forward(*inputs, None, True, 0.1, 0.0, None, 0))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("B", "T", "S", "H"), [(0, 1, 300, 2), (2, 0, 300, 2), (2, 1, 0, 2)])
def test_empty_inputs(target, B, T, S, H):
    inputs = [t.to(target.device) for t in qkv(B, T, S, H, 16, "cpu").values()]
    with target.run():
        out, lse = attention_decode.forward(*inputs, None, True, 1.0, 0.0, None, 0)
    assert torch.equal(out, torch.zeros(B, T, H, 16, device=target.device))
    assert lse.isneginf().all()


@pytest.mark.parametrize("heads", [1, 12, 400])
@pytest.mark.parametrize("S", [0, 1, 128, 1000, 100_000, 2**31 - 64])
def test_chunks_cover_the_keys_in_whole_tiles(S, heads):
    chunk = attention_decode._chunk(heads, S, 64)
    assert chunk % 64 == 0
    assert chunk * 64 >= S
    assert chunk >= min(S, 128)
