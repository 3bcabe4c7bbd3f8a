"""Attention within packed sequences whose lengths are uniform in [T / 3, T].

Eager PyTorch has no such op on a CPU: it pads, masks and packs again. Its padding is an index that
was made before; `loop` calls SDPA once per sequence instead. On a GPU flash-attn has the op.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from benchmarks.bench_attention import first_of
from benchmarks.cases import TrainingCase, random_lengths
from benchmarks.command import main
from benchmarks.libraries import find_all
from benchmarks.ops import Operation, op_benchmark

FLASH_ATTENTION = {
    "flash-attn-2": "flash_attn:flash_attn_varlen_func",
    "flash-attn-3": "flash_attn_interface:flash_attn_varlen_func",
    "flash-attn-4": "flash_attn.cute:flash_attn_varlen_func",
}


def _ours(qkv: Tensor, *, cu_seqlens: Tensor, longest: int, causal: bool) -> Tensor:
    return fastformer.attention_varlen(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest, causal=causal
    )


def _eager(qkv: Tensor, *, inside: Tensor, index: Tensor, causal: bool) -> Tensor:
    B, T = inside.shape
    padded = qkv.new_zeros(B * T, *qkv.shape[1:]).index_copy(0, index, qkv).unflatten(0, (B, T))
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    # Padding is at the end, where a causal mask hides it from every token.
    mask = None if causal else inside[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(0, 1)[index]


def _loop(qkv: Tensor, *, lengths: list[int], causal: bool) -> Tensor:
    outs = []
    for sequence in qkv.split(lengths):
        q, k, v = sequence.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _flash_attention(
    qkv: Tensor, *, function: Any, cu_seqlens: Tensor, longest: int, causal: bool
) -> Tensor:
    lengths = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"}
    longest_of = {f"max_seqlen_{x}": longest for x in "qk"}
    return first_of(function(*qkv.unbind(1), **lengths, **longest_of, causal=causal))


def _attention(case: TrainingCase, dtype: torch.dtype) -> Operation:
    lengths = random_lengths(case, torch.Generator(torch.get_default_device()).manual_seed(1))
    inside = torch.arange(case.T) < lengths[:, None]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest, causal = int(lengths.max()), case.config.causal
    qkv = torch.randn(int(lengths.sum()), 3, case.config.heads, case.D).to(dtype)
    packing = {"cu_seqlens": cu_seqlens, "longest": longest, "causal": causal}
    on_gpu = torch.get_default_device().type == "cuda"
    found, absent = find_all(FLASH_ATTENTION if on_gpu else {})
    return Operation(
        {"qkv": qkv},
        partial(_ours, **packing),
        partial(_eager, inside=inside, index=inside.flatten().nonzero().squeeze(1), causal=causal),
        {"loop": partial(_loop, lengths=lengths.tolist(), causal=causal)},
        {name: partial(_flash_attention, function=f, **packing) for name, f in found.items()},
        absent,
    )


BENCHMARK = op_benchmark(
    "attention_varlen",
    "Attention on packed sequences",
    {"attention_varlen": _attention},
    others=("loop",),
)

if __name__ == "__main__":
    main(BENCHMARK)
