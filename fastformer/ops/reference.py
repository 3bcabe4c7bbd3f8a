"""The specification of every raw op in plain PyTorch, and the kernel of last resort on any device.

Everything here is written to be checked by eye, not to be fast. Sums, softmax and statistics are in
float32 (float64 for float64), with one rounding on the way out; products with weights run in the
dtype of their inputs, as torch.nn.Linear does, whose kernels accumulate in float32. Dropout draws
its mask through the public raw op, so that a compiled mask kernel is used where there is one.

B batch, T query tokens, S key tokens, H heads, D head dim, C model dim, F hidden dim, V vocabulary,
N rows (all leading dimensions flattened).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer._dropout import dropout_scale, dropout_threshold

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- dropout: see fastformer/ops/dropout.py for the definition ----


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b; b is split, as the whole product would overflow int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_mask(rows: int, cols: int, p: float, rng: Tensor, site: int) -> Tensor:
    """Philox-4x32-10 keep mask (rows, cols), bool."""
    seed, stream = rng[0], rng[1] + site
    key0, key1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    col = torch.arange((cols + 7) // 8, device=rng.device, dtype=torch.int64)
    row = torch.arange(rows, device=rng.device, dtype=torch.int64)
    c1, c0 = torch.meshgrid(row & _LOW_32, col, indexing="ij")
    c2 = (stream & _LOW_32).expand_as(c0)
    c3 = ((stream >> 32) & _LOW_32).expand_as(c0)
    for _ in range(10):
        high0, low0 = _multiply_32(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_32(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 = (key0 + _PHILOX_WEYL[0]) & _LOW_32
        key1 = (key1 + _PHILOX_WEYL[1]) & _LOW_32
    lanes = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :cols] >= dropout_threshold(p)


def _keep(rows: int, cols: int, p: float, rng: Tensor, site: int) -> Tensor:
    return torch.ops.fastformer.dropout_mask.default(rows, cols, p, rng, site)


# ---- embedding ----


def embedding_bwd(grad_out: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """The gradient (vocabulary, C) of a table: each row is the sum over its tokens."""
    grad = grad_out.to(accumulator(grad_out.dtype))
    sums = torch.ops.aten.embedding_dense_backward(grad, ids, vocabulary, -1, False)
    return sums.to(grad_out.dtype)


# ---- attention ----


def _visible(
    T: int,
    S: int,
    causal: bool,
    key_lengths: Tensor | None,
    shift: Tensor | int,
    device: torch.device,
) -> Tensor:
    """Which key each query may see, broadcastable to (B, H, T, S); `shift` moves the diagonal."""
    key = torch.arange(S, device=device)
    visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if causal:
        visible = key <= torch.arange(T, device=device)[:, None] + shift
        visible = visible if visible.dim() == 4 else visible[None, None]
    if key_lengths is not None:
        visible = visible & (key < key_lengths.view(-1, 1, 1, 1))
    return visible


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Masked scores (B, H, T, S) of q (B, T, H, D) and k (B, S, H, D)."""
    acc = accumulator(q.dtype)
    scores = q.to(acc).transpose(1, 2) @ k.to(acc).permute(0, 2, 3, 1)
    return scores.mul_(scale).masked_fill_(~visible, float("-inf"))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, keep: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    acc = accumulator(q.dtype)
    scores = _scores(q, k, visible, scale)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees no key has lse = -inf and attends to nothing.
    weights = torch.exp_(scores.sub_(lse.masked_fill(lse.isneginf(), 0.0)[..., None]))
    if keep is not None:
        weights = weights * keep * dropout_scale(p)
    out = weights @ v.to(acc).transpose(1, 2)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    visible: Tensor,
    scale: float,
    keep: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(q.dtype)
    grad = grad_out.to(acc).transpose(1, 2)
    weights = _scores(q, k, visible, scale)
    weights = weights.sub_(lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp_()
    grad_weights = grad @ v.to(acc).permute(0, 2, 3, 1)
    kept = weights
    if keep is not None:
        factor = keep * dropout_scale(p)
        kept, grad_weights = weights * factor, grad_weights * factor
    grad_v = kept.transpose(-1, -2) @ grad
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(scale)
    grad_q = grad_scores @ k.to(acc).transpose(1, 2)
    grad_k = grad_scores.transpose(-1, -2) @ q.to(acc).transpose(1, 2)
    grads = (grad_q, grad_k, grad_v)
    q_out, k_out, v_out = (g.transpose(1, 2).to(q.dtype).contiguous() for g in grads)
    return q_out, k_out, v_out


def _attention_keep(q: Tensor, S: int, p: float, rng: Tensor | None, site: int) -> Tensor | None:
    """Keep mask (B, H, T, S): row (b * T + t) * H + h, column s of the dropout definition."""
    if rng is None:
        return None
    B, T, H, _ = q.shape
    return _keep(B * T * H, S, p, rng, site).view(B, T, H, S).permute(0, 2, 1, 3)


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
    """out (B, T, H, D) in the dtype of q and lse (B, H, T) in the accumulator's dtype."""
    T, S = q.shape[1], k.shape[1]
    visible = _visible(T, S, causal, key_lengths, S - T, q.device)
    keep = _attention_keep(q, S, dropout_p, rng, site)
    return _attend(q, k, v, visible, scale, keep, dropout_p)


def attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the weights are recomputed from lse."""
    T, S = q.shape[1], k.shape[1]
    visible = _visible(T, S, causal, key_lengths, S - T, q.device)
    keep = _attention_keep(q, S, dropout_p, rng, site)
    return _attend_backward(grad_out, q, k, v, lse, visible, scale, keep, dropout_p)


def attention_qkvpacked_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> Tensor:
    """The gradient of qkv (B, T, 3, H, D), whose parts are the q, k and v of attention_bwd."""
    q, k, v = qkv.unbind(2)
    return torch.stack(attention_bwd(grad_out, q, k, v, out, lse, *settings), dim=2)


class _Packing:
    """Moves packed sequences (N, ...) to padded ones (sequences, longest, ...) and back, without a
    host synchronisation: the longest lengths come from the caller."""

    def __init__(self, cu_seqlens: Tensor, longest: int, total: int) -> None:
        start = cu_seqlens.long()
        self.lengths = start[1:] - start[:-1]
        position = torch.arange(longest, device=start.device)
        self.inside = position < self.lengths[:, None]
        self.index = torch.where(self.inside, start[:-1, None] + position, total)
        self.total = total

    def pad(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.index]

    def unpad(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.total + 1, *x.shape[2:])
        out[self.index.flatten()] = x.flatten(0, 1)
        return out[: self.total]


def _varlen_visible(
    queries: _Packing, keys: _Packing, T: int, S: int, causal: bool, device: torch.device
) -> Tensor:
    shift = (keys.lengths - queries.lengths).view(-1, 1, 1, 1)
    visible = _visible(T, S, causal, keys.lengths, shift, device)
    return visible & queries.inside[:, None, :, None]


def _varlen_keep(
    q: Tensor, queries: _Packing, S: int, p: float, rng: Tensor | None, site: int
) -> Tensor | None:
    """Keep mask (sequences, H, T, S): row n * H + h of token n, column the key's position."""
    if rng is None:
        return None
    N, H, _ = q.shape
    keep = _keep(N * H, S, p, rng, site).view(N, H, S)
    return queries.pad(keep).permute(0, 2, 1, 3)


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
    """out (N, H, D) in the dtype of q and lse (H, N) in the accumulator's dtype."""
    queries = _Packing(cu_seqlens_q, max_seqlen_q, q.shape[0])
    keys = _Packing(cu_seqlens_k, max_seqlen_k, k.shape[0])
    visible = _varlen_visible(queries, keys, max_seqlen_q, max_seqlen_k, causal, q.device)
    keep = _varlen_keep(q, queries, max_seqlen_k, dropout_p, rng, site)
    out, lse = _attend(queries.pad(q), keys.pad(k), keys.pad(v), visible, scale, keep, dropout_p)
    return queries.unpad(out), queries.unpad(lse.transpose(1, 2)).t().contiguous()


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
    causal: bool,
    scale: float,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the packed q, k and v."""
    queries = _Packing(cu_seqlens_q, max_seqlen_q, q.shape[0])
    keys = _Packing(cu_seqlens_k, max_seqlen_k, k.shape[0])
    visible = _varlen_visible(queries, keys, max_seqlen_q, max_seqlen_k, causal, q.device)
    keep = _varlen_keep(q, queries, max_seqlen_k, dropout_p, rng, site)
    padded = (queries.pad(grad_out), queries.pad(q), keys.pad(k), keys.pad(v))
    padded_lse = queries.pad(lse.t()).transpose(1, 2)
    grad_q, grad_k, grad_v = _attend_backward(*padded, padded_lse, visible, scale, keep, dropout_p)
    return queries.unpad(grad_q), keys.unpad(grad_k), keys.unpad(grad_v)


def attention_varlen_qkvpacked_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *settings: Any,
) -> Tensor:
    """The gradient of qkv (N, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return torch.stack(
        attention_varlen_bwd(grad_out, q, k, v, out, lse, *lengths, *settings), dim=1
    )


# ---- layer norm ----


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    rows = x.to(acc)
    mean = rows.mean(-1)
    centred = rows - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    out = centred * rstd[..., None] * weight.to(acc)
    if bias is not None:
        out = out + bias.to(acc)
    return out.to(out_dtype), mean.flatten(), rstd.flatten()


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x (..., C), and mean and rstd (N,) in the accumulator's dtype."""
    return _normalise(x, weight, bias, eps, out_dtype)


def layer_norm_bwd(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    acc = accumulator(x.dtype)
    C = x.shape[-1]
    grad = grad_out.to(acc).reshape(-1, C)
    normed = (x.to(acc).reshape(-1, C) - mean[:, None]) * rstd[:, None]
    weighted = grad * weight.to(acc)
    along = (weighted * normed).mean(-1, keepdim=True)
    grad_x = (weighted - weighted.mean(-1, keepdim=True) - normed * along) * rstd[:, None]
    grad_weight, grad_bias = (grad * normed).sum(0), grad.sum(0)
    return (
        grad_x.to(x.dtype).view(x.shape),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm(s) and s = residual + dropout(x), both (..., C), and mean and rstd (N,) of s."""
    acc = accumulator(residual.dtype)
    branch = x.to(acc)
    if rng is not None:
        C = x.shape[-1]
        keep = _keep(x.numel() // max(C, 1), C, dropout_p, rng, site)
        branch = branch * keep.view(x.shape) * dropout_scale(dropout_p)
    # The statistics are those of the sum as it is stored, which is what the backward pass reads.
    new_residual = (residual.to(acc) + branch).to(residual.dtype)
    normed, mean, rstd = _normalise(new_residual, weight, bias, eps, out_dtype)
    return normed, new_residual, mean, rstd


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias."""
    grad, grad_weight, grad_bias = layer_norm_bwd(grad_normed, new_residual, weight, mean, rstd)
    if grad_new_residual is not None:
        grad = grad + grad_new_residual
    grad_x = grad.to(accumulator(grad.dtype))
    if rng is not None:
        C = grad.shape[-1]
        keep = _keep(grad.numel() // max(C, 1), C, dropout_p, rng, site)
        grad_x = grad_x * keep.view(grad.shape) * dropout_scale(dropout_p)
    # A copy where nothing was cast: results of an op must not share memory.
    grad_x = grad_x.to(x_dtype, copy=True)
    return grad_x, grad, grad_weight, grad_bias


# ---- linear ----


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is not known when C is 0


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (..., C_out)."""
    # Not view: the result of an op is a tensor of its own, which may be changed in place.
    out = F.linear(_rows(x), weight, bias)
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))


def linear_bwd(
    grad_out: Tensor, x: Tensor, weight: Tensor, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, in `grad_dtype`, which is float32 or that of x, of weight and bias."""
    rows, grad = _rows(x), _rows(grad_out)
    grad_bias = grad.sum(0, dtype=accumulator(x.dtype)).to(grad_dtype)
    return (grad @ weight).view(x.shape), (grad.t() @ rows).to(grad_dtype), grad_bias


# ---- MLP ----


def _hidden(
    pre: Tensor, tanh: bool, dropout_p: float, rng: Tensor | None, site: int
) -> tuple[Tensor, Tensor | None]:
    """dropout(gelu(pre)) in the accumulator's dtype, and the dropout factor."""
    hidden = F.gelu(pre.to(accumulator(pre.dtype)), approximate="tanh" if tanh else "none")
    if rng is None:
        return hidden, None
    rows, cols = pre.shape
    factor = _keep(rows, cols, dropout_p, rng, site) * dropout_scale(dropout_p)
    return hidden * factor, factor


def mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    tanh: bool,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """out (..., C) and the pre-activation (N, F) that the backward pass needs."""
    pre = F.linear(x.reshape(-1, x.shape[-1]), w1, b1)
    hidden, _ = _hidden(pre, tanh, dropout_p, rng, site)
    out = F.linear(hidden.to(x.dtype), w2, b2)
    # Not view: the result of an op is a tensor of its own, which may be changed in place.
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], w2.shape[0])), pre


def mlp_bwd(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    tanh: bool,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and, in `grad_dtype`, which is float32 or that of x, of w1, b1, w2 and b2.

    The hidden activation is recomputed.
    """
    rows, grad = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, w2.shape[0])
    hidden, factor = _hidden(pre, tanh, dropout_p, rng, site)
    grad_hidden = (grad @ w2).to(hidden.dtype)
    if factor is not None:
        grad_hidden = grad_hidden * factor
    grad_pre = torch.ops.aten.gelu_backward(
        grad_hidden, pre.to(hidden.dtype), approximate="tanh" if tanh else "none"
    ).to(x.dtype)
    return (
        (grad_pre @ w1).view(x.shape),
        (grad_pre.t() @ rows).to(grad_dtype),
        grad_pre.sum(0, dtype=hidden.dtype).to(grad_dtype),
        (grad.t() @ hidden.to(x.dtype)).to(grad_dtype),
        grad.sum(0, dtype=hidden.dtype).to(grad_dtype),
    )


# ---- linear cross-entropy ----

_ROWS_PER_CHUNK = 512


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    mostly_ignored: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (scalar) and, unless `grad_dtype` is None, its gradients: of x and, in that dtype,
    which is float32 or that of x, of weight and bias. Those not asked for are empty, and that of
    a bias that there is not. `mostly_ignored` changes nothing but speed elsewhere.

    Only rows whose target counts are multiplied, a chunk at a time, and a chunk's logits become
    their own gradient, so that the whole (N, V) matrix never exists.
    """
    acc, needs_grad = accumulator(x.dtype), grad_dtype is not None
    V = weight.shape[0]
    rows = (targets != ignore_index).nonzero().squeeze(1)
    if x.device.type == "cpu" and rows.numel():
        _check_targets(targets[rows], V)
    share = 1.0 / max(rows.numel(), 1) if mean else 1.0
    loss = torch.zeros((), dtype=acc, device=x.device)
    grad_x = x.new_zeros(x.shape if needs_grad else 0)
    grad_w = x.new_zeros(weight.shape if needs_grad else 0, dtype=acc)
    grad_b = x.new_zeros(V if needs_grad and bias is not None else 0, dtype=acc)
    for index in rows.split(_ROWS_PER_CHUNK):
        chunk, target = x[index], targets[index, None]
        logits = F.linear(chunk, weight, None if bias is None else bias.to(x.dtype)).to(acc)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        nll = lse - (1.0 - label_smoothing) * logits.gather(1, target)
        if label_smoothing:
            nll = nll - label_smoothing * logits.mean(-1, keepdim=True)
        loss += (nll + z_loss * lse.square()).sum() * share
        if needs_grad:
            grad = torch.exp_(logits.sub_(lse)).mul_(1.0 + 2.0 * z_loss * lse)
            grad.sub_(label_smoothing / V)
            ones = torch.full_like(target, 1, dtype=acc)
            grad.scatter_add_(1, target, ones.mul_(label_smoothing - 1.0)).mul_(share)
            if bias is not None:
                grad_b += grad.sum(0)
            grad = grad.to(x.dtype)
            grad_x[index] = grad @ weight
            grad_w += grad.t() @ chunk
    return loss, grad_x, grad_w.to(grad_dtype or x.dtype), grad_b.to(grad_dtype or x.dtype)


def _check_targets(targets: Tensor, V: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= V:
        bad = low if low < 0 else high
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {V}) or equal ignore_index, got {bad}"
        )


# ---- AdamW ----


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update params, both averages, the numbers of steps and, if there are any, the copies."""
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        exp_avg, exp_avg_sq, t = exp_avgs[index], exp_avg_sqs[index], steps[index].add_(1).item()
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**t)).add_(eps)
        param.mul_(1.0 - lr * weight_decay)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - beta1**t))
        if copies:
            copies[index].copy_(param)
