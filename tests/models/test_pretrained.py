"""The weights of other libraries give their logits: torchvision, timm and Hugging Face.

All are optional. The weights are random, so nothing is downloaded; every parameter is moved away
from its initial value, as a zero would hide an error.
"""

import pytest
import torch
from safetensors.torch import save_file

from fastformer import from_preset, load_pretrained
from tests.interop import optional


def _randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_vit_b16(library, tmp_path):
    if library == "torchvision":
        theirs = optional("torchvision").models.vit_b_16(num_classes=3)
    else:
        theirs = optional("timm").create_model("vit_base_patch16_224", num_classes=3)
    _randomise(theirs)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    model = load_pretrained(path, "vit-b16")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        _same(model(images), theirs(images))


def test_hugging_face_vit(tmp_path):
    transformers = optional("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=32,
        patch_size=8,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    theirs = _randomise(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    shape = {"dim": 48, "heads": 3, "layers": 3, "hidden_dim": 80, "patch_size": 8}
    images = torch.randn(2, 3, 32, 32)
    model = load_pretrained(tmp_path, "vit-s16", **shape, image_size=32, num_classes=5)
    with torch.no_grad():
        _same(model(images), theirs(images).logits)
        # In memory its parameters have other names than in its files.
        torch.save(theirs.state_dict(), tmp_path / "memory.pth")
        path, options = tmp_path / "memory.pth", {"image_size": 32, "num_classes": 5}
        _same(load_pretrained(path, "vit-s16", **shape, **options)(images), model(images))
        other = load_pretrained(tmp_path, "vit-s16", **shape, image_size=32, num_classes=2)
        _same(other.hidden(images), model.hidden(images))
        assert other(images).shape == (2, 2)


def test_hugging_face_gpt2(tmp_path):
    transformers = optional("transformers")
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
    theirs = _randomise(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path)
    shape = {"dim": 48, "heads": 3, "layers": 3, "hidden_dim": 192}
    model = load_pretrained(tmp_path, "gpt2", vocab_size=101, max_tokens=40, **shape)
    ids = torch.randint(101, (3, 40))
    _same(model(ids), theirs(ids).logits)
    expected = theirs.generate(
        ids[:, :7],
        max_new_tokens=20,
        do_sample=False,
        attention_mask=torch.ones(3, 7),
        eos_token_id=None,
    )
    assert torch.equal(model.generate(ids[:, :7], 20, temperature=0.0), expected)
    # The published file has no prefix, and its attention masks.
    bare = {n.removeprefix("transformer."): t for n, t in theirs.transformer.state_dict().items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    save_file({n: t.contiguous() for n, t in bare.items()}, tmp_path / "bare.safetensors")
    again = load_pretrained(
        tmp_path / "bare.safetensors", "gpt2", vocab_size=101, max_tokens=40, **shape
    )
    _same(again(ids), model(ids))


def test_hugging_face_bert(tmp_path):
    transformers = optional("transformers")
    config = transformers.BertConfig(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=40,
        attn_implementation="eager",
    )
    theirs = _randomise(transformers.BertForPreTraining(config))
    # The first published files call LayerNorm's parameters gamma and beta.
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in theirs.state_dict().items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    shape = {"dim": 48, "heads": 3, "layers": 3, "hidden_dim": 80}
    model = load_pretrained(tmp_path, "bert-base", vocab_size=101, max_tokens=40, **shape)
    ids, types = torch.randint(101, (3, 40)), torch.randint(2, (3, 40))
    lengths = torch.tensor([40, 13, 1])
    mask = (torch.arange(40) < lengths[:, None]).long()
    found = model(ids, token_types=types, key_lengths=lengths.int())
    result = theirs(ids, token_type_ids=types, attention_mask=mask)
    real = mask.bool()  # theirs computes padding too
    _same(found[real], result.prediction_logits[real])


def test_what_does_not_fit_is_refused(tmp_path):
    """One file each: missing, no weights, cut short, unknown, another kind, another shape."""
    model = from_preset("vit-digits")
    timm_names = {
        "cls_token": torch.zeros(1, 1, 64),
        "blocks.0.attn.qkv.weight": torch.zeros(192, 64),
    }
    save_file(timm_names, tmp_path / "timm.safetensors")
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(own, tmp_path / "own.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "own.safetensors").read_bytes()[:-9])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickle.pth")
    for name, preset, message in (
        ("none.safetensors", "vit-b16", "no weights at"),
        ("cut.safetensors", "vit-b16", "cannot be read"),
        ("text.pth", "vit-b16", "text.pth"),
        ("pickle.pth", "vit-b16", "holds more than weights"),
        ("own.safetensors", "vit-b16", "none of the known formats"),
        ("timm.safetensors", "gpt2", "is a timm ViT, preset 'gpt2' is a gpt"),
        ("timm.safetensors", "vit-b16", "is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / name, preset)
