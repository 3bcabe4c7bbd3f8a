"""Windows of tokens: batches that depend on (seed, step) only, and BERT's masks."""

import pytest
import torch
from torch.utils.data import DataLoader

from fastformer.train.data import DataError
from fastformer.train.data.text import train_tokenizer
from fastformer.train.data.windows import (
    IGNORED,
    CausalWindows,
    MaskedWindows,
    Masking,
    check_ids,
    validation_windows,
)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_check_ids(dtype):
    tokens = torch.tensor([3, 99, 7], dtype=dtype)
    check_ids(tokens, 100)
    check_ids(tokens[:0], 1)
    with pytest.raises(DataError, match="vocabulary size 99, got 99 at position 1"):
        check_ids(tokens, 99)
    with pytest.raises(DataError, match="negative, got -1"):
        check_ids(torch.tensor([0, -1], dtype=dtype), 99)


SPECIALS = (0, 1, 2, 3, 4)
MASKING = Masking(vocab_size=1000, cls_id=2, sep_id=3, mask_id=4, special_ids=SPECIALS)


def counting_tokens(count=995):
    """Each token tells its position: position p holds the id 5 + p."""
    return torch.arange(5, 5 + count, dtype=torch.int32)


def windows(kind, **changes):
    arguments = {
        "tokens": counting_tokens(),
        "window": 32,
        "batch_size": 6,
        "seed": 11,
    } | changes
    if kind == "masked":
        return MaskedWindows(masking=MASKING, **arguments)
    return CausalWindows(**arguments)


both = pytest.mark.parametrize("kind", ["causal", "masked"])


def test_causal_windows_are_windows_with_targets_one_on():
    batches = [windows("causal")[step] for step in range(300)]
    for batch in batches:
        assert batch["ids"].dtype == batch["targets"].dtype == torch.int64
        assert torch.equal(batch["ids"] - batch["ids"][:, :1], torch.arange(32).expand(6, 32))
        assert torch.equal(batch["targets"], batch["ids"] + 1)
    starts = torch.cat([batch["ids"][:, 0] - 5 for batch in batches])
    # 1,800 uniform draws from 963 starts: both ends occur, the mean is near the middle.
    assert starts.min() <= 3 and 959 <= starts.max() <= 995 - 33
    assert abs(starts.double().mean() - 481) < 3 * 278 / 1800**0.5


@both
def test_batches_depend_on_seed_and_step_only(kind):
    torch.manual_seed(0)
    first = windows(kind)[5]
    torch.manual_seed(1)
    assert equal(windows(kind)[5], first)
    assert not equal(windows(kind)[6], first)
    assert not equal(windows(kind, seed=12)[5], first)


@both
def test_loader_workers_and_resumption_change_nothing(kind):
    dataset = windows(kind)
    expected = [dataset[step] for step in range(9)]
    for workers, first_step in [(0, 0), (1, 0), (2, 0), (2, 4)]:
        loader = DataLoader(
            dataset, sampler=range(first_step, 9), batch_size=None, num_workers=workers
        )
        loaded = list(loader)
        assert len(loaded) == 9 - first_step
        assert all(map(equal, loaded, expected[first_step:]))


