"""Softmax attention within packed sequences of any lengths, without padding.

The method is that of `fastformer.ops.attention`; what is not computed is cheapest.

N packed query tokens, M packed key tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import autocast_dtype, check_dropout, distinct, needs_grad
from fastformer.ops.attention import (
    SETTINGS,
    bwd_fake,
    cast_qkv,
    check_lengths,
    check_packed,
    check_qkv,
    qkvpacked_bwd_fake,
    refuse_cuda,
)


def _fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((H, N), dtype=reference.accumulator(q.dtype))


_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"

dispatch.define(
    f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {SETTINGS})"
    " -> (Tensor, Tensor)",
    reference=reference.attention_varlen_fwd,
    fake=_fwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": refuse_cuda},
)
dispatch.define(
    "attention_varlen_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_LENGTHS}, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_varlen_bwd,
    fake=bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": refuse_cuda},
)

dispatch.define(
    "attention_varlen_qkvpacked_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse,"
    f" Tensor cu_seqlens, SymInt max_seqlen, {SETTINGS}) -> Tensor",
    reference=reference.attention_varlen_qkvpacked_bwd,
    fake=qkvpacked_bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": refuse_cuda},
)

for _op in ("attention_varlen_fwd", "attention_varlen_bwd", "attention_varlen_qkvpacked_bwd"):
    dispatch.add_triton(_op, "attention_varlen")


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        ctx.settings = (max_seqlen_q, max_seqlen_k, causal, scale, dropout_p)
        ctx.site = site
        out, lse = torch.ops.fastformer.attention_varlen_fwd.default(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings, rng, site
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, rng = ctx.saved_tensors
        grads = torch.ops.fastformer.attention_varlen_bwd.default(
            grad_out, *saved, *ctx.settings, rng, ctx.site
        )
        return *grads, None, None, None, None, None, None, None, None, None


class _AttentionVarlenQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        ctx.settings = (causal, scale, dropout_p)
        ctx.max_seqlen, ctx.site = max_seqlen, site
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        out, lse = torch.ops.fastformer.attention_varlen_fwd.default(
            *qkv.unbind(1), *lengths, *ctx.settings, rng, site
        )
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, rng)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, rng = ctx.saved_tensors
        grad = torch.ops.fastformer.attention_varlen_qkvpacked_bwd.default(
            grad_out, *saved, ctx.max_seqlen, *ctx.settings, rng, ctx.site
        )
        return grad, None, None, None, None, None, None, None


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Any, ...]:
    op = "attention_varlen"
    q, k, v = cast_qkv(q, k, v)
    check_qkv(op, q, k, v, dims=3)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.numel() < 2:
        raise ValueError(
            f"{op}: cu_seqlens_q must hold the start of each sequence and the end of the last,"
            f" got shape {tuple(cu_seqlens_q.shape)}"
        )
    count = (cu_seqlens_q.numel(),)
    check_lengths(op, "cu_seqlens_q", cu_seqlens_q, count, q)
    check_lengths(op, "cu_seqlens_k", cu_seqlens_k, count, q)
    state = check_dropout(op, dropout_p, rng, q)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return q, k, v, *lengths, causal, scale, float(dropout_p), state, site


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Attention within each of several packed sequences, without padding; return (N, H, D).

    q (N, H, D), k and v (M, H, D): the sequences one after the other. cu_seqlens_q and
    cu_seqlens_k (sequences + 1,) int32: where each starts, then the total. max_seqlen_q and
    max_seqlen_k: the longest lengths (upper bounds serve), given by the caller so that nothing
    waits for the device. Each sequence pair is aligned bottom right when causal. The rest is as
    in `attention`; with equal lengths both draw the same dropout mask. The values of cu_seqlens
    are not checked, as that would
    synchronise: they must be non-decreasing from 0 to the number of tokens.
    """
    args = _prepare(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )
    if needs_grad(q, k, v):
        return _AttentionVarlen.apply(*distinct(args))
    return torch.ops.fastformer.attention_varlen_fwd.default(*args)[0]


def attention_varlen_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Self-attention within packed sequences from `qkv` (N, 3, H, D); return (N, H, D).

    The same as `attention_varlen` on the three parts, see there and `attention_qkvpacked`.
    """
    check_packed("attention_varlen_qkvpacked", qkv, "(N, 3, H, D)")
    dtype = autocast_dtype(qkv)
    qkv = qkv if dtype is None else qkv.to(dtype)
    q, k, v = qkv.unbind(1)
    q, k, v, *rest = _prepare(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
    )
    if needs_grad(qkv):
        return _AttentionVarlenQKVPacked.apply(qkv, cu_seqlens, max_seqlen, *rest[4:])
    return torch.ops.fastformer.attention_varlen_fwd.default(q, k, v, *rest)[0]


@dispatch.explainer("attention_varlen")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _prepare(*args, **kwargs)
    return [("attention_varlen_fwd", raw), ("attention_varlen_bwd", raw)]


@dispatch.explainer("attention_varlen_qkvpacked")
def _explain_packed(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **kwargs: Any
) -> list[tuple[str, tuple[Any, ...]]]:
    check_packed("attention_varlen_qkvpacked", qkv, "(N, 3, H, D)")
    q, k, v = qkv.unbind(1)
    raw = _prepare(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **kwargs)
    return [("attention_varlen_fwd", raw), ("attention_varlen_qkvpacked_bwd", raw)]
