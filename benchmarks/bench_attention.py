"""Attention on views of one packed projection, against SDPA and against materialised scores.

Materialised scores are a rival in their own right: SDPA's backward pass is slow in bfloat16 on the
CPU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer
from benchmarks.cases import TrainingCase
from benchmarks.command import main
from benchmarks.gate import Function
from benchmarks.libraries import find_all
from benchmarks.ops import SHAPES, Operation, op_benchmark

# The fourth has no function of a packed projection.
FLASH_ATTENTION = {
    "flash-attn-2": "flash_attn:flash_attn_qkvpacked_func",
    "flash-attn-3": "flash_attn_interface:flash_attn_qkvpacked_func",
    "flash-attn-4": "flash_attn.cute:flash_attn_func",
}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _ours(qkv: Tensor, *, causal: bool, key_lengths: Tensor | None) -> Tensor:
    return fastformer.attention(*qkv.unbind(2), causal=causal, key_lengths=key_lengths)


def _eager(qkv: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _naive(qkv: Tensor, *, mask: Tensor | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2)


def _sdpa(backend: SDPBackend, **options: object) -> Function:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _eager(qkv, **options)

    return run


def _flash_attention(name: str, function: Any, causal: bool) -> Function:
    def run(qkv: Tensor) -> Tensor:
        parts = qkv.unbind(2) if name == "flash-attn-4" else (qkv,)
        return first_of(function(*parts, causal=causal))

    return run


def first_of(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; some versions of flash-attn return the log-sum-exp too."""
    return results if isinstance(results, Tensor) else results[0]


def _libraries(
    causal: bool, mask: Tensor | None, dtype: torch.dtype
) -> tuple[dict[str, Function], dict[str, str]]:
    """On a GPU flash-attn and every backend of SDPA, which does not always choose the fastest."""
    if torch.get_default_device().type != "cuda":
        return {}, {}
    options = {"causal": causal, "mask": mask}
    functions = {f"sdpa-{name}": _sdpa(backend, **options) for name, backend in SDPA.items()}
    found, absent = find_all(FLASH_ATTENTION)
    if mask is not None or dtype == torch.float32:
        found, reason = {}, "no mask and no float32"
        absent = dict.fromkeys(FLASH_ATTENTION, reason)
    functions |= {name: _flash_attention(name, f, causal) for name, f in found.items()}
    return functions, absent


def _attention(case: TrainingCase, dtype: torch.dtype) -> Operation:
    B, T, H, D = case.B, case.T, case.config.heads, case.D
    causal, key_lengths = case.config.causal, case.batch().key_lengths
    mask = visible = None
    if key_lengths is not None:
        mask = visible = (torch.arange(T) < key_lengths[:, None])[:, None, None]
    elif causal:
        visible = torch.ones(T, T, dtype=torch.bool).tril()
    libraries, absent = _libraries(causal, mask, dtype)
    return Operation(
        {"qkv": torch.randn(B, T, 3, H, D).to(dtype)},
        partial(_ours, causal=causal, key_lengths=key_lengths),
        partial(_eager, causal=causal, mask=mask),
        {"naive": partial(_naive, mask=visible)},
        libraries,
        absent,
        flop=4.0 * B * H * T * T * D / (2 if causal else 1),
        more=3.5,  # five products in backward
    )


BENCHMARK = op_benchmark(
    "attention",
    "Attention",
    {"attention": _attention},
    shapes=(*SHAPES, "bert-7.7m-padded"),
    others=("naive",),
)

if __name__ == "__main__":
    main(BENCHMARK)
