"""The modules, against torch's encoder layer with the same weights and against einsum by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastformer.modules import MLP, Attention, Block, KeyValueCache, LayerNorm, last_site
from fastformer.ops import dropout_mask


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def torch_layer(block, dim, heads, hidden, *, pre_norm, activation="gelu", eps=1e-5):
    """nn.TransformerEncoderLayer with the weights of `block`."""
    act = nn.GELU(approximate="tanh") if activation == "gelu_tanh" else activation
    layer = nn.TransformerEncoderLayer(
        dim,
        heads,
        hidden,
        dropout=0.0,
        activation=act,
        layer_norm_eps=eps,
        batch_first=True,
        norm_first=pre_norm,
    )
    layer.load_state_dict(renamed(block.state_dict()))
    return layer


def renamed(state):
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.qkv": "self_attn.in_proj",
        "attention.out": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    out = {}
    for name, value in state.items():
        module, kind = name.rsplit(".", 1)
        glue = "_" if module == "attention.qkv" else "."
        out[f"{names[module]}{glue}{kind}"] = value
    return out


def stream(block, x, **options):
    """The stream a block leaves behind: a pre-norm block hands it over in two parts."""
    branch, residual = block(x, **options)
    return branch if residual is None else branch + residual


def test_parameters_of_one_vit_b16_block():
    assert parameters(Block(768, 12, 3072)) == 7_087_872


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize(
    ("T", "dim", "heads", "hidden"), [(20, 64, 4, 128), (50, 80, 1, 63)], ids=str
)
def test_block_is_torchs_encoder_layer(T, dim, heads, hidden, pre_norm, activation):
    block = Block(dim, heads, hidden, pre_norm=pre_norm, activation=activation, eps=1e-6)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    layer = torch_layer(
        block, dim, heads, hidden, pre_norm=pre_norm, activation=activation, eps=1e-6
    )
    x = torch.randn(3, T, dim, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    found, expected = stream(block, x), layer(twin)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, twin.grad, atol=2e-5, rtol=1e-4)
    ours = renamed({name: p.grad for name, p in block.named_parameters()})
    assert len(ours) == 12
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, atol=5e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_block_hides_padding_like_torchs_key_padding_mask(pre_norm):
    block = Block(64, 4, 128, pre_norm=pre_norm).eval()
    layer = torch_layer(block, 64, 4, 128, pre_norm=pre_norm)
    x, lengths = torch.randn(3, 20, 64), torch.tensor([20, 7, 1])
    expected = layer(x, src_key_padding_mask=torch.arange(20) >= lengths[:, None])
    found = stream(block, x, key_lengths=lengths.int())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_causal_block_is_torchs_layer_with_a_mask():
    block = Block(64, 4, 128, causal=True)
    layer = torch_layer(block, 64, 4, 128, pre_norm=True)
    x = torch.randn(2, 20, 64)
    mask = nn.Transformer.generate_square_subsequent_mask(20)
    torch.testing.assert_close(stream(block, x), layer(x, src_mask=mask), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_a_chain_of_blocks_adds_every_branch_once(pre_norm):
    blocks = [Block(32, 2, 64, pre_norm=pre_norm, index=i) for i in range(3)]
    x = torch.randn(2, 7, 32)
    expected, branch, residual = x, x, None
    for block in blocks:
        expected = torch_layer(block, 32, 2, 64, pre_norm=pre_norm)(expected)
        branch, residual = block(branch, residual)
    found = branch if residual is None else branch + residual
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_every_dropout_of_a_stack_has_its_own_site():
    for pre_norm in (True, False):
        blocks = [Block(32, 2, 64, pre_norm=pre_norm, index=i) for i in range(4)]
        sites = [
            site
            for i, block in enumerate(blocks)
            for site in (
                *([block.norm1.site] if i or not pre_norm else []),  # nothing to add in the first
                block.norm2.site,
                block.attention.site,
                block.mlp.site,
            )
        ]
        sites += [0, *([last_site(4)] if pre_norm else [])]
        assert len(sites) == len(set(sites)) == 17


def test_block_dropout_is_that_of_the_masks_by_hand():
    """The four places of a post-norm block, each with the mask of its site."""
    B, T, C, H, hidden = 2, 5, 16, 2, 24
    rates = {"dropout": 0.25, "attention_dropout": 0.5, "mlp_dropout": 0.125}
    block = Block(C, H, hidden, pre_norm=False, index=2, **rates).double()
    x, rng = torch.randn(B, T, C, dtype=torch.float64), torch.tensor([5, 6])

    def dropped(value, p, site):
        cols = value.shape[-1]
        keep = dropout_mask(value.numel() // cols, cols, p, rng, site).view(value.shape)
        return value * keep / (1 - p)

    first_site = 1 + 4 * 2
    a, m = block.attention, block.mlp
    q, k, v = a.qkv(x).view(B, T, 3, H, C // H).unbind(2)
    weights = torch.einsum("bthd,bshd->bths", q, k).div((C // H) ** 0.5).softmax(-1)
    weights = dropped(weights, 0.5, first_site)
    attended = torch.einsum("bths,bshd->bthd", weights, v).reshape(B, T, C)
    branch = dropped(a.out(attended), 0.25, first_site + 1)
    stream = F.layer_norm(x + branch, (C,), block.norm1.weight, block.norm1.bias)
    inner = dropped(F.gelu(m.fc1(stream)), 0.125, first_site + 2)
    branch = dropped(m.fc2(inner), 0.25, first_site + 3)
    expected = F.layer_norm(stream + branch, (C,), block.norm2.weight, block.norm2.bias)
    torch.testing.assert_close(block(x, rng=rng)[0], expected)
    assert not torch.allclose(block.eval()(x, rng=rng)[0], expected)


def test_linformer_attention_is_the_projection_by_hand():
    T, K, C, H = 17, 5, 32, 4
    attention = Attention(C, H, linformer=(T, K))
    assert parameters(attention) == parameters(Attention(C, H)) + 2 * T * K
    x = torch.randn(2, T, C)
    q, k, v = attention.qkv(x).view(2, T, 3, H, C // H).unbind(2)
    k = torch.einsum("bshd,sk->bkhd", k, attention.project_k)
    v = torch.einsum("bshd,sk->bkhd", v, attention.project_v)
    weights = torch.einsum("bthd,bkhd->bhtk", q, k).div((C // H) ** 0.5).softmax(-1)
    expected = attention.out(torch.einsum("bhtk,bkhd->bthd", weights, v).reshape(2, T, C))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
    expected.sum().backward()
    by_hand = [p.grad.clone() for p in attention.parameters()]
    attention.zero_grad()
    attention(x).sum().backward()
    for one, other in zip(by_hand, attention.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one, atol=1e-4, rtol=1e-4)


def test_linformer_excludes_what_it_cannot_do():
    with pytest.raises(ValueError, match="mixes tokens, so it cannot be causal"):
        Attention(32, 4, causal=True, linformer=(8, 4))
    attention = Attention(32, 4, linformer=(8, 4))
    with pytest.raises(ValueError, match="cannot skip padded keys"):
        attention(torch.randn(2, 8, 32), key_lengths=torch.tensor([3, 8], dtype=torch.int32))


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="heads must divide dim, got dim 30 and 4 heads"):
        Attention(30, 4)


def test_attention_with_a_cache_is_attention_without():
    attention = Attention(32, 2, causal=True)
    x = torch.randn(2, 11, 32)
    expected = attention(x)
    cache = KeyValueCache(11)
    with torch.no_grad():
        parts = [attention(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 11))]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_an_error():
    cache = KeyValueCache(4)
    k = torch.zeros(1, 3, 2, 8)
    cache.append(k, k)
    with pytest.raises(ValueError, match="at most 4 tokens, got 3 more after 3"):
        cache.append(k, k)
    assert cache.length == 3


def test_layer_norm_and_mlp_modules_are_torchs():
    x = torch.randn(3, 5, 16)
    norm, twin = LayerNorm(16, eps=1e-3), nn.LayerNorm(16, eps=1e-3)
    mlp = MLP(16, 24, activation="gelu_tanh", dropout=0.5).eval()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    twin.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), twin(x))
    normed, total = norm.add(x, 2 * x)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(normed, twin(3 * x))
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_block_in_bfloat16_autocast_stays_near_float32(pre_norm):
    block = Block(64, 4, 128, pre_norm=pre_norm)
    x = torch.randn(2, 20, 64)
    expected = stream(block, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch, residual = block(x)
        found = stream(block, x)
    if pre_norm:
        assert branch.dtype == torch.bfloat16 and residual.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_modules_copy_and_print():
    block = Block(32, 2, 64, dropout=0.1)
    assert "heads=2" in repr(block) and "activation=gelu" in repr(block)
    twin = copy.deepcopy(block).eval()
    x = torch.randn(1, 3, 32)
    assert torch.equal(stream(twin, x), stream(block.eval(), x))
