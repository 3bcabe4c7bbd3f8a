"""Attention within packed sequences: the kernels of `kernels/attention_long.py` with cu_seqlens.

A grid has programs for the longest sequence, and those beyond the end of a shorter one return at
once: nothing waits for the lengths, which stay on the device.

N packed query tokens, M packed key tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.kernels import attention_blocks
from fastformer.kernels.attention_long import launch_forward, launch_options
from fastformer.kernels.attention_long_bwd import launch_backward

refuse = attention_blocks.refuse


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    N, H, _ = q.shape
    out = q.new_empty(*q.shape)
    lse = q.new_empty(H, N, dtype=torch.float32)
    launch_forward(
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        (cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k),
        causal,
        scale,
        dropout_p,
        rng,
        site,
        chunk=max(1, max_seqlen_k),
        options_of=launch_options,
    )
    return out, lse


def attention_varlen_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    sizes = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
    grads = q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape)
    launch_backward(grad_out, q, k, v, out, lse, *cu_seqlens, None, sizes, grads, *settings)
    return grads


def attention_varlen_qkvpacked_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *settings: Any,
) -> Tensor:
    q, k, v = qkv.unbind(1)
    sizes = cu_seqlens.numel() - 1, max_seqlen, max_seqlen
    grad = qkv.new_empty(*qkv.shape)
    both = cu_seqlens, cu_seqlens
    grad_q, grad_k, grad_v = grad.unbind(1)
    grads = grad_q, grad_k, grad_v
    launch_backward(grad_out, q, k, v, out, lse, *both, None, sizes, grads, *settings)
    return grad
