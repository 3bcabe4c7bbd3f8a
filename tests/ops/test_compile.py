"""The ops under torch's transformations: compile, export, checkpointing, autocast and opcheck."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastformer import ops
from fastformer.ops import dispatch

SEQUENCES = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
RNG = torch.tensor([3, 2**33])


def randn(*shape):
    return torch.randn(shape, requires_grad=True)


def qkv(T, S):
    return randn(2, T, 2, 16), randn(2, S, 2, 16), randn(2, S, 2, 16)


def dropping(like, **options):
    return {"dropout_p": 0.2, "rng": RNG.to(like.device), **options}


def _attention(q, k, v):
    lengths = torch.tensor([2, 4], dtype=torch.int32, device=q.device)
    return ops.attention(q, k, v, causal=True, key_lengths=lengths, **dropping(q))


def _attention_varlen(q, k, v):
    starts = SEQUENCES.to(q.device)
    return ops.attention_varlen(q, k, v, starts, starts, 5, 5, **dropping(q))


def _add_layer_norm(x, residual, weight, bias):
    return ops.add_layer_norm(x, residual, weight, bias, **dropping(x, site=2))


def _mlp(x, w1, b1, w2, b2):
    return ops.mlp(x, w1, b1, w2, b2, activation="gelu_tanh", **dropping(x))


def _linear_cross_entropy(x, weight, bias):
    targets = torch.arange(x.shape[0], device=x.device) % 7 - 1
    options = {"ignore_index": -1, "label_smoothing": 0.1, "z_loss": 0.01}
    return ops.linear_cross_entropy(x, weight, targets, bias=bias, **options)


def _embedding(weight):
    return ops.embedding(torch.tensor([[0, 3, 1], [1, 0, 0]], device=weight.device), weight)


def _dropout(x):
    return ops.dropout(x, **dropping(x))


# Each public op as a function of tensors, and inputs of it whose first size, the rows, is n.
CALLS = {
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, causal=True),
        lambda n: (randn(n, 5, 2, 16), randn(n, 7, 2, 16), randn(n, 7, 2, 16)),
    ),
    "attention-options": (
        _attention,
        lambda n: tuple(x.transpose(0, 1) for x in (randn(n, 2, 2, 16) for _ in range(3))),
    ),
    "attention_varlen": (_attention_varlen, lambda n: tuple(randn(8, 2, 16) for _ in range(3))),
    "layer_norm": (ops.layer_norm, lambda n: (randn(n, 3, 8), randn(8), randn(8))),
    "add_layer_norm": (
        _add_layer_norm,
        lambda n: (randn(n, 3, 8), randn(n, 3, 8), randn(8), randn(8)),
    ),
    "embedding": (_embedding, lambda n: (randn(n, 8),)),
    "linear": (ops.linear, lambda n: (randn(n, 3, 8), randn(6, 8), randn(6))),
    "mlp": (
        _mlp,
        lambda n: (randn(n, 3, 8), randn(16, 8), randn(16), randn(4, 16), randn(4)),
    ),
    "linear_cross_entropy": (
        _linear_cross_entropy,
        lambda n: (randn(n, 8), randn(6, 8), randn(6)),
    ),
    "dropout": (_dropout, lambda n: (randn(n, 3, 9),)),
}
calls = pytest.mark.parametrize(("function", "inputs"), CALLS.values(), ids=CALLS)
OWN_FORWARD = {name: call for name, call in CALLS.items() if name != "embedding"}


def results(function, tensors):
    """Outputs and gradients of a scalar made of all outputs."""
    outputs = function(*tensors)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    loss = sum(
        (out.float() * torch.linspace(1, 2, out.numel()).view(out.shape)).sum() for out in outputs
    )
    return (*outputs, *torch.autograd.grad(loss, tensors))


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@calls
def test_compile_without_a_graph_break(function, inputs):
    torch._dynamo.reset()
    tensors = inputs(4)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, tensors), results(function, tensors))
    plain = [x.detach() for x in tensors]
    assert_equal(tree_leaves(compiled(*plain)), tree_leaves(function(*plain)))


@calls
def test_compile_once_for_all_sizes(function, inputs):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    for n in (10, 12, 19):  # unlike every other size, which would be taken for the same
        tensors = inputs(n)
        assert_equal(results(compiled, tensors), results(function, tensors))
    assert len(graphs) == 1


def test_dropout_without_a_state_compiles():
    """The state is drawn inside the graph from torch's generator: each call has its own mask."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(32, 32)
    torch.manual_seed(5)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(5)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)


