"""The library's attention for CUDA, executed as compiled, through the public functions."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

import fastformer
from fastformer.ops import attention, attention_qkvpacked, attention_varlen, dispatch, reference
from fastformer.ops.attention import refuse_cuda
from tests.ops.test_attention import eager
from tests.ops.test_attention_varlen import arguments, one_at_a_time
from tests.ptx import nvcc
from tests.ptx.cases import cuda_kernels
from tests.ptx.emulator import PtxError
from tests.ptx.library_cases import ATTENTION_BWD_CU, ATTENTION_FWD_CU, CUDA_ATTENTION
from tests.ptx.nvcc import Shifted, Struct
from tests.ptx.resources import SHARED_LIMIT
from tests.ptx.test_attention import BF16, FP16, Case

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

NAMES = {BF16: "__nv_bfloat16", FP16: "__half"}
# fastformer_attention_args of csrc/cuda/launchers.h: eight operands, then lse and what follows it.
FIELDS = "Qqqq" * 8 + "QQQQQ" + "QqfI" + "qqq" + "iiiiif"


class Emulated:
    """What csrc/ops/attention_cuda.cpp does, with the emulator's kernels and tensors of the CPU.

    Those for narrow heads are compiled for sm_80, those for wide ones for sm_90a.
    """

    def __init__(self, native: ModuleType) -> None:
        self.sources = {"fwd": ATTENTION_FWD_CU, "bwd": ATTENTION_BWD_CU}
        self.launches, self.seed = native.attention, 1

    def launch(self, what: str, rows: list[Tensor | None], lse: Tensor, options: Any) -> None:
        """`rows` are q, k, v, out, grad_out, grad_q, grad_k and grad_v."""
        lengths, causal, scale, dropout_p, rng, site = options
        key_lengths, starts_q, starts_k, T, S = lengths
        q = rows[0]
        H, D = q.shape[-2:]
        B = q.shape[0] if starts_q is None else len(starts_q) - 1
        held: dict[int, np.ndarray] = {}

        def address(t: Tensor | None) -> Any:
            if t is None or not t.numel():
                return 0
            storage = t.untyped_storage()
            whole = torch.empty(0, dtype=torch.int16).set_(storage).numpy()
            whole = held.setdefault(storage.data_ptr(), whole)
            return Shifted(whole, t.storage_offset() * t.element_size() // 2)

        def operand(t: Tensor | None) -> list[Any]:
            if t is None or not t.numel():
                return [0, 0, 0, 0]
            *batch, token, head, last = t.stride()
            assert last == 1
            return [address(t), *(batch or [0]), token, head]

        sums = None
        if what == "bwd":
            sums = torch.full((self.launches.bwd_sums(B * H, T, S, D),), math.nan)
        fields = [field for t in rows for field in operand(t)]
        fields += [address(t) for t in (lse, sums, key_lengths, starts_q, starts_k, rng)]
        drops = rng is not None
        fields += [site, reference.dropout_scale(dropout_p) if drops else 1.0]
        fields += [reference.dropout_threshold(dropout_p) if drops else 0]
        fields += [B, H, q.shape[0] if starts_q is not None else 0]
        fields += [T, S, D, causal, 1 if q.dtype == BF16 else 2, scale]
        if what == "fwd":
            launch = self.launches.fwd_launch(B * H, T, D)
        else:
            launch = self.launches.bwd_launch(B * H, S, D)
        kernels = cuda_kernels(self.sources[what], "80" if launch.dim == 64 else "90a")
        kernels.launch(
            f"attention_{what}_kernel<{NAMES[q.dtype]}, {launch.dim}>",
            launch.blocks,
            launch.threads,
            [Struct(FIELDS, fields)],
            dynamic_shared=launch.shared_bytes,
            seed=self.seed,
        )

    def forward(self, q, k, v, lengths, *settings) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape)
        packed = lengths[1] is not None
        shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(shape, dtype=torch.float32)
        rows = [q, k, v, out, None, None, None, None]
        if q.numel():
            self.launch("fwd", rows, lse, (lengths, *settings))
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, lengths, settings, grads) -> None:
        rows = [q, k, v, out, grad_out.contiguous(), *grads]
        self.launch("bwd", rows, lse, (lengths, *settings))

    def attention_fwd(self, q, k, v, key_lengths, *settings):
        lengths = (key_lengths, None, None, q.shape[1], k.shape[1])
        return self.forward(q, k, v, lengths, *settings)

    def attention_bwd(self, grad_out, q, k, v, out, lse, key_lengths, *settings):
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        lengths = (key_lengths, None, None, q.shape[1], k.shape[1])
        self.backward(grad_out, q, k, v, out, lse, lengths, settings, grads)
        return grads

    def attention_qkvpacked_bwd(self, grad_out, qkv, out, lse, key_lengths, *settings):
        grad = qkv.new_empty(qkv.shape)
        lengths = (key_lengths, None, None, qkv.shape[1], qkv.shape[1])
        parts = (*qkv.unbind(2), out, lse)
        self.backward(grad_out, *parts, lengths, settings, grad.unbind(2))
        return grad

    def attention_varlen_fwd(self, q, k, v, starts_q, starts_k, T, S, *settings):
        return self.forward(q, k, v, (None, starts_q, starts_k, T, S), *settings)

    def attention_varlen_bwd(
        self, grad_out, q, k, v, out, lse, starts_q, starts_k, T, S, *settings
    ):
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        lengths = (None, starts_q, starts_k, T, S)
        self.backward(grad_out, q, k, v, out, lse, lengths, settings, grads)
        return grads


OPS = ("attention_fwd", "attention_bwd", "attention_qkvpacked_bwd")
OPS += ("attention_varlen_fwd", "attention_varlen_bwd")


@pytest.fixture
def cuda(native, monkeypatch):
    """Every attention op by these kernels."""
    emulated = Emulated(native)
    for op in OPS:
        kernel = dispatch.Kernel(getattr(emulated, op), refuse_cuda)
        monkeypatch.setitem(dispatch._kernels[op], "cuda", kernel)
    with fastformer.backend("cuda"):
        yield emulated


CASES = [
    Case(BF16, 1, 64, S=197, causal=True),
    Case(BF16, 20, 64, causal=True, H=2),
    Case(BF16, 63, 64, S=20, causal=True),  # the first 43 queries see no key
    Case(BF16, 64, 64, scale=-0.3),
    Case(BF16, 197, 64),
    Case(BF16, 50, 64, causal=True, lengths=(50, 0, 17), dropout_p=0.2, H=2),
    Case(FP16, 70, 64, S=63, causal=True, dropout_p=0.5),
    Case(FP16, 33, 16, lengths=(33, 1), scale=0.0),
    Case(FP16, 100, 64, S=300, causal=True, dropout_p=0.1),  # keys in two turns
    Case(FP16, 40, 80, S=63, lengths=(63, 33)),
    Case(BF16, 150, 128, causal=True, lengths=(140,)),  # keys in two turns
    Case(BF16, 33, 128, dropout_p=0.2),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_numerics(cuda, check_numerics, case):
    options = case.options("cpu")
    peer_options = {name: value for name, value in options.items() if name not in ("rng", "site")}
    keep = case.keep(options)

    def ours(q, k, v):
        return attention(q, k, v, **options)

    def peer(q, k, v):
        return eager(q, k, v, keep=keep, **peer_options)

    check_numerics(ours, peer, case.dtype, case.inputs("cpu"))


def test_a_packed_projection_gives_the_bits_of_its_parts(cuda):
    """The kernels read views, and write the three gradients into one packed tensor."""
    qkv = torch.randn(1, 40, 3, 2, 64, dtype=BF16).requires_grad_()
    grad_out = torch.randn(1, 40, 2, 64, dtype=BF16)
    out = attention_qkvpacked(qkv, causal=True)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    parts = [part.detach().contiguous().requires_grad_() for part in qkv.unbind(2)]
    expected = attention(*parts, causal=True)
    expected.backward(grad_out)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b.grad) for a, b in zip(grad.unbind(2), parts, strict=True))


@pytest.mark.parametrize("dropout_p", [2**-16, 0.5])
def test_the_mask_is_that_of_the_reference(cuda, dropout_p):
    """With unit vectors as values an output is the row of its weights, 0 where it was dropped."""
    case = Case(BF16, 40, 32, S=32, lengths=(32, 32), dropout_p=dropout_p, H=2)
    options = case.options("cpu")
    q, k, _ = (x.to(BF16) for x in case.inputs("cpu").values())
    v = torch.eye(32, dtype=BF16)[None, :, None].expand(2, -1, 2, -1).contiguous()
    v.requires_grad_()
    out = attention(torch.zeros_like(q), k, v, **options)
    (out.detach() * out).sum().backward()
    keep = case.keep(options)
    assert torch.equal(out.detach().transpose(1, 2) != 0, keep)
    assert torch.equal(v.grad.diagonal(dim1=1, dim2=3) != 0, keep.any(2))


def test_the_same_inputs_give_the_same_bits(cuda):
    """Whatever the order in which blocks run and copies arrive, also with keys in two turns."""
    case = Case(BF16, 70, 128, S=140, causal=True, dropout_p=0.2)
    options = case.options("cpu")
    inputs = [x.to(BF16).requires_grad_() for x in case.inputs("cpu").values()]
    runs = []
    for cuda.seed in (1, 2):
        out = attention(*inputs, **options)
        runs.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.planted_bug
def test_gradients_of_scores_that_are_not_awaited_are_found(cuda, monkeypatch):
    """Backward without its last barrier, which other warps' gradients of scores need."""
    kernels = cuda_kernels(ATTENTION_BWD_CU, "80")
    entry = kernels.ptx.index(f".entry {kernels.mangled('attention_bwd_kernel<__half, 64>')}")
    body, found, rest = kernels.ptx[entry:].partition("\n}\n")
    before, barrier, after = body.rpartition("bar.sync")
    assert barrier
    ptx = kernels.ptx[:entry] + before + "//" + after + found + rest
    monkeypatch.setattr(f"{__name__}.cuda_kernels", lambda source, arch: kernels.with_ptx(ptx))
    q = torch.randn(1, 20, 1, 64, dtype=FP16)
    lse, settings = torch.zeros(1, 1, 20), (None, False, 0.1, 0.0, None, 0)
    with pytest.raises(PtxError) as caught:
        torch.ops.fastformer.attention_bwd(q, q, q, q, q, lse, *settings)
    assert caught.value.kind == "race"


