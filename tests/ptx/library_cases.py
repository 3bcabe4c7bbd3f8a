"""The library's own kernels. One that joins the library is put here with the rules it has to obey.

T tokens, H heads, D head dim, C model dim.
"""

from __future__ import annotations

from functools import partial

import torch

from fastformer.kernels import (
    attention,
    attention_decode,
    attention_hopper,
    attention_long,
    attention_long_bwd,
    attention_varlen,
    counted_rows,
    dropout,
    layer_norm,
    linear_cross_entropy,
    mlp,
)
from tests.ptx import gates
from tests.ptx.cases import (
    CUDA_ARCHS,
    PRODUCTS,
    TRITON_ARCHS,
    Case,
    Rule,
    cuda_case,
    meta,
    triton_case,
)
from tests.ptx.resources import Resources
from tests.ptx.triton_compile import ROOT

ATTENTION_DECODE_CU = ROOT / "csrc" / "cuda" / "attention_decode.cu"
ATTENTION_FWD_CU = ROOT / "csrc" / "cuda" / "attention_fwd.cu"
ATTENTION_BWD_CU = ROOT / "csrc" / "cuda" / "attention_bwd.cu"
DROPOUT_CU = ROOT / "csrc" / "cuda" / "dropout.cu"
LAYER_NORM_CU = ROOT / "csrc" / "cuda" / "layer_norm.cu"
MLP_CU = ROOT / "csrc" / "cuda" / "mlp.cu"


def _layer_norm(raw: str, C: int) -> None:
    """The launches of one op, as a bfloat16 model with float32 parameters makes them."""
    x, weight = meta(4096, C), meta(C, dtype=torch.float32)
    mean = meta(4096, dtype=torch.float32)
    rng = meta(2, dtype=torch.int64)
    drop = (0.1, rng, 1)
    if raw == "layer_norm":
        layer_norm.layer_norm_fwd(x, weight, weight, 1e-5, x.dtype)
        layer_norm.layer_norm_bwd(x, x, weight, mean, mean)
    else:
        layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5, x.dtype, *drop)
        layer_norm.add_layer_norm_bwd(x, x, x, weight, mean, mean, x.dtype, *drop)


def _mlp(dtype: torch.dtype, tanh: bool, drops: bool) -> None:
    x, hidden = meta(4096, 768, dtype=dtype), meta(4096, 3072, dtype=dtype)
    w1, w2 = meta(3072, 768, dtype=dtype), meta(768, 3072, dtype=dtype)
    b1, b2 = w1[:, 0].contiguous(), w2[:, 0].contiguous()
    settings = (tanh, 0.1, meta(2, dtype=torch.int64), 1) if drops else (tanh, 0.0, None, 0)
    mlp.mlp_fwd(x, w1, b1, w2, b2, *settings)
    mlp.mlp_bwd(x, x, w1, w2, hidden, *settings, dtype)


def _cross_entropy(dtype: torch.dtype, smoothing: float) -> None:
    x, weight = meta(4096, 768, dtype=dtype), meta(50257, 768, dtype=dtype)
    targets = meta(4096, dtype=torch.int64)
    settings = (-100, smoothing, 0.0, True, False, dtype)
    linear_cross_entropy.linear_cross_entropy_fwd(x, weight, None, targets, *settings)


def _counted_rows(backward: bool) -> None:
    """A head with a bias whose rows are mostly ignored: its loss, or the gradients' products."""
    x, weight, targets = meta(4096, 768), meta(30522, 768), meta(4096, dtype=torch.int64)
    if not backward:
        settings = (-100, 0.0, 0.0, True, True, None)
        linear_cross_entropy.linear_cross_entropy_fwd(x, weight, weight[:, 0], targets, *settings)
        return
    rows = counted_rows.CountedRows(x, meta(30522, 784), targets, -100, several=False)
    rows.add_gradients(0, meta(4096, 30528), weight)


def _dropout_mask() -> None:
    dropout.dropout_mask(4096, 768, 0.1, meta(2, dtype=torch.int64), 1)


