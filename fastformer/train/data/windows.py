"""Windows of a token stream: causal ones for GPT, masked ones for BERT; fixed ones to validate.

A batch is one vectorised gather, drawn for all ranks at once from a generator of (seed, step);
each rank keeps every world_size-th row, so the global batch is the same on any number of ranks.

B rows of this rank, T tokens, G = B * world_size rows of the global batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastformer.train.data import DataError, Purpose, random_stream
from fastformer.train.data.text import BERT_SPECIALS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = dict[str, Tensor]

IGNORED = -100
"""The target of a position that is not to be predicted (`ignore_index` of cross entropy)."""


def check_ids(tokens: Tensor, vocab_size: int) -> None:
    """Raise DataError unless all ids are in [0, vocab_size), naming the worst and its place."""
    if tokens.numel() == 0:
        return
    position = int(tokens.argmax())
    largest = int(tokens[position])
    if largest >= vocab_size:
        raise DataError(
            f"text: token ids must be below the vocabulary size {vocab_size}, got {largest} at "
            f"position {position}; use the tokeniser that the model was trained with"
        )
    if int(tokens.min()) < 0:
        raise DataError(f"text: token ids must not be negative, got {int(tokens.min())}")


@dataclass(frozen=True)
class Masking:
    """BERT's corruption: which ids are special, and the share of positions to predict.

    A row of T positions has exactly `count(T)` predicted ones, as in the original BERT code
    (a coin per position would change the number from row to row): never [CLS], [SEP] or another
    special token. Of these, 80 % become [MASK], 10 % a random ordinary token, 10 % stay.
    (Devlin et al., BERT, 2018, section 3.1 and appendix A.1.)
    """

    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    probability: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise DataError(
                f"text: mask probability must be above 0 and at most 1, got {self.probability}"
            )

    @classmethod
    def of(cls, tokenizer: Tokenizer, probability: float = 0.15) -> Masking:
        """Take the ids from a tokeniser that has BERT's special tokens."""
        found = ((name, tokenizer.token_to_id(name)) for name in BERT_SPECIALS)
        ids = {name: number for name, number in found if number is not None}
        missing = [name for name in ("[CLS]", "[SEP]", "[MASK]") if name not in ids]
        if missing:
            raise DataError(
                f"text: a BERT tokeniser must hold [CLS], [SEP] and [MASK], got one without "
                f"{', '.join(missing)}; use a WordPiece tokeniser"
            )
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        special |= set(ids.values())
        return cls(
            vocab_size=tokenizer.get_vocab_size(),
            cls_id=ids["[CLS]"],
            sep_id=ids["[SEP]"],
            mask_id=ids["[MASK]"],
            special_ids=tuple(sorted(special)),
            probability=probability,
        )

    @cached_property
    def is_special(self) -> Tensor:
        """bool (V,)"""
        table = torch.zeros(self.vocab_size, dtype=torch.bool)
        table[list(self.special_ids)] = True
        return table

    @cached_property
    def ordinary_ids(self) -> Tensor:
        return (~self.is_special).nonzero().flatten()

    def count(self, window: int) -> int:
        """Positions to predict in a row of `window` positions, [CLS] and [SEP] included."""
        return max(1, round(self.probability * (window - 2)))

    def draw(self, rows: int, window: int, generator: torch.Generator) -> Tensor:
        """Draw what `apply` needs for (rows, window): uniform numbers, a row for each row."""
        return torch.rand(rows, window + 2 * self.count(window), generator=generator)

    def apply(self, tokens: Tensor, uniform: Tensor) -> Batch:
        """Frame tokens (B, T - 2) with [CLS] and [SEP], and corrupt them.

        Returns "ids" and "targets", int64 (B, T); targets are `IGNORED` where not predicted.
        """
        frame = tokens.new_ones(tokens.shape[0], 1)
        ids = torch.cat([frame * self.cls_id, tokens, frame * self.sep_id], dim=1)
        T = ids.shape[1]
        count = self.count(T)
        order, fate, substitute = uniform.split([T, count, count], dim=1)
        order = order.masked_fill(self.is_special[ids], 2.0)
        lowest = order.topk(count, dim=1, largest=False)
        # A row with fewer ordinary tokens than `count` reaches special ones: left alone.
        chosen = lowest.values < 2.0
        positions = lowest.indices
        original = ids.gather(1, positions)
        random_ids = self.ordinary_ids[(substitute * len(self.ordinary_ids)).long()]
        corrupted = original.masked_fill(chosen & (fate < 0.8), self.mask_id)
        corrupted = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, corrupted)
        targets = torch.full_like(ids, IGNORED)
        targets.scatter_(1, positions, original.masked_fill(~chosen, IGNORED))
        return {"ids": ids.scatter(1, positions, corrupted), "targets": targets}


