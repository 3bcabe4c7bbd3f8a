"""The three tasks: next token (GPT), masked token (BERT), image class (ViT).

A task owns the model and its data, measures the model on a validation batch and shows a sample of
what it has learnt. The loop knows nothing else about what it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.presets import MODELS
from fastformer.train.config import ImageTrainConfig, Kind, RunError, TextTrainConfig, TrainConfig
from fastformer.train.data import Progress
from fastformer.train.data.image_batches import (
    ArraySource,
    ImageBatches,
    ImageSource,
    PhotoSource,
    ValidationBatches,
    array_statistics,
)
from fastformer.train.data.images import load_digits, scan_folder, split_arrays
from fastformer.train.data.text import (
    END_OF_TEXT,
    encode_documents,
    load_tokenizer,
    read_documents,
    split_documents,
    train_tokenizer,
)
from fastformer.train.data.windows import (
    CausalWindows,
    MaskedWindows,
    Masking,
    check_ids,
    validation_windows,
)
from fastformer.train.folder import RunFolder
from fastformer.train.processes import Share
from fastformer.train.report import Screen
from fastformer.transformer import BERT, GPT, IGNORE_INDEX, TransformerConfig, ViT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_VALIDATION_BATCHES = 64
_SAMPLE_TOKENS = 200
_LEARNT = ("bpe", "wordpiece", "char")


@dataclass
class Totals:
    """Sums over validation examples, so that metrics weigh every example the same."""

    loss: float = 0.0
    count: int = 0
    correct: int = 0

    def add(self, loss: Tensor, count: int, correct: int = 0) -> None:
        self.loss += float(loss)
        self.count += count
        self.correct += correct


def _seeded_model(kind: Kind, config: TransformerConfig, seed: int) -> Any:
    # Weights come from the run's seed alone; the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class: Any = MODELS[kind]
        return model_class(config)


def _skipped(names: Sequence[str], screen: Screen) -> None:
    for name in names[:10]:
        screen.line(f"skipped {name}")
    if len(names) > 10:
        screen.line(f"skipped {len(names) - 10} more")


class _TextTask:
    """Text, its tokenizer and its two token streams."""

    unit = "tokens"
    separator: str

    def __init__(self, config: TextTrainConfig, folder: RunFolder, screen: Screen) -> None:
        config.check_text()
        with screen.bar("reading text", None) as progress:
            corpus = read_documents(config.data, progress)
        _skipped(corpus.skipped, screen)
        self.data_sha256 = corpus.sha256
        train, val = split_documents(corpus.documents)
        self.tokenizer = self._tokenizer(config, folder, [d.text for d in train], screen)
        separator = self.separator if self.tokenizer.token_to_id(self.separator) else None
        with screen.bar("tokenizing", None) as progress:
            self.train_tokens = self._encode(train, separator, progress)
            self.val_tokens = self._encode(val, separator, None)
        self.vocab_size = self.tokenizer.get_vocab_size()
        for tokens in (self.train_tokens, self.val_tokens):
            check_ids(tokens, self.vocab_size)
        name = "Python's language reference" if config.data is None else str(config.data)
        self.about = [
            f"data: {name}, {len(self.train_tokens):,} training and {len(self.val_tokens):,}"
            f" validation tokens, vocabulary of {self.vocab_size:,}"
        ]

    def _encode(self, documents: Any, separator: str | None, progress: Progress | None) -> Tensor:
        return encode_documents(self.tokenizer, documents, separator, progress)

    def _tokenizer(
        self, config: TextTrainConfig, folder: RunFolder, texts: list[str], screen: Screen
    ) -> Tokenizer:
        stored = folder / "tokenizer.json"
        if stored.exists():  # of the run that is resumed, or made by the leading process
            return load_tokenizer(stored)
        if config.tokenizer in _LEARNT:
            with screen.bar(f"learning a {config.tokenizer} tokenizer", None):
                tokenizer = train_tokenizer(config.tokenizer, texts, config.vocab_size)
        else:
            path = Path(config.tokenizer)
            if not path.exists():
                raise RunError(
                    f"--tokenizer must be {', '.join(_LEARNT)} or the path of a tokenizer.json,"
                    f" got {config.tokenizer!r}"
                )
            tokenizer = load_tokenizer(path)
        return tokenizer

    def save(self, folder: RunFolder) -> None:
        folder.write_text("tokenizer.json", self.tokenizer.to_str(pretty=True))


class GPTTask(_TextTask):
    """Predict each token from those before it."""

    separator = END_OF_TEXT
    has_accuracy = False

    def __init__(
        self, config: TextTrainConfig, folder: RunFolder, share: Share, screen: Screen
    ) -> None:
        super().__init__(config, folder, screen)
        T, B = config.max_tokens, config.batch_size
        self.train = CausalWindows(
            self.train_tokens, T, B, config.seed, share.rank, share.world_size
        )
        self.validation = validation_windows(
            self.val_tokens, T, B, max_batches=_MAX_VALIDATION_BATCHES
        )
        self.units_per_batch = T * B
        model_config = config.model_config(vocab_size=self.vocab_size)
        self.model: GPT = _seeded_model("gpt", model_config, config.seed)

    def measure(self, inputs: Tensor, targets: Tensor, totals: Totals) -> None:
        loss = self.model(inputs, targets)
        totals.add(loss.double() * targets.numel(), targets.numel())

    def sample(self, device: torch.device) -> str:
        start = self.tokenizer.token_to_id(END_OF_TEXT)
        first = int(self.val_tokens[0]) if start is None else start
        prompt = torch.full((1, 1), first, device=device)
        ids = self.model.generate(prompt, _SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=0)
        return str(self.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)).strip()


class BERTTask(_TextTask):
    """Predict the tokens that were hidden, from both sides."""

    separator = "[SEP]"
    has_accuracy = True

    def __init__(
        self, config: TextTrainConfig, folder: RunFolder, share: Share, screen: Screen
    ) -> None:
        super().__init__(config, folder, screen)
        T, B = config.max_tokens, config.batch_size
        masking = Masking.of(self.tokenizer)
        self.train = MaskedWindows(
            self.train_tokens, T, B, config.seed, masking, share.rank, share.world_size
        )
        self.validation = validation_windows(
            self.val_tokens, T, B, masking, max_batches=_MAX_VALIDATION_BATCHES
        )
        self.units_per_batch = T * B
        model_config = config.model_config(vocab_size=self.vocab_size)
        self.model: BERT = _seeded_model("bert", model_config, config.seed)

    def _predict(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the hidden tokens only, and what they are."""
        hidden = targets != IGNORE_INDEX
        states = self.model.hidden(inputs)[hidden]
        return self.model.head(self.model.head_transform(states)).float(), targets[hidden]

    def measure(self, inputs: Tensor, targets: Tensor, totals: Totals) -> None:
        logits, truth = self._predict(inputs, targets)
        loss = F.cross_entropy(logits, truth, reduction="sum")
        totals.add(loss, truth.numel(), int((logits.argmax(-1) == truth).sum()))

    def sample(self, device: torch.device) -> str:
        batch = self.validation[0]
        inputs, targets = (batch[name][:4].to(device) for name in ("ids", "targets"))
        logits, _ = self._predict(inputs, targets)
        filled = inputs.clone()
        filled[targets != IGNORE_INDEX] = logits.argmax(-1)
        lines = []
        for ids, guess, truth in zip(
            filled.tolist(), filled.tolist(), targets.tolist(), strict=True
        ):
            shown = [
                self._mark(token, guess[i], truth[i]) for i, token in enumerate(ids[1:-1], start=1)
            ]
            lines.append(" ".join(shown).replace(" ##", ""))
        return "\n".join(lines)

    def _mark(self, token: int, guess: int, truth: int) -> str:
        """The token; a hidden one in brackets, with the true one when the guess is wrong."""
        word = self.tokenizer.id_to_token
        if truth == IGNORE_INDEX:
            return str(word(token))
        return f"[{word(guess)}]" if guess == truth else f"[{word(guess)}, not {word(truth)}]"