def _attention_long(
    D: int,
    causal: bool,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
) -> None:
    """Both directions of self-attention on one packed projection, 1024 tokens."""
    q, k, v = meta(4, 1024, 3, 12, D, dtype=dtype).unbind(2)
    rng = meta(2, dtype=torch.int64) if dropout_p else None
    lengths = meta(4, dtype=torch.int32) if padded else None
    settings = (lengths, causal, 0.125, dropout_p, rng, 1)
    out, lse = attention_long.forward(q, k, v, *settings)
    grads = meta(4, 1024, 3, 12, D, dtype=dtype).unbind(2)
    attention_long.backward(out, q, k, v, out, lse, *settings, *grads)


def _attention_hopper(D: int, causal: bool, dtype: torch.dtype, padded: bool) -> None:
    """Forward of self-attention on a packed projection, 1024 tokens."""
    q, k, v = meta(4, 1024, 3, 12, D, dtype=dtype).unbind(2)
    lengths = meta(4, dtype=torch.int32) if padded else None
    attention_hopper.forward(q, k, v, lengths, causal, 0.125, 0.0, None, 0)


def _attention_varlen() -> None:
    qkv, starts = meta(4096, 3, 12, 64), meta(9, dtype=torch.int32)
    lengths, settings = (starts, starts, 1024, 1024), (True, 0.125, 0.0, None, 0)
    out, lse = attention_varlen.attention_varlen_fwd(*qkv.unbind(1), *lengths, *settings)
    attention_varlen.attention_varlen_qkvpacked_bwd(out, qkv, out, lse, starts, 1024, *settings)


def _attention_decode(D: int, dtype: torch.dtype = torch.bfloat16) -> None:
    cache = meta(1, 1024, 12, D, dtype=dtype)
    attention_decode.forward(cache[:, :1], cache, cache, None, True, 0.125, 0.0, None, 0)


def _attention_short(T: int, D: int, causal: bool, dropout_p: float, dtype: torch.dtype) -> None:
    """The launches of self-attention on a packed projection of 12 heads."""
    qkv, out = meta(64, T, 3, 12, D, dtype=dtype), meta(64, T, 12, D, dtype=dtype)
    lse = meta(64, 12, T, dtype=torch.float32)
    rng = meta(2, dtype=torch.int64) if dropout_p else None
    settings = (None, causal, D**-0.5, dropout_p, rng, 1)
    attention.attention_fwd(*qkv.unbind(2), *settings)
    attention.attention_qkvpacked_bwd(out, qkv, out, lse, *settings)


def _useful_attention_long_flops(record: Resources, D: int, causal: bool, drops: bool) -> list[str]:
    of_q, of_kv = attention_long_bwd.launch_options(record.arch, D, 2, causal, drops)
    products, tile = {
        "_attention_long_fwd_kernel": (2, attention_long.launch_options(D, 2, drops)),
        "_attention_long_bwd_q_kernel": (3, of_q),
        "_attention_long_bwd_kv_kernel": (4, of_kv),
    }[record.name]
    useful = products * 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_D"]
    return gates.no_redundant_matrix_work(record, useful)


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
                cuda_case(
                    f"layer_norm_{what}-{low.strip('_')}-{per_row}",
                    arch,
                    LAYER_NORM_CU,
                    f"layer_norm_{what}_kernel<{low}, {low}, {low}, {mode}>",
                    threads,
                    gates.wide_accesses,
                    inputs=f"{dtype}, a {per_row} per row",
                )
            )
    return cases


def _cuda_attention_decode(arch: str) -> list[Case]:
    """A query and four of them, lanes for D = 64 and 128, and the sum of the chunks."""
    cases = []
    for low, lanes, queries in (
        ("__nv_bfloat16", 8, 1),
        ("__nv_bfloat16", 16, 1),
        ("__half", 8, 1),
        ("float", 8, 1),
        ("__nv_bfloat16", 8, 4),
        ("float", 16, 4),
    ):
        D, dtype = 8 * lanes, _CUDA_DTYPES[low]
        cases.append(
            cuda_case(
                f"attention_decode-{dtype}-{D}-{queries}",
                arch,
                ATTENTION_DECODE_CU,
                f"attention_decode_kernel<{low}, {lanes}, {queries}>",
                128,
                gates.wide_accesses,
                inputs=f"T {queries}, D {D}, {dtype}",
            )
        )
    merge, inputs = "attention_decode_merge_kernel<__nv_bfloat16>", "bfloat16"
    name = "attention_decode_merge"
    return [*cases, cuda_case(name, arch, ATTENTION_DECODE_CU, merge, 128, inputs=inputs)]


