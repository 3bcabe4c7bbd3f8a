"""BERT, GPT and ViT: what they see, their loss, dropout, generation, compilation and errors."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastformer import BERT, GPT, ImageConfig, TextConfig, TransformerConfig, ViT, ops

SHAPE = {"dim": 32, "layers": 2, "heads": 2, "hidden_dim": 48}
TEXT = {**SHAPE, "vocab_size": 50, "max_tokens": 12}
IMAGE = {**SHAPE, "image_size": 8, "patch_size": 2, "channels": 3, "num_classes": 5}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.3, "mlp_dropout": 0.1}
BERT_LIKE = {
    "pre_norm": False,
    "token_types": 2,
    "embedding_norm": True,
    "head_transform": True,
    "tied_head": True,
    "head_bias": True,
}


def gpt(**changes):
    return widened(GPT(TextConfig(causal=True, **TEXT | changes)))


def bert(**changes):
    return widened(BERT(TextConfig(**TEXT | changes)))


def vit(**changes):
    return widened(ViT(ImageConfig(**IMAGE | changes)))


def widened(model):
    """Larger weights than a fresh model's, so that an error in any part shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


MODELS = {
    "gpt": gpt,
    "gpt-tied-tanh": lambda **c: gpt(tied_head=True, activation="gelu_tanh", qkv_bias=False, **c),
    "bert": bert,
    "bert-post-norm": lambda **c: bert(**BERT_LIKE, **c),
    "vit": vit,
    "vit-linformer": lambda **c: vit(linformer=4, **c),
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def batch(model, n=4):
    """Inputs and targets; text has padding in its targets."""
    if isinstance(model, ViT):
        return torch.randn(n, 3, 8, 8), torch.randint(5, (n,))
    ids, targets = torch.randint(50, (2, n, 12))
    return ids, targets.where(torch.rand(n, 12) < 0.7, -100)


def loss_and_grads(model, inputs, targets, **options):
    model.zero_grad()
    loss = model(inputs, targets, **options)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@models
def test_the_loss_is_cross_entropy_of_the_logits(build):
    model = build()
    inputs, targets = batch(model)
    found = loss_and_grads(model, inputs, targets)
    model.zero_grad()
    expected = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(found[0], expected)
    for (name, parameter), grad in zip(model.named_parameters(), found[1:], strict=True):
        torch.testing.assert_close(
            grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("build", "expected"), [(bert, True), (gpt, False)])
def test_a_model_of_masked_tokens_says_that_most_are_ignored(monkeypatch, build, expected):
    found, loss = [], ops.linear_cross_entropy

    def spy(*args, mostly_ignored, **kwargs):
        found.append(mostly_ignored)
        return loss(*args, mostly_ignored=mostly_ignored, **kwargs)

    monkeypatch.setattr(ops, "linear_cross_entropy", spy)
    model = build()
    model(*batch(model))
    assert found == [expected]


def test_gpt_by_hand():
    """Embeddings, torch's encoder layers with a causal mask, a final norm and the tied head."""
    model = gpt(tied_head=True)
    ids = torch.randint(50, (3, 9))
    x = model.embedding.token.weight[ids] + model.embedding.position.weight[:9]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    for block in model.transformer.blocks:
        x = encoder_layer(block, norm_first=True)(x, src_mask=mask)
    norm = model.transformer.norm
    x = F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-5)
    expected = x @ model.embedding.token.weight.T
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)


def test_bert_by_hand():
    """Post-norm layers under BERT's embeddings and masked-token head."""
    model = bert(**BERT_LIKE)
    ids, types = torch.randint(50, (3, 9)), torch.randint(2, (3, 9))
    e = model.embedding
    x = e.token(ids) + e.position(torch.arange(9)) + e.token_type(types)
    x = F.layer_norm(x, (32,), e.norm.weight, e.norm.bias, 1e-5)
    for block in model.transformer.blocks:
        x = encoder_layer(block, norm_first=False)(x)
    dense, _, norm = model.head_transform
    x = F.layer_norm(F.gelu(dense(x)), (32,), norm.weight, norm.bias, 1e-5)
    expected = x @ e.token.weight.T + model.head.bias
    torch.testing.assert_close(model(ids, token_types=types), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(ids), expected)
    torch.testing.assert_close(model(ids), model(ids, token_types=torch.zeros_like(ids)))


