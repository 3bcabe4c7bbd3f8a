"""The CPU kernels against the reference on shapes, strides, dtypes and lengths nobody thought of.

The search is the same in every run, and a case that fails is printed as small as it can be made.
The tolerances catch a wrong element, not a lost digit: the rule of numerics has its own tests.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastformer
from fastformer import ops
from fastformer.ops import dispatch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

search = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def needs_kernel(op):
    missing = "cpu" not in dispatch._kernels.get(op, {})
    return pytest.mark.skipif(missing, reason=f"{op} has no cpu kernel in this version")


# How a tensor lies in memory: the shape of what owns it, and the view of it that an op is given.
LAYOUTS = {
    "contiguous": (lambda shape: shape, lambda x, shape: x),
    "reversed": (lambda shape: shape[::-1], lambda x, shape: x.permute(*reversed(range(x.dim())))),
    "sliced": (
        lambda shape: [n + 3 for n in shape],
        lambda x, shape: x[(slice(1, -2),) * x.dim()],
    ),
    "stepped": (lambda shape: (*shape[:-1], 2 * shape[-1]), lambda x, shape: x[..., ::2]),
    "expanded": (lambda shape: (1, *shape[1:]), lambda x, shape: x.expand(shape)),
}


def laid_out(make, shape, layout):
    """The tensor of this shape and layout whose memory `make` fills."""
    if not shape:
        return make(shape)
    owned, view = LAYOUTS[layout]
    return view(make(owned(tuple(shape))), shape)


def evaluate(backend, call, inputs, upstream):
    """Outputs and gradients by name; `upstream(output)` is the gradient of an output."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with fastformer.backend(backend):
        outputs = call(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.manual_seed(1)
        torch.autograd.backward(outputs, [upstream(output) for output in outputs])
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return found | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def compare(call, shapes, dtypes, layouts, sizes=()):
    """Run `call` on random tensors of these shapes with both backends; compare all that comes out.

    `dtypes` is one for all or one per name; `sizes` has the standard deviations that are not 1.
    """
    torch.manual_seed(0)
    if isinstance(dtypes, torch.dtype):
        dtypes = dict.fromkeys(shapes, dtypes)
    sizes = dict.fromkeys(shapes, 1.0) | dict(sizes)

    def normal(dtype, size=1.0):
        return lambda shape: (torch.randn(shape) * size).to(dtype)

    def upstream(output):
        return laid_out(normal(output.dtype), output.shape, layouts["grad"])

    inputs = {
        name: laid_out(normal(dtypes[name], sizes[name]), shape, layouts[name])
        for name, shape in shapes.items()
    }
    expected = evaluate("reference", call, inputs, upstream)
    found = evaluate("cpu", call, inputs, upstream)
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes.values())
    for name, one in expected.items():
        other = found[name]
        assert other.shape == one.shape and other.dtype == one.dtype, name
        if one.numel():
            error = (other.double() - one.double()).abs().max().item()
            allowed = tolerance * max(1.0, one.double().abs().max().item())
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


dtype = st.sampled_from(list(TOLERANCE))
layout = st.sampled_from(list(LAYOUTS))
dropout = st.sampled_from([0.0, 0.1, 0.9])
rng = st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62)).map(torch.tensor)
width = st.integers(1, 140)
leading = st.lists(st.integers(0, 9), max_size=2).map(tuple)


def layouts_of(*names):
    return st.fixed_dictionaries(dict.fromkeys((*names, "grad"), layout))


def optional(shapes, **extra):
    """`shapes` and those of `extra` that are not None."""
    return shapes | {name: shape for name, shape in extra.items() if shape is not None}


head_dim = st.integers(1, 16).map(lambda n: 8 * n)
tokens = st.integers(0, 90) | st.sampled_from([1, 63, 64, 65, 128, 129])
heads = st.integers(1, 3)


@needs_kernel("attention_bwd")
@search
@given(
    B=st.integers(0, 3),
    T=tokens,
    S=tokens,
    H=heads,
    D=head_dim,
    dtype=dtype,
    layouts=layouts_of("q", "k", "v"),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.02, 0.5]),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
    lengths=st.none() | st.lists(st.integers(-1, 140), min_size=3, max_size=3),
)
def test_attention(B, T, S, H, D, dtype, layouts, lengths, **options):
    if lengths is not None:
        options["key_lengths"] = torch.tensor(lengths[:B], dtype=torch.int32)

    def call(q, k, v):
        return ops.attention(q, k, v, **options)

    compare(call, {"q": (B, T, H, D), "k": (B, S, H, D), "v": (B, S, H, D)}, dtype, layouts)


