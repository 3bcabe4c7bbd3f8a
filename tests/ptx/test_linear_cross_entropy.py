"""The Triton kernel of the head's loss, executed as compiled, through the public function."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from fastformer import linear_cross_entropy
from fastformer.kernels import linear_cross_entropy as kernels

IGNORED = -100


def inputs(N, C, V, device, *, bias=True):
    shapes = {"x": (N, C), "weight": (V, C)} | ({"bias": (V,)} if bias else {})
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    values["weight"] /= math.sqrt(C)
    return {name: value.to(device) for name, value in values.items()}


def some_targets(N, V, device, ignored=0.3):
    targets = torch.randint(V, (N,))
    return targets.where(torch.rand(N) >= ignored, IGNORED).to(device)


def eager(
    x,
    weight,
    targets,
    *,
    bias=None,
    z_loss=0.0,
    reduction="mean",
    label_smoothing=0.0,
    mostly_ignored=False,
):
    logits = F.linear(x, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(logits, targets, **options)
    if z_loss:
        squares = logits[targets != IGNORED].logsumexp(-1).square()
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    return loss


def check_head(triton, check_numerics, dtype, values, targets, **options):
    """The rule of numerics. A bfloat16 loss errs by the mean of its logits' roundings, and eager's
    may cancel by luck: there only the gradients are judged, and the losses in a test of many."""

    def judged(loss):
        return loss - loss.detach() if dtype == torch.bfloat16 else loss

    with triton(checks=True) as launches:
        check_numerics(
            lambda **tensors: judged(linear_cross_entropy(targets=targets, **tensors, **options)),
            lambda **tensors: judged(eager(targets=targets, **tensors, **options)),
            dtype,
            values,
        )
    return launches


@pytest.fixture
def check(triton, check_numerics):
    return partial(check_head, triton, check_numerics)


# dtype, N, C, V, whether there is a bias: blocks and vectors of the kernel that end within.
SIZES = {
    "one-row": (torch.float32, 1, 16, 101, True),
    "float32": (torch.float32, 20, 127, 1000, False),
    "float32-vocabulary": (torch.float32, 5, 64, 23948, True),
    "bfloat16": (torch.bfloat16, 20, 127, 1000, True),
    "bfloat16-vocabulary": (torch.bfloat16, 5, 64, 23948, False),
    "float16": (torch.float16, 20, 127, 999, True),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_numerics(target, check, size):
    dtype, N, C, V, bias = size
    targets = some_targets(N, V, target.device, ignored=0.0 if N == 1 else 0.3)
    launches = check(dtype, inputs(N, C, V, target.device, bias=bias), targets)
    assert [launch.name for launch in launches] in ([], 2 * ["_cross_entropy_kernel"])


OPTIONS = {
    "sum": (torch.bfloat16, {"reduction": "sum"}),
    "smoothing": (torch.float32, {"label_smoothing": 0.1}),
    "z-loss": (torch.float32, {"z_loss": 1e-2}),
    "all": (torch.bfloat16, {"label_smoothing": 0.2, "z_loss": 1e-3, "reduction": "sum"}),
}


@pytest.mark.parametrize(("dtype", "options"), OPTIONS.values(), ids=OPTIONS)
def test_numerics_of_the_options(target, check, options, dtype):
    """The vocabulary ends within the second of the blocks that a program takes."""
    targets = some_targets(4, 9001, target.device)
    check(dtype, inputs(4, 32, 9001, target.device), targets, **options)


def test_numerics_of_many_losses(target, triton, check_numerics):
    """The largest error of 12 losses is no matter of luck."""
    targets = some_targets(12 * 4, 101, target.device)

    def losses(loss):
        def of_each_batch(x, weight, bias):
            batches = zip(x.view(12, 4, 64), targets.view(12, 4), strict=True)
            return torch.stack([loss(x, weight, t, bias=bias) for x, t in batches])

        return of_each_batch

    values = inputs(12 * 4, 64, 101, target.device)
    with triton():
        check_numerics(losses(linear_cross_entropy), losses(eager), torch.bfloat16, values)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 64 rows, whatever the vocabulary is."""
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 64)


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["float32", "bfloat16", "bfloat16-no-bias"],
)
def test_numerics_of_several_chunks(target, check, short_chunks, bias, dtype):
    """Three of them; in the second no row counts."""
    targets = some_targets(134, 101, target.device)
    targets[64:128] = IGNORED
    launches = check(dtype, inputs(134, 20, 101, target.device, bias=bias), targets)
    assert len(launches) in (0, 6)