def test_one_tensor_may_be_given_twice():
    """As cu_seqlens of self-attention, or a memory that is both key and value."""
    torch._dynamo.reset()

    def twice(x, w):
        normed, total = ops.add_layer_norm(x, x, w, w)
        table = torch.stack([w, w])
        out = ops.attention(normed, total, total) + ops.attention(total, total, total)
        return ops.mlp(out, table, w[:2], table.t(), None) + ops.layer_norm(out, w, w)

    tensors = randn(2, 5, 2, 16), randn(16)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, tensors), results(twice, tensors))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductor_gives_the_same_results():
    torch._dynamo.reset()

    def block(x, weight, bias, w1, b1, w2, b2, table):
        normed, total = ops.add_layer_norm(x, 2 * x, weight, bias, dropout_p=0.1, rng=RNG)
        q = F.gelu(normed).view(*x.shape[:2], 2, 8)
        attended = ops.attention(q, q, 1 + q, causal=True, dropout_p=0.1, rng=RNG).flatten(2)
        total = total + ops.mlp(attended, w1, b1, w2, b2)
        targets = torch.arange(x.shape[1]).expand(x.shape[:2]) % 5
        return ops.linear_cross_entropy(total, table, targets)

    shapes = ((2, 6, 16), (16,), (16,), (24, 16), (24,), (16, 24), (16,), (5, 16))
    tensors = tuple(randn(*shape) for shape in shapes)
    assert_equal(results(torch.compile(block, fullgraph=True), tensors), results(block, tensors))


