"""The head with its loss, against torch's linear followed by torch's cross_entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastformer.ops import linear_cross_entropy

OP = "linear_cross_entropy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


def inputs(N, C, V, device, *, bias=True):
    values = {
        "x": torch.randn(N, C, device=device),
        "weight": torch.randn(V, C, device=device) / math.sqrt(C),
    }
    if bias:
        values["bias"] = torch.randn(V, device=device)
    return values


def eager(
    x,
    weight,
    targets,
    *,
    bias=None,
    z_loss=0.0,
    reduction="mean",
    ignore_index=-100,
    mostly_ignored=False,
    **rest,
):
    logits = F.linear(x, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()  # what every trainer does before a loss
    flat, targets = logits.flatten(0, -2), targets.flatten()
    options = {"ignore_index": ignore_index, "reduction": reduction, **rest}
    loss = F.cross_entropy(flat, targets, **options)
    if z_loss:
        squares = flat[targets != ignore_index].logsumexp(-1).square()
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    return loss


def check(check_numerics, dtype, values, targets, *, upstream=1.0, **options):
    """The rule of numerics, with the loss scaled by `upstream` as in gradient accumulation.

    A bfloat16 loss errs by the mean of its logits' roundings, which depend on when the bias is
    added, and eager's may cancel by luck: there only the gradients are judged here, and the losses
    in test_numerics_of_many_losses.
    """
    gradients_only = dtype == torch.bfloat16 and "bias" in values

    def judged(loss):
        return (loss - loss.detach() if gradients_only else loss) * upstream

    check_numerics(
        lambda **tensors: judged(linear_cross_entropy(**tensors, targets=targets, **options)),
        lambda **tensors: judged(eager(**tensors, targets=targets, **options)),
        dtype,
        values,
    )


def some_targets(N, V, device, ignored=0.3, ignore_index=-100):
    targets = torch.randint(V, (N,), device=device)
    return targets.where(torch.rand(N, device=device) >= ignored, ignore_index)


@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("N", "C", "V"), [(1, 127, 50), (20, 64, 2), (63, 64, 1023), (197, 80, 128)], ids=str
)
def test_numerics(backend, check_numerics, N, C, V, bias, dtype):
    targets = torch.randint(V, (N,), device=backend)
    check(check_numerics, dtype, inputs(N, C, V, backend, bias=bias), targets)


OPTIONS = {
    "ignore": {},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "z-loss-sum": {"z_loss": 1e-2, "reduction": "sum"},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3},
    "ignore-0": {"ignore_index": 0, "label_smoothing": 0.1},
    "scaled-loss": {"upstream": 1 / 3},
    "mostly-ignored": {"mostly_ignored": True},
}


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numerics_of_the_options(backend, check_numerics, options, dtype):
    targets = some_targets(50, 63, backend, ignore_index=options.get("ignore_index", -100))
    check(check_numerics, dtype, inputs(50, 64, 63, backend), targets, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numerics_of_many_losses(backend, check_numerics, options):
    """The largest error of 40 losses is no matter of luck."""
    options = {name: value for name, value in options.items() if name != "upstream"}
    targets = some_targets(40 * 12, 63, backend, ignore_index=options.get("ignore_index", -100))

    def losses(loss):
        def of_each_batch(x, weight, bias):
            batches = zip(x.view(40, 12, 64), targets.view(40, 12), strict=True)
            return torch.stack([loss(x, weight, t, bias=bias, **options) for x, t in batches])

        return of_each_batch

    values = inputs(40 * 12, 64, 63, backend)
    check_numerics(losses(linear_cross_entropy), losses(eager), torch.bfloat16, values)


@dtypes
def test_numerics_of_a_real_vocabulary(backend, check_numerics, dtype):
    targets = some_targets(20, 23948, backend)
    check(check_numerics, dtype, inputs(20, 64, 23948, backend), targets)


@dtypes
@pytest.mark.parametrize("N", [512, 513, 1500])
def test_numerics_of_several_chunks(backend, check_numerics, N, dtype):
    targets = some_targets(N, 128, backend, ignored=0.0 if N < 1000 else 0.2)
    check(check_numerics, dtype, inputs(N, 64, 128, backend), targets, label_smoothing=0.1)


def test_the_gradient_is_handed_over_without_a_copy(monkeypatch):
    """The parameter takes the memory that the forward pass wrote its gradient to."""
    written = []
    raw = torch.ops.fastformer.linear_cross_entropy_fwd

    class Spy:
        @staticmethod
        def default(*args):
            results = raw.default(*args)
            written.extend(result.data_ptr() for result in results[1:])
            return results

    monkeypatch.setattr(torch.ops.fastformer, "linear_cross_entropy_fwd", Spy)
    leaves = [v.requires_grad_() for v in inputs(6, 16, 7, "cpu").values()]
    targets = some_targets(6, 7, "cpu")
    x, weight, bias = leaves
    linear_cross_entropy(x, weight, targets, bias=bias).backward()
    assert [leaf.grad.data_ptr() for leaf in leaves] == written


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_may_be_repeated_and_accumulated(backend, scale):
    leaves = [v.requires_grad_() for v in inputs(6, 16, 7, backend).values()]
    copies = [v.detach().clone().requires_grad_() for v in leaves]
    targets = some_targets(6, 7, backend)
    for function, (x, weight, bias) in ((linear_cross_entropy, leaves), (eager, copies)):
        for _ in range(2):
            loss = scale * function(x, weight, targets, bias=bias)
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_leading_dimensions_are_rows(backend):
    x = torch.randn(3, 4, 16, device=backend).transpose(0, 1).requires_grad_()
    copy = x.detach().clone().requires_grad_()
    weight = torch.randn(7, 16, device=backend)
    targets = some_targets(12, 7, backend).view(4, 3)
    loss, expected = linear_cross_entropy(x, weight, targets), eager(copy, weight, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, copy.grad)
    assert not x.grad[targets == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("N", [0, 5])
def test_no_counted_row_gives_zero(backend, reduction, N):
    leaves = {n: v.requires_grad_() for n, v in inputs(N, 16, 7, backend).items()}
    targets = torch.full((N,), -100, device=backend)
    loss = linear_cross_entropy(**leaves, targets=targets, z_loss=0.1, reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


def test_ignored_rows_are_never_read(backend):
    x, weight = inputs(6, 16, 7, backend, bias=False).values()
    targets = torch.tensor([3, -100, 0, -100, 6, 1], device=backend)
    expected = eager(x, weight, targets)
    x[targets == -100] = torch.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not x.grad[targets == -100].any() and x.grad.isfinite().all()


def test_equal_logits_give_the_logarithm_of_the_vocabulary(backend):
    x, weight = torch.zeros(4, 16, device=backend), torch.randn(50, 16, device=backend)
    targets = torch.arange(4, device=backend)
    for smoothing in (0.0, 0.3):
        loss = linear_cross_entropy(x, weight, targets, label_smoothing=smoothing, z_loss=0.5)
        assert loss.item() == pytest.approx(math.log(50) + 0.5 * math.log(50) ** 2, rel=1e-6)


def test_large_logits_do_not_overflow(backend):
    x = torch.full((2, 1), 1.0, device=backend)
    weight = torch.tensor([[1e4], [-1e4]], device=backend, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1], device=backend))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.5], [-0.5]], device=backend))


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
@pytest.mark.parametrize("position", [0, 700])
def test_a_target_out_of_range_is_an_error_on_the_cpu(bad, position):
    values = inputs(800, 16, 7, "cpu")
    targets = torch.randint(7, (800,))
    targets[position] = bad
    words = rf"linear_cross_entropy: targets must be in \[0, 7\) .* got {bad}$"
    for requires_grad in (False, True):
        with pytest.raises(ValueError, match=words):
            leaves = {n: v.requires_grad_(requires_grad) for n, v in values.items()}
            linear_cross_entropy(**leaves, targets=targets)


@dtypes
def test_the_loss_is_the_same_with_and_without_gradients(backend, dtype):
    x, weight, bias = (v.to(dtype) for v in inputs(600, 16, 31, backend).values())
    targets = some_targets(600, 31, backend)
    without = linear_cross_entropy(x, weight, targets, bias=bias)
    recorded = linear_cross_entropy(x.requires_grad_(), weight, targets, bias=bias)
    assert without.dtype == torch.float32
    assert not without.requires_grad and recorded.requires_grad
    assert torch.equal(without, recorded)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(backend, reduction):
    leaves = [v.double().requires_grad_() for v in inputs(5, 4, 6, backend).values()]
    targets = torch.tensor([0, -100, 5, 3, -100], device=backend)

    def ours(x, weight, bias):
        options = {"label_smoothing": 0.1, "z_loss": 0.05, "reduction": reduction}
        return linear_cross_entropy(x, weight, targets, bias=bias, **options)

    torch.autograd.gradcheck(ours, leaves)


def test_a_second_derivative_is_an_error(backend):
    x, weight = (v.requires_grad_() for v in inputs(5, 4, 6, backend, bias=False).values())
    loss = linear_cross_entropy(x, weight, torch.zeros(5, dtype=torch.long, device=backend))
    (grad,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_two_losses_may_share_a_weight(backend):
    """Backward scales what forward computed: it must not do so in place."""
    x, weight = (v.requires_grad_() for v in inputs(5, 4, 6, backend, bias=False).values())
    loss = linear_cross_entropy(x, weight, torch.arange(5, device=backend))
    first = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def allocations(function):
    """Bytes of every allocation of CPU memory that the profiler sees in `function`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return [event.self_cpu_memory_usage for event in profiler.events()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numerics_of_chunks_by_memory(check_numerics, dtype):
    """Enough logits for several chunks of the C++ kernel, whose length depends on their bytes."""
    targets = some_targets(300, 140_001, "cpu", ignored=0.05)
    check(check_numerics, dtype, inputs(300, 8, 140_001, "cpu"), targets)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["loss", "loss-and-gradients"])