# Of one chunk in a turn, beside the two numbers of a dropout state.
_half_wide = partial(gates.wide_accesses, share=0.6)


def _cuda_mlp(arch: str) -> list[Case]:
    cases = []
    for low, dtype in _CUDA_DTYPES.items():
        for kernel, flags, inputs in (
            ("gelu_fwd", ", false, true", f"{dtype}, erf"),
            ("gelu_bwd", ", false, true", f"{dtype}, erf"),
            ("gelu_bwd", ", true, true", f"{dtype}, tanh"),
            ("column_sums", ", true", dtype),
        ):
            name = "-".join([f"mlp_{kernel}", low.strip("_"), *inputs.split(", ")[1:]])
            signature = f"{kernel}_kernel<{low}{flags}>"
            case = cuda_case(name, arch, MLP_CU, signature, 256, _half_wide, inputs=inputs)
            cases.append(case)
    sums, inputs = "add_sums_kernel<float>", "float32"
    return [*cases, cuda_case("mlp_add_sums", arch, MLP_CU, sums, 256, inputs=inputs)]


def _uses_mma_sync(record: Resources) -> list[str]:
    return [] if record.counts.get("HMMA") else [f"no HMMA, but {record.counts}"]


def _no_halves(record: Resources) -> list[str]:
    """Rows move in pieces of 16 bytes; of less there are statistics, lengths and the like."""
    return ["accesses of two bytes"] if record.accesses.get(2) else []


# The largest blocks of csrc/cuda/attention.h: threads, shared memory, and the products of a turn of
# the hot loop, all keys of a tile for 16 queries of a warp or 32 queries for its 16 keys.
CUDA_ATTENTION = {
    ("fwd", 64): (256, 49152, 2 * 64),
    ("fwd", 128): (192, 57344, 2 * 32),
    ("bwd", 64): (512, 140288, 4 * 32),
    ("bwd", 128): (256, 115200, 4 * 32),
}


def _cuda_attention(arch: str) -> list[Case]:
    cases = []
    for (what, D), (threads, shared, columns) in CUDA_ATTENTION.items():
        useful = columns * 2 * 16 * D * threads // 32
        # float16 has the same code but for the type of its products.
        for low in ("__nv_bfloat16", "__half") if (what, D) == ("bwd", 64) else ("__nv_bfloat16",):
            dtype = _CUDA_DTYPES[low]
            rules: list[Rule] = [_uses_mma_sync, gates.copies_asynchronously, _no_halves]
            rules.append(partial(gates.no_redundant_matrix_work, useful_flops=useful))
            cases.append(
                cuda_case(
                    f"attention_{what}-{dtype}-{D}",
                    arch,
                    ATTENTION_FWD_CU if what == "fwd" else ATTENTION_BWD_CU,
                    f"attention_{what}_kernel<{low}, {D}>",
                    threads,
                    *rules,
                    dynamic_shared=shared,
                    inputs=f"{dtype}, D {D}",
                )
            )
    return cases


def _mlp_cases(arch: int) -> list[Case]:
    cases = []
    for name, dtype, tanh, drops in (
        ("mlp-bf16", torch.bfloat16, False, False),
        ("mlp-bf16-tanh", torch.bfloat16, True, False),
        ("mlp-bf16-dropout", torch.bfloat16, False, True),
        ("mlp-bf16-tanh-dropout", torch.bfloat16, True, True),
        ("mlp-float32", torch.float32, False, False),
    ):
        if tanh and drops and arch < 100:
            continue  # only there it has options of its own
        inputs = f"(4096, 768) to 3072 {str(dtype)[6:]}, {'tanh' if tanh else 'erf'}"
        inputs += ", dropout" if drops else ""
        tile = mlp._launch_options(dtype, tma=arch >= 90)
        products = 3 if dtype == torch.float32 else 1
        flops = products * 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
        rules: list[Rule] = [gates.uses_tensor_cores, gates.copies_asynchronously]
        if arch < 100:  # later ones do not have the shape of a product in its instruction
            rules.append(partial(gates.no_redundant_matrix_work, useful_flops=flops))
        launch = partial(_mlp, dtype, tanh, drops)
        cases.append(triton_case(name, arch, launch, *rules, inputs=inputs))
    return cases


