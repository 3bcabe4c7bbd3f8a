"""Softmax attention, causal or not, on batches of equally long or padded sequences.

The (T, S) score matrix is never stored: forward keeps one log-sum-exp per row and backward
recomputes the weights from it (Dao et al., "FlashAttention", NeurIPS 2022, sections 3.1 and B).

B batch, T query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import (
    autocast_dtype,
    check_dropout,
    check_float,
    check_same_dtype,
    distinct,
    needs_grad,
)

MAX_HEAD_DIM = 128


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=reference.accumulator(q.dtype))


def bwd_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def qkvpacked_bwd_fake(grad_out: Tensor, qkv: Tensor, *saved: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def refuse_cuda(*args: Any) -> str | None:
    dtype = args[0].dtype
    if dtype in (torch.bfloat16, torch.float16):
        return None
    return f"it takes bfloat16 and float16, got {str(dtype)[6:]}"


_CUDA_MAX_QUERIES = 16  # kDecodeMaxQueries of csrc/cuda/attention_decode.h


def _refuse_cuda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> str | None:
    """The kernel for few queries, as when tokens are generated one by one, takes float32 too."""
    if q.dtype != torch.float32:
        return refuse_cuda(q)
    if rng is not None:
        return f"it drops no weights of float32, got dropout_p {dropout_p}"
    if q.shape[1] > _CUDA_MAX_QUERIES:
        return f"of float32 it takes at most {_CUDA_MAX_QUERIES} queries, got {q.shape[1]}"
    return None


SETTINGS = "bool causal, float scale, float dropout_p, Tensor? rng, int site"


dispatch.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, {SETTINGS})"
    " -> (Tensor, Tensor)",
    reference=reference.attention_fwd,
    fake=_fwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda_fwd},
)
dispatch.define(
    "attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor? key_lengths, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_bwd,
    fake=bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": refuse_cuda},
)
dispatch.define(
    "attention_qkvpacked_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse,"
    f" Tensor? key_lengths, {SETTINGS}) -> Tensor",
    reference=reference.attention_qkvpacked_bwd,
    fake=qkvpacked_bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": refuse_cuda},
)

for _op in ("attention_fwd", "attention_bwd", "attention_qkvpacked_bwd"):
    dispatch.add_triton(_op, "attention")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        out, lse = torch.ops.fastformer.attention_fwd.default(
            q, k, v, key_lengths, causal, scale, dropout_p, rng, site
        )
        ctx.save_for_backward(q, k, v, out, lse, key_lengths, rng)
        ctx.settings = (causal, scale, dropout_p)
        ctx.site = site
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, key_lengths, rng = ctx.saved_tensors
        grads = torch.ops.fastformer.attention_bwd.default(
            grad_out, *saved, key_lengths, *ctx.settings, rng, ctx.site
        )
        return *grads, None, None, None, None, None, None


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        key_lengths: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        out, lse = torch.ops.fastformer.attention_fwd.default(
            *qkv.unbind(2), key_lengths, causal, scale, dropout_p, rng, site
        )
        ctx.save_for_backward(qkv, out, lse, key_lengths, rng)
        ctx.settings = (causal, scale, dropout_p)
        ctx.site = site
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, key_lengths, rng = ctx.saved_tensors
        grad = torch.ops.fastformer.attention_qkvpacked_bwd.default(
            grad_out, *saved, key_lengths, *ctx.settings, rng, ctx.site
        )
        return grad, None, None, None, None, None, None


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    layout = "(B, tokens, H, D)" if dims == 4 else "(tokens, H, D)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(t.shape)}")
    check_float(op, q=q, k=k, v=v)
    check_same_dtype(op, q=q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(
            f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    H, D = q.shape[-2:]
    if k.shape[-2:] != (H, D) or (dims == 4 and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"{op}: q and k must agree in all but the number of tokens,"
            f" got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if D % 8 or not 0 < D <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head_dim must be a multiple of 8 and at most {MAX_HEAD_DIM},"
            f" got {D} (C={H * D}, H={H})"
        )


def check_lengths(op: str, name: str, lengths: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != shape or lengths.device != q.device:
        raise ValueError(
            f"{op}: {name} must be int32 of shape {shape} on {q.device},"
            f" got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
        )


def cast_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = autocast_dtype(q)
    return (q, k, v) if dtype is None else (q.to(dtype), k.to(dtype), v.to(dtype))


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Any, ...]:
    q, k, v = cast_qkv(q, k, v)
    check_qkv("attention", q, k, v, dims=4)
    if key_lengths is not None:
        check_lengths("attention", "key_lengths", key_lengths, (q.shape[0],), q)
    state = check_dropout("attention", dropout_p, rng, q)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return q, k, v, key_lengths, causal, scale, float(dropout_p), state, site


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Compute softmax(scale * q k^T) v per head; return (B, T, H, D) in the dtype of `q`.

    q (B, T, H, D), k and v (B, S, H, D): one floating dtype, D a multiple of 8 up to 128; any
    strides, such as views of one packed projection. T and S may differ: cross attention, a
    key-value cache.
    causal: query t sees key s when s <= t + S - T (the diagonal ends in the bottom right corner).
    scale: of the scores, by default 1 / sqrt(D).
    dropout_p: dropout of the weights; its row is the (token, head) of the output, its column the
    key.
    key_lengths (B,) int32: keys at and beyond the length are not seen. A query that sees no key
    gives zeros. rng, site: the generator state, see `fastformer.ops.dropout`.

    Under torch.autocast q, k and v are cast to its dtype. Differs from
    torch.nn.functional.scaled_dot_product_attention in the layout (tokens before heads) and the
    alignment of the causal mask (top left there). Raises ValueError or TypeError on bad arguments.
    """
    args = _prepare(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        key_lengths=key_lengths,
        rng=rng,
        site=site,
    )
    if needs_grad(q, k, v):
        return _Attention.apply(*distinct(args))
    return torch.ops.fastformer.attention_fwd.default(*args)[0]


def check_packed(op: str, qkv: Tensor, layout: str) -> None:
    if qkv.dim() != layout.count(",") + 1 or qkv.shape[-3] != 3:
        raise ValueError(f"{op}: qkv must be {layout}, got shape {tuple(qkv.shape)}")


def attention_qkvpacked(
    qkv: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Self-attention from one packed projection `qkv` (B, T, 3, H, D); return (B, T, H, D).

    The same as `attention(*qkv.unbind(2), ...)`, whose backward pass would copy the three gradients
    once more to put them together. flash-attn has it as flash_attn_qkvpacked_func.
    """
    check_packed("attention_qkvpacked", qkv, "(B, T, 3, H, D)")
    dtype = autocast_dtype(qkv)
    qkv = qkv if dtype is None else qkv.to(dtype)
    q, k, v = qkv.unbind(2)
    q, k, v, *settings = _prepare(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        key_lengths=key_lengths,
        rng=rng,
        site=site,
    )
    if needs_grad(qkv):
        return _AttentionQKVPacked.apply(qkv, *settings)
    return torch.ops.fastformer.attention_fwd.default(q, k, v, *settings)[0]


@dispatch.explainer("attention")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _prepare(*args, **kwargs)
    return [("attention_fwd", raw), ("attention_bwd", raw)]


@dispatch.explainer("attention_qkvpacked")
def _explain_qkvpacked(qkv: Tensor, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    check_packed("attention_qkvpacked", qkv, "(B, T, 3, H, D)")
    raw = _prepare(*qkv.unbind(2), **kwargs)
    return [("attention_fwd", raw), ("attention_qkvpacked_bwd", raw)]
