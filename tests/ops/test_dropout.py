"""Dropout masks, against Philox-4x32-10 written in NumPy, itself checked with published answers."""

import numpy as np
import pytest
import torch

import fastformer
from fastformer import _library
from fastformer.ops import dropout, dropout_mask

OP = "dropout"

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

# rows, cols, p, seed, offset, site: every kind of tail, and every word of key and counter in use.
MASKS = {
    "one-draw": (3, 8, 0.5, 0, 0, 0),
    "tail-of-1": (5, 9, 0.1, 1, 2, 3),
    "tail-of-7": (20, 1023, 0.1, 12345, 0, 0),
    "one-element": (1, 1, 0.3, 99, 4, 0),
    "odd-columns": (63, 197, 0.9, 7, 8, 9),
    "offset-above-32-bits": (4, 100, 0.25, 3, 2**33 + 7, 2),
    "site-carries-into-the-high-word": (4, 100, 0.25, 3, 2**32 - 1, 1),
    "seed-above-32-bits": (4, 100, 0.25, 2**62 - 3, 1, 0),
    "negative-state": (4, 100, 0.25, -5, -7, 3),
    "smallest-p": (4, 100, 1e-9, 1, 1, 0),
    "largest-p": (4, 100, 0.99999, 1, 1, 0),
    "no-rows": (0, 16, 0.5, 1, 1, 0),
    "no-columns": (16, 0, 0.5, 1, 1, 0),
}
masks = pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)


