"""The head's loss where most rows are ignored: the order of the others, and their products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from fastformer import linear_cross_entropy
from fastformer.kernels import counted_rows
from fastformer.kernels import linear_cross_entropy as kernels
from tests.ptx.test_linear_cross_entropy import (
    IGNORED,
    check_head,
    inputs,
    run,
    some_targets,
)

BF16, FP32 = torch.bfloat16, torch.float32
FORWARD = ["_order_kernel", "_gather_kernel", "_rows_product_kernel", "_cross_entropy_kernel"]
BACKWARD = ["_rows_product_kernel", "_table_product_kernel"]


@pytest.mark.parametrize("ignored", [0.0, 0.85, 1.0])
def test_rows_are_packed_in_order(target, triton, monkeypatch, ignored):
    """Of three blocks of targets; four columns more than x has."""
    monkeypatch.setattr(counted_rows, "_ORDER_BLOCK", 64)
    x, table = torch.randn(150, 20, 2)[..., 0], torch.zeros(7, 24)
    targets = some_targets(150, 7, "cpu", ignored)
    moved = [t.to(target.device) for t in (x, table, targets)]
    with triton(checks=True):
        rows = counted_rows.CountedRows(*moved, IGNORED, several=False)
    expected = (targets != IGNORED).nonzero().squeeze(1)
    count = int(rows.count)
    assert torch.equal(rows.order[:count].cpu(), expected)
    found = rows.rows.cpu()
    assert torch.equal(found[:count, :20], x[expected])
    assert (found[:count, 20] == 1).all() and not found[:count, 21:].any()
    assert not found[count : -(-count // counted_rows.PADDING) * counted_rows.PADDING].any()


@pytest.mark.parametrize(
    ("dtype", "N", "C", "V", "bias"),
    [(BF16, 40, 72, 300, True), (FP32, 20, 67, 67, False)],
    ids=["bfloat16", "float32-odd"],
)
def test_numerics(target, triton, check_numerics, dtype, N, C, V, bias):
    """Of what TMA copies on sm_90, and of what it does not; the odd weight is dense in columns."""
    targets = some_targets(N, V, target.device, ignored=0.85)
    values = inputs(N, C, V, target.device, bias=bias)
    if not bias:
        values["weight"] = values["weight"].t().contiguous().t()
    launches = check_head(triton, check_numerics, dtype, values, targets, mostly_ignored=True)
    assert [launch.name for launch in launches] in ([], [*FORWARD, *FORWARD, *BACKWARD])


@pytest.fixture
def small_tiles(monkeypatch):
    """Few elements are many tiles, of 32 by 32 in groups of 2 rows, and chunks of 64 slots."""
    sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2}
    options = sizes | {"num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(counted_rows, "_launch_options", lambda dtype, tma: options)
    monkeypatch.setattr(counted_rows, "_ORDER_BLOCK", 64)
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 64)


def test_several_chunks_of_which_some_are_empty(target, triton, check_numerics, small_tiles):
    """Of three the first is full, the third empty. The same bits in any order of the programs, and
    from rows that are ignored nothing is read."""
    targets = some_targets(130, 61, target.device, ignored=0.4)
    values = inputs(130, 24, 61, target.device)
    options = {"mostly_ignored": True, "label_smoothing": 0.1}
    check_head(triton, check_numerics, BF16, values, targets, **options)

    values = {name: value.to(BF16) for name, value in values.items()}
    first = run(triton, values, targets, seed=1, **options)
    values["x"][targets == IGNORED] = torch.nan
    second = run(triton, values, targets, seed=2, **options)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["x"][targets == IGNORED].any() and first["x"][targets != IGNORED].any()


@pytest.mark.parametrize("N", [0, 70])
def test_no_counted_row_gives_zero(target, triton, small_tiles, N):
    targets = torch.full((N,), IGNORED, device=target.device)
    values = inputs(N, 16, 61, target.device)
    found = run(triton, values, targets, z_loss=0.1, mostly_ignored=True)
    assert not any(value.any() for value in found.values())
    assert found["x"].shape == values["x"].shape


def test_logits_far_below_zero(target, triton, small_tiles):
    """Beside which the padding of a row, whose logits are zero, would overflow."""
    values, targets = inputs(70, 16, 61, target.device), some_targets(70, 61, target.device)
    expected = run(triton, values, targets, mostly_ignored=True)
    values["bias"] -= 200.0
    found = run(triton, values, targets, mostly_ignored=True)
    assert found["loss"].isfinite()
    with triton(checks=True):
        loss = linear_cross_entropy(**values, targets=targets, mostly_ignored=True)
    assert torch.equal(loss, found["loss"]) and not loss.requires_grad
    for name in ("x", "weight", "bias"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


def test_a_target_out_of_range_makes_the_loss_nan(target, triton, small_tiles):
    targets = some_targets(70, 61, target.device)
    targets[40] = 61
    values = inputs(70, 16, 61, target.device)
    assert run(triton, values, targets, mostly_ignored=True)["loss"].isnan()
