"""The kernels that are compiled and judged: the library's own, and the corpus of tests/ptx/kernels.

A kernel that joins the library is put here with the rules that it has to obey.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from fastformer.kernels import dropout as library_dropout
from fastformer.kernels import (
    attention_decode,
    attention_long,
    attention_long_bwd,
    attention_varlen,
)
from fastformer.kernels import attention as library_attention
from fastformer.kernels import layer_norm as library_layer_norm
from fastformer.kernels import linear_cross_entropy as library_cross_entropy
from fastformer.kernels import mlp as library_mlp
from tests.ptx import gates, nvcc
from tests.ptx.kernels import attention, attention_bwd, dropout, layer_norm, matmul, reductions
from tests.ptx.resources import Resources, compile_only
from tests.ptx.triton_compile import ROOT

CORPUS_FOLDER = Path(__file__).parent / "kernels"
DROPOUT_CU = ROOT / "csrc" / "cuda" / "dropout.cu"
LAYER_NORM_CU = ROOT / "csrc" / "cuda" / "layer_norm.cu"

# Compiled and judged for all of them; the emulator executes what is for the first two.
TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = ("80", "90a", "100")

Rule = Callable[[Resources], list[str]]


@dataclass(frozen=True)
class Case:
    """A wrapper, or a CUDA kernel, for one architecture. `compiler` is "triton" or "nvcc".

    `inputs` say in docs/kernels.md what it is compiled for, where the name does not.
    """

    name: str
    arch: int
    compiler: str
    records: Callable[[], list[Resources]]
    rules: tuple[Rule, ...] = ()
    inputs: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-sm_{self.arch}"

    def key(self, record: Resources) -> str:
        """Of a record in the golden file."""
        return f"{self.id}/{record.name}"

    def violations(self, record: Resources) -> list[str]:
        return [found for rule in (*gates.ALWAYS, *self.rules) for found in rule(record)]


def _triton(
    name: str, arch: int, launch: Callable[[], object], *rules: Rule, inputs: str = ""
) -> Case:
    def records() -> list[Resources]:
        with compile_only(arch) as found:
            launch()
        return found

    return Case(name, arch, "triton", records, rules, inputs)


@lru_cache(maxsize=4)
def cuda_kernels(source: Path, arch: str) -> nvcc.CudaKernels:
    """Kept: a file of many kernels is slow to read."""
    return nvcc.CudaKernels(source, arch)


def _cuda(
    name: str,
    arch: str,
    source: Path,
    kernel: str,
    threads: int,
    *rules: Rule,
    dynamic_shared: int = 0,
    inputs: str = "",
) -> Case:
    def records() -> list[Resources]:
        return [cuda_kernels(source, arch).resources(kernel, threads, dynamic_shared)]

    return Case(name, int(arch.rstrip("a")), "nvcc", records, rules, inputs)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer_norm() -> None:
    x, weight = _meta(4096, 768), _meta(768, dtype=torch.float32)
    _, mean, rstd = layer_norm.layer_norm_fwd(x, weight, weight)
    layer_norm.layer_norm_bwd(x, weight, x, mean, rstd)


def _library_layer_norm(raw: str, C: int) -> None:
    """The launches of one op, as a bfloat16 model with float32 parameters makes them."""
    x, weight = _meta(4096, C), _meta(C, dtype=torch.float32)
    mean = _meta(4096, dtype=torch.float32)
    rng = _meta(2, dtype=torch.int64)
    drop = (0.1, rng, 1)
    if raw == "layer_norm":
        library_layer_norm.layer_norm_fwd(x, weight, weight, 1e-5, x.dtype)
        library_layer_norm.layer_norm_bwd(x, x, weight, mean, mean)
    else:
        library_layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5, x.dtype, *drop)
        library_layer_norm.add_layer_norm_bwd(x, x, x, weight, mean, mean, x.dtype, *drop)


def _library_mlp(dtype: torch.dtype, tanh: bool, drops: bool) -> None:
    x, hidden = _meta(4096, 768, dtype=dtype), _meta(4096, 3072, dtype=dtype)
    w1, w2 = _meta(3072, 768, dtype=dtype), _meta(768, 3072, dtype=dtype)
    b1, b2 = w1[:, 0].contiguous(), w2[:, 0].contiguous()
    settings = (tanh, 0.1, _meta(2, dtype=torch.int64), 1) if drops else (tanh, 0.0, None, 0)
    library_mlp.mlp_fwd(x, w1, b1, w2, b2, *settings)
    library_mlp.mlp_bwd(x, x, w1, w2, hidden, *settings)


def _library_cross_entropy(dtype: torch.dtype, smoothing: float) -> None:
    x, weight = _meta(4096, 768, dtype=dtype), _meta(50257, 768, dtype=dtype)
    targets = _meta(4096, dtype=torch.int64)
    settings = (-100, smoothing, 0.0, True, True)
    library_cross_entropy.linear_cross_entropy_fwd(x, weight, None, targets, *settings)


def _library_dropout_mask() -> None:
    library_dropout.dropout_mask(4096, 768, 0.1, _meta(2, dtype=torch.int64), 1)


def _attention_long(
    D: int, causal: bool, dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Both directions of self-attention on one packed projection, 1024 tokens."""
    q, k, v = _meta(4, 1024, 3, 12, D, dtype=dtype).unbind(2)
    rng = _meta(2, dtype=torch.int64) if dropout_p else None
    settings = (None, causal, 0.125, dropout_p, rng, 1)
    out, lse = attention_long.forward(q, k, v, *settings)
    grads = _meta(4, 1024, 3, 12, D, dtype=dtype).unbind(2)
    attention_long.backward(out, q, k, v, out, lse, *settings, *grads)


