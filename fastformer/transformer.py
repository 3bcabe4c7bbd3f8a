"""The whole family in one file: one Transformer, and BERT, GPT and ViT built from it.

    ids  --> TextEmbedding  --+                             +--> head: logits, or the loss
                              +--> Transformer (L Blocks) --+
    images -> ImageEmbedding -+      causal: a decoder      +--> head on the class token

`causal` is the only difference between the encoder and the decoder. Every model returns logits, or,
when given targets, the mean loss without ever holding all logits.

B batch, T tokens, N real tokens (padding dropped), C model dim, V vocabulary, P patch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastformer import ops
from fastformer.modules import (
    Block,
    Embedding,
    KeyValueCache,
    LayerNorm,
    Linear,
    Packing,
    last_site,
)

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and options of a stack of blocks; defaults are those of a pre-norm encoder.

    `linformer` is the number of keys that the tokens are projected to, 0 for plain attention.
    """

    dim: int
    layers: int
    heads: int
    hidden_dim: int
    max_tokens: int
    causal: bool = False
    pre_norm: bool = True
    activation: str = "gelu"
    eps: float = 1e-5
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    linformer: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "hidden_dim", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(
                f"config: heads must divide dim, got dim {self.dim} and {self.heads} heads;"
                f" take one of {_divisors(self.dim)}"
            )
        D = self.dim // self.heads
        if D % 8 or D > 128:
            raise ValueError(
                "config: the head dim (dim / heads) must be a multiple of 8 and at most 128,"
                f" got {D} (dim {self.dim}, {self.heads} heads)"
            )
        if self.activation not in ("gelu", "gelu_tanh"):
            raise ValueError(
                f"config: activation must be gelu or gelu_tanh, got {self.activation!r}"
            )
        for name in ("dropout", "attention_dropout", "mlp_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"config: {name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def draws_dropout(self) -> bool:
        """Whether a training step needs a generator state."""
        return max(self.dropout, self.attention_dropout, self.mlp_dropout) > 0.0


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A language model. `head_transform` is BERT's dense + GELU + LayerNorm before the head."""

    vocab_size: int
    token_types: int = 0
    embedding_norm: bool = False
    head_transform: bool = False
    tied_head: bool = False
    head_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"config: vocab_size must be at least 1, got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TransformerConfig):
    """A vision transformer on square images cut into square patches, plus a class token."""

    image_size: int
    patch_size: int
    num_classes: int
    channels: int = 3
    max_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "num_classes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                "config: image_size must be a multiple of patch_size,"
                f" got {self.image_size} and {self.patch_size}"
            )
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        object.__setattr__(self, "max_tokens", tokens)
        super().__post_init__()


def _divisors(dim: int) -> str:
    fitting = [
        h for h in range(1, dim + 1) if dim % h == 0 and dim // h % 8 == 0 and dim // h <= 128
    ]
    return ", ".join(map(str, fitting)) or "none: make dim a multiple of 8"


class Transformer(nn.Module):
    """A stack of blocks over a stream of embeddings (B, T, C): encoder, or decoder when causal."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.blocks = nn.ModuleList(
            Block(
                config.dim,
                config.heads,
                config.hidden_dim,
                causal=config.causal,
                pre_norm=config.pre_norm,
                activation=config.activation,
                eps=config.eps,
                qkv_bias=config.qkv_bias,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                mlp_dropout=config.mlp_dropout,
                linformer=(config.max_tokens, config.linformer) if config.linformer else None,
                index=index,
            )
            for index in range(config.layers)
        )
        self.norm = (
            LayerNorm(
                config.dim, eps=config.eps, dropout=config.dropout, site=last_site(config.layers)
            )
            if config.pre_norm
            else None
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_lengths: Tensor | None = None,
        rng: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Map embeddings `x` (B, T, C), or (N, C) with `packing`, to final hidden states."""
        residual: Tensor | None = None
        for index, block in enumerate(self.blocks):
            given: dict[str, Any] = {"key_lengths": key_lengths, "rng": rng, "packing": packing}
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, use_reentrant=False, **given)
            else:
                cache = caches[index] if caches is not None else None
                x, residual = block(x, residual, cache=cache, **given)
        if self.norm is None or residual is None:
            return x
        return self.norm.add(x, residual, rng)[0]