def philox(counter, key):
    """Ten rounds on uint64 arrays that hold 32-bit words; counter (4, ...)."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.asarray(counter, dtype=np.uint64)
    for round_ in range(10):
        k0 = np.uint64((key[0] + round_ * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + round_ * 0xBB67AE85) & 0xFFFFFFFF)
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & word,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & word,
        )
    return np.stack([c0, c1, c2, c3])


def numpy_mask(rows, cols, p, seed, offset, site):
    seed, stream = seed % 2**64, (offset + site) % 2**64
    row, col = np.indices((rows, cols))
    high = np.full_like(row, stream >> 32)
    words = philox(
        np.stack([col // 8, row, np.full_like(row, stream % 2**32), high]),
        (seed % 2**32, seed >> 32),
    )
    halves = np.stack([half for w in words for half in (w & np.uint64(0xFFFF), w >> np.uint64(16))])
    lane = np.take_along_axis(halves, col[None] % 8, axis=0)[0]
    return lane >= min(65535, round(p * 65536))


def state(seed, offset, device):
    return torch.tensor([seed, offset], device=device)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_numpy_philox_gives_the_published_answers(counter, key, words):
    assert philox(counter, key).tolist() == list(words)


@masks
def test_masks_are_those_of_the_definition(backend, case):
    rows, cols, p, seed, offset, site = case
    mask = dropout_mask(rows, cols, p, state(seed, offset, backend), site)
    assert mask.dtype == torch.bool and mask.device.type == backend
    assert np.array_equal(mask.cpu().numpy(), numpy_mask(*case))


@pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))
@pytest.mark.parametrize("shape", [(64, 12345), (1000, 127), (3, 65536)], ids=str)
def test_reference_and_compiled_masks_are_equal(shape):
    rng = state(2**61 + 12345, 2**40 + 1, "cpu")
    found = []
    for name in ("reference", "cpu"):
        with fastformer.backend(name):
            found.append(dropout_mask(*shape, 0.1, rng, site=4))
    assert torch.equal(*found)


@pytest.mark.parametrize("dropout_p", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_that_asked_for(backend, dropout_p):
    rows, cols = 1000, 1023
    mask = dropout_mask(rows, cols, dropout_p, state(1, 2, backend)).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    for dim, count in ((None, rows * cols), (0, rows), (1, cols)):
        dropped = 1 - (mask.mean() if dim is None else mask.mean(dim))
        # 2000 rows and columns are looked at: six deviations happen to none of them by chance.
        assert (dropped - dropout_p).abs().max() < 6 * deviation / count**0.5 + 2**-16


def test_neighbouring_elements_are_independent(backend):
    kept = dropout_mask(1000, 1024, 0.5, state(3, 4, backend)).double() - 0.5
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(8, 1)):
        assert abs((kept * shifted).mean().item() * 4) < 6 / 1000


CHANGES = {"seed": (6, 7, 8), "offset": (5, 17, 8), "site": (5, 7, 9), "far-site": (5, 7, 800)}


@pytest.mark.parametrize("other", CHANGES.values(), ids=CHANGES)
def test_seed_offset_and_site_give_unrelated_masks(backend, other):
    first = dropout_mask(500, 512, 0.5, state(5, 7, backend), 8).double() - 0.5
    seed, offset, site = other
    second = dropout_mask(500, 512, 0.5, state(seed, offset, backend), site).double() - 0.5
    assert abs((first * second).mean().item() * 4) < 6 / 500


def test_site_and_offset_are_one_sum(backend):
    masks = [
        dropout_mask(9, 99, 0.5, state(5, offset, backend), site)
        for offset, site in ((7, 3), (10, 0), (0, 10))
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1 / 3])
def test_kept_elements_are_scaled_and_the_others_zero(backend, dropout_p, dtype):
    x = torch.randn(3, 20, 127, device=backend).to(dtype).requires_grad_()
    grad = torch.randn(3, 20, 127, device=backend).to(dtype)
    out = dropout(x, dropout_p, rng=state(5, 2**35, backend), site=2)
    out.backward(grad)
    keep = torch.from_numpy(numpy_mask(60, 127, dropout_p, 5, 2**35, 2)).view(3, 20, 127)
    keep = keep.to(backend)
    # The exact probability of being kept is a multiple of 2**-16, so the expectation is exact.
    factor = 1 / (1 - round(dropout_p * 65536) / 65536)
    for found, source in ((out, x.detach()), (x.grad, grad)):
        expected = (source.double() * factor).to(dtype)
        torch.testing.assert_close(found.detach(), expected.where(keep, 0.0))
        assert found.dtype == dtype


def test_the_expectation_is_exact(backend):
    """p is rounded to a multiple of 2**-16 and the factor follows it."""
    ones = torch.ones(64, 64, device=backend)
    runs = [dropout(ones, 0.3, rng=state(seed, 0, backend)).double().mean() for seed in range(300)]
    deviation = (0.3 / 0.7) ** 0.5 / (300 * 64 * 64) ** 0.5
    assert abs(torch.stack(runs).mean().item() - 1) < 5 * deviation


def test_dropped_infinities_are_zero(backend):
    x = torch.full((10, 16), torch.inf, device=backend, requires_grad=True)
    out = dropout(x, 0.5, rng=state(1, 2, backend))
    out.backward(torch.full_like(out, torch.inf))
    for found in (out, x.grad):
        assert set(found.unique().tolist()) == {0.0, torch.inf}


def test_zero_probability_changes_nothing(backend):
    x = torch.randn(4, 8, device=backend)
    assert dropout(x, 0.0) is x
    assert dropout_mask(4, 8, 0.0, state(1, 2, backend)).all()


def test_strides_do_not_matter(backend):
    x = torch.randn(6, 5, 16, device=backend)
    rng = state(1, 2, backend)
    view = x.transpose(0, 1)
    assert torch.equal(dropout(view, 0.5, rng=rng), dropout(view.contiguous(), 0.5, rng=rng))


def test_without_a_state_it_follows_torchs_seed(backend):
    x = torch.ones(64, 64, device=backend)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append((dropout(x, 0.5), dropout(x, 0.5)))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[0][1])
    assert not torch.equal(outs[0][0], outs[2][0])


def test_gradcheck(backend):
    x = torch.randn(3, 7, dtype=torch.float64, device=backend, requires_grad=True)
    rng = state(1, 2, backend)
    torch.autograd.gradcheck(lambda x: dropout(x, 0.4, rng=rng), x)


def test_a_second_derivative_is_an_error(backend):
    x = torch.randn(3, 7, device=backend, requires_grad=True)
    (grad,) = torch.autograd.grad(dropout(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
