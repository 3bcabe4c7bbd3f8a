"""The Triton kernels of attention: which of them runs a raw op of `fastformer/ops/attention.py`.

B batch, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.kernels import attention_short


def _kernels(T: int, S: int, H: int, D: int) -> Any:
    """The module whose `forward` and `backward` run this size, None if there is none."""
    return attention_short if attention_short.holds(T, S, H, D) else None


def refuse(*args: Any) -> str | None:
    """Why these kernels cannot run a raw op of ops/attention.py on `args`, or None."""
    if args[0].dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    # The first argument has the shape of q. The third one has that of the keys, or in
    # attention_qkvpacked_bwd that of out, which has as many tokens.
    (_, T, H, D), S = args[0].shape, args[2].shape[1]
    if _kernels(T, S, H, D) is None:
        return (
            "it takes at most 512 tokens of head_dim <= 64 or 256 of more, and 2**20 elements in"
            f" a token, got T={T}, S={S}, H={H}, D={D}"
        )
    return None


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(q.shape[1], k.shape[1], *q.shape[2:])
    return kernels.forward(q, k, v, key_lengths, *settings)


def attention_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    kernels = _kernels(q.shape[1], k.shape[1], *q.shape[2:])
    kernels.backward(grad_out, q, k, v, *saved, *grads)
    return grads


def attention_qkvpacked_bwd(grad_out: Tensor, qkv: Tensor, *saved: Any) -> Tensor:
    grad = qkv.new_empty(qkv.shape)
    _, T, _, H, D = qkv.shape
    _kernels(T, T, H, D).backward(grad_out, *qkv.unbind(2), *saved, *grad.unbind(2))
    return grad
