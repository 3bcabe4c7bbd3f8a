"""BERT, GPT-2 and ViT of Hugging Face, timm and torchvision, with the weights of our models.

They run as their users run them: scaled_dot_product_attention or flash-attn, no dropout, and
Hugging Face's head computes the logits of every token. The tables of fastformer.pretrained say
which of their parameters is which of ours.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.libraries import Absent, find
from fastformer.pretrained import pack, rename
from fastformer.transformer import ImageConfig, TextConfig

Config = Any  # a TextConfig or an ImageConfig

# What is no matter of size in the published models. Biases and activations that are not here can be
# chosen.
_PLAIN = {"pre_norm": True, "qkv_bias": True, "linformer": 0}
_PUBLISHED: dict[str, dict[str, object]] = {
    "bert": {
        **_PLAIN,
        "pre_norm": False,
        "token_types": 2,
        "embedding_norm": True,
        "head_transform": True,
        "head_bias": True,
        "tied_head": True,
    },
    "gpt": {
        **_PLAIN,
        "token_types": 0,
        "embedding_norm": False,
        "head_transform": False,
        "head_bias": False,
    },
    "vit": {**_PLAIN, "activation": "gelu"},
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours, Hugging Face's


class HuggingFace(nn.Module):
    """A model of transformers that is called as ours is: logits or, with targets, the mean loss."""

    def __init__(self, kind: str, config: Config, attention: str) -> None:
        super().__init__()
        self.shifts_labels = kind == "gpt"
        build = {"bert": _bert, "gpt": _gpt2, "vit": _hugging_face_vit}[kind]
        self.model = build(config, {"attn_implementation": attention})

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, *, key_lengths: Tensor | None = None
    ) -> Tensor:
        options: dict[str, Tensor] = {}
        if key_lengths is not None:
            tokens = torch.arange(inputs.shape[1], device=inputs.device)
            options["attention_mask"] = (tokens < key_lengths[:, None]).long()
        if targets is not None:
            options["labels"] = targets
            if self.shifts_labels:  # ours are shifted
                options["shift_labels"] = targets
        results = self.model(inputs, **options)
        return results.logits if targets is None else results.loss


class Classifier(nn.Module):
    """A model of images that returns logits, with its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.model(images)
        return logits if targets is None else F.cross_entropy(logits, targets)


def _bert(config: TextConfig, options: dict[str, Any]) -> nn.Module:
    settings = find("transformers:BertConfig")(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_tokens,
        type_vocab_size=config.token_types,
        hidden_act=_ACTIVATIONS[config.activation],
        layer_norm_eps=config.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,  # the embedding of such a token would have no gradient
        **options,
    )
    return find("transformers:BertForMaskedLM")(settings)


def _gpt2(config: TextConfig, options: dict[str, Any]) -> nn.Module:
    settings = find("transformers:GPT2Config")(
        vocab_size=config.vocab_size,
        n_embd=config.dim,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.hidden_dim,
        n_positions=config.max_tokens,
        activation_function=_ACTIVATIONS[config.activation],
        layer_norm_epsilon=config.eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=config.tied_head,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return find("transformers:GPT2LMHeadModel")(settings)


def _hugging_face_vit(config: ImageConfig, options: dict[str, Any]) -> nn.Module:
    settings = find("transformers:ViTConfig")(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.channels,
        num_labels=config.num_classes,
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden_dim,
        layer_norm_eps=config.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return find("transformers:ViTForImageClassification")(settings)


def _timm_vit(kind: str, config: ImageConfig) -> nn.Module:
    model = find("timm.models.vision_transformer:VisionTransformer")(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        num_classes=config.num_classes,
        embed_dim=config.dim,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.hidden_dim / config.dim,
        norm_layer=partial(nn.LayerNorm, eps=config.eps),
    )
    return Classifier(model)


def _torchvision_vit(kind: str, config: ImageConfig) -> nn.Module:
    model = find("torchvision.models.vision_transformer:VisionTransformer")(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.layers,
        num_heads=config.heads,
        hidden_dim=config.dim,
        mlp_dim=config.hidden_dim,
        num_classes=config.num_classes,
        norm_layer=partial(nn.LayerNorm, eps=config.eps),
    )
    return Classifier(model)


# Variant -> what it needs, and how to build its model.
LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[str, Config], nn.Module]]] = {
    "hugging-face": (("transformers:GPT2LMHeadModel",), partial(HuggingFace, attention="sdpa")),
    "hugging-face-flash-attn": (
        ("transformers:GPT2LMHeadModel", "flash_attn:flash_attn_func"),
        partial(HuggingFace, attention="flash_attention_2"),
    ),
    "timm": (("timm.models.vision_transformer:VisionTransformer",), _timm_vit),
    "torchvision": (("torchvision.models.vision_transformer:VisionTransformer",), _torchvision_vit),
}


def has_models(library: str, kind: str) -> bool:
    return kind == "vit" or library.startswith("hugging-face")


def why_absent(library: str, kind: str, config: Config) -> str | None:
    """Why `library` cannot run this model, or None."""
    for path in LIBRARIES[library][0]:
        try:
            find(path)
        except Absent as reason:
            return str(reason)
    needed = dict(_PUBLISHED[kind])
    if library == "torchvision":
        needed["channels"] = 3
    others = [name for name, value in needed.items() if getattr(config, name) != value]
    if others:
        settings = ", ".join(f"{name}={getattr(config, name)}" for name in others)
        return f"it has no model with {settings}"
    return None


def library_model(
    library: str, kind: str, config: Config, weights: dict[str, Tensor]
) -> HuggingFace | Classifier:
    """Build the model of `library` and give it the weights of ours.

    Raises RuntimeError if one of them has no place there, or one of theirs stays empty.
    """
    rival = LIBRARIES[library][1](kind, config)
    apart = dict(weights)
    for name, value in weights.items():
        if ".attention.qkv." in name:
            thirds = zip(("query", "key", "value"), value.chunk(3), strict=True)
            apart |= {name.replace("qkv", part): third for part, third in thirds}
    places = _by_our_names(dict(rival.model.named_parameters()))
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(apart[name])
    filled, given = (sum(t.numel() for t in ts) for ts in (places.values(), weights.values()))
    if filled != given or filled != sum(p.numel() for p in rival.model.parameters()):
        raise RuntimeError(f"{library}: {filled} weights have places, of ours there are {given}")
    return rival


def gradients(rival: HuggingFace | Classifier) -> dict[str, Tensor]:
    """The gradients of all parameters, under our names."""
    return pack(_by_our_names({n: p.grad for n, p in rival.model.named_parameters()}))


def _by_our_names(tensors: dict[str, Any]) -> dict[str, Tensor]:
    places = rename(tensors, "a model in memory")
    if "lm_head.weight" in tensors:  # of GPT-2, where it is not that of the embedding
        places["head.weight"] = tensors["lm_head.weight"]
    return places
