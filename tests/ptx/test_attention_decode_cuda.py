"""Attention from few queries in CUDA, executed as compiled, against eager PyTorch and float64."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

import fastformer
from fastformer.ops import reference
from fastformer.ops.attention import _refuse_cuda_fwd
from tests.ops.test_attention import eager, qkv
from tests.ptx import nvcc
from tests.ptx.cases import cuda_kernels
from tests.ptx.emulator import PtxError
from tests.ptx.library_cases import ATTENTION_DECODE_CU
from tests.ptx.mutations import only_entry
from tests.ptx.nvcc import CudaKernels, Shifted
from tests.ptx.test_layer_norm_cuda import NAMES, array, poison, tensor

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def operand(t: Tensor) -> tuple[Any, bytes]:
    """A view, all it is a view of in memory, and its strides."""
    strides = struct.pack("<3q", *t.stride()[:3])
    if t.numel() == 0:
        return 0, strides
    whole = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    return Shifted(array(whole), t.storage_offset()), strides


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Decode:
    """The launcher of csrc/cuda/attention_decode.cu: on the CPU's tensors, or the op on a GPU."""

    native: Any
    kernels: CudaKernels | None
    seed: int = 1
    chunks: int = 0  # of the last call

    @property
    def device(self) -> str:
        return "cpu" if self.kernels else "cuda"

    def __call__(self, q, k, v, key_lengths=None, causal=True, scale=None):
        B, T, H, D = q.shape
        S = k.shape[1]
        scale = D**-0.5 if scale is None else scale
        launch = self.native.attention_decode.launch(B, T, S, H, D)
        self.chunks = launch.chunks
        if self.kernels is None:
            settings = (key_lengths, causal, scale, 0.0, None, 0)
            with fastformer.backend("cuda"):
                return torch.ops.fastformer.attention_fwd.default(q, k, v, *settings)
        out, lse = poison(q.dtype, B, T, H, D), poison(F32, B, H, T)
        partial: list[Any] = [0, 0]
        if launch.chunks > 1:
            rows = launch.chunks, B * T * H
            partial = [poison(F32, *rows, D), poison(F32, *rows)]
            scratch = self.native.attention_decode.scratch(launch, B * T * H, D)
            assert scratch == sum(part.size for part in partial)
        tensors, strides = zip(*map(operand, (q, k, v)), strict=True)
        masked = 0 if key_lengths is None else key_lengths.numpy().copy()
        sizes = [B * T * H, T, S, H, D, launch.chunk, launch.chunks]
        scale_log2 = float(np.float32(scale) * np.float32(math.log2(math.e)))
        name, threads, options = NAMES[q.dtype], launch.threads, {"seed": self.seed}
        if launch.blocks:
            kernel = f"attention_decode_kernel<{name}, {launch.lanes}, {launch.queries}>"
            arguments = [*tensors, masked, out, lse, *partial, *strides, *sizes, causal, scale_log2]
            self.kernels.launch(kernel, launch.blocks, threads, arguments, **options)
        if launch.merge_blocks:
            kernel = f"attention_decode_merge_kernel<{name}>"
            arguments = [*partial, out, lse, B * T * H, T, H, D, launch.chunks]
            self.kernels.launch(kernel, launch.merge_blocks, threads, arguments, **options)
        return tensor(out, q.dtype), tensor(lse, F32)


@pytest.fixture(params=["sm_80", pytest.param("gpu", marks=pytest.mark.gpu)])
def decode(request, native) -> Decode:
    if request.param == "sm_80":
        return Decode(native, cuda_kernels(ATTENTION_DECODE_CU, "80"))
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
    return Decode(native, None)


def error(found, exact):
    return (found.double() - exact).abs().max().item()


