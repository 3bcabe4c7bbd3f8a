"""The Triton kernels of attention: which of them runs a raw op of `fastformer/ops/attention.py`.

B batch, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import triton
from torch import Tensor

from fastformer.kernels import attention_blocks, attention_decode, attention_long, attention_short

refuse = attention_blocks.refuse

_GLUON = ("3.6", "3.7")  # the versions of Triton, as Gluon is experimental and changes with each


def _kernels(T: int, S: int, H: int, D: int) -> Any:
    """The module whose `forward` and `backward` run this size."""
    return attention_short if attention_short.holds(T, S, H, D) else attention_long


@functools.cache
def _hopper() -> Any:
    """The kernel for Hopper, or None where this Triton's Gluon is not one that it is written in."""
    reason = f"it was compiled with Triton {' and '.join(_GLUON)}, this is {triton.__version__}"
    if triton.__version__.rsplit(".", 1)[0] in _GLUON:
        try:
            return importlib.import_module("fastformer.kernels.attention_hopper")
        except (ImportError, AttributeError) as error:
            reason = f"Triton {triton.__version__} lacks a part of Gluon: {error}"
    warnings.warn(
        "fastformer: attention of long sequences runs on the slower kernel because that for Hopper"
        f" cannot run: {reason}",
        stacklevel=2,
    )
    return None


def _long(q: Tensor, k: Tensor, v: Tensor, scale: float, rng: Tensor | None) -> Any:
    """The module whose `forward` runs sequences that are not short."""
    if q.shape[1] <= attention_decode.MAX_T:
        return attention_decode
    kernels = _hopper() if attention_blocks.is_hopper(q) else None
    if kernels is None or kernels.refuse(q, k, v, scale, rng) is not None:
        return attention_long
    return kernels


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    _, T, H, D = q.shape
    kernels = _kernels(T, k.shape[1], H, D)
    if kernels is attention_long:
        kernels = _long(q, k, v, scale, rng)
    return kernels.forward(q, k, v, key_lengths, causal, scale, dropout_p, rng, site)


def attention_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape)
    _, T, H, D = q.shape
    kernels = _kernels(T, k.shape[1], H, D)
    kernels.backward(grad_out, q, k, v, *saved, *grads)
    return grads


def attention_qkvpacked_bwd(grad_out: Tensor, qkv: Tensor, *saved: Any) -> Tensor:
    shape = qkv.shape
    grad = qkv.new_empty(*shape)
    _, T, _, H, D = shape
    _kernels(T, T, H, D).backward(grad_out, *qkv.unbind(2), *saved, *grad.unbind(2))
    return grad
