"""Text for GPT and BERT: documents, their split, tokenisers, and the stream of token ids.

Encoding is quick because long documents are cut into pieces where no tokeniser here looks across
the cut, so that one large file keeps every core busy and offsets are never computed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastformer.train.data import DataError, Progress, visible_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN_CHARACTER = "<unk>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_PIECE_CHARACTERS = 1 << 16
_PIECES_PER_CALL = 64
_WORD_END = re.compile(r"(?<=\S)(?=[ \t\r\n])")


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents, the files passed over (as "name: reason"), and the hash of names and texts."""

    documents: tuple[Document, ...]
    skipped: tuple[str, ...]
    sha256: str


def read_documents(source: Path | None, on_progress: Progress | None = None) -> Corpus:
    """Read a corpus: the language reference that ships inside Python, a file, or a folder.

    `None` takes the topics of `pydoc_data`, sorted by name (about 470 KB; the text varies with
    the version of Python, so compare `sha256`). A file of any name is one document. A folder
    gives one document per file below it whose name ends in one of `TEXT_SUFFIXES`, sorted by
    path, without hidden files; what is not UTF-8 text, or is empty, is skipped and named.
    Raises DataError when nothing is left.
    """
    skipped: list[str] = []
    if source is None:
        documents = _language_reference()
    elif source.is_file():
        documents = [Document(source.name, _read_text(source))]
    elif source.is_dir():
        files, skipped = visible_files(source)
        files = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
        documents = []
        for done, path in enumerate(files, start=1):
            name = path.relative_to(source).as_posix()
            try:
                documents.append(Document(name, _read_text(path)))
            except DataError as error:
                skipped.append(f"{name}: {error}")
            if on_progress:
                on_progress(done, len(files))
        if not documents:
            reasons = f"; skipped {len(skipped)}, first {skipped[0]}" if skipped else ""
            raise DataError(
                f"text: the folder must hold UTF-8 files named {' '.join(TEXT_SUFFIXES)}, "
                f"got none in {source}{reasons}"
            )
    else:
        raise DataError(f"text: no such file or folder: {source}; check the path")
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            # Lengths keep ("ab", "c") and ("a", "bc") apart.
            encoded = part.encode("utf-8", "surrogateescape")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return Corpus(tuple(documents), tuple(skipped), digest.hexdigest())


def _language_reference() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "text: the default text (module pydoc_data of Python's standard library) is not "
            "installed; install the full standard library (Debian: libpython3-stdlib) or name "
            "a text file or folder"
        ) from error
    return [Document(name, topics[name]) for name in sorted(topics)]


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"text: {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error
    if "\0" in text:
        # UTF-16 without a byte-order mark, and most binary formats, decode as UTF-8 with NULs.
        raise DataError(f"text: {path} is not UTF-8 text (it holds NUL); convert it to UTF-8")
    if not text.strip():
        raise DataError(f"text: {path} is empty; name a file with text in it")
    return text