def test_vit_by_hand():
    """Patches in raster order, cut out with reshapes; the class token first."""
    model = vit()
    images = torch.randn(2, 3, 8, 8)
    cut = images.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 12)
    patch = model.embedding.patch
    patches = cut @ patch.weight.view(32, 12).T + patch.bias
    x = torch.cat([model.embedding.class_token.expand(2, 1, 32), patches], 1)
    x = x + model.embedding.position
    for block in model.transformer.blocks:
        x = encoder_layer(block, norm_first=True)(x)
    norm = model.transformer.norm
    x = F.layer_norm(x[:, 0], (32,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(model(images), model.head(x), atol=1e-4, rtol=1e-4)


def encoder_layer(block, norm_first):
    layer = torch.nn.TransformerEncoderLayer(
        32, 2, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    own = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj": block.attention.out,
        "linear1": block.mlp.fc1,
        "linear2": block.mlp.fc2,
        "norm1": block.norm1,
        "norm2": block.norm2,
    }
    state = {}
    for name, source in own.items():
        if isinstance(source, torch.Tensor):
            state[name] = source
        else:
            state |= {f"{name}.{kind}": getattr(source, kind) for kind in ("weight", "bias")}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("t", [0, 4, 11])
def test_gpt_never_sees_the_future(t):
    model = gpt()
    ids = torch.randint(50, (2, 12))
    before = model(ids)
    ids[:, t] = (ids[:, t] + 1) % 50
    after = model(ids)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.isclose(before[:, t:], after[:, t:]).all(-1).any()


def test_bert_sees_the_whole_text():
    model = bert()
    ids = torch.randint(50, (2, 12))
    before = model(ids)
    ids[:, -1] = (ids[:, -1] + 1) % 50
    assert not torch.isclose(before, model(ids)).all(-1).any()


@pytest.mark.parametrize(
    "build", [bert, MODELS["bert-post-norm"], gpt], ids=["bert", "post", "gpt"]
)
def test_padding_changes_nothing(build):
    model = build()
    ids, lengths = torch.randint(50, (3, 12)), torch.tensor([12, 5, 1], dtype=torch.int32)
    logits = model(ids, key_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1, :length], alone, atol=1e-5, rtol=1e-4)


@models
def test_dropout_is_a_function_of_the_state(build):
    model = build(**DROPOUT).train()
    inputs, targets = batch(model)
    first = loss_and_grads(model, inputs, targets, rng=torch.tensor([1, 2]))
    again = loss_and_grads(model, inputs, targets, rng=torch.tensor([1, 2]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ([3, 2], [1, 1000]):
        assert model(inputs, targets, rng=torch.tensor(other)) != first[0]
    evaluated = model.eval()(inputs, targets, rng=torch.tensor([1, 2]))
    assert evaluated != first[0]
    assert torch.equal(evaluated, model(inputs, targets))


@models
def test_dropout_without_a_state_follows_torchs_seed(build):
    model = build(**DROPOUT).train()
    inputs, targets = batch(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(inputs, targets).item())
    assert losses[0] == losses[1] != losses[2]


@models
def test_activation_checkpointing_gives_the_same_loss_and_gradients(build):
    model = build(**DROPOUT).train()
    inputs, targets = batch(model)
    for rng in (torch.tensor([5, 6]), None):
        found = []
        for enabled in (False, True):
            model.transformer.checkpoint_activations = enabled
            torch.manual_seed(3)
            found.append(loss_and_grads(model, inputs, targets, rng=rng))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@models
def test_compile_without_a_graph_break(build):
    torch._dynamo.reset()
    model = build(**DROPOUT).train()
    inputs, targets = batch(model)
    rng = torch.tensor([5, 6])
    expected = loss_and_grads(model, inputs, targets, rng=rng)
    logits = model.eval()(inputs).detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), logits)
    found = loss_and_grads(compiled.train(), inputs, targets, rng=rng)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductor_trains_a_gpt_as_eager_does():
    torch._dynamo.reset()
    model = gpt(**DROPOUT).train()
    twin = copy.deepcopy(model)
    inputs, targets = batch(model)
    compiled = torch.compile(model, fullgraph=True)
    for step in range(2):
        rng = torch.tensor([9, step * 1000])
        found = loss_and_grads(compiled, inputs, targets, rng=rng)
        expected = loss_and_grads(twin, inputs, targets, rng=rng)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@models
def test_export(build):
    model = build().eval()
    inputs, _ = batch(model)
    size = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: size},))
    for n in (4, 7):
        inputs, _ = batch(model, n)
        torch.testing.assert_close(program.module()(inputs), model(inputs))