def _cross_entropy_cases(arch: int) -> list[Case]:
    return [
        triton_case(
            f"linear_cross_entropy-{name}",
            arch,
            partial(_cross_entropy, dtype, smoothing),
            gates.wide_accesses,
            inputs=f"(4096, 768) to 50257 {str(dtype)[6:]}" + ", smoothing" * (smoothing > 0),
        )
        for name, dtype, smoothing in (
            ("bf16", torch.bfloat16, 0.0),
            ("bf16-smoothing", torch.bfloat16, 0.1),
            ("float32", torch.float32, 0.0),
        )
    ]


def _counted_rows_cases(arch: int) -> list[Case]:
    return [
        triton_case(
            f"counted_rows-{what}",
            arch,
            partial(_counted_rows, what == "backward"),
            _of_counted_rows,
            inputs=f"(4096, 768) to 30522 bfloat16, few rows, {what}",
        )
        for what in ("forward", "backward")
    ]


def _of_counted_rows(record: Resources) -> list[str]:
    if "product" not in record.name:
        return []
    found = [violation for rule in PRODUCTS for violation in rule(record)]
    if record.arch < 100:  # later ones do not have the shape of a product in its instruction
        tile = counted_rows._launch_options(torch.bfloat16, tma=record.arch >= 90)
        flops = 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
        found += gates.no_redundant_matrix_work(record, flops)
    return found


def _attention_long_cases(arch: int) -> list[Case]:
    cases = []
    for name, D, causal, dropout_p, padded in (
        ("64-full", 64, False, 0.0, False),
        ("64-causal", 64, True, 0.0, False),
        ("64-dropout", 64, True, 0.1, False),
        ("64-dropout-lengths", 64, False, 0.1, True),
        ("128-causal", 128, True, 0.0, False),
        ("80-dropout", 80, True, 0.1, False),
    ):
        if padded and arch != 90:
            continue  # only there it has options of its own
        launch = partial(_attention_long, D, causal, dropout_p, padded=padded)
        rules: list[Rule] = [gates.uses_tensor_cores]
        rules.append(partial(_useful_attention_long_flops, D=D, causal=causal, drops=dropout_p > 0))
        if not padded:
            rules.append(gates.copies_asynchronously)
        inputs = f"T 1024, D {name.replace('-', ', ')}"
        cases.append(triton_case(f"attention_long-{name}", arch, launch, *rules, inputs=inputs))
    for name, D, causal, dropout_p in (
        ("64-float32", 64, True, 0.0),
        ("64-float32-dropout", 64, True, 0.1),
        ("128-float32", 128, True, 0.0),
        ("128-float32-dropout", 128, False, 0.1),
    ):
        launch = partial(_attention_long, D, causal, dropout_p, torch.float32)
        inputs = f"T 1024, D {D}, {'causal, ' * causal}float32{', dropout' * (dropout_p > 0)}"
        cases.append(triton_case(f"attention_long-{name}", arch, launch, inputs=inputs))
    name, inputs = "attention_varlen", "packed, T up to 1024, D 64, causal"
    useful = partial(_useful_attention_long_flops, D=64, causal=True, drops=False)
    cases.append(triton_case(name, arch, _attention_varlen, *PRODUCTS, useful, inputs=inputs))
    for D in (64, 128):
        name, inputs = f"attention_decode-{D}", f"T 1, S 1024, D {D}"
        cases.append(triton_case(name, arch, partial(_attention_decode, D), inputs=inputs))
    launch = partial(_attention_decode, 128, torch.float32)
    name, inputs = "attention_decode-128-float32", "T 1, S 1024, D 128, float32"
    cases.append(triton_case(name, arch, launch, inputs=inputs))
    return cases


