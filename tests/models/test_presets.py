"""The presets: exact sizes, also those of the published models, and errors that help."""

import dataclasses

import pytest
import torch

from fastformer import BERT, GPT, ViT, from_preset
from fastformer.presets import PRESETS, build_config, find_preset

# Counted by others: torchvision and Hugging Face for the published models.
SIZES = {
    "vit-b16": 85_800_963,
    "vit-43m": 43_273_731,
    "bert-7.7m": 7_719_680,
    "gpt-63.5m": 63_476_736,
    "bert-base": 109_514_298,
    "gpt2": 124_439_808,
    "vit-s16": 22_050_664,
    "vit-l16": 304_326_632,
}


def block_size(dim, hidden, qkv_bias=True):
    attention = 3 * dim * dim + 3 * dim * qkv_bias + dim * dim + dim
    return attention + 2 * dim * hidden + hidden + dim + 4 * dim


# The small ones, added up by hand: embeddings + blocks + final norm + head.
SIZES |= {
    "gpt-tiny": 2048 * 128 + 64 * 128 + 4 * block_size(128, 512) + 2 * 128,
    "shakespeare-char-cpu": 256 * 128 + 64 * 128 + 4 * block_size(128, 512) + 2 * 128,
    "bert-tiny": 4096 * 128 + 64 * 128 + 4 * block_size(128, 512) + 2 * 128 + 4096,
    "vit-digits": (4 + 1) * 64 + 64 + 17 * 64 + 4 * block_size(64, 256) + 2 * 64 + 65 * 10,
    "vit-tiny": (192 + 1) * 128 + 128 + 65 * 128 + 6 * block_size(128, 512) + 2 * 128 + 129 * 10,
}


def test_every_preset_has_its_size_stated():
    assert SIZES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        model = from_preset(name)
    assert model.num_parameters == SIZES[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_of_its_kind(name):
    kinds = {"bert": BERT, "gpt": GPT, "vit": ViT}
    with torch.device("meta"):
        model = from_preset(name)
        assert type(model) is kinds[find_preset(name).kind]
        if isinstance(model, ViT):
            size = model.config.image_size
            inputs = torch.zeros(2, model.config.channels, size, size)
            expected = (2, model.config.num_classes)
        else:
            inputs = torch.zeros(2, model.config.max_tokens, dtype=torch.long)
            expected = (2, model.config.max_tokens, model.config.vocab_size)
        assert model.eval()(inputs).shape == expected


def test_number_of_parameters_of_a_linformer():
    """The two-class classifier of 32-pixel patches that vit-pytorch and linformer build together.

    Theirs has no bias in the query, key and value layers; ours has one unless told otherwise.
    """
    shape = {"dim": 128, "layers": 12, "heads": 8, "hidden_dim": 512, "linformer": 64}
    for qkv_bias, more in ((False, 0), (True, 12 * 3 * 128)):
        with torch.device("meta"):
            model = from_preset("vit-b16", patch_size=32, num_classes=2, qkv_bias=qkv_bias, **shape)
        assert model.num_parameters == 2_851_842 + more


def test_overrides_replace_fields():
    with torch.device("meta"):
        model = from_preset("vit-b16", num_classes=1000)
    assert model.num_parameters == SIZES["vit-b16"] + 997 * 769
    assert build_config("gpt2", dropout=0.3, layers=2) == dataclasses.replace(
        find_preset("gpt2").config, dropout=0.3, layers=2
    )
    assert find_preset("gpt2").config.dropout == 0.1


@pytest.mark.parametrize(
    ("name", "hint"), [("vit-b-16", "vit-b16"), ("gpt-2", "gpt2"), ("bertbase", "bert-base")]
)
def test_an_unknown_preset_suggests_the_nearest(name, hint):
    with pytest.raises(
        ValueError, match=f"unknown preset '{name}', did you mean '{hint}'"
    ) as caught:
        from_preset(name)
    assert all(known in str(caught.value) for known in PRESETS)


@pytest.mark.parametrize(
    ("preset", "field", "hint"),
    [
        ("gpt2", "drop_out", "dropout"),
        ("vit-b16", "num_class", "num_classes"),
        ("gpt2", "layer", "layers"),
    ],
)
def test_an_unknown_field_suggests_the_nearest(preset, field, hint):
    words = f"preset '{preset}' has no field '{field}', did you mean '{hint}'"
    with pytest.raises(ValueError, match=words):
        from_preset(preset, **{field: 1})


def test_a_preset_has_no_fields_of_another_kind():
    with pytest.raises(ValueError, match="has no field 'vocab_size'"):
        from_preset("vit-b16", vocab_size=10)
    with pytest.raises(ValueError, match="has no field 'max_tokens'"):
        from_preset("vit-b16", max_tokens=10)


def test_overrides_must_fit_together():
    with pytest.raises(ValueError, match="heads must divide dim, got dim 768 and 7 heads"):
        from_preset("gpt2", heads=7)
    with pytest.raises(ValueError, match="must be a multiple of patch_size, got 224 and 15"):
        from_preset("vit-b16", patch_size=15)
