"""The Triton kernels of attention: which of them runs a raw op of `fastformer/ops/attention.py`.

B batch, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastformer.kernels import attention_blocks, attention_decode, attention_long, attention_short

refuse = attention_blocks.refuse


def _kernels(T: int, S: int, H: int, D: int) -> Any:
    """The module whose `forward` and `backward` run this size."""
    return attention_short if attention_short.holds(T, S, H, D) else attention_long


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(q.shape[1], k.shape[1], *q.shape[2:])
    if kernels is attention_long and q.shape[1] <= attention_decode.MAX_T:
        kernels = attention_decode
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
