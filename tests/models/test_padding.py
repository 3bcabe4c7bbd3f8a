"""Padded batches: only real tokens are computed on the CPU, and all paths give the same results."""

import pytest
import torch

from fastformer import BERT, GPT, TextConfig
from fastformer.modules import Attention, Block, Packing

TEXT = {"dim": 32, "layers": 3, "heads": 2, "hidden_dim": 48, "vocab_size": 50, "max_tokens": 12}
BERT_LIKE = {
    "pre_norm": False,
    "token_types": 2,
    "embedding_norm": True,
    "head_transform": True,
    "tied_head": True,
    "head_bias": True,
}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.3, "mlp_dropout": 0.1}


def build(model_class, **changes):
    """Larger weights than a fresh model's, so that an error in any part shows."""
    model = model_class(TextConfig(causal=model_class is GPT, **TEXT | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


MODELS = {
    "gpt": lambda **c: build(GPT, **c),
    "bert": lambda **c: build(BERT, **c),
    "bert-post-norm": lambda **c: build(BERT, **BERT_LIKE, **c),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)

LENGTHS = {
    "mixed": [12, 5, 1, 7],
    "empty-rows": [0, 12, 0, 3],
    "beyond": [99, 4, 12, -2],
    "nothing": [0, 0, 0, 0],
    "no-padding": [12, 12, 12, 12],
}
lengths = pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS)


def batch(model, rows):
    """ids, and targets of which some are -100, padding not more often than the rest."""
    ids, targets = torch.randint(50, (2, len(rows), 12))
    targets = targets.where(torch.rand(targets.shape) < 0.7, -100)
    options = {"key_lengths": torch.tensor(rows, dtype=torch.int32)}
    if model.config.token_types:
        options["token_types"] = torch.randint(2, ids.shape)
    return ids, targets, options


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def masked(monkeypatch):
    """From here on take the path of GPUs and compiled graphs, which hides padded keys."""
    monkeypatch.setattr(BERT, "_packing", lambda *args: None)
    monkeypatch.setattr(GPT, "_packing", lambda *args: None)


def row_by_row(model, ids, targets, options):
    """The logits of each row cut to its length, zero elsewhere, and the mean loss of all rows."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size)
    loss, count = torch.zeros(()), 0
    for row, length in enumerate(options["key_lengths"].clamp(0, 12).tolist()):
        if length:
            part = slice(row, row + 1), slice(length)
            types = options.get("token_types")
            found = model(ids[part], token_types=None if types is None else types[part])
            logits[part] = found.detach()
            loss = loss + torch.nn.functional.cross_entropy(
                found[0], targets[part][0], ignore_index=-100, reduction="sum"
            )
            count += int((targets[part] != -100).sum())
    return logits, loss / max(count, 1)


@models
@lengths
def test_a_padded_batch_is_its_rows_one_by_one(make, rows):
    model = make()
    ids, targets, options = batch(model, rows)
    logits, expected = row_by_row(model, ids, targets, options)
    torch.testing.assert_close(model(ids, **options), logits, atol=1e-5, rtol=1e-4)
    loss = model(ids, targets, **options)
    torch.testing.assert_close(loss, expected)
    if expected.requires_grad:
        close(grads(model, loss), grads(model, expected))


@models
@lengths
def test_dropping_padding_is_masking_it(make, rows, monkeypatch):
    model = make()
    ids, targets, options = batch(model, rows)
    states, logits = model.hidden(ids, **options), model(ids, **options)
    loss = model(ids, targets, **options)
    found = grads(model, loss)
    masked(monkeypatch)
    real = torch.arange(12) < options["key_lengths"][:, None]
    close([states[real], logits[real]], [f(ids, **options)[real] for f in (model.hidden, model)])
    assert not states[~real].any() and not logits[~real].any()
    expected = model(ids, targets, **options)
    close([loss, *found], [expected, *grads(model, expected)])


@models
def test_padding_is_not_computed(make):
    """Whatever stands in the padding, not a bit changes, and every layer sees real tokens only."""
    model = make()
    ids, targets, options = batch(model, [9, 0, 4, 2])
    seen = []
    for block in model.transformer.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    first = model(ids, targets, **options)
    gradients = grads(model, first)
    assert seen == [(15, 32)] * 3
    real = torch.arange(12) < options["key_lengths"][:, None]
    ids, targets = ids.where(real, (ids + 1) % 50), targets.where(real, -100)
    again = model(ids, targets, **options)
    assert torch.equal(again, first)
    assert all(torch.equal(a, b) for a, b in zip(grads(model, again), gradients, strict=True))


@models
def test_dropout_is_a_function_of_the_state(make):
    model = make(**DROPOUT).train()
    ids, targets, options = batch(model, [9, 0, 4, 12])
    rng = torch.tensor([1, 2])
    losses = [model(ids, targets, rng=rng, **options) for _ in range(2)]
    found = [grads(model, loss) for loss in losses]
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert model(ids, targets, rng=rng + 1000, **options) != losses[0]
    model.transformer.checkpoint_activations = True
    again = grads(model, model(ids, targets, rng=rng, **options))
    assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@models
def test_without_padding_dropout_is_that_of_the_whole_batch(make):
    model = make(**DROPOUT).train()
    ids, targets, options = batch(model, [12, 12, 12, 12])
    rng = torch.tensor([1, 2])
    loss = model(ids, targets, rng=rng, **options)
    del options["key_lengths"]
    torch.testing.assert_close(loss, model(ids, targets, rng=rng, **options))


@models
def test_compiled_models_mask(make):
    torch._dynamo.reset()
    model = make()
    ids, targets, options = batch(model, [9, 0, 4, 12])
    loss = model(ids, targets, **options)
    expected = grads(model, loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, targets, **options)
    close([compiled, *grads(model, compiled)], [loss, *expected])


@models
def test_bfloat16_autocast_stays_near_float32(make):
    model = make()
    ids, targets, options = batch(model, [9, 0, 4, 12])
    expected = model(ids, targets, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids, **options), model(ids, targets, **options)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@models
def test_an_empty_batch(make):
    model = make()
    ids = torch.zeros(0, 12, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.int32)
    assert model(ids, key_lengths=none).shape == (0, 12, 50)


def test_a_linformer_refuses_key_lengths():
    model = build(BERT, linformer=4)
    with pytest.raises(ValueError, match="cannot skip padded keys"):
        model(
            torch.zeros(2, 12, dtype=torch.long), key_lengths=torch.tensor([3, 4]).to(torch.int32)
        )
    with pytest.raises(ValueError, match="cannot skip padded keys"):
        packing = Packing.of(torch.tensor([3, 4], dtype=torch.int32), 2, 5)
        Attention(32, 2, linformer=(12, 4))(torch.zeros(7, 32), packing=packing)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_lengths": torch.tensor([3, 4])}, r"int32 of shape \(2,\), got torch.int64 \(2,\)"),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, r"of shape \(2,\), got .* \(3,\)"),
        ({"token_types": torch.zeros(2, 9, dtype=torch.long)}, r"\(2, 12\), got \(2, 9\)"),
        ({"targets": torch.zeros(2, 13, dtype=torch.long)}, r"\(2, 12\), got \(2, 13\)"),
        ({"targets": torch.full((2, 12), 50)}, r"\[0, 50\) .* got 50"),
    ],
    ids=["int64", "three", "types", "targets", "target-range"],
)
def test_what_does_not_fit_the_batch_is_refused(changes, words):
    model = build(BERT, **BERT_LIKE)
    ids = torch.zeros(2, 12, dtype=torch.long)
    arguments = {"targets": ids, "key_lengths": torch.tensor([3, 4], dtype=torch.int32)}
    with pytest.raises(ValueError, match=words):
        model(ids, **arguments | changes)


def test_targets_out_of_range_in_padding_do_not_count():
    model, ids = build(BERT), torch.zeros(2, 12, dtype=torch.long)
    lengths, targets = torch.tensor([3, 4], dtype=torch.int32), ids.clone()
    expected = model(ids, targets, key_lengths=lengths)
    targets[:, 6:] = 777
    assert torch.equal(model(ids, targets, key_lengths=lengths), expected)


def test_packing_by_hand():
    packing = Packing.of(torch.tensor([2, 0, 7, 3], dtype=torch.int32), 4, 3)
    assert packing.index.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5, 8]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == 3
    x = torch.randn(4, 3, 5, requires_grad=True)
    back = packing.unpack(packing.pack(x))
    real = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]])[..., None]
    assert torch.equal(back, x * real)
    back.sum().backward()
    assert torch.equal(x.grad, real.expand(4, 3, 5).float())


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_block_on_packed_rows_is_the_block_on_each_sequence(causal, pre_norm):
    block = Block(32, 4, 48, causal=causal, pre_norm=pre_norm)
    x, rows = torch.randn(3, 6, 32), [6, 0, 4]
    packing = Packing.of(torch.tensor(rows, dtype=torch.int32), 3, 6)
    branch, residual = block(packing.pack(x), packing=packing)
    found = packing.unpack(branch if residual is None else branch + residual)
    for row, length in enumerate(rows):
        if length:
            branch, residual = block(x[row : row + 1, :length])
            expected = branch if residual is None else branch + residual
            torch.testing.assert_close(found[row : row + 1, :length], expected)
