"""fastformer: one transformer, three models (BERT, GPT, ViT), on kernels written for them."""

try:
    import torch as _torch
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ImportError(
        "fastformer needs PyTorch 2.11 or newer: pip install torch, or see pytorch.org for your GPU"
    ) from None
if tuple(int(_part) for _part in _torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(
        f"fastformer needs PyTorch 2.11 or newer, found {_torch.__version__}:"
        " pip install --upgrade torch"
    )

from fastformer._checkout import version as _version
from fastformer._library import release_memory
from fastformer.ops import (
    add_layer_norm,
    attention,
    attention_qkvpacked,
    attention_varlen,
    attention_varlen_qkvpacked,
    backend,
    dropout,
    embedding,
    explain,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
)
from fastformer.optim import AdamW
from fastformer.presets import from_preset
from fastformer.pretrained import load_pretrained
from fastformer.transformer import (
    BERT,
    GPT,
    ImageConfig,
    TextConfig,
    Transformer,
    TransformerConfig,
    ViT,
)
from fastformer.weights import load_model, save_model

__version__ = _version()

__all__ = [
    "BERT",
    "GPT",
    "AdamW",
    "ImageConfig",
    "TextConfig",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_varlen_qkvpacked",
    "backend",
    "dropout",
    "embedding",
    "explain",
    "from_preset",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "load_model",
    "load_pretrained",
    "mlp",
    "release_memory",
    "save_model",
]
