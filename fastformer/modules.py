"""Linear, LayerNorm, Attention, MLP and Block: nn.Modules that own parameters and call the ops.

There is no mathematics here. What the modules add is the fused order of a block: each residual
addition is done by the LayerNorm that follows it, so a block hands over (branch, residual), the
last branch not yet added.

B batch, T tokens, S key tokens, N packed tokens, H heads, D head dim, C model dim, F hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastformer import ops

# Each layer draws dropout at up to four sites; the embeddings take site 0.
_SITES_PER_LAYER = 4


class KeyValueCache:
    """Keys and values (B, S, H, D) of the tokens one attention layer has seen, for decoding."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' k and v; return views of all that are stored."""
        B, T, H, D = k.shape
        end = self.length + T
        if end > self.max_tokens:
            raise ValueError(
                f"KeyValueCache: holds at most {self.max_tokens} tokens,"
                f" got {T} more after {self.length}"
            )
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(B, self.max_tokens, H, D)
            self._values = torch.empty_like(self._keys)
        self._keys[:, self.length : end] = k
        self._values[:, self.length : end] = v
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


class Linear(nn.Linear):
    """torch.nn.Linear, run by the op `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., C) to (..., C_out)."""
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """torch.nn.Embedding without its options, run by the op `embedding`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `ids` (...); return (..., C)."""
        return ops.embedding(ids, self.weight)


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch (B, T) stand when they follow one another.

    index (N,) int64: the places of the real tokens in the flattened batch. cu_seqlens (B + 1,)
    int32: where each sequence starts in the packed one, then N.
    """

    shape: tuple[int, int]
    index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, key_lengths: Tensor, B: int, T: int) -> Packing:
        """Keep the first `key_lengths` (B,) int32 of each row's T tokens; waits for the device."""
        if key_lengths.dtype != torch.int32 or tuple(key_lengths.shape) != (B,):
            raise ValueError(
                f"key_lengths must be int32 of shape ({B},),"
                f" got {key_lengths.dtype} {tuple(key_lengths.shape)}"
            )
        lengths = key_lengths.clamp(0, T)
        real = torch.arange(T, device=lengths.device) < lengths[:, None]
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls((B, T), real.flatten().nonzero().squeeze(1), cu_seqlens, int(lengths.max()))

    @property
    def positions(self) -> Tensor:
        """The position (N,) of each packed token within its sequence."""
        return self.index % self.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """The real tokens of `x` (B, T, ...) as (N, ...)."""
        if tuple(x.shape[:2]) != self.shape:
            raise ValueError(f"a padded batch must be {self.shape}, got {tuple(x.shape)}")
        return x.flatten(0, 1)[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros for padding."""
        B, T = self.shape
        padded = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, self.index, x)
        return padded.view(B, T, *x.shape[1:])


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; with a residual, the fused add + LayerNorm."""

    def __init__(self, dim: int, *, eps: float = 1e-5, dropout: float = 0.0, site: int = 0) -> None:
        super().__init__()
        self.eps, self.dropout, self.site = eps, dropout, site
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., C)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (forward(s), s) with s = residual + dropout(x)."""
        return ops.add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            rng=rng,
            site=self.site,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout={self.dropout}"


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection of queries, keys and values.

    `linformer` = (max_tokens, k) projects keys and values along the tokens to k of them
    (Wang et al., "Linformer", 2020, section 4); it excludes `causal`, key lengths and a cache.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        linformer: tuple[int, int] | None = None,
        site: int = 0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: heads must divide dim, got dim {dim} and {heads} heads")
        if linformer and causal:
            raise ValueError(
                "Attention: a Linformer projection mixes tokens, so it cannot be causal"
            )
        self.heads, self.causal, self.dropout, self.site = heads, causal, dropout, site
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = Linear(dim, dim)
        self.project_k = nn.Parameter(torch.empty(linformer)) if linformer else None
        self.project_v = nn.Parameter(torch.empty(linformer)) if linformer else None
        for projection in (self.project_k, self.project_v):
            if projection is not None:
                nn.init.normal_(projection, std=projection.shape[1] ** -0.5)

    def forward(
        self,
        x: Tensor,
        *,
        key_lengths: Tensor | None = None,
        rng: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend within `x` (B, T, C) and to what `cache` holds; return (B, T, C).

        With `packing`, `x` is (N, C) and each sequence attends within itself.
        """
        if self.project_k is not None and (key_lengths is not None or packing is not None):
            raise ValueError("Attention: a Linformer projection cannot skip padded keys")
        if packing is not None:
            return self._attend_packed(x, packing, rng)
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        dropout_p = self.dropout if self.training else 0.0
        if cache is None and self.project_k is None:
            out = ops.attention_qkvpacked(
                qkv,
                causal=self.causal,
                dropout_p=dropout_p,
                key_lengths=key_lengths,
                rng=rng,
                site=self.site,
            )
            return self.out(out.reshape(B, T, C))
        q, k, v = qkv.unbind(2)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.project_k is not None and self.project_v is not None:
            k = torch.einsum("bshd,sk->bkhd", k, self.project_k[:T])
            v = torch.einsum("bshd,sk->bkhd", v, self.project_v[:T])
        out = ops.attention(
            q,
            k,
            v,
            causal=self.causal,
            dropout_p=dropout_p,
            key_lengths=key_lengths,
            rng=rng,
            site=self.site,
        )
        return self.out(out.reshape(B, T, C))

    def _attend_packed(self, x: Tensor, packing: Packing, rng: Tensor | None) -> Tensor:
        N, C = x.shape
        out = ops.attention_varlen_qkvpacked(
            self.qkv(x).view(N, 3, self.heads, C // self.heads),
            packing.cu_seqlens,
            packing.max_seqlen,
            causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            rng=rng,
            site=self.site,
        )
        return self.out(out.reshape(N, C))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, dropout={self.dropout}"


class MLP(nn.Module):
    """Linear, GELU, dropout, linear: the feed-forward half of a block."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        site: int = 0,
    ) -> None:
        super().__init__()
        self.activation, self.dropout, self.site = activation, dropout, site
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, *, rng: Tensor | None = None) -> Tensor:
        """Map `x` (..., C) to (..., C)."""
        return ops.mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
            rng=rng,
            site=self.site,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"


class Block(nn.Module):
    """One transformer layer, encoder or decoder, pre-norm or post-norm.

    `dropout` acts on both branches before they are added, `attention_dropout` on the attention
    weights, `mlp_dropout` on the hidden activation. `index` numbers the layer, for its dropout
    sites.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden_dim: int,
        *,
        causal: bool = False,
        pre_norm: bool = True,
        activation: str = "gelu",
        eps: float = 1e-5,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
        linformer: tuple[int, int] | None = None,
        index: int = 0,
    ) -> None:
        super().__init__()
        site = 1 + _SITES_PER_LAYER * index
        self.pre_norm = pre_norm
        # A pre-norm block's first norm adds the branch of the layer before it.
        first, second = (
            (site + 3 - _SITES_PER_LAYER, site + 1) if pre_norm else (site + 1, site + 3)
        )
        self.norm1 = LayerNorm(dim, eps=eps, dropout=dropout, site=first)
        self.attention = Attention(
            dim,
            heads,
            causal=causal,
            qkv_bias=qkv_bias,
            dropout=attention_dropout,
            linformer=linformer,
            site=site,
        )
        self.norm2 = LayerNorm(dim, eps=eps, dropout=dropout, site=second)
        self.mlp = MLP(dim, hidden_dim, activation=activation, dropout=mlp_dropout, site=site + 2)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        rng: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer to the stream x + residual (B, T, C); return the new (x, residual).

        With `packing` the stream is (N, C), the real tokens of a batch one after the other.

        The stream a pre-norm block returns is the sum of the two, added by whoever comes next:
        `x, residual = block(x)` gives `x + residual` equal to nn.TransformerEncoderLayer's output.
        A post-norm block returns the finished stream and None.
        """
        if not self.pre_norm:
            branch = self.attention(
                x, key_lengths=key_lengths, rng=rng, cache=cache, packing=packing
            )
            x, _ = self.norm1.add(branch, x, rng)
            x, _ = self.norm2.add(self.mlp(x, rng=rng), x, rng)
            return x, None
        if residual is None:
            normed, residual = self.norm1(x), x
        else:
            normed, residual = self.norm1.add(x, residual, rng)
        branch = self.attention(
            normed, key_lengths=key_lengths, rng=rng, cache=cache, packing=packing
        )
        normed, residual = self.norm2.add(branch, residual, rng)
        return self.mlp(normed, rng=rng), residual


def last_site(layers: int) -> int:
    """The dropout site of the final norm, which adds the last block's branch."""
    return _SITES_PER_LAYER * layers
