"""nvcc's kernels, executed as compiled, against float64; bugs planted in them are found."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

from tests.ops.test_dropout import numpy_mask
from tests.ptx import gates, nvcc
from tests.ptx.corpus_cases import CORPUS_FOLDER
from tests.ptx.emulator import PtxError
from tests.ptx.emulator.types import from_bf16, to_bf16
from tests.ptx.library_cases import DROPOUT_CU
from tests.ptx.nvcc import CudaKernels, Tiled

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

ARCHS = pytest.mark.parametrize("arch", ["80", "90a"])
LAYER_NORM = CORPUS_FOLDER / "layer_norm.cu"
FLASH = CORPUS_FOLDER / "flash_attention.cu"
QK = CORPUS_FOLDER / "qk_wgmma.cu"
QK_SHARED = 3 * 8192 + 64
NAN_BF16 = 0x7FC0


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_layer_norm(arch: str, C: int, *defines: str) -> tuple[np.ndarray, ...]:
    """x, weight, bias and grad_out; y and the gradients of x, weight and bias."""
    M, rows = 7, 3
    x, grad_out = to_bf16(draw(M, C) + 1), to_bf16(draw(M, C, seed=1))
    weight, bias = draw(C, seed=2), draw(C, seed=3)
    y, grad_x = (np.full((M, C), NAN_BF16, np.uint16) for _ in range(2))
    mean, rstd = np.full((2, M), np.nan, np.float32)
    grad_weight, grad_bias = np.zeros((2, C), np.float32)
    kernels = CudaKernels(LAYER_NORM, arch, defines=defines)
    arguments = [x, weight, bias, y, mean, rstd, C, 1e-5]
    kernels.launch("layer_norm_fwd_kernel<4>", M, 128, arguments, seed=1)
    arguments = [x, weight, grad_out, mean, rstd, grad_x, grad_weight, grad_bias, M, C, rows]
    kernels.launch("layer_norm_bwd_kernel<4>", -(-M // rows), 128, arguments, seed=1)
    return x, weight, bias, grad_out, y, grad_x, grad_weight, grad_bias


@ARCHS
@pytest.mark.parametrize("C", [768, 1024, 40])
def test_layer_norm(arch, C):
    x, weight, bias, grad_out, y, grad_x, grad_weight, grad_bias = run_layer_norm(arch, C)
    x, grad_out = from_bf16(x).astype(np.float64), from_bf16(grad_out).astype(np.float64)
    rstd = 1 / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    normal = (x - x.mean(1, keepdims=True)) * rstd
    assert error(from_bf16(y), normal * weight + bias) < 3e-3
    weighted = grad_out * weight
    along = normal * (normal * weighted).mean(1, keepdims=True)
    exact = (weighted - along - weighted.mean(1, keepdims=True)) * rstd
    assert error(from_bf16(grad_x), exact) < 3e-3
    assert error(grad_weight, (grad_out * normal).sum(0)) < 1e-6
    assert error(grad_bias, grad_out.sum(0)) < 1e-6


@pytest.mark.planted_bug
@ARCHS
def test_shared_memory_read_before_a_barrier_is_found(arch):
    with pytest.raises(PtxError) as caught:
        run_layer_norm(arch, 768, "BUG_TOTAL_NOT_AWAITED")
    assert caught.value.kind == "race"


def run_flash(arch: str, N: int, D: int, causal: bool, *defines: str) -> tuple[float, float]:
    """Errors of out and lse."""
    q, k, v = (to_bf16(draw(2, N, D, seed=seed)) for seed in range(3))
    out, lse = np.full((2, N, D), NAN_BF16, np.uint16), np.full((2, N), np.nan, np.float32)
    scale = 1 / math.sqrt(D)
    CudaKernels(FLASH, arch, defines=defines).launch(
        f"flash_fwd_kernel<{D}, {str(causal).lower()}>",
        (-(-N // 64), 2),
        128,
        [q, k, v, out, lse, N, scale / math.log(2)],
        dynamic_shared=5 * 64 * D * 2,
        seed=1,
    )
    q, k, v = (from_bf16(bits).astype(np.float64) for bits in (q, k, v))
    s = q @ k.transpose(0, 2, 1) * scale
    if causal:
        s = np.where(np.tril(np.ones((N, N), bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    exact_lse = (np.log(p.sum(-1)) + s.max(-1)) / math.log(2)
    exact = p / p.sum(-1, keepdims=True) @ v
    return error(from_bf16(out), exact), error(lse, exact_lse)


@ARCHS
@pytest.mark.parametrize(
    ("N", "D", "causal"), [(192, 64, False), (200, 64, True), (128, 128, True)], ids=str
)
def test_flash_attention(arch, N, D, causal):
    out, lse = run_flash(arch, N, D, causal)
    assert out < 4e-3 and lse < 1e-6


@pytest.mark.planted_bug
@ARCHS
def test_a_copy_that_is_not_waited_for_is_found(arch):
    with pytest.raises(PtxError) as caught:
        run_flash(arch, 192, 64, False, "BUG_V_NOT_WAITED_FOR")
    assert caught.value.kind in ("in flight", "race")


def run_qk(seed: int | None, *defines: str) -> float:
    """The error of S = Q K^T."""
    N = 256
    q, k = to_bf16(draw(N, 64)), to_bf16(draw(N, 64, seed=1))
    s = np.full((N, N), np.nan, np.float32)
    arguments = [Tiled(q, (64, 64)), Tiled(k, (64, 64)), s, N]
    CudaKernels(QK, "90a", defines=defines).launch(
        "qk_kernel", N // 64, 256, arguments, dynamic_shared=QK_SHARED, seed=seed
    )
    return error(s, from_bf16(q).astype(np.float64) @ from_bf16(k).T)


@pytest.mark.parametrize("seed", [None, 1, 2, 3], ids=str)
def test_warp_specialised_wgmma(seed):
    assert run_qk(seed) < 1e-6


def test_a_product_that_is_not_waited_for_is_found():
    with pytest.raises(PtxError) as caught:
        run_qk(1, "BUG_RESULT_NOT_AWAITED")
    assert caught.value.kind == "in flight"


def test_what_ptxas_says_of_wgmma_is_a_violation():
    kernels = CudaKernels(QK, "90a", defines=["BUG_RESULT_NOT_AWAITED"])
    (found,) = gates.no_warnings(kernels.resources("qk_kernel", 256, QK_SHARED))
    assert "warpgroup.wait is injected" in found


# The library's own kernel: tails of a row, 64-bit counters, several draws of a thread.
MASKS = {
    "whole-draws": (40, 64, 0.5, 12345, 0, 0),
    "tail": (20, 101, 0.1, 2**62 - 3, 2**33 + 7, 2),
    "one-element": (1, 1, 0.3, 99, 4, 0),
    "negative-state": (4, 100, 0.25, -5, -7, 3),
}


@ARCHS
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_dropout_masks_are_those_of_the_definition(arch, case):
    rows, cols, p, seed, offset, site = case
    keep = np.full((rows, cols), 0xAA, np.uint8)
    threshold = min(65535, round(p * 65536))
    arguments = [keep, np.array([seed, offset]), rows, cols, site, threshold]
    # One block: a thread makes more than one draw where there are more than 256.
    CudaKernels(DROPOUT_CU, arch).launch("dropout_mask_kernel", 1, 256, arguments)
    assert np.array_equal(keep, numpy_mask(*case).astype(np.uint8))


def test_kernels_are_found_by_their_names():
    kernels = CudaKernels(FLASH, "80")
    assert "flash_fwd_kernel" in kernels.mangled("flash_fwd_kernel<64, true>")
    for name in ("flash_fwd_kernel", "fwd_kernel<64, true>", "other_kernel"):
        with pytest.raises(LookupError, match="flash_fwd_kernel<64, true>"):
            kernels.mangled(name)


def test_a_file_that_does_not_compile_shows_the_compilers_words(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken_kernel() { unknown(); }\n")
    with pytest.raises(RuntimeError, match='identifier "unknown" is undefined'):
        nvcc.compile_cuda(source, "80", "ptx")


def test_the_same_source_is_compiled_once(tmp_path, monkeypatch):
    source = tmp_path / "once.cu"
    source.write_text("__global__ void once_kernel(int *p) { *p = VALUE; }\n")
    monkeypatch.setattr(nvcc, "CACHE", tmp_path / "cache")
    first = nvcc.compile_cuda(source, "80", "ptx", ["VALUE=1"])
    other = nvcc.compile_cuda(source, "80", "ptx", ["VALUE=2"])
    assert first.data != other.data
    monkeypatch.setattr(nvcc, "_nvcc", lambda: "/nonexistent")
    assert nvcc.compile_cuda(source, "80", "ptx", ["VALUE=1"]) == first
    source.write_text("__global__ void once_kernel(int *p) { *p = VALUE + 1; }\n")
    with pytest.raises(FileNotFoundError):
        nvcc.compile_cuda(source, "80", "ptx", ["VALUE=1"])