def test_the_logits_are_never_materialised(requires_grad):
    N, C, V = 20_000, 8, 4000
    logits = N * V * 4
    values = {n: v.requires_grad_(requires_grad) for n, v in inputs(N, C, V, "cpu").items()}
    targets = torch.randint(V, (N,))

    def run(loss):
        loss = loss(**values, targets=targets)
        if requires_grad:
            loss.backward()

    assert max(allocations(lambda: run(eager))) >= logits
    assert max(allocations(lambda: run(linear_cross_entropy))) <= logits / 4


@dtypes
@pytest.mark.parametrize("N", [1, 63, 700])
def test_threads_do_not_show_in_the_loss_and_the_bias_gradient(backend, threads, N, dtype):
    """One channel, so that the products add nothing whose order could differ."""
    x, weight, bias = (v.to(dtype) for v in inputs(N, 1, 999, backend).values())
    targets, bias = some_targets(N, 999, backend), bias.requires_grad_()
    found = []
    for count in (1, 2, 7):
        threads(count)
        loss = linear_cross_entropy(x, weight, targets, bias=bias)
        found.append((loss, *torch.autograd.grad(loss, bias)))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_logit_of_minus_infinity_is_a_token_that_never_comes(backend, dtype):
    x, weight, bias = (v.to(dtype) for v in inputs(20, 16, 50, backend).values())
    bias[[3, 40]] = -torch.inf
    targets = torch.randint(4, 40, (20,), device=backend)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    loss = linear_cross_entropy(x, weight, targets, bias=bias)
    grads = torch.autograd.grad(loss, leaves)
    expected = eager(x, weight, targets, bias=bias)
    tolerance = {"atol": 2e-3, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(loss, expected, **tolerance)
    for one, other in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("V", [5, 127, 1000])
def test_nan_is_not_lost(backend, V, dtype):
    """One NaN among the logits makes the loss NaN: a trainer stops there."""
    for position in range(0, V, max(1, V // 7)):
        x, weight = (v.to(dtype) for v in inputs(2, 16, V, backend, bias=False).values())
        weight[position] = torch.nan
        assert linear_cross_entropy(x, weight, torch.tensor([0, 1], device=backend)).isnan()