@needs_kernel("attention_qkvpacked_bwd")
@search
@given(
    B=st.integers(0, 3),
    T=tokens,
    H=heads,
    D=head_dim,
    dtype=dtype,
    layouts=layouts_of("qkv"),
    causal=st.booleans(),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
    lengths=st.none() | st.lists(st.integers(-1, 140), min_size=3, max_size=3),
)
def test_attention_qkvpacked(B, T, H, D, dtype, layouts, lengths, **options):
    if lengths is not None:
        options["key_lengths"] = torch.tensor(lengths[:B], dtype=torch.int32)

    def call(qkv):
        return ops.attention_qkvpacked(qkv, **options)

    compare(call, {"qkv": (B, T, 3, H, D)}, dtype, layouts)


@needs_kernel("attention_varlen_bwd")
@search
@given(
    pairs=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5),
    spare=st.integers(0, 40),
    H=heads,
    D=head_dim,
    dtype=dtype,
    layouts=layouts_of("q", "k", "v"),
    causal=st.booleans(),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
)
def test_attention_varlen(pairs, spare, H, D, dtype, layouts, **options):
    queries, keys = zip(*pairs, strict=True)
    starts = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (queries, keys)
    ]
    longest = max(queries) + spare, max(keys) + spare

    def call(q, k, v):
        return ops.attention_varlen(q, k, v, *starts, *longest, **options)

    N, M = sum(queries), sum(keys)
    compare(call, {"q": (N, H, D), "k": (M, H, D), "v": (M, H, D)}, dtype, layouts)


@needs_kernel("attention_varlen_qkvpacked_bwd")
@search
@given(
    rows=st.lists(tokens, min_size=1, max_size=5),
    spare=st.integers(0, 40),
    H=heads,
    D=head_dim,
    dtype=dtype,
    layouts=layouts_of("qkv"),
    causal=st.booleans(),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
)
def test_attention_varlen_qkvpacked(rows, spare, H, D, dtype, layouts, **options):
    starts = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)

    def call(qkv):
        return ops.attention_varlen_qkvpacked(qkv, starts, max(rows) + spare, **options)

    compare(call, {"qkv": (sum(rows), 3, H, D)}, dtype, layouts)