class _Model(nn.Module):
    """What BERT, GPT and ViT share: the transformer, its dropout state and a size."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def _dropout_state(self, rng: Tensor | None, device: torch.device) -> Tensor | None:
        if rng is None and self.training and self.config.draws_dropout:
            return torch.randint(2**62, (2,), dtype=torch.int64, device=device)
        return rng


def _init_weights(model: _Model) -> None:
    """Draw weights from normals as wide as GPT-2's at its width, 0.02 * sqrt(768 / C).

    A fixed 0.02 is too narrow for the small models and slows their start. Outputs of branches are
    narrower by sqrt(2 L), as in GPT-2. Patches are projected from P * P * channels values, not C.
    Image positions get the amplitude of a sine-cosine table: with quieter ones a ViT is slow to
    tell patches apart.
    """
    std = 0.02 * math.sqrt(768 / model.config.dim)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("attention.out.weight", "mlp.fc2.weight")):
            nn.init.normal_(parameter, std=std / math.sqrt(2 * model.config.layers))
        elif name == "embedding.patch.weight":
            nn.init.normal_(parameter, std=0.02 * math.sqrt(768 / parameter[0].numel()))
        elif name == "embedding.position":
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() > 1 and "project_" not in name:
            nn.init.normal_(parameter, std=std)


class TextEmbedding(nn.Module):
    """Token + learned position (+ token type) embeddings, optional LayerNorm, dropout."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = Embedding(config.vocab_size, config.dim)
        self.position = Embedding(config.max_tokens, config.dim)
        self.token_type = Embedding(config.token_types, config.dim) if config.token_types else None
        self.norm = LayerNorm(config.dim, eps=config.eps) if config.embedding_norm else None

    def forward(
        self,
        ids: Tensor,
        *,
        token_types: Tensor | None = None,
        rng: Tensor | None = None,
        start: int = 0,
        packing: Packing | None = None,
    ) -> Tensor:
        """Embed `ids` (B, T), whose first token stands at position `start`; return (B, T, C).

        With `packing` only the real tokens are embedded, to (N, C).
        """
        _check_ids(ids, self.config, start)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        if packing is not None:
            ids, positions = packing.pack(ids), positions[packing.positions]
            token_types = None if token_types is None else packing.pack(token_types)
        x = self.token(ids) + self.position(positions)
        if self.token_type is not None:
            types = torch.zeros_like(ids) if token_types is None else token_types
            x = x + self.token_type(types)
        if self.norm is not None:
            x = self.norm(x)
        if self.training and self.config.dropout:
            x = ops.dropout(x, self.config.dropout, rng=rng)
        return x


def _check_ids(ids: Tensor, config: TextConfig, start: int) -> None:
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids must be (B, T) of int64 or int32, got {tuple(ids.shape)} of {ids.dtype}"
        )
    if start + ids.shape[1] > config.max_tokens:
        raise ValueError(
            f"ids have {start + ids.shape[1]} tokens but the position table ends at"
            f" max_tokens={config.max_tokens}"
        )
    # On a GPU the check would wait for the device; there the embedding's own assertion speaks.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"token ids must be in [0, vocab_size={config.vocab_size}),"
                f" got {low if low < 0 else high}"
            )