def _attention_hopper_cases() -> list[Case]:
    """Its rules do not count matrix products: each warpgroup has a loop of its own."""
    cases = []
    for name, D, causal, dtype, padded in (
        ("64-causal", 64, True, torch.bfloat16, False),
        ("64-float16-lengths", 64, False, torch.float16, True),
        ("128-causal", 128, True, torch.bfloat16, False),
    ):
        launch = partial(_attention_hopper, D, causal, dtype, padded)
        name, inputs = f"attention_hopper-{name}", f"T 1024, D {name.replace('-', ', ')}"
        cases.append(triton_case(name, 90, launch, *PRODUCTS, inputs=inputs))
    return cases


def _attention_short_cases(arch: int) -> list[Case]:
    """Short sequences: one tile of queries, and the largest of each head dim."""
    cases = []
    for T, D, causal, dropout_p, dtype in (
        (128, 64, True, 0.0, torch.bfloat16),
        (512, 64, False, 0.0, torch.bfloat16),
        (512, 64, True, 0.1, torch.bfloat16),
        (256, 128, False, 0.0, torch.bfloat16),
        (64, 128, True, 0.1, torch.bfloat16),
        (128, 64, True, 0.1, torch.bfloat16),
        (256, 128, True, 0.1, torch.bfloat16),
        (128, 64, True, 0.0, torch.float32),
        (128, 64, True, 0.1, torch.float32),
        (128, 128, True, 0.0, torch.float32),
        (128, 128, True, 0.1, torch.float32),
    ):
        is_float32 = dtype == torch.float32
        more = ["float32"] * is_float32 + ["causal"] * causal + ["dropout"] * (dropout_p > 0)
        name = "-".join(["attention_short", str(T), str(D), *more])
        inputs = ", ".join([f"T {T}", f"D {D}", *more])
        launch = partial(_attention_short, T, D, causal, dropout_p, dtype)
        rules: list[Rule] = [] if is_float32 else [gates.uses_tensor_cores]
        # Backward of 128 queries has several blocks on a multiprocessor instead.
        if T > 128:
            rules.append(gates.copies_asynchronously)
        cases.append(triton_case(name, arch, launch, *rules, inputs=inputs))
    return cases


# A tile of 768 columns is so small that the scalars of its rows and of dropout count.
_mostly_wide = partial(gates.wide_accesses, share=0.8)


LIBRARY = [
    *(
        cuda_case("dropout_mask", arch, DROPOUT_CU, "dropout_mask_kernel", 256)
        for arch in CUDA_ARCHS
    ),
    *(case for arch in CUDA_ARCHS for case in _cuda_layer_norm(arch)),
    *(case for arch in CUDA_ARCHS for case in _cuda_attention_decode(arch)),
    *(case for arch in CUDA_ARCHS for case in _cuda_mlp(arch)),
    *(case for arch in CUDA_ARCHS for case in _cuda_attention(arch)),
    *(
        triton_case(
            f"{raw}-{C}",
            arch,
            partial(_layer_norm, raw, C),
            _mostly_wide,
            inputs=f"{raw}, (4096, {C}) bfloat16",
        )
        for raw in ("layer_norm", "add_layer_norm")
        for C in (768, 8192)
        for arch in TRITON_ARCHS
    ),
    *(
        triton_case("triton-dropout_mask", arch, _dropout_mask, inputs="(4096, 768)")
        for arch in TRITON_ARCHS
    ),
    *(case for arch in TRITON_ARCHS for case in _mlp_cases(arch)),
    *(case for arch in TRITON_ARCHS for case in _cross_entropy_cases(arch)),
    *(case for arch in TRITON_ARCHS for case in _counted_rows_cases(arch)),
    *(case for arch in TRITON_ARCHS for case in _attention_long_cases(arch)),
    *_attention_hopper_cases(),
    *(case for arch in TRITON_ARCHS for case in _attention_short_cases(arch)),
]
