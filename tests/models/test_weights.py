"""Models on disk: what is saved comes back, and what is damaged is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastformer import from_preset, load_model, save_model

SMALL = {"dim": 16, "heads": 2, "layers": 2, "hidden_dim": 24}
BUILDS = {
    "gpt": lambda: from_preset("gpt-tiny", vocab_size=30, max_tokens=8, **SMALL),
    "bert": lambda: from_preset("bert-base", vocab_size=30, max_tokens=8, **SMALL),
    "vit": lambda: from_preset("vit-digits", linformer=4, **SMALL),
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(BUILDS["gpt"](), path)
    return path


@builds
def test_round_trip(build, tmp_path):
    model = build()
    save_model(model, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        loaded = load_model(path)
        assert type(loaded) is type(model) and loaded.config == model.config
        assert not any(module.training for module in loaded.modules())
        for (name, one), (other_name, other) in zip(
            model.named_parameters(), loaded.named_parameters(), strict=True
        ):
            assert name == other_name and torch.equal(one, other) and other.requires_grad
    inputs = torch.randint(30, (2, 8)) if hasattr(model.config, "vocab_size") else None
    inputs = torch.randn(2, 1, 8, 8) if inputs is None else inputs
    assert torch.equal(loaded(inputs), model.eval()(inputs))


def test_a_tied_head_stays_tied(saved):
    model = load_model(saved)
    assert model.head.weight is model.embedding.token.weight
    assert "head.weight" not in load_file(saved)


def test_other_programs_can_read_the_file(saved):
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["fastformer"])
        assert file.metadata()["format"] == "pt"
    assert header["kind"] == "gpt" and header["config"]["vocab_size"] == 30
    weights = load_file(saved)
    assert torch.equal(weights["embedding.token.weight"], load_model(saved).embedding.token.weight)


def test_lower_precision_weights_load_as_float32(saved):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    halved = {name: value.bfloat16() for name, value in load_file(saved).items()}
    save_file(halved, saved, metadata=metadata)
    model = load_model(saved)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.transformer.norm.weight, halved["transformer.norm.weight"].float())


def rewrite(path, change):
    """Let `change` spoil the weights or the header, and write the file again."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    metadata = change(weights, metadata) or metadata
    save_file(weights, path, metadata=metadata)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


def no_header(path):
    rewrite(path, lambda weights, metadata: {"format": "pt"})


def header_not_json(path):
    rewrite(path, lambda weights, metadata: metadata | {"fastformer": "{"})


def other_kind(path):
    header = json.dumps({"kind": "resnet", "config": {}})
    rewrite(path, lambda weights, metadata: metadata | {"fastformer": header})


def header_without_kind(path):
    rewrite(path, lambda weights, metadata: metadata | {"fastformer": "{}"})


def unknown_field(path):
    def change(weights, metadata):
        header = json.loads(metadata["fastformer"])
        header["config"]["rotary"] = True
        return metadata | {"fastformer": json.dumps(header)}

    rewrite(path, change)


def missing_weight(path):
    rewrite(path, lambda weights, metadata: weights.popitem() and None)


def extra_weight(path):
    rewrite(path, lambda weights, metadata: weights.update(more=torch.zeros(2)))


def wrong_shape(path):
    change = {"transformer.norm.weight": torch.zeros(1)}
    rewrite(path, lambda weights, metadata: weights.update(change))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_header,
        empty,
        noise,
        no_header,
        header_not_json,
        header_without_kind,
        other_kind,
        unknown_field,
        missing_weight,
        extra_weight,
        wrong_shape,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_refused(saved, damage):
    damage(saved)
    with pytest.raises(ValueError, match=str(saved)):
        load_model(saved)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model at .*model\.safetensors"):
        load_model(tmp_path)