class _LanguageModel(_Model):
    """Embedding, transformer and a head over the vocabulary."""

    config: TextConfig

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.embedding = TextEmbedding(config)
        self.head_transform = (
            nn.Sequential(
                Linear(config.dim, config.dim),
                nn.GELU("tanh" if config.activation == "gelu_tanh" else "none"),
                LayerNorm(config.dim, eps=config.eps),
            )
            if config.head_transform
            else nn.Identity()
        )
        self.head = Linear(config.dim, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.embedding.token.weight
        _init_weights(self)

    def _packing(self, ids: Tensor, key_lengths: Tensor | None) -> Packing | None:
        """How to drop the padding, where it can be dropped.

        That takes the number of real tokens. On a GPU the host would wait for it, and a traced
        graph cannot depend on it: there the padded keys are masked.
        """
        if key_lengths is None or ids.dim() != 2 or self.config.linformer:
            return None
        B, T = ids.shape
        if B == 0 or ids.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return Packing.of(key_lengths, B, T)

    def _states(
        self,
        ids: Tensor,
        token_types: Tensor | None,
        key_lengths: Tensor | None,
        rng: Tensor | None,
        caches: list[KeyValueCache] | None = None,
    ) -> tuple[Tensor, Packing | None]:
        """Final hidden states (B, T, C), or (N, C) and how they are packed."""
        rng = self._dropout_state(rng, ids.device)
        packing = None if caches else self._packing(ids, key_lengths)
        start = caches[0].length if caches else 0
        x = self.embedding(ids, token_types=token_types, rng=rng, start=start, packing=packing)
        if packing is not None:
            return self.transformer(x, rng=rng, packing=packing), packing
        return self.transformer(x, key_lengths=key_lengths, rng=rng, caches=caches), None

    def hidden(
        self,
        ids: Tensor,
        *,
        token_types: Tensor | None = None,
        key_lengths: Tensor | None = None,
        rng: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, C) of `ids` (B, T); see `forward` for padding."""
        x, packing = self._states(ids, token_types, key_lengths, rng, caches)
        return x if packing is None else packing.unpack(x)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        token_types: Tensor | None = None,
        key_lengths: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) or, given `targets` (B, T), the mean loss over those not -100.

        ids (B, T) int64. token_types (B, T) for models that have them. rng: an int64 tensor
        (seed, offset) that determines all dropout; without it a state is drawn from torch's default
        generator.
        key_lengths (B,) int32: the number of real tokens in each row. The padding after them is not
        seen and its targets do not count. On the CPU it is not computed either: its logits are
        zero. On a GPU, where the host would have to wait for the number of real tokens, and under
        torch.compile it is computed behind a mask, and its logits mean nothing.
        Raises ValueError for ids out of range (on the CPU) or more tokens than positions.
        """
        x, packing = self._states(ids, token_types, key_lengths, rng)
        x = self.head_transform(x)
        if targets is None:
            return self.head(x) if packing is None else packing.unpack(self.head(x))
        if packing is not None:
            targets = packing.pack(targets)
        elif key_lengths is not None:
            padding = torch.arange(ids.shape[1], device=ids.device) >= key_lengths[:, None]
            targets = targets.masked_fill(padding, IGNORE_INDEX)
        return ops.linear_cross_entropy(
            x,
            self.head.weight,
            targets,
            bias=self.head.bias,
            ignore_index=IGNORE_INDEX,
            mostly_ignored=not self.config.causal,  # an encoder predicts masked tokens
        )


class BERT(_LanguageModel):
    """Encoder trained on masked tokens: targets hold the true id where one is masked, else -100.

    Devlin et al., "BERT", 2018, without the next-sentence task.
    """

    def __init__(self, config: TextConfig) -> None:
        if config.causal:
            raise ValueError("BERT: an encoder sees the whole text; set causal=False")
        super().__init__(config)


class GPT(_LanguageModel):
    """Decoder trained on the next token: targets are the ids shifted by one.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    def __init__(self, config: TextConfig) -> None:
        if not config.causal:
            raise ValueError("GPT: a decoder must not see the future; set causal=True")
        super().__init__(config)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Continue `ids` (B, T), T >= 1, by up to `max_new_tokens` sampled tokens; return all ids.

        temperature 0 takes the most likely token; top_k keeps only the k most likely. seed makes
        the text reproducible, otherwise torch's default generator is used. stop ends a row's
        text: rows that have produced it repeat it, and generation ends when all have. Past
        max_tokens the oldest tokens are forgotten, as in nanoGPT.
        """
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"generate: ids must be (B, T) with T >= 1, got {tuple(ids.shape)}")
        if temperature < 0.0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "generate: temperature must not be negative and top_k at least 1,"
                f" got {temperature} and {top_k}"
            )
        generator = None
        if seed is not None:
            generator = torch.Generator(ids.device).manual_seed(seed)
        caches: list[KeyValueCache] = []
        limit = self.config.max_tokens
        done = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if caches and caches[0].length < limit:
                    fresh = ids[:, -1:]
                else:  # at the start, and at every token once the window slides
                    caches = [KeyValueCache(limit) for _ in self.transformer.blocks]
                    fresh = ids[:, -limit:]
                x = self.hidden(fresh, caches=caches)[:, -1]
                logits = self.head(self.head_transform(x)).float()
                new = _sample(logits, temperature, top_k, generator)
                if stop is not None:
                    new = torch.where(done, stop, new)
                    done |= new == stop
                ids = torch.cat([ids, new], dim=1)
                if stop is not None and bool(done.all()):
                    break
        finally:
            self.train(was_training)
        return ids


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