@needs_kernel("layer_norm_bwd")
@search
@given(
    rows=leading,
    C=width,
    dtype=dtype,
    weight_dtype=dtype,
    layouts=layouts_of("x", "weight", "bias"),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_layer_norm(rows, C, dtype, weight_dtype, layouts, bias, eps):
    assume(rows or layouts["x"] != "expanded")  # equal elements: a difference of rounding errors
    shapes = optional({"x": (*rows, C), "weight": (C,)}, bias=(C,) if bias else None)
    dtypes = dict.fromkeys(shapes, weight_dtype) | {"x": dtype}
    compare(lambda **given: ops.layer_norm(**given, eps=eps), shapes, dtypes, layouts)


@needs_kernel("add_layer_norm_bwd")
@search
@given(
    rows=leading,
    C=width,
    dtypes=st.tuples(dtype, dtype, dtype),
    layouts=layouts_of("x", "residual", "weight", "bias"),
    bias=st.booleans(),
    used=st.sampled_from([(0, 1), (0,), (1,)]),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
)
def test_add_layer_norm(rows, C, dtypes, layouts, bias, used, **options):
    """`used`: which of the two results the gradient comes from."""
    assume(rows or layouts["x"] != "expanded")
    shapes = {"x": (*rows, C), "residual": (*rows, C), "weight": (C,)}
    shapes = optional(shapes, bias=(C,) if bias else None)
    names = dict(zip(("x", "residual", "weight"), dtypes, strict=True)) | {"bias": dtypes[2]}

    def call(**given):
        results = ops.add_layer_norm(**given, **options)
        return [results[i] for i in used]

    compare(call, shapes, {name: names[name] for name in shapes}, layouts)


@needs_kernel("mlp_bwd")
@search
@given(
    rows=leading,
    C=width,
    F=width,
    C_out=width,
    dtype=dtype,
    layouts=layouts_of("x", "w1", "b1", "w2", "b2"),
    biases=st.tuples(st.booleans(), st.booleans()),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
    dropout_p=dropout,
    rng=rng,
    site=st.integers(0, 99),
)
def test_mlp(rows, C, F, C_out, dtype, layouts, biases, **options):
    b1, b2 = (F,) if biases[0] else None, (C_out,) if biases[1] else None
    shapes = optional({"x": (*rows, C), "w1": (F, C), "w2": (C_out, F)}, b1=b1, b2=b2)

    def call(x, w1, w2, b1=None, b2=None):
        return ops.mlp(x, w1, b1, w2, b2, **options)

    compare(call, shapes, dtype, layouts, {"w1": C**-0.5, "w2": F**-0.5})


@needs_kernel("embedding_bwd")
@search
@given(
    shape=st.lists(st.integers(0, 60), max_size=2).map(tuple),
    V=st.integers(1, 300) | st.sampled_from([1, 5000]),
    C=width,
    used=st.floats(0.0, 1.0),
    dtype=dtype,
    layouts=layouts_of("weight"),
    of_ids=layout,
)
def test_embedding(shape, V, C, used, dtype, layouts, of_ids):
    torch.manual_seed(1)
    highest = max(1, int(used * V))
    ids = laid_out(lambda shape: torch.randint(highest, shape), shape, of_ids)
    compare(lambda weight: ops.embedding(ids, weight), {"weight": (V, C)}, dtype, layouts)


@needs_kernel("linear_bwd")
@search
@given(
    rows=leading,
    C=width,
    C_out=width,
    dtype=dtype,
    layouts=layouts_of("x", "weight", "bias"),
    bias=st.booleans(),
)
def test_linear(rows, C, C_out, dtype, layouts, bias):
    shapes = {"x": (*rows, C), "weight": (C_out, C)}
    shapes = optional(shapes, bias=(C_out,) if bias else None)
    compare(lambda **given: ops.linear(**given), shapes, dtype, layouts, {"weight": C**-0.5})


@needs_kernel("linear_cross_entropy_fwd")
@search
@given(
    rows=leading,
    C=width,
    V=st.integers(1, 300) | st.sampled_from([1023, 2050]),
    dtype=dtype,
    layouts=layouts_of("x", "weight", "bias"),
    targets=layout,
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    ignore_index=st.sampled_from([-100, 0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_linear_cross_entropy(rows, C, V, dtype, layouts, targets, bias, ignored, **options):
    torch.manual_seed(1)
    shapes = {"x": (*rows, C), "weight": (V, C)}
    shapes = optional(shapes, bias=(V,) if bias else None)

    def some_ignored(shape):
        return torch.randint(V, shape).where(torch.rand(shape) >= ignored, options["ignore_index"])

    labels = laid_out(some_ignored, rows, targets)
    # A mean's gradients shrink with the number of rows; the tolerance does not.
    factor = max(1, labels.numel()) if options["reduction"] == "mean" else 1

    def call(x, weight, bias=None):
        return ops.linear_cross_entropy(x, weight, labels, bias=bias, **options) * factor

    compare(call, shapes, dtype, layouts, {"weight": C**-0.5})


@needs_kernel("adamw_step")
@search
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4),
    layout=layout,
    copied=st.booleans(),
    done=st.integers(0, 1000),
    lr=st.sampled_from([0.0, 1e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.95), (0.5, 0.999)]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_adamw_step(shapes, layout, copied, done, lr, betas, weight_decay):
    torch.manual_seed(0)
    grads = [laid_out(torch.randn, shape, layout) for shape in shapes]
    lists = [[torch.randn(shape) for shape in shapes], grads]
    lists += [[torch.rand(shape) for shape in shapes] for _ in range(2)]
    lists += [[torch.tensor(float(done)) for _ in shapes]]
    lists += [[torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes if copied]]
    results = []
    for backend in ("reference", "cpu"):
        state = [grads if part is grads else [t.clone() for t in part] for part in lists]
        with fastformer.backend(backend):
            for _ in range(2):
                torch.ops.fastformer.adamw_step.default(*state, lr, *betas, 1e-8, weight_decay)
        results.append([t for part in state for t in part])
    for expected, found in zip(*results, strict=True):
        close = TOLERANCE[found.dtype]
        torch.testing.assert_close(found, expected, atol=close, rtol=close)


@needs_kernel("dropout_mask")
@search
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 300),
    dropout_p=st.floats(1e-6, 0.999999),
    rng=rng,
    site=st.integers(0, 2**31),
)
def test_dropout_mask(rows, cols, dropout_p, rng, site):
    masks = []
    for backend in ("reference", "cpu"):
        with fastformer.backend(backend):
            masks.append(ops.dropout_mask(rows, cols, dropout_p, rng, site))
    assert torch.equal(*masks)