def test_queries_that_see_no_key_give_zero_and_padding_is_never_read(cuda):
    case = Case(BF16, 50, 64, S=40, causal=True, lengths=(0, 9))
    lengths = case.options("cpu")["key_lengths"]
    q, k, v = (x.to(BF16) for x in case.inputs("cpu").values())
    for b, length in enumerate(case.lengths):
        k[b, length:], v[b, length:] = math.nan, math.inf
    settings = (True, 0.1, 0.0, None, 0)
    out, lse = torch.ops.fastformer.attention_fwd(q, k, v, lengths, *settings)
    grads = torch.ops.fastformer.attention_bwd(out, q, k, v, out, lse, lengths, *settings)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not out[0].any() and not out[1, :10].any() and out[1, 10:].any(-1).all()
    assert not grads[0][0].any() and not grads[0][1, :10].any()
    assert (lse[0] == -math.inf).all() and (lse[1, :, :10] == -math.inf).all()
    with fastformer.backend("reference"):
        expected = torch.ops.fastformer.attention_fwd(
            q[1:, 10:], k[1:, :9], v[1:, :9], None, False, 0.1, 0.0, None, 0
        )[1]
    seen = lse[1:, :, 18:]  # those see all nine keys
    assert torch.allclose(seen, expected[..., 8:], rtol=1e-6)
    for b, length in enumerate(case.lengths):
        assert not grads[1][b, length:].any() and not grads[2][b, length:].any()