def split_documents(
    documents: Iterable[Document], fraction: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """Split every document in two: its last `fraction` is for validation, the rest for training.

    nanoGPT's tail rule, for each document on its own, so that both sides speak of everything.
    The cut is moved to the nearest line end, else white space, within half the tail (at most
    1,000 characters); with neither it falls inside a word. Every character lands on exactly one
    side; a side without characters is left out.
    """
    if not 0 < fraction < 1:
        raise DataError(f"text: the validation fraction must be between 0 and 1, got {fraction}")
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        cut = _cut_near(document.text, fraction)
        for side, text in ((train, document.text[:cut]), (val, document.text[cut:])):
            if text:
                side.append(Document(document.name, text))
    return train, val


def _cut_near(text: str, fraction: float) -> int:
    target = round(len(text) * (1 - fraction))
    reach = min(1000, (len(text) - target) // 2, target // 2)
    first = target - reach
    nearby = text[first : target + reach]
    for boundary in (r"\n", r"\s"):
        cuts = [first + match.end() for match in re.finditer(boundary, nearby)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return target


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokeniser with at most `vocab_size` entries; same texts, same result.

    "bpe": byte-level BPE as GPT-2's, any text comes back exactly, special token `<|endoftext|>`.
    "wordpiece": lower-casing WordPiece as bert-base-uncased, specials `BERT_SPECIALS`.
    "char": one entry per character, the most frequent ones when they are too many, others
    become `<unk>`; special token `<|endoftext|>`.
    All are `tokenizers.Tokenizer`: `save(path)` writes one tokenizer.json for every kind.
    """
    pieces = [piece for text in texts for piece in _pieces(text)]
    if not pieces:
        raise DataError("text: a tokeniser needs text to learn from, got none")
    smallest = {"bpe": 257, "wordpiece": len(BERT_SPECIALS) + 2, "char": 3}
    if kind not in smallest:
        raise DataError(f"text: the tokeniser must be one of {', '.join(smallest)}, got {kind!r}")
    if vocab_size < smallest[kind]:
        raise DataError(
            f"text: a {kind} vocabulary must have at least {smallest[kind]} entries, "
            f"got {vocab_size}"
        )
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "char": _train_char}
    return train[kind](pieces, vocab_size)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, with truncation and padding switched off: documents are long."""
    if not path.is_file():
        raise DataError(f"text: no such tokeniser file: {path}; check the path")
    try:
        tokenizer = _tokenizers().Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise DataError(
            f"text: {path} is not a tokeniser file ({error}); it must be a tokenizer.json as "
            "the tokenizers library writes it"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "text needs the tokenizers library: pip install 'fastformer[train]'"
        ) from error
    return tokenizers


def _train_bpe(pieces: list[str], vocab_size: int) -> Tokenizer:
    lib = _tokenizers()
    byte_level = lib.pre_tokenizers.ByteLevel
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def _train_wordpiece(pieces: list[str], vocab_size: int) -> Tokenizer:
    lib = _tokenizers()

    def untrained(vocab: dict[str, int]) -> Any:
        tokenizer = lib.Tokenizer(lib.models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = lib.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = lib.decoders.WordPiece()
        return tokenizer

    def learn(first_entries: Sequence[str], size: int) -> dict[str, int]:
        trainer = lib.trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=list(first_entries),
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer = untrained({})
        tokenizer.train_from_iterator(pieces, trainer)
        return tokenizer.get_vocab()

    normalizer = untrained({}).normalizer
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(normalizer.normalize_str(piece))
    # A character may need two entries, at the start of a word and after it ("##x").
    alphabet = _most_frequent(counts, (vocab_size - len(BERT_SPECIALS)) // 2)
    # The trainer numbers the "##x" in the order of a randomly seeded hash map and breaks ties
    # between merges by number: another vocabulary in every process. So a first pass collects the
    # single characters, and the second is given them in a fixed order, as if they were special.
    characters = learn((), 0)
    vocab = learn([*BERT_SPECIALS, *sorted(characters)], vocab_size)
    tokenizer = untrained(vocab)
    tokenizer.add_special_tokens(list(BERT_SPECIALS))
    tokenizer.post_processor = lib.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _train_char(pieces: list[str], vocab_size: int) -> Tokenizer:
    lib = _tokenizers()
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    entries = [END_OF_TEXT, UNKNOWN_CHARACTER, *_most_frequent(counts, vocab_size - 2)]
    vocab = {entry: number for number, entry in enumerate(entries)}
    # BPE without merges: nine times as fast as WordLevel behind a splitting pre-tokeniser.
    tokenizer = lib.Tokenizer(lib.models.BPE(vocab, [], unk_token=UNKNOWN_CHARACTER))
    tokenizer.decoder = lib.decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    """The `limit` most frequent characters, sorted; equal counts in order of code point."""
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(ranked[:limit])


def encode_documents(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    separator: str | None,
    on_progress: Progress | None = None,
) -> torch.Tensor:
    """Encode documents to one int32 stream (N,), the id of `separator` after each document.

    The spelling of a special token inside the text is text, as in nanoGPT's `encode_ordinary`:
    a file that speaks of `[MASK]` holds no mask. Documents without tokens add no separator.
    """
    separator_id = None
    if separator is not None:
        separator_id = tokenizer.token_to_id(separator)
        if separator_id is None:
            raise DataError(
                f"text: the tokeniser must hold the separator {separator!r}, got none among its "
                f"{tokenizer.get_vocab_size()} entries; train one of the right kind"
            )
    pieces = [(i, piece) for i, doc in enumerate(documents) for piece in _pieces(doc.text)]
    parts: list[torch.Tensor] = []
    last_owner = None
    as_before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for first in range(0, len(pieces), _PIECES_PER_CALL):
            group = pieces[first : first + _PIECES_PER_CALL]
            encoded = tokenizer.encode_batch_fast(
                [piece for _, piece in group], add_special_tokens=False
            )
            for (owner, _), encoding in zip(group, encoded, strict=True):
                if not encoding.ids:
                    continue
                if separator_id is not None and last_owner not in (None, owner):
                    parts.append(torch.tensor([separator_id], dtype=torch.int32))
                parts.append(torch.tensor(encoding.ids, dtype=torch.int32))
                last_owner = owner
            if on_progress:
                on_progress(first + len(group), len(pieces))
    finally:
        tokenizer.encode_special_tokens = as_before
    if separator_id is not None and parts:
        parts.append(torch.tensor([separator_id], dtype=torch.int32))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def _pieces(text: str) -> Iterator[str]:
    """Cut long text before white space that follows a visible character.

    GPT-2's pattern and BERT's both end a word there, whatever comes next. A cut after a line
    end would not do: GPT-2 reads "\\n\\n" before a letter as two words, at the end as one.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        boundary = _WORD_END.search(text, start + _PIECE_CHARACTERS)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    if start < len(text):
        yield text[start:]