def _attention_varlen() -> None:
    qkv, starts = _meta(4096, 3, 12, 64), _meta(9, dtype=torch.int32)
    lengths, settings = (starts, starts, 1024, 1024), (True, 0.125, 0.0, None, 0)
    out, lse = attention_varlen.attention_varlen_fwd(*qkv.unbind(1), *lengths, *settings)
    attention_varlen.attention_varlen_qkvpacked_bwd(out, qkv, out, lse, starts, 1024, *settings)


def _attention_decode(D: int) -> None:
    cache = _meta(1, 1024, 12, D)
    attention_decode.forward(cache[:, :1], cache, cache, None, True, 0.125, 0.0, None, 0)


def _attention_short(T: int, D: int, causal: bool, dropout_p: float) -> None:
    """The launches of self-attention on a packed projection of 12 heads."""
    qkv, out = _meta(64, T, 3, 12, D), _meta(64, T, 12, D)
    lse = _meta(64, 12, T, dtype=torch.float32)
    rng = _meta(2, dtype=torch.int64) if dropout_p else None
    settings = (None, causal, D**-0.5, dropout_p, rng, 1)
    library_attention.attention_fwd(*qkv.unbind(2), *settings)
    library_attention.attention_qkvpacked_bwd(out, qkv, out, lse, *settings)


def _attention_fwd(D: int, block_m: int, descriptors: bool) -> None:
    q = _meta(16, 1024, D)
    options = {"block_m": block_m, "num_warps": 8 if block_m * D > 128 * 64 else 4}
    attention.attention_fwd(q, q, q, causal=True, descriptors=descriptors, **options)


def _attention_bwd() -> None:
    q, lse = _meta(16, 1024, 64), _meta(16, 1024, dtype=torch.float32)
    attention_bwd.attention_bwd(q, q, q, q, lse, q, causal=True)


def _matmul(dtype: torch.dtype, precision: str) -> None:
    a = _meta(1024, 1024, dtype=dtype)
    matmul.matmul(a, a, precision=precision)


def _column_sums() -> None:
    reductions.column_sums(_meta(4096, 768))


def _dropout() -> None:
    dropout.dropout(_meta(1 << 20), 0.1, 3)


_PRODUCTS = (gates.uses_tensor_cores, gates.copies_asynchronously)


def _useful_attention_flops(record: Resources, block_m: int, D: int) -> list[str]:
    """Two products of a tile of rows with 64 keys in a turn."""
    return gates.no_redundant_matrix_work(record, 2 * 2 * block_m * 64 * D)


def _useful_attention_long_flops(record: Resources, D: int, dropout: bool) -> list[str]:
    of_q, of_kv = attention_long_bwd.launch_options(D, 2, dropout)
    products, tile = {
        "_attention_long_fwd_kernel": (2, attention_long.launch_options(D, 2, dropout)),
        "_attention_long_bwd_q_kernel": (3, of_q),
        "_attention_long_bwd_kv_kernel": (4, of_kv),
    }[record.name]
    useful = products * 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * D
    return gates.no_redundant_matrix_work(record, useful)