@pytest.mark.parametrize("size", [(2, 0, 5, 2), (2, 5, 0, 2)], ids=str)
def test_empty_inputs(cuda, size):
    B, T, S, H = size
    q = torch.randn(B, T, H, 16, dtype=BF16, requires_grad=True)
    k, v = (torch.randn(B, S, H, 16, dtype=BF16, requires_grad=True) for _ in range(2))
    out = attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape and not out.any()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_sequences(cuda, check_numerics, causal):
    queries, keys = [20, 0, 70, 5], [33, 7, 65, 0]
    lengths = arguments(queries, keys, "cpu")

    def ours(q, k, v):
        return attention_varlen(q, k, v, *lengths, causal=causal)

    shapes = {"q": sum(queries), "k": sum(keys), "v": sum(keys)}
    values = {name: torch.randn(tokens, 2, 64) for name, tokens in shapes.items()}
    check_numerics(ours, one_at_a_time(queries, keys, causal), BF16, values)


def test_packed_sequences_draw_the_mask_of_padded_ones(cuda):
    B, T, H, D = 2, 20, 2, 16
    options = {"dropout_p": 0.3, "rng": torch.tensor([9, 2**40]), "site": 5, "causal": True}
    leaves = [torch.randn(B, T, H, D, dtype=BF16, requires_grad=True) for _ in range(3)]
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in leaves]
    padded = attention(*leaves, **options)
    out = attention_varlen(*flat, *arguments([T] * B, [T] * B, "cpu"), **options)
    assert torch.equal(out.view(B, T, H, D), padded)
    grad = torch.randn_like(padded)
    padded.backward(grad)
    out.backward(grad.flatten(0, 1))
    for leaf, one in zip(leaves, flat, strict=True):
        assert torch.equal(one.grad.view(B, T, H, D), leaf.grad)