@models
def test_bfloat16_autocast_stays_near_float32(build):
    model = build()
    inputs, targets = batch(model)
    expected = loss_and_grads(model, inputs, targets)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(inputs), model(inputs, targets)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected[0].item(), rel=0.02)
    for parameter, grad in zip(model.parameters(), expected[1:], strict=True):
        assert parameter.grad.dtype == torch.float32
        # The backward pass of bfloat16 keeps two to three digits of the largest element.
        assert (parameter.grad - grad).abs().max() <= 0.1 * grad.abs().max() + 1e-5


@models
def test_the_models_learn_a_batch(build):
    model = build(**DROPOUT).train()
    inputs, targets = batch(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model.eval()(inputs, targets).item()
    model.train()
    for step in range(60):
        optimiser.zero_grad()
        model(inputs, targets, rng=torch.tensor([1, 1000 * step])).backward()
        optimiser.step()
    assert model.eval()(inputs, targets).item() < 0.5 * first


def naive_generate(model, ids, count, choose):
    """The whole window again for every token, without a cache."""
    for _ in range(count):
        logits = model(ids[:, -model.config.max_tokens :])[:, -1]
        ids = torch.cat([ids, choose(logits)], 1)
    return ids


@pytest.mark.parametrize("T", [1, 5, 12, 20])
def test_generation_with_a_cache_is_generation_without(T):
    """Through and beyond max_tokens = 12, where the oldest tokens are forgotten."""
    model = gpt(head_transform=True).eval()
    ids = torch.randint(50, (3, T))
    expected = naive_generate(model, ids, 20, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(model.generate(ids, 20, temperature=0.0), expected)
    assert torch.equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize("top_k", [None, 3, 1000])
def test_sampling_draws_from_the_tempered_softmax(top_k):
    model = gpt().eval()
    ids = torch.randint(50, (2, 4))
    generator = torch.Generator().manual_seed(7)

    def choose(logits):
        logits = logits / 0.7
        if top_k == 3:
            kept = logits.argsort(descending=True)[:, :3]
            allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, kept, True)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    expected = naive_generate(model, ids, 12, choose)
    found = model.generate(ids, 12, temperature=0.7, top_k=top_k, seed=7)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(ids, 12, temperature=0.7, top_k=top_k, seed=8))


def test_top_1_is_the_most_likely_token():
    model, ids = gpt(), torch.randint(50, (3, 4))
    greedy = model.generate(ids, 10, temperature=0.0)
    assert torch.equal(model.generate(ids, 10, top_k=1, seed=1), greedy)


def test_without_a_seed_generation_follows_torchs():
    model, ids = gpt(), torch.randint(50, (3, 4))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, 10))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_stop_ends_a_row_and_then_the_text():
    model, ids = gpt(), torch.randint(50, (2, 4))
    full = model.generate(ids, 20, temperature=0.0)
    stop = int(full[0, 9])
    ends = [next((i for i in range(4, 24) if full[row, i] == stop), 99) for row in range(2)]
    found = model.generate(ids, 20, temperature=0.0, stop=stop)
    assert found.shape[1] == min(max(ends) + 1, 24)
    for row, end in enumerate(ends):
        assert torch.equal(found[row, : end + 1], full[row, : min(end + 1, found.shape[1])])
        assert (found[row, end:] == stop).all()
    alone = model.generate(ids[:1], 20, temperature=0.0, stop=stop)
    assert torch.equal(alone, full[:1, : ends[0] + 1])


@pytest.mark.parametrize("training", [True, False])
def test_generation_ignores_dropout_and_restores_the_mode(training):
    model = gpt(**DROPOUT).train(training)
    ids = torch.randint(50, (2, 4))
    found = model.generate(ids, 8, temperature=0.0)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(found, model.eval().generate(ids, 8, temperature=0.0))
    model.train(training)
    with pytest.raises(ValueError, match="got 50"):
        model.generate(torch.full((1, 2), 50), 3)
    assert all(module.training == training for module in model.modules())


def test_generation_records_no_gradient():
    model = gpt()
    assert not model.generate(torch.zeros(1, 1, dtype=torch.long), 3).requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "got -0.5 and None"),
        ({"top_k": 0}, "top_k at least 1, got 1.0 and 0"),
    ],
)
def test_generation_refuses_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        gpt().generate(torch.zeros(1, 2, dtype=torch.long), 3, **options)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)], ids=str)
def test_generation_refuses_bad_shapes(shape):
    with pytest.raises(ValueError, match="with T >= 1, got"):
        gpt().generate(torch.zeros(shape, dtype=torch.long), 3)


