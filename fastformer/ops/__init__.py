"""The ops: public functions with checks, autograd and autocast, over kernels of every backend."""

from fastformer.ops.attention import attention, attention_qkvpacked
from fastformer.ops.attention_varlen import attention_varlen, attention_varlen_qkvpacked
from fastformer.ops.dispatch import backend, explain
from fastformer.ops.dropout import dropout, dropout_mask
from fastformer.ops.embedding import embedding
from fastformer.ops.layer_norm import add_layer_norm, layer_norm
from fastformer.ops.linear import linear
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.mlp import mlp

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_varlen_qkvpacked",
    "backend",
    "dropout",
    "dropout_mask",
    "embedding",
    "explain",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
]