def judge(decode, q, k, v, key_lengths=None, causal=True, scale=None):
    """The rule of numerics for the output, and the log-sum-exp against float64."""
    q, k, v = (t.to(decode.device) for t in (q, k, v))
    key_lengths = None if key_lengths is None else key_lengths.to(decode.device)
    out, lse = decode(q, k, v, key_lengths, causal, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    doubles = [t.double() for t in (q, k, v)]
    exact, exact_lse = reference.attention_fwd(*doubles, key_lengths, causal, scale, 0.0, None, 0)
    peer = eager(q, k, v, causal=causal, scale=scale, key_lengths=key_lengths)
    assert error(out, exact) <= 2 * error(peer, exact) + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def inputs(B, T, S, H, D, dtype):
    return [t.to(dtype) for t in qkv(B, T, S, H, D, "cpu").values()]


CASES = {  # B, T, S, H, D, dtype, chunks
    "one key": (2, 1, 1, 3, 64, BF16, 1),
    "20 keys": (1, 1, 20, 2, 128, F16, 1),
    "197 keys": (1, 1, 197, 2, 64, F16, 1),
    "1000 keys": (1, 1, 1000, 1, 64, BF16, 6),
    "1000 keys of float32": (1, 1, 1000, 1, 64, F32, 6),
    "idle lanes": (1, 1, 300, 1, 80, BF16, 2),
    "the smallest head": (1, 2, 70, 1, 8, F32, 1),
    "several queries": (1, 3, 300, 1, 96, F32, 2),
    "two blocks of queries": (1, 6, 300, 2, 64, BF16, 2),
}


@pytest.mark.parametrize(("B", "T", "S", "H", "D", "dtype", "chunks"), CASES.values(), ids=CASES)
def test_numerics(decode, B, T, S, H, D, dtype, chunks):
    judge(decode, *inputs(B, T, S, H, D, dtype))
    assert decode.chunks == chunks


def test_sm_90a(native):
    decode = Decode(native, cuda_kernels(ATTENTION_DECODE_CU, "90a"))
    judge(decode, *inputs(1, 1, 300, 2, 64, BF16))
    judge(decode, *inputs(1, 5, 300, 1, 72, F16), lengths(290))
    assert decode.chunks == 2


def test_without_a_mask_and_with_another_scale(decode):
    judge(decode, *inputs(1, 4, 20, 1, 16, F16), causal=False, scale=-0.7)


def test_chunks_beyond_the_keys_of_a_sequence(decode):
    """Of 520 keys in three chunks: none, one, one chunk and a part of the next, all."""
    judge(decode, *inputs(4, 1, 520, 1, 32, F16), lengths(0, 1, 250, 520))
    assert decode.chunks == 3


def test_lengths_outside_the_keys_count_as_the_nearest(decode):
    q, k, v = (t.to(decode.device) for t in inputs(2, 1, 20, 1, 16, F32))
    found = decode(q, k, v, lengths(-3, 1000).to(decode.device))
    expected = decode(q, k, v, lengths(0, 20).to(decode.device))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_queries_that_see_no_key_give_zeros(decode):
    """Of seven queries to three keys, causal, the first four; of a second sequence, all."""
    q, k, v = inputs(2, 7, 3, 1, 16, BF16)
    judge(decode, q, k, v, lengths(3, 0))
    out, lse = decode(*(t.to(decode.device) for t in (q, k, v)), lengths(3, 0).to(decode.device))
    assert not out[0, :4].any() and not out[1].any() and out[0, 4:].all()
    assert lse[0, :, :4].isneginf().all() and lse[1].isneginf().all()


@pytest.mark.parametrize(("B", "T", "S", "H"), [(0, 1, 300, 2), (2, 0, 300, 2), (2, 1, 0, 2)])
def test_empty_inputs(decode, B, T, S, H):
    out, lse = decode(*(t.to(decode.device) for t in inputs(B, T, S, H, 16, F32)))
    assert not out.any() and out.shape == (B, T, H, 16)
    assert lse.isneginf().all()


def test_a_cache_that_is_part_of_a_larger_one(decode):
    """Behind the tokens so far, and beside the heads, there is NaN."""
    room = torch.full((2, 2, 300, 2, 24), math.nan, dtype=BF16)
    room[:, :, :257, :, :16] = torch.randn(2, 2, 257, 2, 16)
    q = torch.randn(2, 3, 2, 16).to(BF16)
    k, v = room.to(decode.device)[:, :, :257, :, :16]
    q = torch.stack((q, q), 1).to(decode.device)[:, 1]
    found = decode(q, k, v)
    copied = decode(q.clone(), k.clone(), v.clone())
    assert all(torch.equal(a, b) for a, b in zip(found, copied, strict=True))
    judge(decode, q, k, v)


def test_large_scores_do_not_overflow(decode):
    """Scores around 4e4: the query attends to one key alone."""
    k = torch.eye(16).mul(200).view(1, 16, 1, 16).to(decode.device)
    v = torch.randn(1, 16, 1, 16).to(decode.device)
    torch.testing.assert_close(decode(k[:, 3:4], k, v, scale=1.0)[0], v[:, 3:4])


def test_the_same_inputs_give_the_same_bits(native, decode):
    """In whatever order blocks are run."""
    tensors = [t.to(decode.device) for t in inputs(1, 1, 300, 2, 16, F32)]
    other = Decode(native, decode.kernels, seed=2)
    assert all(torch.equal(*pair) for pair in zip(decode(*tensors), other(*tensors), strict=True))


@pytest.mark.planted_bug
def test_a_missing_barrier_is_found(native):
    kernels = cuda_kernels(ATTENTION_DECODE_CU, "80")
    name = kernels.mangled("attention_decode_kernel<float, 8, 1>")
    ptx = only_entry(kernels.ptx, name)
    assert ptx.count("bar.sync") == 1
    broken = kernels.with_ptx(ptx.replace("bar.sync", "// bar.sync"))
    with pytest.raises(PtxError, match="race"):
        Decode(native, broken)(*inputs(1, 1, 20, 1, 16, F32))


@pytest.mark.parametrize("heads", [1, 12, 400, 10**6])
@pytest.mark.parametrize("S", [0, 1, 127, 1000, 100_000, 2**30])
@pytest.mark.parametrize("T", [1, 4, 13])
def test_launches_cover_all_keys_of_all_queries(native, T, S, heads):
    launch = native.attention_decode.launch(2, T, S, heads, 64)
    assert launch.chunk * launch.chunks >= S > launch.chunk * (launch.chunks - 1) - (S == 0)
    assert launch.chunk % 64 == 0 and 1 <= launch.chunks <= 64
    assert launch.chunks == 1 or launch.chunk >= 128
    blocks, left = divmod(launch.blocks, launch.chunks * 2 * heads)
    assert left == 0 and blocks * launch.queries >= T > (blocks - 1) * launch.queries
    rows = 2 * T * heads
    expected = -(-rows // 8) if launch.chunks > 1 else 0
    assert launch.merge_blocks == expected


def test_a_long_cache_of_few_heads_is_split(native):
    """GPT-2's 12 heads and 1024 keys: a chunk for each 128 keys, more blocks than heads."""
    assert native.attention_decode.launch(1, 1, 1024, 12, 64).chunks == 8
    assert native.attention_decode.launch(64, 1, 1024, 12, 64).chunks == 1
    assert native.attention_decode.launch(1, 1, 10**6, 1, 64).chunks == 64


@pytest.mark.parametrize(
    ("words", "T", "dtype", "rng"),
    [
        ("at most 16 queries, got 17", 17, F32, None),
        ("got float64", 1, torch.float64, None),
        ("drops no weights of float32, got dropout_p 0.5", 1, F32, torch.tensor([1, 2])),
        (None, 16, F16, None),
    ],
    ids=str,
)
def test_refusals(words, T, dtype, rng):
    q, k, v = (t.to("meta") for t in inputs(1, T, 20, 1, 16, dtype))
    reason = _refuse_cuda_fwd(q, k, v, None, True, 1.0, 0.5, rng, 0)
    assert reason is None if words is None else words in reason
