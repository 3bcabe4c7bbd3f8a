"""The corpus of tests/ptx/kernels: the usual kinds of kernels, which the tools must understand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from tests.ptx import gates
from tests.ptx.cases import PRODUCTS, Case, cuda_case, meta, triton_case
from tests.ptx.kernels import attention, attention_bwd, dropout, layer_norm, matmul, reductions
from tests.ptx.resources import Resources

CORPUS_FOLDER = Path(__file__).parent / "kernels"


def _layer_norm() -> None:
    x, weight = meta(4096, 768), meta(768, dtype=torch.float32)
    _, mean, rstd = layer_norm.layer_norm_fwd(x, weight, weight)
    layer_norm.layer_norm_bwd(x, weight, x, mean, rstd)


def _attention_fwd(D: int, block_m: int, descriptors: bool) -> None:
    q = meta(16, 1024, D)
    options = {"block_m": block_m, "num_warps": 8 if block_m * D > 128 * 64 else 4}
    attention.attention_fwd(q, q, q, causal=True, descriptors=descriptors, **options)


def _attention_bwd() -> None:
    q, lse = meta(16, 1024, 64), meta(16, 1024, dtype=torch.float32)
    attention_bwd.attention_bwd(q, q, q, q, lse, q, causal=True)


def _matmul(dtype: torch.dtype, precision: str) -> None:
    a = meta(1024, 1024, dtype=dtype)
    matmul.matmul(a, a, precision=precision)


def _column_sums() -> None:
    reductions.column_sums(meta(4096, 768))


def _dropout() -> None:
    dropout.dropout(meta(1 << 20), 0.1, 3)


def _useful_attention_flops(record: Resources, block_m: int, D: int) -> list[str]:
    """Two products of a tile of rows with 64 keys in a turn."""
    return gates.no_redundant_matrix_work(record, 2 * 2 * block_m * 64 * D)


def _corpus(arch: int) -> list[Case]:
    cases = [
        triton_case("layer_norm", arch, _layer_norm),
        triton_case("attention_bwd", arch, _attention_bwd),
        triton_case("matmul-bf16", arch, partial(_matmul, torch.bfloat16, "ieee"), *PRODUCTS),
        triton_case("matmul-tf32", arch, partial(_matmul, torch.float32, "tf32"), *PRODUCTS),
        triton_case("column_sums", arch, _column_sums),
        triton_case("dropout", arch, _dropout, gates.wide_accesses),
    ]
    block_m = 128 if arch >= 90 else 64  # sm_80 would spill
    for D in (64, 128):
        useful = partial(_useful_attention_flops, block_m=block_m, D=D)
        launch = partial(_attention_fwd, D, block_m, False)
        cases.append(triton_case(f"attention_fwd-{D}", arch, launch, *PRODUCTS, useful))
        if arch >= 90:
            launch = partial(_attention_fwd, D, block_m, True)
            cases.append(triton_case(f"attention_fwd_tma-{D}", arch, launch, *PRODUCTS, useful))
    return cases


def _blackwell_corpus() -> list[Case]:
    """As much as shows that the rules know the instructions of sm_100."""
    tensor = (gates.uses_tensor_cores, gates.copies_asynchronously)
    launch = partial(_attention_fwd, 64, 128, True)
    return [
        triton_case("matmul-bf16", 100, partial(_matmul, torch.bfloat16, "ieee"), *tensor),
        triton_case("attention_fwd_tma-64", 100, launch, *tensor),
    ]


def _cuda_corpus(arch: str) -> list[Case]:
    norm, flash = CORPUS_FOLDER / "layer_norm.cu", CORPUS_FOLDER / "flash_attention.cu"
    fwd, bwd = "layer_norm_fwd_kernel<4>", "layer_norm_bwd_kernel<4>"
    flash_shared = 5 * 64 * 64 * 2
    useful = partial(_useful_attention_flops, block_m=64, D=64)
    cases = [
        cuda_case("cuda-layer_norm_fwd", arch, norm, fwd, 128, gates.wide_accesses),
        cuda_case("cuda-layer_norm_bwd", arch, norm, bwd, 128),
        cuda_case(
            "cuda-flash_fwd",
            arch,
            flash,
            "flash_fwd_kernel<64, true>",
            128,
            gates.copies_asynchronously,
            useful,
            dynamic_shared=flash_shared,
        ),
    ]
    if arch == "90a":
        qk, shared = CORPUS_FOLDER / "qk_wgmma.cu", 3 * 8192 + 64
        rules = (gates.uses_tensor_cores, gates.copies_asynchronously)
        cases.append(
            cuda_case("cuda-qk", arch, qk, "qk_kernel", 256, *rules, dynamic_shared=shared)
        )
    return cases


CORPUS = [
    *_corpus(80),
    *_corpus(90),
    *_blackwell_corpus(),
    *_cuda_corpus("80"),
    *_cuda_corpus("90a"),
]
