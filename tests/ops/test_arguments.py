"""Bad arguments: each is refused by name, with the values found, and nothing is touched."""

import pytest
import torch

from fastformer import ops

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64


def zeros(*shape, dtype=F32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def meta(*shape):
    return zeros(*shape, device="meta")


def good():
    """Arguments that each op accepts."""
    q = zeros(2, 5, 4, 16)
    packed, starts = zeros(10, 4, 16), torch.tensor([0, 4, 10], dtype=I32)
    rows, weight = zeros(6, 8), zeros(8)
    return {
        "attention": {"q": q, "k": q.clone(), "v": q.clone()},
        "attention_varlen": {
            "q": packed,
            "k": packed.clone(),
            "v": packed.clone(),
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts.clone(),
            "max_seqlen_q": 6,
            "max_seqlen_k": 6,
        },
        "layer_norm": {"x": rows, "weight": weight, "bias": weight.clone()},
        "add_layer_norm": {"x": rows, "residual": rows.clone(), "weight": weight, "bias": None},
        "linear": {"x": rows, "weight": zeros(20, 8), "bias": zeros(20)},
        "embedding": {"ids": zeros(6, dtype=I64), "weight": zeros(20, 8)},
        "mlp": {"x": rows, "w1": zeros(16, 8), "b1": zeros(16), "w2": zeros(4, 16), "b2": zeros(4)},
        "linear_cross_entropy": {
            "x": rows,
            "weight": zeros(20, 8),
            "targets": zeros(6, dtype=I64),
        },
        "dropout": {"x": rows, "dropout_p": 0.5},
        "dropout_mask": {"rows": 3, "cols": 4, "dropout_p": 0.5, "rng": zeros(2, dtype=I64)},
    }


def heads(H, D):
    return {name: zeros(2, 5, H, D) for name in "qkv"}


DROPOUT_OPS = ("attention", "attention_varlen", "add_layer_norm", "mlp", "dropout", "dropout_mask")
HALF = {"dropout_p": 0.5}

# op, what is changed, the exception, what its message must say besides the op's name.
BAD = [
    ("attention", {"q": zeros(5, 4, 16)}, ValueError, ["q", "(5, 4, 16)", "(B, tokens, H, D)"]),
    ("attention", {"v": zeros(2, 5, 4)}, ValueError, ["v", "(2, 5, 4)"]),
    ("attention", {"q": zeros(2, 5, 4, 16, dtype=I64)}, TypeError, ["q", "torch.int64"]),
    (
        "attention",
        {"k": zeros(2, 5, 4, 16, dtype=BF16)},
        TypeError,
        ["q torch.float32", "k torch.bfloat16", "autocast"],
    ),
    ("attention", {"k": meta(2, 5, 4, 16)}, ValueError, ["q on cpu", "k on meta"]),
    ("attention", {"v": zeros(2, 6, 4, 16)}, ValueError, ["(2, 5, 4, 16)", "(2, 6, 4, 16)"]),
    (
        "attention",
        {"k": zeros(3, 5, 4, 16), "v": zeros(3, 5, 4, 16)},
        ValueError,
        ["(2, 5, 4, 16)", "(3, 5, 4, 16)"],
    ),
    (
        "attention",
        {"k": zeros(2, 5, 2, 16), "v": zeros(2, 5, 2, 16)},
        ValueError,
        ["(2, 5, 4, 16)", "(2, 5, 2, 16)"],
    ),
    ("attention", heads(8, 20), ValueError, ["multiple of 8 and at most 128", "20", "C=160, H=8"]),
    ("attention", heads(2, 136), ValueError, ["multiple of 8 and at most 128", "136"]),
    ("attention", heads(2, 0), ValueError, ["multiple of 8", "got 0"]),
    (
        "attention",
        {"key_lengths": zeros(2, dtype=I64)},
        ValueError,
        ["key_lengths", "int32", "int64"],
    ),
    (
        "attention",
        {"key_lengths": zeros(3, dtype=I32)},
        ValueError,
        ["key_lengths", "(2,)", "(3,)"],
    ),
    (
        "attention",
        {"key_lengths": zeros(2, dtype=I32, device="meta")},
        ValueError,
        ["key_lengths", "on cpu", "on meta"],
    ),
    ("attention_varlen", {"q": zeros(2, 5, 4, 16)}, ValueError, ["q", "(2, 5, 4, 16)", "(tokens,"]),
    ("attention_varlen", {"k": zeros(9, 4, 16)}, ValueError, ["(9, 4, 16)", "(10, 4, 16)"]),
    ("attention_varlen", {n: zeros(10, 1, 12) for n in "qkv"}, ValueError, ["multiple of 8", "12"]),
    (
        "attention_varlen",
        {"cu_seqlens_q": zeros(1, dtype=I32)},
        ValueError,
        ["cu_seqlens_q", "(1,)"],
    ),
    (
        "attention_varlen",
        {"cu_seqlens_q": zeros(3, dtype=I64)},
        ValueError,
        ["cu_seqlens_q", "int32", "int64"],
    ),
    (
        "attention_varlen",
        {"cu_seqlens_k": zeros(4, dtype=I32)},
        ValueError,
        ["cu_seqlens_k", "(3,)", "(4,)"],
    ),
    ("layer_norm", {"weight": zeros(9)}, ValueError, ["weight", "(9,)", "(6, 8)"]),
    ("layer_norm", {"bias": zeros(8, 1)}, ValueError, ["bias", "(8, 1)", "(6, 8)"]),
    ("layer_norm", {"x": zeros()}, ValueError, ["weight", "(8,)", "()"]),
    (
        "layer_norm",
        {"bias": zeros(8, dtype=BF16)},
        TypeError,
        ["torch.float32", "torch.bfloat16"],
    ),
    ("layer_norm", {"x": zeros(6, 8, dtype=I32)}, TypeError, ["x", "torch.int32"]),
    ("layer_norm", {"weight": meta(8)}, ValueError, ["weight on meta", "x on cpu"]),
    ("layer_norm", {"eps": 0.0}, ValueError, ["eps", "0.0"]),
    ("layer_norm", {"eps": float("nan")}, ValueError, ["eps", "nan"]),
    ("add_layer_norm", {"residual": zeros(8, 6)}, ValueError, ["(6, 8)", "(8, 6)"]),
    ("add_layer_norm", {"residual": zeros(6, 8, dtype=I64)}, TypeError, ["residual", "int64"]),
    ("add_layer_norm", {"weight": zeros(6)}, ValueError, ["weight", "(6,)", "(6, 8)"]),
    ("add_layer_norm", {"eps": -1.0}, ValueError, ["eps", "-1.0"]),
    ("embedding", {"weight": zeros(8)}, ValueError, ["weight", "(8,)"]),
    ("embedding", {"weight": zeros(20, 8, dtype=I64)}, TypeError, ["weight", "torch.int64"]),
    ("embedding", {"ids": zeros(6)}, TypeError, ["ids", "torch.float32"]),
    ("embedding", {"ids": meta(6).long()}, ValueError, ["ids on meta", "weight on cpu"]),
    ("linear", {"x": zeros(6, 9)}, ValueError, ["(6, 9)", "(20, 8)"]),
    ("linear", {"x": zeros()}, ValueError, ["()", "(20, 8)"]),
    ("linear", {"weight": zeros(8)}, ValueError, ["weight", "(8,)"]),
    ("linear", {"bias": zeros(8)}, ValueError, ["bias", "(20,)", "(8,)"]),
    ("linear", {"bias": zeros(20, dtype=BF16)}, TypeError, ["bias torch.bfloat16", "autocast"]),
    ("linear", {"x": zeros(6, 8, dtype=I64)}, TypeError, ["x", "torch.int64"]),
    ("linear", {"weight": meta(20, 8)}, ValueError, ["weight on meta"]),
    ("mlp", {"x": zeros(6, 9)}, ValueError, ["w1", "9", "(16, 8)"]),
    ("mlp", {"w2": zeros(4, 15)}, ValueError, ["w2", "16", "(4, 15)"]),
    ("mlp", {"w1": zeros(16)}, ValueError, ["w1", "(16,)"]),
    ("mlp", {"b1": zeros(15)}, ValueError, ["b1", "(16,)", "(15,)"]),
    ("mlp", {"b2": zeros(16)}, ValueError, ["b2", "(4,)", "(16,)"]),
    ("mlp", {"b2": zeros(4, dtype=BF16)}, TypeError, ["b2 torch.bfloat16", "x torch.float32"]),
    ("mlp", {"w2": meta(4, 16)}, ValueError, ["w2 on meta"]),
    ("mlp", {"activation": "relu"}, ValueError, ["activation", "gelu_tanh", "'relu'"]),
    ("linear_cross_entropy", {"x": zeros(6, 9)}, ValueError, ["(6, 9)", "(20, 8)"]),
    ("linear_cross_entropy", {"weight": zeros(8)}, ValueError, ["weight", "(8,)"]),
    (
        "linear_cross_entropy",
        {"weight": zeros(20, 8, dtype=BF16)},
        TypeError,
        ["x torch.float32", "weight torch.bfloat16"],
    ),
    ("linear_cross_entropy", {"bias": zeros(19)}, ValueError, ["bias", "(20,)", "(19,)"]),
    ("linear_cross_entropy", {"bias": zeros(20, dtype=BF16)}, TypeError, ["bias torch.bfloat16"]),
    ("linear_cross_entropy", {"targets": zeros(5, dtype=I64)}, ValueError, ["(6,)", "(5,)"]),
    ("linear_cross_entropy", {"targets": zeros(6, dtype=I32)}, ValueError, ["int64", "int32"]),
    (
        "linear_cross_entropy",
        {"targets": zeros(6, dtype=I64, device="meta")},
        ValueError,
        ["x on cpu", "targets on meta"],
    ),
    ("linear_cross_entropy", {"label_smoothing": 1.0}, ValueError, ["label_smoothing", "1.0"]),
    ("linear_cross_entropy", {"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1"]),
    ("linear_cross_entropy", {"z_loss": -1.0}, ValueError, ["z_loss", "-1.0"]),
    ("linear_cross_entropy", {"reduction": "none"}, ValueError, ["'mean' or 'sum'", "'none'"]),
    ("dropout", {"x": zeros(6, 8, dtype=I64)}, TypeError, ["x", "torch.int64"]),
    ("dropout", {"x": zeros()}, ValueError, ["x", "()"]),
    ("dropout_mask", {"rows": 2**32}, ValueError, ["2**32", str(2**32)]),
    *((op, {"dropout_p": p}, ValueError, [str(p)]) for op in DROPOUT_OPS for p in (-0.1, 1.0, 1.5)),
    *(
        (op, HALF | {"rng": rng}, ValueError, ["int64", *words])
        for op in DROPOUT_OPS
        for rng, words in (
            (zeros(3, dtype=I64), ["(2,)", "(3,)"]),
            (zeros(2, dtype=I32), ["torch.int32"]),
        )
    ),
    *(
        (op, HALF | {"rng": zeros(2, dtype=I64, device="meta")}, ValueError, ["on cpu", "on meta"])
        for op in DROPOUT_OPS
        if op != "dropout_mask"
    ),
]


@pytest.mark.parametrize("op", good())
def test_the_arguments_to_be_spoiled_are_good(op):
    getattr(ops, op)(**good()[op])


bad = pytest.mark.parametrize(
    ("op", "change", "error", "words"),
    BAD,
    ids=[f"{op}-{'-'.join(change)}-{n}" for n, (op, change, *_) in enumerate(BAD)],
)


def spoiled(op, change):
    change = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in change.items()}
    return good()[op] | change


@bad
def test_bad_arguments_are_refused(refuses, op, change, error, words):
    refuses(error, (f"{op}: ", *words), getattr(ops, op), **spoiled(op, change))


@bad
def test_explain_refuses_the_same_arguments(refuses, op, change, error, words):
    if op != "dropout_mask":  # explained as a part of dropout
        refuses(error, (f"{op}: ", *words), ops.explain, op, **spoiled(op, change))


def test_an_error_leaves_gradients_alone(refuses):
    x = torch.ones(6, 8, requires_grad=True)
    x.grad = torch.full((6, 8), 3.0)
    refuses(ValueError, ("layer_norm",), ops.layer_norm, x, zeros(9))
    assert torch.equal(x.grad, torch.full((6, 8), 3.0))