class CausalWindows(Dataset[Batch]):
    """Random windows for next-token prediction, as in nanoGPT.

    `[step]` is {"ids", "targets"}, int64 (B, T): the targets are the ids one position on.
    Rank r of W holds rows r, r + W, ... of the batch that one rank with B * W rows would see.
    """

    def __init__(
        self,
        tokens: Tensor,
        window: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        _check_length(tokens, window + 1, window, "training")
        self.tokens = tokens
        self.window = window
        self.rows = batch_size * world_size
        self.seed = seed
        self.share = slice(rank, None, world_size)

    def __getitem__(self, step: int) -> Batch:
        generator = random_stream(Purpose.WINDOWS, self.seed, step)
        places = len(self.tokens) - self.window
        starts = torch.randint(places, (self.rows,), generator=generator)[self.share]
        return _causal_batch(self.tokens, starts, self.window)


class MaskedWindows(Dataset[Batch]):
    """Random windows for masked language modelling: [CLS], T - 2 tokens, [SEP].

    `[step]` is {"ids", "targets"}, int64 (B, T), corrupted by `masking`; every row has at least
    one target (windows of special tokens only are never drawn). Ranks as in `CausalWindows`.
    """

    def __init__(
        self,
        tokens: Tensor,
        window: int,
        batch_size: int,
        seed: int,
        masking: Masking,
        rank: int = 0,
        world_size: int = 1,
    ):
        _check_masked(tokens, window, masking, "training")
        self.tokens = tokens
        self.window = window
        self.rows = batch_size * world_size
        self.seed = seed
        self.masking = masking
        self.share = slice(rank, None, world_size)
        self.places = len(tokens) - (window - 2) + 1
        ordinary = (~masking.is_special[tokens]).cumsum(0, dtype=torch.int32)
        ordinary = torch.nn.functional.pad(ordinary, (1, 0))
        usable = ordinary[window - 2 :] > ordinary[: self.places]
        self.usable_starts = None if usable.all() else usable.nonzero().flatten()

    def __getitem__(self, step: int) -> Batch:
        generator = random_stream(Purpose.WINDOWS, self.seed, step)
        if self.usable_starts is None:
            starts = torch.randint(self.places, (self.rows,), generator=generator)
        else:
            picks = torch.randint(len(self.usable_starts), (self.rows,), generator=generator)
            starts = self.usable_starts[picks]
        generator = random_stream(Purpose.MASKS, self.seed, step)
        uniform = self.masking.draw(self.rows, self.window, generator)
        rows = _gather(self.tokens, starts[self.share], self.window - 2)
        return self.masking.apply(rows, uniform[self.share])


def validation_windows(
    tokens: Tensor,
    window: int,
    batch_size: int,
    masking: Masking | None = None,
    seed: int = 0,
    max_batches: int | None = None,
) -> Sequence[Batch]:
    """Cut tokens into windows that do not overlap, in order; the last batch may be smaller.

    Batches as those of `CausalWindows`, or with `masking` of `MaskedWindows`, where the masks
    depend on `seed` and the number of the batch only. Tokens after the last whole window, and
    batches past `max_batches`, are not used.
    """
    if masking is None:
        _check_length(tokens, window + 1, window, "validation")
        stride, span = window, window + 1
    else:
        _check_masked(tokens, window, masking, "validation")
        stride = span = window - 2
    starts = torch.arange(0, len(tokens) - span + 1, stride)
    batches = []
    for number, rows in enumerate(starts.split(batch_size)[:max_batches]):
        if masking is None:
            batches.append(_causal_batch(tokens, rows, window))
        else:
            generator = random_stream(Purpose.VALIDATION_MASKS, seed, number)
            uniform = masking.draw(len(rows), window, generator)
            batches.append(masking.apply(_gather(tokens, rows, window - 2), uniform))
    return batches


def _gather(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(length)].long()


def _causal_batch(tokens: Tensor, starts: Tensor, window: int) -> Batch:
    return {
        "ids": _gather(tokens, starts, window),
        "targets": _gather(tokens, starts + 1, window),
    }


def _check_length(tokens: Tensor, needed: int, window: int, part: str) -> None:
    if len(tokens) < needed:
        raise DataError(
            f"text: one {part} window of {window} positions needs {needed:,} tokens, got "
            f"{len(tokens):,}; use a shorter --max-tokens or more text"
        )


def _check_masked(tokens: Tensor, window: int, masking: Masking, part: str) -> None:
    if window < 3:
        raise DataError(
            f"text: a masked window must have at least 3 positions ([CLS], a token, [SEP]), "
            f"got {window}; use a larger --max-tokens"
        )
    _check_length(tokens, window - 2, window, part)
    check_ids(tokens, masking.vocab_size)
    if masking.is_special[tokens].all():
        raise DataError(
            f"text: the {part} text must hold tokens to mask, got {len(tokens):,} special tokens "
            "only; use a tokeniser that knows the text"
        )