@pytest.mark.parametrize("dim", [768, 192])
def test_initial_weights_follow_gpt2(dim):
    """0.02 at GPT-2's width; outputs of branches narrower by sqrt(2 L), norms one, biases zero."""
    torch.manual_seed(0)
    changes = {"dim": dim, "heads": 12, "hidden_dim": 512, "layers": 8, "vocab_size": 500}
    model = GPT(TextConfig(causal=True, head_bias=True, **TEXT | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            narrow = name.endswith(("attention.out.weight", "fc2.weight"))
            expected = 0.02 * (768 / dim) ** 0.5 / (4 if narrow else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_fresh_model_predicts_nearly_the_uniform_distribution():
    model = GPT(TextConfig(causal=True, **TEXT))
    ids, targets = torch.randint(50, (2, 8, 12))
    assert model(ids, targets).item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)


def test_a_tied_head_is_one_parameter():
    tied, free = gpt(tied_head=True), gpt()
    assert free.num_parameters - tied.num_parameters == 50 * 32
    assert tied.head.weight is tied.embedding.token.weight


CONFIG_ERRORS = {
    "heads": (
        TextConfig,
        TEXT | {"heads": 3},
        ["heads must divide dim, got dim 32 and 3", "1, 2, 4"],
    ),
    "head-dim": (TextConfig, TEXT | {"heads": 8}, ["multiple of 8", "got 4 (dim 32, 8 heads)"]),
    "wide-head": (TextConfig, TEXT | {"dim": 144, "heads": 1}, ["at most 128", "got 144"]),
    "no-layers": (TextConfig, TEXT | {"layers": 0}, ["layers must be at least 1, got 0"]),
    "vocab": (TextConfig, TEXT | {"vocab_size": 0}, ["vocab_size must be at least 1, got 0"]),
    "activation": (TextConfig, TEXT | {"activation": "relu"}, ["gelu or gelu_tanh, got 'relu'"]),
    "dropout": (
        TextConfig,
        TEXT | {"mlp_dropout": 1.0},
        ["mlp_dropout must be in [0, 1), got 1.0"],
    ),
    "patches": (ImageConfig, IMAGE | {"patch_size": 3}, ["multiple of patch_size, got 8 and 3"]),
    "no-classes": (
        ImageConfig,
        IMAGE | {"num_classes": 0},
        ["num_classes must be at least 1, got 0"],
    ),
    "no-size": (ImageConfig, IMAGE | {"patch_size": 0}, ["patch_size must be at least 1, got 0"]),
    "no-heads": (TransformerConfig, {**SHAPE, "max_tokens": 4, "heads": 0}, ["heads", "got 0"]),
}


@pytest.mark.parametrize(("kind", "values", "words"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_a_bad_configuration_is_refused(kind, values, words):
    with pytest.raises(ValueError, match="config: ") as caught:
        kind(**values)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_configuration_cannot_be_changed_behind_the_model():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpt().config.dim = 64


def test_models_refuse_the_wrong_direction():
    with pytest.raises(ValueError, match=r"GPT: .* set causal=True"):
        GPT(TextConfig(**TEXT))
    with pytest.raises(ValueError, match=r"BERT: .* set causal=False"):
        BERT(TextConfig(causal=True, **TEXT))
    with pytest.raises(ValueError, match=r"ViT: .* set causal=False"):
        ViT(ImageConfig(causal=True, **IMAGE))


@pytest.mark.parametrize("build", [gpt, bert], ids=["gpt", "bert"])
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(2, 13, dtype=torch.long), "13 tokens .* max_tokens=12"),
        (torch.zeros(12, dtype=torch.long), r"\(B, T\) of int64 or int32, got \(12,\)"),
        (torch.zeros(2, 3), "got .* of torch.float32"),
        (torch.tensor([[0, 50]]), r"\[0, vocab_size=50\), got 50"),
        (torch.tensor([[0, -1]]), "got -1"),
    ],
    ids=["too-long", "one-row", "float", "beyond", "negative"],
)
def test_bad_ids_are_refused(build, ids, words):
    with pytest.raises(ValueError, match=words):
        build()(ids)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (2, 1, 8, 8), (3, 8, 8)], ids=str)
def test_bad_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be .*8, 8.* got"):
        vit()(torch.zeros(shape))


@pytest.mark.parametrize("bad", [50, -1])
def test_targets_out_of_range_are_refused(bad):
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"targets must be in .*got {bad}"):
        gpt()(ids, torch.full((2, 3), bad))


def test_int32_ids_serve():
    model, ids = gpt(), torch.randint(50, (2, 5))
    assert torch.equal(model(ids.int()), model(ids))