class _Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(("function", "inputs"), OWN_FORWARD.values(), ids=OWN_FORWARD)
def test_export_keeps_the_op_whole(function, inputs, strict):
    tensors = tuple(x.detach() for x in inputs(4))
    program = torch.export.export(_Call(function), tensors, strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(name.startswith("fastformer.") for name in called)
    found = program.module()(*tensors)
    assert_equal(tree_leaves(found), tree_leaves(function(*tensors)))


@calls
def test_activation_checkpointing_gives_the_same_bits(function, inputs):
    tensors = inputs(4)

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    for found, expected in zip(
        results(checkpointed, tensors), results(function, tensors), strict=True
    ):
        assert torch.equal(found, expected)


def test_activation_checkpointing_replays_a_drawn_dropout_state():
    x = randn(16, 64)
    out = checkpoint(lambda x: ops.dropout(x.sin(), 0.5).exp(), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    dropped = out == 1
    assert 0.3 < dropped.float().mean() < 0.7
    expected = (2 * x.cos() * (2 * x.sin()).exp()).masked_fill(dropped, 0.0)
    torch.testing.assert_close(grad, expected)


def raw_calls():
    """Arguments for every raw op: with and without what is optional, and in lower precision."""
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    plain, dropping = (False, 0.25, 0.0, None, 0), (True, 0.5, 0.3, RNG, 4)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype) for x in qkv(5, 7))
        for key_lengths, settings in ((None, plain), (lengths, dropping)):
            yield "attention_fwd", (q, k, v, key_lengths, *settings)
            out, lse = torch.ops.fastformer.attention_fwd.default(q, k, v, key_lengths, *settings)
            yield "attention_bwd", (out, q, k, v, out, lse, key_lengths, *settings)
        packed = torch.stack((q, q, q), 2)
        for key_lengths, settings in ((None, plain), (lengths, dropping)):
            out, lse = torch.ops.fastformer.attention_fwd.default(q, q, q, key_lengths, *settings)
            saved = (out, packed, out, lse, key_lengths, *settings)
            yield "attention_qkvpacked_bwd", saved
        q, k, v = (torch.randn(8, 2, 16).to(dtype) for _ in range(3))
        for settings in (plain, dropping):
            varlen = (SEQUENCES, SEQUENCES, 5, 6, *settings)
            yield "attention_varlen_fwd", (q, k, v, *varlen)
            out, lse = torch.ops.fastformer.attention_varlen_fwd.default(q, k, v, *varlen)
            yield "attention_varlen_bwd", (out, q, k, v, out, lse, *varlen)
            saved = (out, torch.stack((q, k, v), 1), out, lse, SEQUENCES, 6, *settings)
            yield "attention_varlen_qkvpacked_bwd", saved

        x, residual = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8)
        weight, bias = torch.randn(8), torch.randn(8)
        for one in (bias, None):
            yield "layer_norm_fwd", (x, weight, one, 1e-5, dtype)
        _, mean, rstd = torch.ops.fastformer.layer_norm_fwd.default(x, weight, bias, 1e-5, dtype)
        yield "layer_norm_bwd", (x, x, weight, mean, rstd)
        for one, drop in ((bias, (0.0, None, 0)), (None, (0.3, RNG, 2))):
            yield "add_layer_norm_fwd", (x, residual, weight, one, 1e-5, dtype, *drop)
            for grad in (residual, None):
                saved = (x, grad, residual, weight, mean, rstd, dtype, *drop)
                yield "add_layer_norm_bwd", saved

        weight, bias = torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype)
        for ids in (torch.tensor([[0, 4, 1], [1, 1, 0]]), torch.tensor([3, 0], dtype=torch.int32)):
            yield "embedding_bwd", (weight[ids], ids, 5)
        for one in (bias, None):
            yield "linear_fwd", (x, weight, one)
        for grad_dtype in {dtype, torch.float32}:
            yield "linear_bwd", (torch.randn(2, 3, 5).to(dtype), x, weight, grad_dtype)

        w1, b1, w2, b2 = (torch.randn(shape).to(dtype) for shape in ((16, 8), (16,), (4, 16), (4,)))
        for biases, settings in (
            ((b1, b2), (False, 0.0, None, 0)),
            ((None, None), (True, 0.3, RNG, 1)),
        ):
            call = (x, w1, biases[0], w2, biases[1], *settings)
            yield "mlp_fwd", call
            out, pre = torch.ops.fastformer.mlp_fwd.default(*call)
            for grad_dtype in {dtype, torch.float32}:
                yield "mlp_bwd", (out, x, w1, w2, pre, *settings, grad_dtype)

        rows, table, targets = x.flatten(0, 1), torch.randn(9, 8).to(dtype), torch.arange(6) - 1
        for one, settings in (
            (None, (-1, 0.0, 0.0, True, False)),
            (table[:, 0].clone(), (-1, 0.1, 0.1, False, True)),
        ):
            for grad_dtype in {None, dtype, torch.float32}:
                call = (rows, table, one, targets, *settings, grad_dtype)
                yield "linear_cross_entropy_fwd", call
    yield "dropout_mask", (5, 9, 0.3, RNG, 2)

    param, copy = torch.randn(2, 3, 5), torch.zeros(3, 5, dtype=torch.bfloat16)
    for copies in ([], [copy]):
        lists = ([param[0].clone()], [param[1]], [torch.zeros(3, 5)], [torch.zeros(3, 5)])
        yield "adamw_step", (*lists, [torch.tensor(0.0)], copies, 1e-3, 0.9, 0.95, 1e-8, 0.1)


RAW_CALLS = list(raw_calls())


def test_every_raw_op_is_checked():
    assert {op for op, _ in RAW_CALLS} == dispatch.automatic("cpu").keys()


