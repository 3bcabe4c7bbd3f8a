"""Weights that others have trained: BERT, GPT-2 and ViT of Hugging Face, timm and torchvision.

Every format is a table of names: a pattern of theirs and our name for it. Nothing is downloaded;
the files are read from disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastformer.presets import find_preset, from_preset
from fastformer.transformer import BERT, GPT, ViT

_BLOCK = r"transformer.blocks.\1"


@dataclass(frozen=True)
class _Format:
    """How one library names the parameters of one kind of model."""

    name: str
    kind: str
    mark: str
    names: Sequence[tuple[str, str]]
    unused: str
    transposed: str | None = None


_FORMATS = (
    _Format(
        "Hugging Face GPT-2",
        "gpt",
        r"(transformer\.)?h\.0\.attn\.c_attn\.weight",
        (
            (r"(?:transformer\.)?wte", "embedding.token"),
            (r"(?:transformer\.)?wpe", "embedding.position"),
            (r"(?:transformer\.)?ln_f", "transformer.norm"),
            (r"(?:transformer\.)?h\.(\d+)\.ln_1", rf"{_BLOCK}.norm1"),
            (r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn", rf"{_BLOCK}.attention.qkv"),
            (r"(?:transformer\.)?h\.(\d+)\.attn\.c_proj", rf"{_BLOCK}.attention.out"),
            (r"(?:transformer\.)?h\.(\d+)\.ln_2", rf"{_BLOCK}.norm2"),
            (r"(?:transformer\.)?h\.(\d+)\.mlp\.c_fc", rf"{_BLOCK}.mlp.fc1"),
            (r"(?:transformer\.)?h\.(\d+)\.mlp\.c_proj", rf"{_BLOCK}.mlp.fc2"),
        ),
        unused=r"lm_head\.weight|.*\.attn\.(masked_)?bias",
        transposed=r".*\.(qkv|out|fc1|fc2)\.weight",  # its projections are stored input first
    ),
    _Format(
        "Hugging Face BERT",
        "bert",
        r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight",
        (
            (r"bert\.embeddings\.word_embeddings", "embedding.token"),
            (r"bert\.embeddings\.position_embeddings", "embedding.position"),
            (r"bert\.embeddings\.token_type_embeddings", "embedding.token_type"),
            (r"bert\.embeddings\.LayerNorm", "embedding.norm"),
            (r"cls\.predictions\.transform\.dense", "head_transform.0"),
            (r"cls\.predictions\.transform\.LayerNorm", "head_transform.2"),
            (r"cls\.predictions(?=\.bias)", "head"),
            (r"bert\.encoder\.layer\.(\d+)\.attention\.self", rf"{_BLOCK}.attention"),
            (r"bert\.encoder\.layer\.(\d+)\.attention\.output\.dense", rf"{_BLOCK}.attention.out"),
            (r"bert\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", rf"{_BLOCK}.norm1"),
            (r"bert\.encoder\.layer\.(\d+)\.intermediate\.dense", rf"{_BLOCK}.mlp.fc1"),
            (r"bert\.encoder\.layer\.(\d+)\.output\.dense", rf"{_BLOCK}.mlp.fc2"),
            (r"bert\.encoder\.layer\.(\d+)\.output\.LayerNorm", rf"{_BLOCK}.norm2"),
        ),
        unused=r"bert\.pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\..*"
        r"|.*\.position_ids",
    ),
    _Format(
        "Hugging Face ViT",
        "vit",
        r"vit\.encoder\.layer\.0\.attention\.attention\.query\.weight",
        (
            (r"vit\.embeddings\.cls_token", "embedding.class_token"),
            (r"vit\.embeddings\.position_embeddings", "embedding.position"),
            (r"vit\.embeddings\.patch_embeddings\.projection", "embedding.patch"),
            (r"vit\.layernorm", "transformer.norm"),
            (r"classifier", "head"),
            (r"vit\.encoder\.layer\.(\d+)\.layernorm_before", rf"{_BLOCK}.norm1"),
            (r"vit\.encoder\.layer\.(\d+)\.attention\.attention", rf"{_BLOCK}.attention"),
            (r"vit\.encoder\.layer\.(\d+)\.attention\.output\.dense", rf"{_BLOCK}.attention.out"),
            (r"vit\.encoder\.layer\.(\d+)\.layernorm_after", rf"{_BLOCK}.norm2"),
            (r"vit\.encoder\.layer\.(\d+)\.intermediate\.dense", rf"{_BLOCK}.mlp.fc1"),
            (r"vit\.encoder\.layer\.(\d+)\.output\.dense", rf"{_BLOCK}.mlp.fc2"),
        ),
        unused=r"vit\.pooler\..*",
    ),
    _Format(
        "Hugging Face ViT of transformers 5, as it is in memory",
        "vit",
        r"vit\.layers\.0\.attention\.q_proj\.weight",
        (
            (r"vit\.embeddings\.cls_token", "embedding.class_token"),
            (r"vit\.embeddings\.position_embeddings", "embedding.position"),
            (r"vit\.embeddings\.patch_embeddings\.projection", "embedding.patch"),
            (r"vit\.layernorm", "transformer.norm"),
            (r"classifier", "head"),
            (r"vit\.layers\.(\d+)\.layernorm_before", rf"{_BLOCK}.norm1"),
            (r"vit\.layers\.(\d+)\.attention\.q_proj", rf"{_BLOCK}.attention.query"),
            (r"vit\.layers\.(\d+)\.attention\.k_proj", rf"{_BLOCK}.attention.key"),
            (r"vit\.layers\.(\d+)\.attention\.v_proj", rf"{_BLOCK}.attention.value"),
            (r"vit\.layers\.(\d+)\.attention\.o_proj", rf"{_BLOCK}.attention.out"),
            (r"vit\.layers\.(\d+)\.layernorm_after", rf"{_BLOCK}.norm2"),
            (r"vit\.layers\.(\d+)\.mlp\.(fc1|fc2)", rf"{_BLOCK}.mlp.\2"),
        ),
        unused=r"vit\.pooler\..*",
    ),
    _Format(
        "timm ViT",
        "vit",
        r"blocks\.0\.attn\.qkv\.weight",
        (
            (r"cls_token", "embedding.class_token"),
            (r"pos_embed", "embedding.position"),
            (r"patch_embed\.proj", "embedding.patch"),
            (r"norm", "transformer.norm"),
            (r"head", "head"),
            (r"blocks\.(\d+)\.attn\.qkv", rf"{_BLOCK}.attention.qkv"),
            (r"blocks\.(\d+)\.attn\.proj", rf"{_BLOCK}.attention.out"),
            (r"blocks\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)", rf"{_BLOCK}.\2"),
        ),
        unused=r"pre_logits\..*",
    ),
    _Format(
        "torchvision ViT",
        "vit",
        r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight",
        (
            (r"class_token", "embedding.class_token"),
            (r"conv_proj", "embedding.patch"),
            (r"encoder\.pos_embedding", "embedding.position"),
            (r"encoder\.ln", "transformer.norm"),
            (r"heads\.head", "head"),
            (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])", rf"{_BLOCK}.norm\2"),
            (
                r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_",
                rf"{_BLOCK}.attention.qkv.",
            ),
            (
                r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj",
                rf"{_BLOCK}.attention.out",
            ),
            (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)", rf"{_BLOCK}.mlp.fc1"),
            (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)", rf"{_BLOCK}.mlp.fc2"),
        ),
        unused="$^",
    ),
)


def load_pretrained(path: str | Path, preset: str, **overrides: Any) -> BERT | GPT | ViT:
    """Build the model of `preset` with the weights in `path`, in evaluation mode.

    path: a .safetensors file, a file of torch.save (read with weights_only), or a folder with one
    of Hugging Face's names. The formats are those of Hugging Face (BertForPreTraining or
    BertForMaskedLM, GPT2LMHeadModel, ViTForImageClassification), timm and torchvision, recognised
    by their names. overrides: fields of the configuration, as in `from_preset`; with `num_classes`
    other than the file's a ViT keeps a fresh head, to be trained on another task.
    Raises ValueError for a missing, damaged or unknown file, or a model of another shape.
    """
    theirs = _read(Path(path))
    kind = find_preset(preset).kind
    found = _format_of(theirs, str(path))
    if found.kind != kind:
        raise ValueError(f"{path} is a {found.name}, preset {preset!r} is a {kind} model")
    ours = pack(rename(theirs, str(path)))
    model = from_preset(preset, **overrides)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if kind == "vit" and "num_classes" in overrides:
        for name in ("head.weight", "head.bias"):
            if name in ours and ours[name].shape != parameters[name].shape:
                ours[name] = parameters[name].detach()
    _fill(parameters, ours, f"{path} ({found.name})")
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: t for name, t in state.items() if isinstance(t, Tensor)}
    except (SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    except Exception as error:  # pickle's UnpicklingError has no base of its own
        raise ValueError(f"{path} holds more than weights: {str(error).splitlines()[0]}") from None


def _format_of(theirs: dict[str, Tensor], path: str) -> _Format:
    for form in _FORMATS:
        if any(re.fullmatch(form.mark, name) for name in theirs):
            return form
    known = ", ".join(form.name for form in _FORMATS)
    raise ValueError(f"{path} holds none of the known formats ({known})")


def rename(theirs: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return parameters of another library, or their gradients, under our names.

    They are the given tensors or transposed views of them, without those that we have no use for.
    Queries, keys and values may still be apart, see `pack`. `path` is for the ValueError that names
    of no known format raise.
    """
    form = _format_of(theirs, path)
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if re.fullmatch(form.unused, name):
            continue
        # The first BERT files call LayerNorm's parameters gamma and beta.
        plain = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        plain = plain.replace("LayerNorm.beta", "LayerNorm.bias")
        for pattern, replacement in form.names:
            match = re.match(pattern + r"(?=\.(?:weight|bias|query|key|value)\b|$|(?<=_))", plain)
            if match:
                renamed = match.expand(replacement) + plain[match.end() :]
                break
        else:
            raise ValueError(f"{path}: {name} has no place in a {form.name} of fastformer")
        turned = form.transposed is not None and re.fullmatch(form.transposed, renamed)
        ours[renamed] = value.t() if turned else value
    return ours


def pack(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join separate projections of queries, keys and values into one."""
    for name in [n for n in ours if ".attention.query." in n]:
        parts = [ours.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        ours[name.replace("query", "qkv")] = torch.cat(parts)
    return ours


def _fill(parameters: dict[str, Tensor], ours: dict[str, Tensor], source: str) -> None:
    for name in sorted(parameters.keys() ^ ours.keys()):
        which = "is missing" if name in parameters else "has no place in the preset"
        raise ValueError(f"{source}: {name} {which}")
    for name, parameter in parameters.items():
        if parameter.shape != ours[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(ours[name].shape)},"
                f" the preset {tuple(parameter.shape)}; override the fields that differ"
            )
        with torch.no_grad():
            parameter.copy_(ours[name])