class ImageEmbedding(nn.Module):
    """Patches projected to C, a class token before them, learned positions, dropout."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        P = config.patch_size
        self.patch = nn.Conv2d(config.channels, config.dim, kernel_size=P, stride=P)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.position = nn.Parameter(torch.empty(1, config.max_tokens, config.dim))

    def forward(self, images: Tensor, *, rng: Tensor | None = None) -> Tensor:
        """Embed `images` (B, channels, size, size); return (B, T, C), the class token first."""
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be (B, {expected}), got {tuple(images.shape)}")
        B, channels, P = images.shape[0], self.config.channels, self.config.patch_size
        side = self.config.image_size // P
        # A convolution whose windows do not overlap is a linear layer, and faster as one.
        cut = images.reshape(B, channels, side, P, side, P).permute(0, 2, 4, 1, 3, 5)
        patches = cut.reshape(B, side * side, channels * P * P)
        projected = ops.linear(patches, self.patch.weight.flatten(1), self.patch.bias)
        # The class token is added with the positions, to a row of zeros.
        added = self.position + nn.functional.pad(self.class_token, (0, 0, 0, side * side))
        x = nn.functional.pad(projected, (0, 0, 1, 0)) + added
        if self.training and self.config.dropout:
            x = ops.dropout(x, self.config.dropout, rng=rng)
        return x


class ViT(_Model):
    """Encoder over image patches that classifies from the class token.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, equations 1 to 4.
    """

    config: ImageConfig

    def __init__(self, config: ImageConfig) -> None:
        if config.causal:
            raise ValueError("ViT: an encoder sees the whole image; set causal=False")
        super().__init__(config)
        self.embedding = ImageEmbedding(config)
        self.head = Linear(config.dim, config.num_classes)
        _init_weights(self)

    def hidden(self, images: Tensor, *, rng: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, T, C), the class token's first."""
        rng = self._dropout_state(rng, images.device)
        return self.transformer(self.embedding(images, rng=rng), rng=rng)

    def forward(
        self, images: Tensor, targets: Tensor | None = None, *, rng: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, classes) or, given class numbers `targets` (B,), the mean loss.

        images (B, channels, size, size). rng: see `GPT.forward`. Raises ValueError for another
        shape.
        """
        x = self.hidden(images, rng=rng)[:, 0]
        if targets is None:
            return self.head(x)
        return ops.linear_cross_entropy(x, self.head.weight, targets, bias=self.head.bias)
