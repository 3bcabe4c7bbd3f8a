"""The Triton kernel of dropout masks, executed as compiled, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer.ops import dropout, dropout_mask

# rows, cols, p, seed, offset, site: tails of every kind, and every word of key and counter in use.
MASKS = {
    "one-element": (1, 1, 0.5, 99, 4, 0),
    "tail-of-1": (20, 9, 0.1, 1, 2, 3),
    "tail-of-7": (63, 1023, 0.1, 12345, 0, 0),
    "several-tiles": (197, 300, 0.9, 7, 8, 9),
    "state-above-32-bits": (4, 100, 0.25, 2**62 - 3, 2**33 + 7, 2),
    "site-carries-into-the-high-word": (4, 100, 0.25, 3, 2**32 - 1, 1),
    "site-above-32-bits": (4, 100, 0.25, 3, 5, 2**40 + 1),
    "negative-state": (4, 100, 0.25, -5, -7, 3),
    "smallest-p": (4, 100, 1e-9, 1, 1, 0),
    "largest-p": (4, 100, 0.99999, 1, 1, 0),
    "no-rows": (0, 16, 0.5, 1, 1, 0),
    "no-columns": (16, 0, 0.5, 1, 1, 0),
}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks_are_those_of_the_reference(target, triton, case):
    rows, cols, p, seed, offset, site = case
    rng = torch.tensor([seed, offset], device=target.device)
    with fastformer.backend("reference"):
        expected = dropout_mask(rows, cols, p, rng, site)
    with triton(checks=True) as launches:
        found = dropout_mask(rows, cols, p, rng, site)
    assert found.dtype == torch.bool and torch.equal(found, expected)
    assert [launch.name for launch in launches] in ([], ["_dropout_mask_kernel"])


def test_forward_and_backward_draw_the_same_mask(target, triton):
    rng = torch.tensor([5, 2**35], device=target.device)
    x = torch.ones(3, 20, 127, device=target.device, requires_grad=True)
    with triton():
        out = dropout(x, 0.25, rng=rng, site=2)
        out.backward(torch.ones_like(out))
    with fastformer.backend("reference"):
        keep = dropout_mask(60, 127, 0.25, rng, 2).view(3, 20, 127)
    expected = torch.where(keep, 4 / 3, 0.0)
    torch.testing.assert_close(out.detach(), expected)
    torch.testing.assert_close(x.grad, expected)