def _library_attention(arch: int) -> list[Case]:
    cases = []
    for name, D, options in (
        ("64-full", 64, {"causal": False}),
        ("64-causal", 64, {"causal": True}),
        ("64-dropout", 64, {"causal": True, "dropout_p": 0.1}),
        ("128-causal", 128, {"causal": True}),
    ):
        launch = partial(_attention_long, D, **options)
        useful = partial(_useful_attention_long_flops, D=D, dropout="dropout_p" in options)
        cases.append(_triton(f"attention_long-{name}", arch, launch, *_PRODUCTS, useful))
    launch = partial(_attention_long, 64, True, dtype=torch.float32)
    cases.append(_triton("attention_long-64-float32", arch, launch))
    useful = partial(_useful_attention_long_flops, D=64, dropout=False)
    cases.append(_triton("attention_varlen", arch, _attention_varlen, *_PRODUCTS, useful))
    for D in (64, 128):
        cases.append(_triton(f"attention_decode-{D}", arch, partial(_attention_decode, D)))
    return cases


def _corpus(arch: int) -> list[Case]:
    cases = [
        _triton("layer_norm", arch, _layer_norm),
        _triton("attention_bwd", arch, _attention_bwd),
        _triton("matmul-bf16", arch, partial(_matmul, torch.bfloat16, "ieee"), *_PRODUCTS),
        _triton("matmul-tf32", arch, partial(_matmul, torch.float32, "tf32"), *_PRODUCTS),
        _triton("column_sums", arch, _column_sums),
        _triton("dropout", arch, _dropout, gates.wide_accesses),
    ]
    block_m = 128 if arch >= 90 else 64  # sm_80 would spill
    for D in (64, 128):
        useful = partial(_useful_attention_flops, block_m=block_m, D=D)
        launch = partial(_attention_fwd, D, block_m, False)
        cases.append(_triton(f"attention_fwd-{D}", arch, launch, *_PRODUCTS, useful))
        if arch >= 90:
            launch = partial(_attention_fwd, D, block_m, True)
            cases.append(_triton(f"attention_fwd_tma-{D}", arch, launch, *_PRODUCTS, useful))
    return cases


def _blackwell_corpus() -> list[Case]:
    """As much as shows that the rules know the instructions of sm_100."""
    tensor = (gates.uses_tensor_cores, gates.copies_asynchronously)
    launch = partial(_attention_fwd, 64, 128, True)
    return [
        _triton("matmul-bf16", 100, partial(_matmul, torch.bfloat16, "ieee"), *tensor),
        _triton("attention_fwd_tma-64", 100, launch, *tensor),
    ]