@pytest.mark.parametrize("bytes_per_row", [128, 100_608, 2_000_000])
@pytest.mark.parametrize("N", [1, 63, 8192, 20_000, 10**6])
def test_chunks_are_bounded_and_aligned(N, bytes_per_row):
    length = kernels._chunk_rows(N, bytes_per_row)
    assert length % 64 == 0
    assert min(length, N) * bytes_per_row <= max(2**30 + 63 * bytes_per_row, 256 * bytes_per_row)
    assert length >= N or length >= 256


def run(triton, values, targets, seed=1, **options):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    with triton(checks=True, seed=seed):
        loss = linear_cross_entropy(**leaves, targets=targets, **options)
        loss.backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def test_the_same_bits_every_time_and_without_gradients(target, triton, short_chunks):
    targets = some_targets(70, 101, target.device)
    values = inputs(70, 20, 101, target.device)
    first, second = (run(triton, values, targets, seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with triton(checks=True):
        loss = linear_cross_entropy(**values, targets=targets)
    assert torch.equal(loss, first["loss"]) and not loss.requires_grad


def test_ignored_rows_are_never_read(target, triton):
    values = inputs(6, 16, 101, target.device)
    targets = torch.tensor([3, IGNORED, 0, IGNORED, 100, 1], device=target.device)
    expected = run(triton, values, targets)
    values["x"][targets == IGNORED] = torch.nan
    found = run(triton, values, targets)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not found["x"][targets == IGNORED].any() and found["x"][0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("N", [0, 5])
def test_no_counted_row_gives_zero(target, triton, N, reduction):
    targets = torch.full((N,), IGNORED, device=target.device)
    values = inputs(N, 16, 101, target.device)
    for found in run(triton, values, targets, z_loss=0.1, reduction=reduction).values():
        assert not found.any()


def test_a_logit_of_minus_infinity_is_a_token_that_never_comes(target, triton):
    values = inputs(4, 16, 1000, target.device)
    values["bias"][:700] = -torch.inf  # whole vectors, and whole warps' first ones
    values["bias"][[720, 999]] = -torch.inf
    targets = torch.tensor([701, 998, 719, IGNORED], device=target.device)
    found = run(triton, values, targets)
    leaves = {name: value.double().requires_grad_() for name, value in values.items()}
    loss = eager(**leaves, targets=targets)
    loss.backward()
    expected = {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 57, 100])
def test_nan_is_not_lost(target, triton, position):
    values = inputs(2, 16, 101, target.device, bias=False)
    values["weight"][position] = torch.nan
    with triton():
        loss = linear_cross_entropy(**values, targets=torch.tensor([3, 4], device=target.device))
    assert loss.isnan()


@pytest.mark.parametrize("bad", [-1, 101, 2**40])
def test_a_target_out_of_range_makes_the_loss_nan(target, triton, bad):
    """Waiting for the device to raise an error would cost every step; nothing else is read."""
    targets = torch.tensor([3, bad], device=target.device)
    with triton(checks=True):
        loss = linear_cross_entropy(**inputs(2, 16, 101, target.device), targets=targets)
    assert loss.isnan()


def test_strides_do_not_matter(target, triton):
    values = inputs(6, 16, 101, target.device)
    targets = some_targets(6, 101, target.device)
    expected = run(triton, values, targets)
    leaves = {
        "x": torch.stack((values["x"],) * 2, -1)[..., 0],
        "weight": values["weight"].t().contiguous().t(),
        "bias": torch.stack((values["bias"],) * 2, -1)[..., 0],
    }
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with triton(checks=True):
        loss = linear_cross_entropy(**leaves, targets=torch.stack((targets,) * 2, -1)[..., 0])
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name])


def test_float64_is_refused(target, triton):
    x = torch.randn(2, 8, device=target.device, dtype=torch.float64)
    targets = torch.tensor([0, 1], device=target.device)
    with triton(), pytest.raises(RuntimeError, match="got float64"):
        linear_cross_entropy(x, x, targets)
