"""The feed-forward layer: linear, GELU, dropout, linear.

Only the pre-activation is saved: backward recomputes the activation from it, which costs less
than reading it back (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, for GELU and its
tanh form).

C model dim, F hidden dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastformer import _library
from fastformer.ops import dispatch, reference
from fastformer.ops.arguments import (
    autocast_dtype,
    check_dropout,
    check_float,
    check_same_dtype,
    distinct,
    needs_grad,
)
from fastformer.ops.weight_copies import cast, grad_dtype

ACTIVATIONS = ("gelu", "gelu_tanh")


def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # not Size.numel(): it would make a dynamic size a constant
    return x.new_empty((*x.shape[:-1], w2.shape[0])), x.new_empty((rows, w1.shape[0]))


def _bwd_fake(
    grad_out: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, grad_dtype = rest
    return (
        x.new_empty(x.shape),
        w1.new_empty(w1.shape, dtype=grad_dtype),
        w1.new_empty(w1.shape[0], dtype=grad_dtype),
        w2.new_empty(w2.shape, dtype=grad_dtype),
        w2.new_empty(w2.shape[0], dtype=grad_dtype),
    )


def _refuse_cuda(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {str(x.dtype)[6:]}"
    return None


_library.library.define(
    "mlp_epilogue(Tensor x, Tensor w1, Tensor w2, bool tanh, bool drops) -> str"
)


def _describe_cuda(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    tanh: bool,
    dropout_p: float,
    rng: Tensor | None,
    site: int,
) -> str:
    """Forward arguments also stand for a backward pass."""
    return torch.ops.fastformer.mlp_epilogue.default(x, w1, w2, tanh, rng is not None)


dispatch.define(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool tanh,"
    " float dropout_p, Tensor? rng, int site) -> (Tensor, Tensor)",
    reference=reference.mlp_fwd,
    fake=_fwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
    descriptions={"cuda": _describe_cuda},
)
dispatch.define(
    "mlp_bwd(Tensor grad_out, Tensor x, Tensor w1, Tensor w2, Tensor pre, bool tanh,"
    " float dropout_p, Tensor? rng, int site, ScalarType grad_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.mlp_bwd,
    fake=_bwd_fake,
    native=("cpu", "cuda"),
    limits={"cuda": _refuse_cuda},
    descriptions={"cuda": _describe_cuda},
)

for _op in ("mlp_fwd", "mlp_bwd"):
    dispatch.add_triton(_op, "mlp")


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        tanh: bool,
        dropout_p: float,
        rng: Tensor | None,
        site: int,
    ) -> Tensor:
        ctx.dtypes = tuple(None if w is None else w.dtype for w in (w1, b1, w2, b2))
        ctx.grad_dtype = grad_dtype(w1, x.dtype)
        args = _cast_weights(x, w1, b1, w2, b2, tanh, dropout_p, rng, site)
        _, w1, _, w2, *_ = args
        out, pre = torch.ops.fastformer.mlp_fwd.default(*args)
        ctx.save_for_backward(x, w1, w2, pre, rng)
        ctx.settings = (tanh, dropout_p)
        ctx.site = site
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, rng = ctx.saved_tensors
        grad_x, *grads = torch.ops.fastformer.mlp_bwd.default(
            grad_out, *saved, *ctx.settings, rng, ctx.site, ctx.grad_dtype
        )
        typed = (
            None if dtype is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return grad_x, *typed, None, None, None, None


def _cast_weights(x: Tensor, *args: Any) -> tuple[Any, ...]:
    return x, *(cast(weight, x.dtype) for weight in args[:4]), *args[4:]


def _prepare(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Any, ...]:
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # the weights, of which there may be copies, follow in _cast_weights
    given = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    tensors = {name: t for name, t in given.items() if t is not None}
    check_float("mlp", **tensors)
    if dtype is None:
        check_same_dtype("mlp", **tensors)
    if x.dim() == 0 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            "mlp: x must be (..., C), w1 (F, C) and w2 (C_out, F),"
            f" got {tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    sizes = (("w1", w1.shape[1], x.shape[-1]), ("w2", w2.shape[1], w1.shape[0]))
    for name, found, wanted in sizes:
        if found != wanted:
            raise ValueError(
                f"mlp: {name} must take rows of {wanted}, got shape {tuple(tensors[name].shape)}"
                f" (x {tuple(x.shape)}, w1 {tuple(w1.shape)})"
            )
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"mlp: {name} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    state = check_dropout("mlp", dropout_p, rng, x)
    return x, w1, b1, w2, b2, activation == "gelu_tanh", float(dropout_p), state, site


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Compute dropout(gelu(x w1^T + b1)) w2^T + b2 for `x` (..., C); return (..., C_out).

    w1 (F, C) and w2 (C_out, F) have the layout of torch.nn.Linear.weight; b1 (F,) and b2 (C_out,)
    may be None; one dtype for all. activation: "gelu" (erf) or "gelu_tanh". Dropout acts on the F
    hidden columns; `rng` and `site` are those of `fastformer.ops.dropout`. Under torch.autocast
    everything is cast to its dtype. Raises ValueError or TypeError on bad arguments.
    """
    args = _prepare(
        x, w1, b1, w2, b2, activation=activation, dropout_p=dropout_p, rng=rng, site=site
    )
    if needs_grad(x, w1, b1, w2, b2):
        return _MLP.apply(*distinct(args))
    return torch.ops.fastformer.mlp_fwd.default(*_cast_weights(*args))[0]


@dispatch.explainer("mlp")
def _explain(*args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    raw = _cast_weights(*_prepare(*args, **kwargs))
    return [("mlp_fwd", raw), ("mlp_bwd", raw)]
