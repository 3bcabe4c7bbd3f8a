"""The kernel of attention over long sequences for Hopper, executed as compiled."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from fastformer.kernels import attention, attention_decode, attention_hopper, attention_long
from fastformer.ops import reference
from tests.ops.test_attention import eager, qkv, with_options
from tests.ptx.conftest import TARGETS
from tests.ptx.emulator import PtxError
from tests.ptx.mutations import MUTATIONS
from tests.ptx.triton_compile import intercepted

BF16, FP16 = torch.bfloat16, torch.float16
NAME = "_attention_hopper_fwd_kernel"


@pytest.fixture(
    params=[
        pytest.param("sm_90a", id="sm_90a"),
        pytest.param("gpu", id="gpu", marks=pytest.mark.gpu),
    ]
)
def target(request, monkeypatch):
    """Emulated sm_90a of two multiprocessors, and the GPU of this machine if it is one."""
    found = TARGETS[request.param]
    if found.arch is not None:
        monkeypatch.setattr(attention_hopper, "_multiprocessors", lambda t: 2)
    else:
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")
    return found


class _Attention(torch.autograd.Function):
    """Gradients are those that the reference makes of the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, lse = attention_hopper.forward(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx, grad_out):
        grads = reference.attention_bwd(grad_out, *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None, None, None, None, None


def ours(q, k, v, *, key_lengths=None, causal=False, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, key_lengths, causal, scale, 0.0, None, 0)


@pytest.mark.parametrize(
    ("B", "T", "S", "H", "D", "dtype", "options"),
    [
        (1, 513, 513, 1, 64, BF16, {"causal": True}),
        (1, 300, 129, 1, 64, BF16, {"causal": True}),  # the first 171 queries see no key
        (1, 100, 640, 1, 128, BF16, {"causal": True}),
        (4, 20, 1000, 1, 64, FP16, {"scale": 0.3, "lengths": (1000, 0, 1, 128)}),
        (2, 70, 300, 1, 80, BF16, {"causal": True, "lengths": (200, 300)}),
    ],
    ids=str,
)
def test_numerics(target, check_numerics, B, T, S, H, D, dtype, options):
    options = dict(options)
    if "lengths" in options:
        lengths = torch.tensor(options.pop("lengths"), dtype=torch.int32, device=target.device)
        options["key_lengths"] = lengths
    values = {name: t.to(target.device) for name, t in qkv(B, T, S, H, D, "cpu").items()}
    with target.run(checks=True) as launches:
        check_numerics(with_options(ours, **options), with_options(eager, **options), dtype, values)
    assert [launch.name for launch in launches] in ([], [NAME, NAME])


def forward(target, q, k, v, *, lengths=None, causal=True, scale=0.125, **options):
    with target.run(**{"checks": True, **options}):
        out, lse = attention_hopper.forward(q, k, v, lengths, causal, scale, 0.0, None, 0)
    return out.clone(), lse.clone()


@pytest.mark.newer_triton
def test_a_packed_projection_gives_the_bits_of_its_parts(target, monkeypatch):
    """Whatever programs run the blocks in which order, and whatever copy arrives first."""
    packed = torch.randn(1, 193, 3, 3, 64).to(target.device, BF16)
    found = forward(target, *packed.unbind(2))
    monkeypatch.setattr(attention_hopper, "_CACHE", 2 * 2 * 193 * 64 * 2)  # of two heads
    monkeypatch.setattr(attention_hopper, "_multiprocessors", lambda t: 4)
    expected = forward(target, *(t.contiguous() for t in packed.unbind(2)), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dimensions_of_one_element_may_have_any_stride(target):
    q, k, v = (torch.randn(1, 70, 1, 16).to(target.device, FP16) for _ in range(3))
    odd = [t.as_strided(t.shape, (3, t.stride(1), 5, 1)) for t in (q, k, v)]
    assert attention_hopper.refuse(*odd, 0.0, None) is None
    out, lse = forward(target, *odd, causal=False, scale=0.0)
    assert (out[0] - v.double().mean(1)).abs().max() < 1e-3
    assert (lse - math.log(70)).abs().max() < 1e-6


def test_the_log_sum_exp_of_rows_without_keys(target):
    """Of a sequence without keys, and before the diagonal."""
    q, k, v = (t.to(target.device) for t in qkv(2, 20, 65, 1, 64, "cpu").values())
    lengths = torch.tensor([0, 65], dtype=torch.int32, device=target.device)
    out, lse = forward(target, q.half(), k.half(), v.half(), lengths=lengths, causal=False)
    assert lse[0].isneginf().all() and lse[1].isfinite().all()
    assert not out[0].any() and out[1].any(-1).all()
    out, lse = forward(target, k.bfloat16(), q.bfloat16(), q.bfloat16())
    assert lse[:, :, :45].isneginf().all() and lse[:, :, 45:].isfinite().all()
    assert not out[:, :45].any() and out[:, 45:].any(-1).all()


def test_padded_keys_may_hold_anything(target):
    q, k, v = (t.to(target.device, FP16) for t in qkv(1, 5, 300, 1, 64, "cpu").values())
    lengths = torch.tensor([170], dtype=torch.int32, device=target.device)
    runs = []
    for value in (0.0, math.nan):
        k[:, 170:], v[:, 170:] = value, value
        runs.append(forward(target, q, k, v, lengths=lengths, causal=False))
    assert runs[0][0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.planted_bug
@pytest.mark.parametrize(
    ("what", "kind"), [("mbarrier wait", "race"), ("mbarrier.arrive", "deadlock")]
)
def test_a_ring_that_is_not_waited_for_is_found(what, kind):
    """Without the last copy's wait for a free slot, without the first word that one is free."""
    expression, replacement = MUTATIONS[what]

    def edit(name, ptx):
        copy = ptx.rindex("cp.async.bulk.tensor.4d.shared")
        matches = list(re.finditer(expression, ptx))
        match = matches[0]
        if what == "mbarrier wait":
            match = [m for m in matches if m.end() < copy][-1]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    q, k, v = (t.to(BF16) for t in qkv(1, 40, 600, 1, 128, "cpu").values())
    with pytest.raises(PtxError) as error:
        forward(TARGETS["sm_90a"], q, k, v, edit=edit, steps_limit=300_000)
    assert error.value.kind == kind


# ---- when it is chosen


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def chosen(arch, q, k=None, scale=0.125, rng=None):
    k = q if k is None else k
    with intercepted(arch, lambda compiled: None):
        return attention._long(q, k, k, scale, rng)


def test_it_is_chosen_for_what_it_takes():
    assert chosen(90, meta(2, 600, 12, 64)) is attention_hopper
    for packed in (meta(2, 600, 3, 12, 64)[:, :, 1], meta(2, 600, 3, 12, 8)[:, 5:, 0, 3:]):
        assert chosen(90, packed) is attention_hopper
    assert chosen(90, meta(1, 17, 12, 64), meta(1, 600, 12, 64)) is attention_hopper
    assert chosen(90, meta(1, 16, 12, 64), meta(1, 600, 12, 64)) is attention_decode


REFUSED = {
    "float32": (meta(2, 600, 12, 64, dtype=torch.float32), {}, "float32"),
    "dropout": (meta(2, 600, 12, 64), {"rng": meta(2, dtype=torch.int64)}, "dropout"),
    "negative scale": (meta(2, 600, 12, 64), {"scale": -0.5}, "negative, got -0.5"),
    "no token": (meta(2, 0, 12, 64), {}, "shape"),
    "odd strides": (meta(2, 600, 12, 68)[..., :64], {}, "strides"),
    "gaps": (meta(2, 600, 12, 128)[..., ::2], {}, "strides"),
    "one key for all": (meta(1, 1, 12, 64).expand(2, 600, 12, 64), {}, "strides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_other_kernel_has_what_it_refuses(name):
    q, options, word = REFUSED[name]
    arguments = {"scale": 0.125, "rng": None, **options}
    assert word in attention_hopper.refuse(q, q, q, **arguments)
    if q.shape[1]:
        assert chosen(90, q, **options) is attention_long


@pytest.mark.parametrize("arch", [80, 100])
def test_other_gpus_have_the_other_kernel(arch):
    assert chosen(arch, meta(2, 600, 12, 64)) is attention_long


@pytest.mark.parametrize(
    ("version", "words"),
    [("3.6.0", "lacks a part of Gluon: no tma"), ("4.1.0", "3.6 and 3.7, this is 4.1.0")],
)
def test_without_its_gluon_the_other_kernel_is_used(monkeypatch, version, words):
    def missing(name):
        raise ImportError("no tma")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(attention.triton, "__version__", version)
    attention._hopper.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"slower kernel.*{words}"):
            assert chosen(90, meta(2, 600, 12, 64)) is attention_long
    finally:
        attention._hopper.cache_clear()