class ImageTask:
    """Tell the class of an image."""

    unit = "images"
    has_accuracy = True

    def __init__(self, config: ImageTrainConfig, share: Share, screen: Screen) -> None:
        train, val, self.classes, channels = self._sources(config, screen)
        B = config.batch_size
        self.train = ImageBatches(train, B, config.seed, share.rank, share.world_size)
        self.validation = ValidationBatches(val, B)
        self.units_per_batch = B
        model_config = config.model_config(num_classes=len(self.classes), channels=channels)
        self.model: ViT = _seeded_model("vit", model_config, config.seed)
        name = "scikit-learn's digits" if config.data is None else str(config.data)
        self.about = [
            f"data: {name}, {len(train.labels):,} training and {len(val.labels):,} validation"
            f" images of {len(self.classes)} classes"
        ]

    def _sources(
        self, config: ImageTrainConfig, screen: Screen
    ) -> tuple[ImageSource, ImageSource, tuple[str, ...], int]:
        config.model_config()  # a size that does not fit is told before any image is read
        if config.data is None:
            digits = load_digits()
            if config.image_size != digits.images.shape[-1]:
                raise RunError(
                    f"the digits are {digits.images.shape[-1]} pixels wide, got --image-size"
                    f" {config.image_size}; name an image folder with --data"
                )
            train, val = split_arrays(digits)
            mean, std = array_statistics(train)
            self.data_sha256 = "digits of scikit-learn"
            shifted = ArraySource(train, mean, std, shift=True)
            return shifted, ArraySource(val, mean, std), digits.classes, 1
        with screen.bar("checking images", None) as progress:
            folder = scan_folder(config.data, progress)
        _skipped(folder.skipped, screen)
        self.data_sha256 = folder.sha256
        size = config.image_size
        sides = (PhotoSource(folder.train, size), PhotoSource(folder.val, size))
        return *sides, folder.train.classes, 3

    def save(self, folder: RunFolder) -> None:
        folder.write_json("classes.json", list(self.classes))

    def measure(self, inputs: Tensor, targets: Tensor, totals: Totals) -> None:
        logits = self.model(inputs).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        totals.add(loss, targets.numel(), int((logits.argmax(-1) == targets).sum()))

    def sample(self, device: torch.device) -> str:
        count = len(self.validation.source.labels)
        numbers = [i * count // 8 for i in range(min(8, count))]
        images = self.validation.source.load(numbers, None, seed=0)
        chance = self.model(images.to(device)).float().softmax(-1).cpu()
        lines = []
        for number, row in zip(numbers, chance, strict=True):
            truth = self.classes[int(self.validation.source.labels[number])]
            guess = self.classes[int(row.argmax())]
            mark = "" if guess == truth else "  wrong"
            lines.append(
                f"image {number}: {truth}, predicted {guess} ({float(row.max()):.0%}){mark}"
            )
        return "\n".join(lines)


Task = GPTTask | BERTTask | ImageTask


def build_task(
    kind: Kind, config: TrainConfig, folder: RunFolder, share: Share, screen: Screen
) -> Task:
    """Read the data and build the model. Raises DataError or RunError, each one clear line."""
    if isinstance(config, ImageTrainConfig):
        return ImageTask(config, share, screen)
    assert isinstance(config, TextTrainConfig)
    return (GPTTask if kind == "gpt" else BERTTask)(config, folder, share, screen)
