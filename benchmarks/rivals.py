"""The same models in plain PyTorch, as a course writes them and as an expert does.

`naive`: separate query, key and value projections, softmax over a materialised matrix of scores,
logits of every token. `eager`: a packed projection, scaled_dot_product_attention, the head on the
counted rows only. Both take the weights of our models. Those of other libraries are in
library_models.py.

B batch, T tokens, H heads, D head dim, C model dim, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer.transformer import IGNORE_INDEX, ImageConfig, TextConfig


class NaiveAttention(nn.Module):
    def __init__(self, config: TextConfig | ImageConfig) -> None:
        super().__init__()
        C = config.dim
        self.heads = config.heads
        self.q = nn.Linear(C, C, bias=config.qkv_bias)
        self.k = nn.Linear(C, C, bias=config.qkv_bias)
        self.v = nn.Linear(C, C, bias=config.qkv_bias)
        self.out = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.attention_dropout)
        mask = torch.ones(config.max_tokens, config.max_tokens, dtype=torch.bool).tril()
        self.register_buffer("visible", mask if config.causal else None, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        D = C // self.heads
        q = self.q(x).view(B, T, self.heads, D).transpose(1, 2)
        k = self.k(x).view(B, T, self.heads, D).transpose(1, 2)
        v = self.v(x).view(B, T, self.heads, D).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible[:T, :T], float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = self.dropout(F.softmax(scores, dim=-1))
        return self.out((weights @ v).transpose(1, 2).contiguous().view(B, T, C))


class EagerAttention(nn.Module):
    def __init__(self, config: TextConfig | ImageConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        out = F.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4).unbind(0),
            attn_mask=mask,
            is_causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(out.transpose(1, 2).reshape(B, T, C))


def _gelu(config: TextConfig | ImageConfig) -> nn.GELU:
    return nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """A layer around either attention."""

    def __init__(self, config: TextConfig | ImageConfig, naive: bool) -> None:
        super().__init__()
        C = config.dim
        self.pre_norm = config.pre_norm
        self.norm1 = nn.LayerNorm(C, config.eps)
        self.attention = NaiveAttention(config) if naive else EagerAttention(config)
        self.norm2 = nn.LayerNorm(C, config.eps)
        self.fc1 = nn.Linear(C, config.hidden_dim)
        self.activation = _gelu(config)
        self.fc2 = nn.Linear(config.hidden_dim, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self._mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self._mlp(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TextEmbedding(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_tokens, config.dim)
        self.token_type = (
            nn.Embedding(config.token_types, config.dim) if config.token_types else None
        )
        self.norm = nn.LayerNorm(config.dim, config.eps) if config.embedding_norm else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(ids))
        return self.norm(x)


class ImageEmbedding(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        P = config.patch_size
        self.patch = nn.Conv2d(config.channels, config.dim, kernel_size=P, stride=P)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.position = nn.Parameter(torch.zeros(1, config.max_tokens, config.dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position


class Rival(nn.Module):
    """The logits of a text or image model or, with targets, its mean loss."""

    def __init__(self, config: TextConfig | ImageConfig, *, naive: bool) -> None:
        super().__init__()
        self.naive = naive
        self.is_image = isinstance(config, ImageConfig)
        # Where every token counts, gathering would only cost.
        self.gathers = not (naive or config.causal or self.is_image)
        self.head_transform: nn.Module = nn.Identity()
        if isinstance(config, ImageConfig):
            self.embedding: nn.Module = ImageEmbedding(config)
            self.head = nn.Linear(config.dim, config.num_classes)
        else:
            self.embedding = TextEmbedding(config)
            self.head = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)
            if config.tied_head:
                self.head.weight = self.embedding.token.weight
            if config.head_transform:
                norm = nn.LayerNorm(config.dim, config.eps)
                linear = nn.Linear(config.dim, config.dim)
                self.head_transform = nn.Sequential(linear, _gelu(config), norm)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, naive) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.eps) if config.pre_norm else nn.Identity()

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, *, key_lengths: Tensor | None = None
    ) -> Tensor:
        x = self.dropout(self.embedding(inputs))
        mask = None
        if key_lengths is not None:
            tokens = torch.arange(x.shape[1], device=x.device)
            mask = (tokens < key_lengths[:, None])[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        if self.is_image:
            x = self.norm(x)[:, 0] if self.naive else self.norm(x[:, 0])
        elif self.gathers and targets is not None:
            counted = targets != IGNORE_INDEX
            x, targets = self.norm(x[counted]), targets[counted]
        else:
            x = self.norm(x)
        logits = self.head(self.head_transform(x))
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORE_INDEX
        )


def plain_names(tensors: dict[str, Tensor], *, split_qkv: bool) -> dict[str, Tensor]:
    """Rename our weights or gradients to those of a rival; `split_qkv` for the naive one."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.").replace(".mlp.", ".")
        if split_qkv and ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}.")] = third
        else:
            renamed[name] = tensor
    return renamed


def load_ours(rival: Rival, weights: dict[str, Tensor]) -> None:
    """Give `rival` the weights of one of our models; raise RuntimeError if any does not fit."""
    rival.load_state_dict(plain_names(weights, split_qkv=rival.naive))