@pytest.mark.parametrize(
    ("op", "call"), RAW_CALLS, ids=[f"{n}-{op}" for n, (op, _) in enumerate(RAW_CALLS)]
)
def test_opcheck(op, call):
    """Schema, fake implementation, autograd registration, and dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.fastformer, op).default, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
class TestAutocast:
    """Results have the dtype that torch's own functions would hand to the next matrix product, and
    gradients that of the master weights."""

    def grads(self, dtype, function, *tensors):
        with torch.autocast("cpu", dtype=dtype):
            outputs = function(*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        grads = torch.autograd.grad(sum(out.float().square().sum() for out in outputs), tensors)
        for grad, tensor in zip(grads, tensors, strict=True):
            assert grad.dtype == tensor.dtype
        return outputs, grads

    def assert_near(self, dtype, found, expected):
        """Within a few roundings of `dtype`, relative to the largest element."""
        for one, other in zip(found, expected, strict=True):
            allowed = 16 * torch.finfo(dtype).eps * other.abs().max()
            assert (one.float() - other.float()).abs().max() <= allowed

    def test_attention(self, dtype):
        q, k, v = qkv(9, 9)
        (out,), grads = self.grads(dtype, ops.attention, q, k, v)
        assert out.dtype == dtype
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        loss = expected.square().sum()
        self.assert_near(dtype, (out, *grads), (expected, *torch.autograd.grad(loss, (q, k, v))))

    def test_attention_varlen(self, dtype):
        q, k, v = (randn(8, 2, 16) for _ in range(3))
        starts = torch.tensor([0, 8], dtype=torch.int32)
        (out,), _ = self.grads(
            dtype, lambda q, k, v: ops.attention_varlen(q, k, v, starts, starts, 8, 8), q, k, v
        )
        assert out.dtype == dtype
        expected = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v))
        ).transpose(0, 1)
        self.assert_near(dtype, (out,), (expected,))

    def test_linear(self, dtype):
        tensors = randn(5, 8), randn(6, 8), randn(6)
        (out,), grads = self.grads(dtype, ops.linear, *tensors)
        assert out.dtype == dtype
        expected = F.linear(*tensors)
        loss = expected.square().sum()
        self.assert_near(dtype, (out, *grads), (expected, *torch.autograd.grad(loss, tensors)))

    def test_mlp(self, dtype):
        tensors = randn(5, 8), randn(16, 8), randn(16), randn(4, 16), randn(4)
        (out,), grads = self.grads(dtype, ops.mlp, *tensors)
        assert out.dtype == dtype
        x, w1, b1, w2, b2 = tensors
        expected = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
        loss = expected.square().sum()
        self.assert_near(dtype, (out, *grads), (expected, *torch.autograd.grad(loss, tensors)))

    def test_layer_norm(self, dtype):
        tensors = randn(5, 32), randn(32), randn(32)
        (out,), grads = self.grads(dtype, ops.layer_norm, *tensors)
        expected = F.layer_norm(tensors[0], (32,), *tensors[1:])
        assert torch.equal(out, expected.to(dtype))
        loss = expected.square().sum()
        self.assert_near(dtype, (out, *grads), (expected, *torch.autograd.grad(loss, tensors)))

    def test_add_layer_norm_keeps_a_float32_residual_beside_a_branch(self, dtype):
        branch = randn(5, 32).detach().to(dtype).requires_grad_()
        residual, weight, bias = randn(5, 32), randn(32), randn(32)
        (normed, total), grads = self.grads(
            dtype, ops.add_layer_norm, branch, residual, weight, bias
        )
        assert normed.dtype == dtype and total.dtype == torch.float32
        assert torch.equal(total, residual + branch.float())
        expected = F.layer_norm(residual + branch.float(), (32,), weight, bias)
        loss = expected.square().sum() + (residual + branch).square().sum()
        expected_grads = torch.autograd.grad(loss, (branch, residual, weight, bias))
        self.assert_near(dtype, (normed, *grads), (expected, *expected_grads))

    def test_linear_cross_entropy(self, dtype):
        tensors = randn(6, 16), randn(9, 16), randn(9)
        targets = torch.arange(6)

        def head(x, weight, bias):
            return ops.linear_cross_entropy(x, weight, targets, bias=bias)

        (loss,), grads = self.grads(dtype, head, *tensors)
        assert loss.dtype == torch.float32
        expected = F.cross_entropy(F.linear(*tensors), targets)
        expected_grads = torch.autograd.grad(expected.square(), tensors)
        self.assert_near(dtype, (loss, *grads), (expected, *expected_grads))

    def test_float64_is_left_alone(self, dtype):
        x = randn(4, 8).double()
        with torch.autocast("cpu", dtype=dtype):
            assert ops.layer_norm(x, torch.ones(8).double()).dtype == torch.float64
            assert ops.dropout(x, 0.5).dtype == torch.float64


@calls
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(function, inputs):
    tensors = [x.detach() for x in inputs(4)]
    found = tree_leaves(function(*(x.to("meta") for x in tensors)))
    real = tree_leaves(function(*tensors))
    for one, other in zip(found, real, strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