# T, D: dim, threads, blocks of three heads, rows of shared memory.
LAUNCHES = [
    (1, 64, (64, 32, 3, 16 + 4 * 64)),
    (128, 64, (64, 256, 3, 128 + 4 * 64)),
    (129, 64, (64, 160, 6, 80 + 4 * 64)),
    (197, 8, (64, 224, 6, 112 + 4 * 64)),
    (512, 72, (128, 192, 18, 96 + 4 * 32)),
]


@pytest.mark.parametrize(("T", "D", "expected"), LAUNCHES, ids=str)
def test_launches(native, T, D, expected):
    launch = native.attention.fwd_launch(3, T, D)
    rows = launch.shared_bytes // (2 * launch.dim)
    assert (launch.dim, launch.threads, launch.blocks, rows) == expected


@pytest.mark.parametrize(("S", "D", "threads", "turns"), [
    (0, 64, 128, 1), (64, 64, 128, 1), (65, 64, 256, 1), (197, 64, 512, 1), (257, 64, 512, 2),
    (64, 128, 128, 1), (129, 128, 256, 2), (512, 72, 256, 4),
], ids=str)  # fmt: skip
def test_launches_of_backward(native, S, D, threads, turns):
    launch = native.attention.bwd_launch(3, S, D)
    assert (launch.threads, launch.blocks) == (threads, 3)
    assert max(1, -(-S // (threads // 2))) == turns
    queries = 64 if launch.dim == 64 else 32
    padded = -(-100 // queries) * queries
    expected = 3 * padded * launch.dim if turns > 1 else 0
    assert native.attention.bwd_sums(3, 100, S, D) == expected
    assert launch.shared_bytes <= SHARED_LIMIT[80]


@pytest.mark.parametrize("cols", [32, 64, 128])
def test_rows_in_shared_memory_have_no_bank_conflicts(native, cols):
    """ldmatrix reads eight rows of a chunk at a time, stores of fragments write them."""
    chunks = cols // 8
    at = np.array(
        [[native.attention.chunk(chunks, r, c) for c in range(chunks)] for r in range(16)]
    )
    assert (np.sort(at, axis=1) == np.arange(chunks)).all()
    banks = (at + chunks * np.arange(16)[:, None]) % 8  # of 16 bytes
    for first in (0, 8):
        assert (np.sort(banks[first : first + 8], axis=0) == np.arange(8)[:, None]).all()


@pytest.mark.parametrize(("what", "D"), CUDA_ATTENTION, ids=str)
def test_the_largest_blocks_are_those_whose_resources_are_known(native, what, D):
    launch = getattr(native.attention, f"{what}_launch")(1, 10_000, D)
    assert (launch.threads, launch.shared_bytes) == CUDA_ATTENTION[what, D][:2]


def test_what_the_kernels_refuse(cuda):
    q = torch.randn(1, 5, 1, 16)
    with pytest.raises(RuntimeError, match="it takes bfloat16 and float16, got float32"):
        attention(q, q, q)