@both
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batch_of_one_rank(kind, world_size):
    whole = windows(kind)[3]
    for rank in range(world_size):
        part = windows(kind, batch_size=6 // world_size, rank=rank, world_size=world_size)[3]
        for name in whole:
            assert torch.equal(part[name], whole[name][rank::world_size])


@both
def test_shortest_text_and_one_token_less(kind):
    needed = 33 if kind == "causal" else 30
    assert windows(kind, tokens=counting_tokens(needed))[0]["ids"].shape == (6, 32)
    short = counting_tokens(needed - 1)
    masking = MASKING if kind == "masked" else None
    for part, make in [
        ("training", lambda: windows(kind, tokens=short)),
        ("validation", lambda: validation_windows(short, 32, 6, masking)),
    ]:
        with pytest.raises(DataError, match=f"{part} window .* {needed} tokens, got {needed - 1}"):
            make()


def original_ids(batch, row):
    """The tokens of a row before corruption, from an untouched one and the counting."""
    ids, targets = batch["ids"][row], batch["targets"][row]
    place = next(i for i in range(1, 31) if targets[i] == IGNORED)
    return torch.arange(32) + (ids[place] - place)


def test_masked_rows_are_framed_and_targets_are_the_original_tokens():
    dataset = windows("masked")
    starts = []
    for step in range(50):
        batch = dataset[step]
        assert (batch["ids"][:, 0] == 2).all() and (batch["ids"][:, -1] == 3).all()
        for row in range(6):
            chosen = batch["targets"][row] != IGNORED
            assert not chosen[0] and not chosen[-1]
            assert chosen.sum() == round(0.15 * 30)
            original = original_ids(batch, row)
            assert torch.equal(batch["targets"][row][chosen], original[chosen])
            untouched = ~chosen
            untouched[[0, -1]] = False
            assert torch.equal(batch["ids"][row][untouched], original[untouched])
            starts.append(int(original[1]) - 5)
    assert min(starts) >= 0 and max(starts) <= 995 - 30


def test_mask_rates():
    dataset = windows("masked", batch_size=200, window=102)
    positions = torch.zeros(102)
    masked = kept = replaced = 0
    substitutes = torch.zeros(1000)
    for step in range(40):
        batch = dataset[step]
        chosen = batch["targets"] != IGNORED
        positions += chosen.sum(0)
        ids, targets = batch["ids"][chosen], batch["targets"][chosen]
        masked += int((ids == 4).sum())
        kept += int((ids == targets).sum())
        other = ids[(ids != 4) & (ids != targets)]
        replaced += len(other)
        substitutes += torch.bincount(other, minlength=1000)
    total = 40 * 200 * 15
    assert masked + kept + replaced == total
    # Four standard deviations of a binomial count.
    assert abs(masked / total - 0.8) < 4 * (0.16 / total) ** 0.5
    assert abs(replaced / total - 0.1) < 4 * (0.09 / total) ** 0.5 + 0.1 / 995
    assert abs(kept / total - 0.1) < 4 * (0.09 / total) ** 0.5 + 0.1 / 995
    assert substitutes[:5].sum() == 0 and (substitutes[5:] > 0).float().mean() > 0.99
    assert positions[0] == positions[-1] == 0
    assert (positions[1:-1] / 8000 - 0.15).abs().max() < 5 * (0.1275 / 8000) ** 0.5


def test_every_row_has_a_target_and_specials_are_never_chosen():
    # Ordinary tokens are rare: 3 among 400, the rest separators and unknowns.
    tokens = torch.tensor([3, 1] * 200, dtype=torch.int32)
    tokens[[10, 11, 390]] = torch.tensor([500, 501, 502], dtype=torch.int32)
    dataset = windows("masked", tokens=tokens)
    for step in range(50):
        targets = dataset[step]["targets"]
        assert ((targets != IGNORED).sum(1) >= 1).all()
        assert set(targets.unique().tolist()) <= {IGNORED, 500, 501, 502}
    with pytest.raises(DataError, match="30 special tokens only"):
        windows("masked", tokens=tokens[20:50])


@pytest.mark.parametrize(("window", "expected"), [(3, 1), (4, 1), (20, 3), (512, 76)])
def test_number_of_targets_is_fixed_and_at_least_one(window, expected):
    targets = windows("masked", window=window)[0]["targets"]
    assert ((targets != IGNORED).sum(1) == expected).all()


def test_mask_probability_reaches_every_token():
    masking = Masking(1000, 2, 3, 4, SPECIALS, probability=1.0)
    batch = MaskedWindows(counting_tokens(), 32, 6, 0, masking)[0]
    assert (batch["targets"][:, 1:-1] != IGNORED).all()
    for wrong in (0, 1.5):
        with pytest.raises(DataError, match=f"got {wrong}"):
            Masking(1000, 2, 3, 4, SPECIALS, probability=wrong)


def test_masked_windows_reject_a_foreign_vocabulary_and_a_tiny_window():
    with pytest.raises(DataError, match="got 1000 at position 995"):
        windows("masked", tokens=counting_tokens(996))
    with pytest.raises(DataError, match=r"at least 3 positions .* got 2"):
        windows("masked", window=2)


def test_masking_of_a_tokenizer():
    texts = ["the quick brown fox"] * 9
    bpe, wordpiece = train_tokenizer("bpe", texts, 300), train_tokenizer("wordpiece", texts, 60)
    masking = Masking.of(wordpiece, probability=0.3)
    assert (masking.cls_id, masking.sep_id, masking.mask_id) == (2, 3, 4)
    assert masking.special_ids == SPECIALS
    assert masking.vocab_size == wordpiece.get_vocab_size()
    assert masking.probability == 0.3
    with pytest.raises(DataError, match=r"without \[CLS\], \[SEP\], \[MASK\]"):
        Masking.of(bpe)


def test_causal_validation_covers_the_text_once_in_order():
    batches = validation_windows(counting_tokens(), 32, 6)
    assert [len(batch["ids"]) for batch in batches] == [6, 6, 6, 6, 6, 1]
    seen = torch.cat([batch["targets"].flatten() for batch in batches])
    assert torch.equal(seen, torch.arange(6, 6 + 31 * 32))
    capped = validation_windows(counting_tokens(), 32, 6, max_batches=2)
    assert len(capped) == 2 and all(map(equal, capped, batches))


def test_masked_validation_is_fixed_and_covers_the_text():
    batches = validation_windows(counting_tokens(), 32, 6, MASKING, seed=3)
    assert [len(batch["ids"]) for batch in batches] == [6, 6, 6, 6, 6, 3]
    starts = [int(original_ids(batch, r)[1]) for batch in batches for r in range(len(batch["ids"]))]
    assert starts == list(range(5, 5 + 33 * 30, 30))
    again = validation_windows(counting_tokens(), 32, 6, MASKING, seed=3, max_batches=3)
    assert len(again) == 3 and all(map(equal, again, batches))
    assert not equal(validation_windows(counting_tokens(), 32, 6, MASKING, seed=4)[0], batches[0])
