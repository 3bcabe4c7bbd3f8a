"""Raw ops with arguments that no public function lets through: an error, never a crash.

`torch.ops.fastformer.<op>.default` can be called by anyone, and a C++ kernel that trusts what it is
given reads and writes memory that is not its own.
"""

import contextlib

import pytest
import torch

import fastformer
from fastformer import ops
from fastformer.ops import dispatch

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
B, T, H, D, N, C, F, V = 2, 5, 2, 16, 10, 24, 40, 30


def raw(op):
    return getattr(torch.ops.fastformer, op).default


def ints(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def good(op):
    """Arguments by name, in the order of the schema, that the op accepts."""
    if op.endswith("_qkvpacked_bwd"):
        arguments = good(op.replace("_qkvpacked", ""))
        qkv = torch.stack([arguments.pop(name) for name in "qkv"], dim=-3)
        if "cu_seqlens_q" in arguments:
            arguments |= {"cu_seqlens_q": ints(0, 4, N), "max_seqlen_q": 6}
            del arguments["cu_seqlens_k"], arguments["max_seqlen_k"]
        return {"grad_out": arguments.pop("grad_out"), "qkv": qkv} | arguments
    torch.manual_seed(0)
    rng = {"dropout_p": 0.5, "rng": ints(1, 2, dtype=I64), "site": 3}
    base = op.removesuffix("_fwd").removesuffix("_bwd")
    if base == "dropout_mask":
        return {"rows": 7, "cols": 33, "p": 0.5, "rng": rng["rng"], "site": 3}
    if op == "embedding_bwd":
        return {"grad_out": torch.randn(4, C), "ids": ints(1, 0, 7, 1), "vocabulary": V}
    if base.startswith("attention"):
        shape = (B, T, H, D) if base == "attention" else (N, H, D)
        given = {name: torch.randn(shape) for name in "qkv"}
        lengths = {"key_lengths": ints(3, 5)}
        if base == "attention_varlen":
            lengths = {"cu_seqlens_q": ints(0, 4, N), "cu_seqlens_k": ints(0, 5, N)}
            lengths |= {"max_seqlen_q": 6, "max_seqlen_k": 5}
        given |= lengths | {"causal": True, "scale": 0.3} | rng
        saved = ("q", "k", "v", "out", "lse")
    elif base == "layer_norm":
        given = {"x": torch.randn(N, C), "weight": torch.randn(C), "bias": torch.randn(C)}
        given |= {"eps": 1e-5, "out_dtype": F32}
        saved = ("x", "weight", "mean", "rstd")
    elif base == "add_layer_norm":
        given = {"x": torch.randn(N, C), "residual": torch.randn(N, C), "weight": torch.randn(C)}
        given |= {"bias": torch.randn(C), "eps": 1e-5, "out_dtype": F32} | rng
        saved = ("grad_new_residual", "new_residual", "weight", "mean", "rstd")
    elif base == "mlp":
        given = {"x": torch.randn(N, C), "w1": torch.randn(F, C), "b1": torch.randn(F)}
        given |= {"w2": torch.randn(C, F), "b2": torch.randn(C), "tanh": False} | rng
        saved = ("x", "w1", "w2", "pre")
    elif base == "linear":
        given = {"x": torch.randn(N, C), "weight": torch.randn(F, C), "bias": torch.randn(F)}
        saved = ("x", "weight")
    else:
        given = {"x": torch.randn(N, C), "weight": torch.randn(V, C), "bias": torch.randn(V)}
        given |= {"targets": torch.randint(V, (N,)), "ignore_index": -100}
        given |= {"label_smoothing": 0.1, "z_loss": 0.1, "mean": True}
        given |= {"mostly_ignored": False, "grad_dtype": F32}
    if not op.endswith("_bwd"):
        return given
    with fastformer.backend("reference"):
        results = raw(f"{base}_fwd")(*given.values())
    results = [results] if isinstance(results, torch.Tensor) else results
    names = {"attention": ("out", "lse"), "attention_varlen": ("out", "lse"), "mlp": ("out", "pre")}
    names |= {"layer_norm": ("out", "mean", "rstd"), "linear": ("out",)}
    names |= {"add_layer_norm": ("out", "new_residual", "mean", "rstd")}
    known = given | dict(zip(names[base], results, strict=True))
    known |= {"grad_out": torch.randn_like(known["out"]), "x_dtype": F32, "grad_dtype": F32}
    known["grad_new_residual"] = torch.randn(N, C)
    settings = {
        "attention": ("key_lengths", "causal", "scale", *rng),
        "attention_varlen": (*list(given)[3:],),
        "add_layer_norm": ("x_dtype", *rng),
        "mlp": ("tanh", *rng, "grad_dtype"),
        "linear": ("grad_dtype",),
    }
    return {name: known[name] for name in ("grad_out", *saved, *settings.get(base, ()))}


OPS = [
    *(
        f"{op}_{direction}"
        for op in ("attention", "attention_varlen", "layer_norm", "add_layer_norm", "mlp", "linear")
        for direction in ("fwd", "bwd")
    ),
    "attention_qkvpacked_bwd",
    "attention_varlen_qkvpacked_bwd",
    "linear_cross_entropy_fwd",
    "embedding_bwd",
    "dropout_mask",
]


@pytest.fixture(autouse=True)
def cpu():
    with fastformer.backend("cpu"):
        yield


def cases(names):
    """The ops among `names` that have a cpu kernel in this version; the others say so."""
    params = []
    for name in names:
        missing = "cpu" not in dispatch._kernels.get(name, {})
        mark = pytest.mark.skipif(missing, reason=f"{name} has no cpu kernel in this version")
        params.append(pytest.param(name, marks=mark))
    return pytest.mark.parametrize("op", params)


def tensors(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


def outcome(op, arguments):
    """What the op gives, None for an error; memory that it left unwritten shows as NaN."""
    try:
        results = tensors(raw(op)(*arguments.values()))
    except Exception:
        return None
    assert not any(result.isnan().any() for result in results), op
    return results


def shorter(t):
    return t[..., :-1].contiguous()


def another_type(t):
    """Never allowed: integers for floating point, and the other width for integers."""
    return t.to(I64 if t.is_floating_point() or t.dtype == I32 else I32)


@cases(OPS)
def test_the_arguments_to_be_spoiled_are_good(op):
    assert outcome(op, good(op)) is not None


# An embedding takes ids of either type, and rows of any width.
@cases([op for op in OPS if op != "embedding_bwd"])
@pytest.mark.parametrize("spoil", [shorter, another_type], ids=["shorter", "another-type"])
def test_a_tensor_of_another_size_or_type_is_refused(op, spoil):
    arguments = good(op)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert outcome(op, arguments | {name: spoil(value)}) is None, name


SPOILERS = {
    "more dimensions": lambda t: t[None],
    "fewer dimensions": lambda t: t[0],
    "no elements": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
    "bfloat16": lambda t: t.to(BF16) if t.is_floating_point() else t,
    "float64": lambda t: t.double() if t.is_floating_point() else t,
    "strides": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "one element": lambda t: t.flatten()[:1].expand(t.shape),
}


@cases(OPS)
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_whatever_a_tensor_looks_like_nothing_breaks(op, spoil):
    """An error or a result without a hole: some of these are fine for some arguments."""
    arguments = good(op)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            outcome(op, arguments | {name: spoil(value)})


@cases(OPS)
def test_a_tensor_on_another_device_breaks_nothing(op):
    """Beside one on "meta" nothing is computed at all, so that there is nothing to look at."""
    arguments = good(op)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            with contextlib.suppress(Exception):
                raw(op)(*(arguments | {name: value.to("meta")}).values())


@cases(OPS)
def test_numbers_out_of_range_break_nothing(op):
    arguments = good(op)
    bad = {"dropout_p": (-1.0, 1.0, 2.0), "p": (-1.0, 2.0), "site": (-1, 2**62), "eps": (1e-38,)}
    bad |= {"scale": (0.0, -1.0), "ignore_index": (-(2**63), 5), "label_smoothing": (0.999,)}
    for name in bad.keys() & arguments.keys():
        for value in bad[name]:
            outcome(op, arguments | {name: value})


@cases([op for op in OPS if op.startswith("attention")])
@pytest.mark.parametrize("width", [0, 4, 20, 136])
def test_head_dims_without_a_kernel_are_refused(op, width):
    arguments = good(op)
    wide = {
        name: torch.zeros(*value.shape[:-1], width)
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.shape[-1:] == (D,)
    }
    assert outcome(op, arguments | wide) is None


STARTS = {
    "descending": (0, 12, N),
    "beyond": (0, 4, N + 1),
    "negative": (-1, 4, N),
    "negative-inside": (0, -3, N),
    "huge": (0, 2**31 - 1, N),
}
VARLEN = cases([op for op in OPS if op.startswith("attention_varlen")])


def sides(arguments):
    return [name for name in arguments if name.startswith("cu_seqlens")]


@VARLEN
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_sequences_outside_the_tokens_are_refused(op, starts):
    arguments = good(op)
    for side in sides(arguments):
        assert outcome(op, arguments | {side: ints(*starts)}) is None, side
        if op == "attention_varlen_fwd":
            keys = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            public = {key: arguments[key] for key in keys} | {side: ints(*starts)}
            with pytest.raises((RuntimeError, ValueError), match=f"{side} must"):
                ops.attention_varlen(**public)


@VARLEN
@pytest.mark.parametrize("starts", [(1, 4, N), (0, 4, N - 1)], ids=["late", "early"])
def test_tokens_of_no_sequence_are_refused_or_give_what_the_reference_gives(op, starts):
    for side in sides(good(op)):
        arguments = good(op) | {side: ints(*starts)}
        results = outcome(op, arguments)
        if results is not None:
            with fastformer.backend("reference"):
                expected = tensors(raw(op)(*arguments.values()))
            torch.testing.assert_close(results, expected)


@VARLEN
@pytest.mark.parametrize("longest", [-1, 0, 1, 2**40])
def test_longest_lengths_that_are_wrong_break_nothing(op, longest):
    arguments = good(op)
    wrong = {name: longest for name in arguments if name.startswith("max_seqlen")}
    expected, results = outcome(op, arguments), outcome(op, arguments | wrong)
    if results is not None and longest > N:
        torch.testing.assert_close(results, expected)


@cases(["linear_cross_entropy_fwd"])
@pytest.mark.parametrize("target", [V, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("grad_dtype", [F32, None], ids=["gradients", "loss"])
def test_targets_outside_the_vocabulary_are_refused(op, target, grad_dtype):
    arguments = good(op) | {"grad_dtype": grad_dtype}
    arguments["targets"][N // 2] = target
    assert outcome(op, arguments) is None


@cases(["embedding_bwd"])
@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("bad", [V, -1, 2**31 - 1, -(2**31)])
def test_ids_outside_the_table_are_refused(op, bad, dtype):
    assert outcome(op, good(op) | {"ids": ints(1, bad, 7, 1, dtype=dtype)}) is None


@cases(["embedding_bwd"])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [("ids", shorter), ("ids", torch.Tensor.float), ("grad_out", another_type)],
    ids=["fewer-ids", "ids-of-floats", "integer-gradients"],
)
def test_gradients_that_do_not_belong_to_ids_are_refused(op, name, spoil):
    arguments = good(op)
    assert outcome(op, arguments | {name: spoil(arguments[name])}) is None


@cases(["embedding_bwd"])
@pytest.mark.parametrize("vocabulary", [-1, 0, 7, 2**31, 2**62])
def test_tables_that_cannot_be_are_refused(op, vocabulary):
    assert outcome(op, good(op) | {"vocabulary": vocabulary}) is None


TYPED = {
    "layer_norm_fwd": "out_dtype",
    "add_layer_norm_fwd": "out_dtype",
    "add_layer_norm_bwd": "x_dtype",
    "linear_bwd": "grad_dtype",
    "mlp_bwd": "grad_dtype",
    "linear_cross_entropy_fwd": "grad_dtype",
}


@cases(TYPED)
@pytest.mark.parametrize("dtype", [I64, torch.float64, torch.complex64])
def test_results_of_another_type_are_refused(op, dtype):
    assert outcome(op, good(op) | {TYPED[op]: dtype}) is None


@cases(["dropout_mask"])
@pytest.mark.parametrize(("rows", "cols"), [(-1, 4), (4, -1), (2**32, 1), (2**31, 2**40)])
def test_masks_without_a_size_are_refused(op, rows, cols):
    assert outcome(op, good(op) | {"rows": rows, "cols": cols}) is None


def adamw_arguments():
    """A float32 matrix and a vector, with all that belongs to them, before their third step."""
    torch.manual_seed(0)
    params = [torch.randn(5, 7), torch.randn(9)]
    lists = {"params": params, "grads": [torch.randn_like(p) for p in params]}
    lists |= {name: [torch.rand_like(p) for p in params] for name in ("exp_avgs", "exp_avg_sqs")}
    lists["steps"] = [torch.tensor(2.0) for _ in params]
    lists["copies"] = [p.to(BF16) for p in params]
    return lists


@cases(["adamw_step"])
@pytest.mark.parametrize("name", adamw_arguments())
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t.new_zeros(3), lambda t: t.to(I64), lambda t: t.to(torch.float16), lambda t: None],
    ids=["another-size", "integers", "float16", "one-less"],
)
def test_an_optimiser_step_with_a_wrong_tensor_changes_nothing(op, name, spoil):
    lists = adamw_arguments()
    last = spoil(lists[name][-1])
    lists[name] = lists[name][:-1] + ([] if last is None else [last])
    before = {key: [t.clone() for t in value] for key, value in lists.items()}
    with pytest.raises(RuntimeError):
        raw(op)(*lists.values(), 0.1, 0.9, 0.95, 1e-8, 0.1)
    for key, value in lists.items():
        assert all(torch.equal(t, b) for t, b in zip(value, before[key], strict=True)), key