def _cuda_corpus(arch: str) -> list[Case]:
    norm, flash = CORPUS_FOLDER / "layer_norm.cu", CORPUS_FOLDER / "flash_attention.cu"
    fwd, bwd = "layer_norm_fwd_kernel<4>", "layer_norm_bwd_kernel<4>"
    flash_shared = 5 * 64 * 64 * 2
    useful = partial(_useful_attention_flops, block_m=64, D=64)
    cases = [
        _cuda("cuda-layer_norm_fwd", arch, norm, fwd, 128, gates.wide_accesses),
        _cuda("cuda-layer_norm_bwd", arch, norm, bwd, 128),
        _cuda(
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
        cases.append(_cuda("cuda-qk", arch, qk, "qk_kernel", 256, *rules, dynamic_shared=shared))
    return cases


_CUDA_DTYPES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}


def _cuda_layer_norm(arch: str) -> list[Case]:
    """C = 768 and 4096: a warp and a block per row."""
    cases = []
    for low, dtype in _CUDA_DTYPES.items():
        for what, mode, threads in (
            ("fwd", 0, 128),
            ("bwd", 0, 128),
            ("fwd", 1, 256),
            ("bwd", 1, 256),
        ):
            per_row = ("warp", "block")[mode]
            cases.append(
                _cuda(
                    f"layer_norm_{what}-{low.strip('_')}-{per_row}",
                    arch,
                    LAYER_NORM_CU,
                    f"layer_norm_{what}_kernel<{low}, {low}, {low}, {mode}>",
                    threads,
                    gates.wide_accesses,
                    inputs=f"{dtype}, a {per_row} per row",
                )
            )
    sums, inputs = "layer_norm_sums_kernel<float>", "float32"
    return [*cases, _cuda("layer_norm_sums", arch, LAYER_NORM_CU, sums, 256, inputs=inputs)]


def _library_mlp_cases(arch: int) -> list[Case]:
    cases = []
    for name, dtype, tanh, drops in (
        ("mlp-bf16", torch.bfloat16, False, False),
        ("mlp-bf16-tanh", torch.bfloat16, True, False),
        ("mlp-bf16-dropout", torch.bfloat16, False, True),
        ("mlp-float32", torch.float32, False, False),
    ):
        inputs = f"(4096, 768) to 3072 {str(dtype)[6:]}, {'tanh' if tanh else 'erf'}"
        inputs += ", dropout" if drops else ""
        tile = library_mlp._launch_options(dtype, tma=arch >= 90)
        products = 3 if dtype == torch.float32 else 1
        flops = products * 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
        rules: list[Rule] = [gates.uses_tensor_cores, gates.copies_asynchronously]
        if arch < 100:  # later ones do not have the shape of a product in its instruction
            rules.append(partial(gates.no_redundant_matrix_work, useful_flops=flops))
        launch = partial(_library_mlp, dtype, tanh, drops)
        cases.append(_triton(name, arch, launch, *rules, inputs=inputs))
    return cases


def _library_cross_entropy_cases(arch: int) -> list[Case]:
    return [
        _triton(
            f"linear_cross_entropy-{name}",
            arch,
            partial(_library_cross_entropy, dtype, smoothing),
            gates.wide_accesses,
            inputs=f"(4096, 768) to 50257 {str(dtype)[6:]}" + ", smoothing" * (smoothing > 0),
        )
        for name, dtype, smoothing in (
            ("bf16", torch.bfloat16, 0.0),
            ("bf16-smoothing", torch.bfloat16, 0.1),
            ("float32", torch.float32, 0.0),
        )
    ]


def _attention_short_cases(arch: int) -> list[Case]:
    """Short sequences: one tile of queries, and the largest of each head dim."""
    cases = []
    for T, D, causal, dropout_p in (
        (128, 64, True, 0.0),
        (512, 64, False, 0.0),
        (512, 64, True, 0.1),
        (256, 128, False, 0.0),
    ):
        name = f"attention_short-{T}-{D}" + "-causal" * causal + "-dropout" * (dropout_p > 0)
        launch = partial(_attention_short, T, D, causal, dropout_p)
        # Backward of 128 queries has several blocks on a multiprocessor instead.
        copies = [gates.copies_asynchronously] if T > 128 else []
        cases.append(_triton(name, arch, launch, gates.uses_tensor_cores, *copies))
    return cases


# A tile of 768 columns is so small that the scalars of its rows and of dropout count.
_mostly_wide = partial(gates.wide_accesses, share=0.8)

LIBRARY = [
    *(_cuda("dropout_mask", arch, DROPOUT_CU, "dropout_mask_kernel", 256) for arch in CUDA_ARCHS),
    *(case for arch in CUDA_ARCHS for case in _cuda_layer_norm(arch)),
    *(
        _triton(
            f"{raw}-{C}",
            arch,
            partial(_library_layer_norm, raw, C),
            _mostly_wide,
            inputs=f"{raw}, (4096, {C}) bfloat16",
        )
        for raw in ("layer_norm", "add_layer_norm")
        for C in (768, 8192)
        for arch in TRITON_ARCHS
    ),
    *(
        _triton("triton-dropout_mask", arch, _library_dropout_mask, inputs="(4096, 768)")
        for arch in TRITON_ARCHS
    ),
    *(case for arch in TRITON_ARCHS for case in _library_mlp_cases(arch)),
    *(case for arch in TRITON_ARCHS for case in _library_cross_entropy_cases(arch)),
    *(case for arch in TRITON_ARCHS for case in _library_attention(arch)),
    *(case for arch in TRITON_ARCHS for case in _attention_short_cases(arch)),
]
CORPUS = [
    *_corpus(80),
    *_corpus(90),
    *_blackwell_corpus(),
    *_cuda_corpus("80"),
    *_cuda_corpus("90a"),
]
