"""The architectures are those of torchvision and Hugging Face: their weights give their logits.

Both libraries are optional; the weights are random, so nothing is downloaded.
"""

import importlib
import importlib.util
import sys

import pytest
import torch

from fastformer import from_preset


def torchvision_models():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:
        # A wheel for another build of torch does not load its C++ ops. No model here uses them.
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        return importlib.import_module("torchvision.models")


@pytest.fixture
def transformers(monkeypatch):
    # It looks for a package `kernels`, and in a checkout would find the folder of that name.
    monkeypatch.setitem(sys.modules, "kernels", None)
    return pytest.importorskip("transformers", reason="needs transformers")


def randomise(model):
    """Some of their parameters start at zero, and would hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def fill(model, state, names, transposed=()):
    """Copy `state` into `model`: names maps each of our modules or parameters to theirs."""
    parameters = dict(model.named_parameters())
    for ours, theirs in names.items():
        pairs = [(ours, theirs)]
        if ours not in parameters:
            pairs = [(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
        for one, other in pairs:
            if one not in parameters:
                continue
            value = state.pop(other)
            value = value.t() if ours.endswith(transposed) and value.dim() == 2 else value
            assert parameters[one].shape == value.shape, one
            with torch.no_grad():
                parameters.pop(one).copy_(value)
    assert not parameters, f"not filled: {sorted(parameters)}"
    return model.eval()


def numbered(ours, theirs, layers, names):
    return {
        f"{ours}.{i}.{a}": f"{theirs.format(i)}.{b}"
        for i in range(layers)
        for a, b in names.items()
    }


def test_vit_b16_is_torchvisions():
    theirs = randomise(torchvision_models().vit_b_16(num_classes=3))
    names = {
        "embedding.patch": "conv_proj",
        "embedding.class_token": "class_token",
        "embedding.position": "encoder.pos_embedding",
        "transformer.norm": "encoder.ln",
        "head": "heads.head",
    }
    layer = {
        "norm1": "ln_1",
        "attention.qkv.weight": "self_attention.in_proj_weight",
        "attention.qkv.bias": "self_attention.in_proj_bias",
        "attention.out": "self_attention.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    names |= numbered("transformer.blocks", "encoder.layers.encoder_layer_{}", 12, layer)
    model = from_preset("vit-b16")
    state = theirs.state_dict()
    fill(model, state, names)
    assert not state, f"not used: {sorted(state)}"
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_gpt2_is_hugging_faces(transformers):
    config = transformers.GPT2Config(
        vocab_size=101,
        n_positions=40,
        n_embd=48,
        n_layer=3,
        n_head=3,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    names = {
        "embedding.token.weight": "transformer.wte.weight",
        "embedding.position.weight": "transformer.wpe.weight",
        "transformer.norm": "transformer.ln_f",
    }
    layer = {
        "norm1": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    names |= numbered("transformer.blocks", "transformer.h.{}", 3, layer)
    shape = {"dim": 48, "heads": 3, "layers": 3, "hidden_dim": 192}
    model = from_preset("gpt2", vocab_size=101, max_tokens=40, **shape)
    # Their projections are stored input first.
    fill(model, theirs.state_dict(), names, transposed=("qkv", "out", "fc1", "fc2"))
    ids = torch.randint(101, (3, 40))
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    expected = theirs.generate(
        ids[:, :7],
        max_new_tokens=20,
        do_sample=False,
        attention_mask=torch.ones(3, 7),
        eos_token_id=None,
    )
    assert torch.equal(model.generate(ids[:, :7], 20, temperature=0.0), expected)


def test_bert_is_hugging_faces(transformers):
    config = transformers.BertConfig(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=40,
        attn_implementation="eager",
    )
    theirs = randomise(transformers.BertForMaskedLM(config))
    state = theirs.state_dict()
    names = {
        "embedding.token.weight": "bert.embeddings.word_embeddings.weight",
        "embedding.position.weight": "bert.embeddings.position_embeddings.weight",
        "embedding.token_type.weight": "bert.embeddings.token_type_embeddings.weight",
        "embedding.norm": "bert.embeddings.LayerNorm",
        "head_transform.0": "cls.predictions.transform.dense",
        "head_transform.2": "cls.predictions.transform.LayerNorm",
        "head.bias": "cls.predictions.bias",
    }
    layer = {
        "attention.qkv": "packed",
        "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    names |= numbered("transformer.blocks", "bert.encoder.layer.{}", 3, layer)
    for i in range(3):
        prefix = f"bert.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = [
                state[f"{prefix}.attention.self.{name}.{kind}"]
                for name in ("query", "key", "value")
            ]
            state[f"{prefix}.packed.{kind}"] = torch.cat(parts)
    shape = {"dim": 48, "heads": 3, "layers": 3, "hidden_dim": 80}
    model = fill(from_preset("bert-base", vocab_size=101, max_tokens=40, **shape), state, names)
    ids, types = torch.randint(101, (3, 40)), torch.randint(2, (3, 40))
    lengths = torch.tensor([40, 13, 1])
    mask = (torch.arange(40) < lengths[:, None]).long()
    found = model(ids, token_types=types, key_lengths=lengths.int())
    expected = theirs(ids, token_type_ids=types, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    targets = ids.where(mask.bool() & (torch.rand(3, 40) < 0.5), -100)
    loss = model(ids, targets, token_types=types, key_lengths=lengths.int())
    their_loss = theirs(ids, token_type_ids=types, attention_mask=mask, labels=targets).loss
    torch.testing.assert_close(loss, their_loss, atol=1e-4, rtol=1e-4)
