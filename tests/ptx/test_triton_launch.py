"""Triton kernels, executed as compiled, against float64; what lies between tensors and PTX."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import triton.language as tl  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.ptx.emulator import PtxError  # noqa: E402
from tests.ptx.kernels import (  # noqa: E402
    attention,
    attention_bwd,
    dropout,
    layer_norm,
    matmul,
    reductions,
)
from tests.ptx.triton_launch import emulated  # noqa: E402

BF16 = torch.bfloat16
newer_triton = pytest.mark.newer_triton


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm; NaN where anything is not finite."""
    found = found.double().cpu()
    return float((found - exact).norm() / exact.norm()) if found.isfinite().all() else math.nan


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse, base 2."""
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        T = s.shape[-1]
        s = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1) / math.log(2)


# ---- the corpus


@pytest.mark.parametrize("C", [768, 127])
def test_layer_norm(target, C):
    x, grad_out = draw(7, C) + 1, draw(7, C)
    weight, bias = draw(C, dtype=torch.float32), draw(C, dtype=torch.float32)
    with target.run() as launches:
        arguments = [t.to(target.device) for t in (x, weight, bias, grad_out)]
        y, mean, rstd = layer_norm.layer_norm_fwd(*arguments[:3])
        grads = layer_norm.layer_norm_bwd(arguments[0], arguments[1], arguments[3], mean, rstd)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(exact[0], (C,), *exact[1:])
    expected.backward(grad_out.double())
    assert error(y, expected.detach()) < 3e-3
    for found, leaf, bound in zip(grads, exact, (3e-3, 1e-6, 1e-6), strict=True):
        assert error(found, leaf.grad) < bound
    names = [launch.name for launch in launches]
    assert names in ([], ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("T", [256, 200])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_attention_fwd(target, descriptors, T, causal):
    q, k, v = (draw(1, T, 64) for _ in range(3))
    with target.run():
        out, lse = attention.attention_fwd(
            *(t.to(target.device) for t in (q, k, v)), causal=causal, descriptors=descriptors
        )
    exact_out, exact_lse = softmax_attention(q.double(), k.double(), v.double(), causal)
    assert error(out, exact_out) < 4e-3
    assert error(lse, exact_lse) < 1e-5


@newer_triton
@pytest.mark.parametrize(
    ("D", "block_m", "block_n", "num_warps"),
    [(16, 64, 32, 4), (32, 128, 128, 8), (128, 64, 64, 4)],
    ids=str,
)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_attention_fwd_tiles(target, descriptors, D, block_m, block_n, num_warps):
    q, k, v = (draw(2, 128, D) for _ in range(3))
    with target.run():
        out, _ = attention.attention_fwd(
            *(t.to(target.device) for t in (q, k, v)),
            causal=True,
            descriptors=descriptors,
            block_m=block_m,
            block_n=block_n,
            num_warps=num_warps,
        )
    exact, _ = softmax_attention(q.double(), k.double(), v.double(), True)
    assert error(out, exact) < 4e-3


@newer_triton
@pytest.mark.parametrize("T", [128, 100])
def test_attention_bwd_into_one_packed_gradient(target, T):
    leaves = [draw(2, T, 64) for _ in range(3)]
    grad_out = draw(2, T, 64)
    exact = [t.double().requires_grad_() for t in leaves]
    out, lse = softmax_attention(*exact, True)
    out.backward(grad_out.double())
    with target.run():
        inputs = [*leaves, out.detach().to(BF16), lse.detach().float(), grad_out]
        inputs = [t.to(target.device) for t in inputs]
        grads = attention_bwd.attention_bwd(*inputs, causal=True)
    for found, leaf in zip(grads, exact, strict=True):
        assert error(found, leaf.grad) < 6e-3


@newer_triton
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [(BF16, "ieee", 3e-3), (torch.float32, "ieee", 1e-6), (torch.float32, "tf32", 1e-3)],
    ids=["bf16", "float32", "tf32"],
)
@pytest.mark.parametrize("shape", [(64, 64, 64), (70, 48, 40)], ids=str)
def test_matmul(target, shape, dtype, precision, bound):
    M, N, K = shape
    a, b = draw(M, K, dtype=dtype), draw(K, N, dtype=dtype)
    with target.run():
        c = matmul.matmul(a.to(target.device), b.to(target.device), precision=precision)
    assert error(c, a.double() @ b.double()) < bound


@newer_triton
def test_sums_by_atomics(target):
    x, classes = draw(50, 200, dtype=torch.float32), torch.randint(0, 10, (1000,))
    with target.run():
        sums = reductions.column_sums(x.to(target.device))
        counts = reductions.counts(classes.to(target.device), 10)
    assert error(sums, x.double().sum(0)) < 1e-6
    assert counts.tolist() == classes.bincount(minlength=10).tolist()


@triton.jit
def _add_kernel(sums_ptr, old_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    ones = tl.full((BLOCK,), 1.0, sums_ptr.dtype.element_ty)
    old = tl.atomic_add(sums_ptr + offs % 3, ones)
    tl.store(old_ptr + tl.program_id(0) * BLOCK + offs, old.to(tl.float32))


@newer_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_atomic_additions(target, dtype):
    """sm_80 adds bfloat16 by swapping whole words, of which there are two here."""
    sums, old = torch.zeros(4, dtype=dtype, device=target.device), torch.empty(128)
    old = old.to(target.device)
    with target.run(checks=True):
        _add_kernel[(2,)](sums, old, BLOCK=64)
    assert sums.tolist() == [44, 42, 42, 0]
    columns = [old.cpu().view(2, 64)[:, column::3].reshape(-1) for column in range(3)]
    for column, count in zip(columns, (44, 42, 42), strict=True):
        assert torch.equal(column.sort().values, torch.arange(float(count)))


@newer_triton
def test_rows(target):
    x = draw(3, 100, dtype=torch.float32)
    with target.run():
        maximum, where, scan, ordered = reductions.rows(x.to(target.device))
    assert torch.equal(maximum.cpu(), x.amax(1))
    assert torch.equal(where.cpu().long(), x.argmax(1))
    assert error(scan, x.double().cumsum(1)) < 1e-6
    assert torch.equal(ordered.cpu(), x.sort(1, descending=True).values)


def philox(seed: int, index: int) -> int:
    """The first word of Philox-4x32-10, counter (index, 0, 0, 0)."""
    c, k = [index, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


@newer_triton
def test_dropout(target):
    x = torch.rand(1500) + 1
    with target.run():
        y = dropout.dropout(x.to(target.device), 0.25, 1234).cpu()
    words = torch.tensor([philox(1234, i) for i in range(1500)])
    # triton.language.rand: the word as a signed number, those below 0 mirrored, over 2^31.
    signed = torch.where(words >= 2**31, words - 2**32, words)
    uniform = torch.where(signed < 0, -signed - 1, signed).double() * 4.6566127342e-10
    assert torch.equal(y != 0, uniform > 0.25)
    assert torch.allclose(y[y != 0], (x / 0.75)[y != 0], rtol=1e-6)


# ---- from tensors to parameters


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask) * factor, mask=mask)


def scale(x: Tensor, y: Tensor, n: int, factor: float = 2.0, block: int = 128) -> None:
    _scale_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n, factor, BLOCK=block)


ARCHS = pytest.mark.parametrize("arch", [80, 90])


@ARCHS
def test_the_record_of_launches(arch):
    x = draw(256, dtype=torch.float32)
    with emulated(arch) as launches:
        scale(x, torch.empty_like(x), 256)
    (launch,) = launches
    assert (launch.name, launch.arch) == ("_scale_kernel", arch)
    assert f".target sm_{arch}" in launch.ptx and launch.instructions > 10
    assert launch.compile_seconds > 0 and launch.run_seconds > 0


@pytest.mark.parametrize(
    ("first", "n", "wide"),
    [(0, 64, True), (1, 64, False), (0, 63, False), (4, 64, True)],
    ids=["aligned", "unaligned-address", "odd-length", "view-at-16-bytes"],
)
def test_specialisation_is_that_of_the_real_addresses(first, n, wide):
    x, y = draw(128, dtype=torch.float32), torch.zeros(128)
    with emulated(90) as launches:
        # 128 threads with 4 elements each, which may be one access of 16 bytes.
        scale(x[first:], y[first:], n, block=512)
    assert torch.equal(y[first : first + n], 2 * x[first : first + n])
    assert not y[:first].any() and not y[first + n :].any()
    assert ("ld.global.v4" in launches[0].ptx) is wide


def test_integers_equal_to_one_are_compiled_in():
    x = draw(4, dtype=torch.float32)
    for n in (1, 4):
        y = torch.zeros(4)
        with emulated(80) as launches:
            scale(x, y, n)
        assert torch.equal(y[:n], 2 * x[:n]) and not y[n:].any()
    assert len(launches) == 1


@triton.jit
def _large_kernel(y_ptr, small, large, flag):
    tl.store(y_ptr, small.to(tl.int64))
    tl.store(y_ptr + 1, large)
    tl.store(y_ptr + 2, flag.to(tl.int64))


def test_integers_of_every_width():
    y = torch.zeros(3, dtype=torch.int64)
    with emulated(90):
        _large_kernel[(1,)](y, -7, 2**40 + 3, True)
    assert y.tolist() == [-7, 2**40 + 3, 1]


@triton.jit
def _optional_kernel(x_ptr, bias_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs)
    tl.store(y_ptr + offs, x)


def test_arguments_that_are_none():
    x, bias, y = draw(64, dtype=torch.float32), draw(64, dtype=torch.float32), torch.empty(64)
    with emulated(80):
        _optional_kernel[(1,)](x, None, y, BLOCK=64)
        assert torch.equal(y, x)
        _optional_kernel[(1,)](x, bias, y, BLOCK=64)
    assert torch.equal(y, x + bias)


@triton.jit
def _tuple_kernel(pointers, numbers, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(pointers[0] + offs) * numbers[0] + numbers[1]
    tl.store(pointers[1] + offs, x)


def test_tuples():
    x, y = draw(64, dtype=torch.float32), torch.empty(64)
    with emulated(90):
        _tuple_kernel[(1,)]((x, y), (3.0, 5), BLOCK=64)
    assert torch.allclose(y, 3 * x + 5)


def test_interleaved_views_of_one_storage_keep_all_their_stores():
    packed = torch.zeros(64, 2)
    x = draw(128, dtype=torch.float32)

    with emulated(80) as launches:
        _interleave_kernel[(1,)](x, packed[:, 0], packed[:, 1], BLOCK=64)
    assert torch.equal(packed, x.reshape(2, 64).T)
    assert len(launches) == 1


@triton.jit
def _interleave_kernel(x_ptr, even_ptr, odd_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(even_ptr + 2 * offs, tl.load(x_ptr + offs))
    tl.store(odd_ptr + 2 * offs, tl.load(x_ptr + BLOCK + offs))


@pytest.mark.planted_bug
@pytest.mark.parametrize("size", [60, 3], ids=["not-a-tile", "smaller-than-a-tile"])
def test_accesses_outside_a_tensor_are_found(size):
    x, y = draw(size, dtype=torch.float32), torch.zeros(128)
    with pytest.raises(PtxError, match=r"x_ptr\+") as caught, emulated(90):
        scale(x, y, 128)
    assert caught.value.kind == "bounds"


def test_accesses_outside_a_view_are_found():
    x, rows = draw(128, dtype=torch.float32), torch.zeros(3, 128)
    with emulated(90):
        scale(x, rows[1], 128)
    assert torch.equal(rows[1], 2 * x) and not rows[0].any() and not rows[2].any()
    with pytest.raises(PtxError, match=r"y_ptr\+") as caught, emulated(90):
        scale(x, rows[1, :100], 128)
    assert caught.value.kind == "bounds"


@triton.autotune(
    [triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, num_warps=8)], key=["n"]
)
@triton.jit
def _tuned_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + offs, 1.0, mask=offs < n)


def test_autotuned_kernels_run_once():
    x = torch.zeros(100)
    with emulated(90) as launches:
        _tuned_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, 100)
    assert torch.equal(x, torch.ones(100))
    assert [launch.name for launch in launches] == ["_tuned_kernel"]


def test_too_much_shared_memory_is_refused_as_on_a_gpu():
    q = draw(1, 256, 128)
    with pytest.raises(OutOfResources, match="shared memory"), emulated(80):
        attention.attention_fwd(q, q, q, causal=False, block_n=128, num_warps=8, num_stages=6)


def test_tensors_must_be_on_the_cpu():
    x = torch.empty(64, device="meta")
    with pytest.raises(ValueError, match="x_ptr: the emulator needs CPU tensors"), emulated(80):
        scale(x, x, 64)


def test_edited_ptx_is_what_runs():
    x, y = torch.ones(64), torch.zeros(64)

    def edit(name: str, ptx: str) -> str:
        assert name == "_scale_kernel" and "mul.f32" in ptx
        return ptx.replace("mul.f32", "add.f32")

    with emulated(80, edit=edit):
        scale(x, y, 64, 7.0)
    assert torch.equal(y, torch.full((64,), 8.0))


def test_triton_is_as_before_afterwards():
    before = JITFunction.run, driver._active
    x = draw(8, dtype=torch.float32)
    with pytest.raises(PtxError), emulated(80):
        scale(x, x, 100000)
    assert (JITFunction.run, driver._active) == before


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), emulated(80):
        pass
