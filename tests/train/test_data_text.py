"""Text data: reading, splitting, tokenisers, and windows that depend on (seed, step) only."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastformer.train.data import DataError, Purpose, derive_seed, random_stream
from fastformer.train.data.text import (
    BERT_SPECIALS,
    END_OF_TEXT,
    Document,
    encode_documents,
    load_tokenizer,
    read_documents,
    split_documents,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt's the dog's day.\n" * 20,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\r\n" * 20,
    "あのイーハトーヴォのすきとおった風、夏でも底に冷たさをもつ青いそら。\n" * 20,
]
ODD_TEXT = (
    "  a\r\n\n\te\u0301 \u200d\U0001f468\u200d\U0001f469 \ufeff\x07 \u2028 \ufdfd"
    " <|endoftext|> [MASK]\n "
)


# seeds


def test_derive_seed_is_splitmix64():
    # The first outputs of the published generator for the seeds 0 and 1.
    assert derive_seed(-1) == 0xE220A8397B1DCDAF >> 1
    assert derive_seed(0) == 0x910A2DEC89025CC1 >> 1


def test_derive_seed_tells_neighbours_order_and_number_apart():
    inputs = [
        *itertools.product(range(40), repeat=2),
        *((i,) for i in range(40)),
        (),
        (0, 0, 0),
    ]
    seeds = [derive_seed(*ints) for ints in inputs]
    # torch's generator keeps the low 32 bits.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(inputs)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_of_different_purposes_differ():
    draws = {float(torch.rand(1, generator=random_stream(purpose, 1, 2))) for purpose in Purpose}
    assert len(draws) == len(Purpose)


# documents


def test_default_corpus_is_the_language_reference():
    topics = pytest.importorskip("pydoc_data.topics").topics
    corpus = read_documents(None)
    assert {document.name: document.text for document in corpus.documents} == topics
    assert [document.name for document in corpus.documents] == sorted(topics)
    assert corpus.skipped == ()
    assert corpus.sha256 == read_documents(None).sha256


def test_default_corpus_missing_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="libpython3-stdlib"):
        read_documents(None)


def test_folder_is_read_in_order_and_names_what_it_skips(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {
        "b.md": b"zwei\r\n",
        "a.TXT": "\ufeffeins".encode(),
        "sub/c.py": b"print()\n",
        ".hidden.txt": b"hidden",
        ".git/config.txt": b"hidden",
        "image.png": b"\x89PNG",
        "latin.txt": "Äpfel".encode("latin-1"),
        "wide.txt": "wide".encode("utf-16-le"),
        "empty.txt": b" \n",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    progress = []
    corpus = read_documents(tmp_path, lambda done, total: progress.append((done, total)))
    assert corpus.documents == (
        Document("a.TXT", "eins"),
        Document("b.md", "zwei\r\n"),
        Document("sub/c.py", "print()\n"),
    )
    assert [line.split(":")[0] for line in corpus.skipped] == [
        "empty.txt",
        "latin.txt",
        "wide.txt",
    ]
    assert "byte 0" in corpus.skipped[1] and "NUL" in corpus.skipped[2]
    assert progress == [(i, 6) for i in range(1, 7)]
    (tmp_path / "b.md").write_bytes(b"drei")
    assert read_documents(tmp_path).sha256 != corpus.sha256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda path: path.mkdir(), "must hold UTF-8 files"),
        (
            lambda path: (path.mkdir(), (path / "a.txt").write_bytes(b"\xff")),
            "skipped 1, first a.txt",
        ),
    ],
    ids=["missing", "empty", "binary", "empty-folder", "binary-folder"],
)
def test_unusable_source_is_one_clear_line(tmp_path, make, message):
    source = tmp_path / "source"
    make(source)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(source)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


words = st.text(alphabet=st.sampled_from("ab \n\té😀"), max_size=200)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(words, st.text(max_size=60)), max_size=4), st.floats(0.01, 0.99))
def test_split_puts_every_character_on_exactly_one_side(texts, fraction):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    sides = split_documents(documents, fraction)
    train, val = ({document.name: document.text for document in side} for side in sides)
    for document in documents:
        head = train.get(document.name, "")
        assert head + val.get(document.name, "") == document.text
        assert abs(len(head) - (1 - fraction) * len(document.text)) <= len(document.text) / 2 + 1
    assert all(train.values()) and all(val.values())


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("x" * 88 + "\n" + "y" * 111, 180),  # the line end is too far away
        (
            "x" * 171 + " " + "y" * 4 + "\n" + "z" * 23,
            177,
        ),  # a line end before a nearer space
        (
            "x" * 175 + "\n" + "y" * 7 + "\n" + "z" * 16,
            176,
        ),  # the nearer of two line ends
        ("x" * 174 + " " + "y" * 25, 175),  # white space when there is no line end
        ("x" * 200, 180),
    ],
)
def test_split_cuts_at_a_line_end_then_white_space_then_hard(text, cut):
    assert len(text) == 200
    ((train,), (val,)) = split_documents([Document("d", text)])
    assert (len(train.text), val.text) == (cut, text[cut:])


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 10])
def test_split_rejects_a_fraction_outside_0_1(fraction):
    with pytest.raises(DataError, match=f"between 0 and 1, got {fraction}"):
        split_documents([Document("d", "text")], fraction)


# tokenisers


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer("bpe", TEXTS, 400)


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer("wordpiece", TEXTS, 200)


@pytest.mark.parametrize("text", [ODD_TEXT, *TEXTS], ids=["odd", "english", "german", "japanese"])
def test_bpe_gives_any_text_back(bpe, text):
    ids = encode_documents(bpe, [Document("d", text)], None)
    assert bpe.decode(ids.tolist(), skip_special_tokens=False) == text


def test_bpe_without_merges_is_one_token_per_byte():
    tokenizer = train_tokenizer("bpe", TEXTS, 257)
    assert tokenizer.get_vocab_size() == 257
    ids = encode_documents(tokenizer, [Document("d", ODD_TEXT)], None)
    assert len(ids) == len(ODD_TEXT.encode())


def test_char_is_one_token_per_character_and_gives_text_back():
    text = "".join(TEXTS)
    tokenizer = train_tokenizer("char", TEXTS, 1000)
    characters = sorted(set(text))
    assert tokenizer.get_vocab_size() == len(characters) + 2
    ids = encode_documents(tokenizer, [Document("d", text)], None)
    assert ids.tolist() == [characters.index(character) + 2 for character in text]
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.encode("aЖb").ids[1] == tokenizer.token_to_id("<unk>") == 1


def test_char_keeps_the_most_frequent_characters():
    tokenizer = train_tokenizer("char", ["aaaabbbccd"], 5)
    assert set(tokenizer.get_vocab()) == {END_OF_TEXT, "<unk>", "a", "b", "c"}


def test_wordpiece_matches_greedy_longest_first(wordpiece):
    vocab = wordpiece.get_vocab()

    def pieces_of(word):
        found, rest = [], word
        while rest:
            prefix = "##" if found else ""
            length = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in vocab), 0)
            if not length:
                return ["[UNK]"]
            found.append(prefix + rest[:length])
            rest = rest[length:]
        return found

    words = ["foxes", "zwolf", "boxkampfer", "jumpsquick", "dogday", "the", "qat", "ж"]
    expected = [piece for word in words for piece in pieces_of(word)]
    # Lower case and accents are normalised as bert-base-uncased does.
    text = "Foxes Zwölf BOXKÄMPFER jumpsquick dogday The qat ж"
    assert wordpiece.encode(text, add_special_tokens=False).tokens == expected
    assert "[UNK]" in expected and any(piece.startswith("##") for piece in expected)
    framed = wordpiece.encode("the [MASK] dog")
    assert framed.tokens[0] == "[CLS]" and framed.tokens[-1] == "[SEP]"
    assert framed.tokens.count("[MASK]") == 1
    assert [vocab[name] for name in BERT_SPECIALS] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("vocab_size", [8, 40, 90, 300])
def test_wordpiece_vocab_size_is_an_upper_bound(vocab_size):
    tokenizer = train_tokenizer("wordpiece", TEXTS, vocab_size)
    assert tokenizer.get_vocab_size() <= vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_training_gives_the_same_vocabulary_in_every_process(kind):
    script = (
        "import sys, json\n"
        "from fastformer.train.data.text import train_tokenizer\n"
        "kind, texts = json.load(sys.stdin)\n"
        "print(train_tokenizer(kind, texts, 300).to_str(), end='')\n"
    )
    here = train_tokenizer(kind, TEXTS, 300).to_str()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps([kind, TEXTS]),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == here


@pytest.mark.parametrize(
    ("kind", "texts", "vocab_size", "message"),
    [
        (
            "sentencepiece",
            TEXTS,
            300,
            "one of bpe, wordpiece, char, got 'sentencepiece'",
        ),
        ("bpe", TEXTS, 256, "at least 257 entries, got 256"),
        ("wordpiece", TEXTS, 6, "at least 7 entries, got 6"),
        ("char", ["", ""], 100, "got none"),
    ],
)
def test_train_tokenizer_rejects(kind, texts, vocab_size, message):
    with pytest.raises(DataError, match=message):
        train_tokenizer(kind, texts, vocab_size)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_saved_tokenizer_loads_and_encodes_the_same(tmp_path, kind):
    tokenizer = train_tokenizer(kind, TEXTS, 300)
    documents = [Document("d", TEXTS[0] + ODD_TEXT)]
    expected = encode_documents(tokenizer, documents, None)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert torch.equal(encode_documents(loaded, documents, None), expected)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "other-json"])
def test_damaged_tokenizer_file(tmp_path, bpe, damage):
    path = tmp_path / "tokenizer.json"
    whole = bpe.to_str()
    contents = {
        "empty": "",
        "truncated": whole[: len(whole) // 2],
        "other-json": "[1, 2]",
    }
    if damage != "missing":
        path.write_text(contents[damage])
    with pytest.raises(DataError, match="tokeniser file") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


# encoding


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_long_documents_are_encoded_as_if_in_one_piece(monkeypatch, kind, piece):
    # Frequent enough that runs of white space are learned as entries of the vocabulary.
    odd = (
        "\n\n\nwe  are\r\n\r\nit's  " * 20
        + "it's 'll\n\n\nwe \t\r\n\r\n x\n  \n.\u00a0\n\u3000y'd \n\n"
        + ODD_TEXT
    )
    text = "".join(itertools.islice(itertools.cycle([odd, *TEXTS]), 20))
    tokenizer = train_tokenizer(kind, [text], 400)
    tokenizer.encode_special_tokens = True
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr("fastformer.train.data.text._PIECE_CHARACTERS", piece)
    progress = []
    ids = encode_documents(
        tokenizer, [Document("d", text)], None, lambda *counts: progress.append(counts)
    )
    assert ids.tolist() == whole
    assert progress[-1][0] == progress[-1][1] > len(text) / (piece + 200)


def test_separator_follows_each_document_and_special_names_in_text_are_text(bpe, wordpiece):
    end = bpe.token_to_id(END_OF_TEXT)
    documents = [
        Document("a", "the dog"),
        Document("b", f"a {END_OF_TEXT} b"),
        Document("c", ""),
    ]
    progress = []
    ids = encode_documents(bpe, documents, END_OF_TEXT, lambda *counts: progress.append(counts))
    assert ids.dtype == torch.int32
    assert bpe.decode(ids.tolist(), skip_special_tokens=False) == (
        f"the dog{END_OF_TEXT}a {END_OF_TEXT} b{END_OF_TEXT}"
    )
    assert (ids == end).sum() == 2 and ids[-1] == end
    assert progress == [(2, 2)]
    assert bpe.encode(END_OF_TEXT).ids == [end]  # the tokeniser is left as it was
    masks = encode_documents(wordpiece, [Document("d", "[MASK] [CLS] [SEP]")], None)
    assert not set(masks.tolist()) & {2, 3, 4}
    assert encode_documents(bpe, [], END_OF_TEXT).tolist() == []


def test_unknown_separator(bpe):
    with pytest.raises(DataError, match=r"separator '\[SEP\]'"):
        encode_documents(bpe, [Document("d", "x")], "[SEP]")
