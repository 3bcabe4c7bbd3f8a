"""Attention on padded batches, against softmax written out in eager PyTorch and in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import attention, attention_qkvpacked, dropout_mask

OP = "attention"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
directions = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def eager(q, k, v, *, causal=False, scale=None, key_lengths=None, keep=None, dropout_p=0.0):
    """Softmax attention in the dtype of q; keep (B, H, T, S) is the dropout mask."""
    T, S = q.shape[1], k.shape[1]
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(S - T)
    visible = visible.expand(q.shape[0], 1, T, S)
    if key_lengths is not None:
        visible = visible & (torch.arange(S, device=q.device) < key_lengths[:, None, None, None])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~visible, 0.0)
    if keep is not None:
        # The exact probability is a multiple of 2**-16.
        weights = weights * keep / (1 - round(dropout_p * 65536) / 65536)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def qkv(B, T, S, H, D, device):
    shapes = {"q": (B, T, H, D), "k": (B, S, H, D), "v": (B, S, H, D)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def with_options(function, **options):
    return lambda q, k, v: function(q, k, v, **options)


def test_the_eager_oracle_is_torchs_attention():
    q, k, v = qkv(2, 9, 9, 3, 16, "cpu").values()
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=causal, scale=0.3
        ).transpose(1, 2)
        found = eager(q.double(), k.double(), v.double(), causal=causal, scale=0.3)
        torch.testing.assert_close(found, expected)


@dtypes
@directions
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("T", [1, 20, 50, 63, 64, 197])
def test_numerics(backend, check_numerics, T, D, causal, dtype):
    options = {"causal": causal}
    values = qkv(2, T, T, 2, D, backend)
    check_numerics(
        with_options(attention, **options), with_options(eager, **options), dtype, values
    )


@directions
def test_numerics_of_a_long_sequence(backend, check_numerics, causal):
    options = {"causal": causal}
    values = qkv(1, 1000, 1000, 1, 64, backend)
    ours, peer = with_options(attention, **options), with_options(eager, **options)
    check_numerics(ours, peer, torch.float32, values)


@dtypes
@directions
@pytest.mark.parametrize(("T", "S"), [(1, 50), (20, 63), (50, 64), (63, 20), (64, 1), (197, 64)])
def test_numerics_of_cross_attention(backend, check_numerics, T, S, causal, dtype):
    """Where T > S and the mask is causal, the first T - S queries see no key."""
    options = {"causal": causal}
    values = qkv(2, T, S, 2, 32, backend)
    check_numerics(
        with_options(attention, **options), with_options(eager, **options), dtype, values
    )


@dtypes
@directions
@pytest.mark.parametrize(("T", "S"), [(50, 50), (20, 63), (63, 20)])
def test_numerics_with_key_lengths(backend, check_numerics, T, S, causal, dtype):
    lengths = torch.tensor([S, 0, 1, S // 2], dtype=torch.int32, device=backend)
    options = {"causal": causal, "key_lengths": lengths}
    values = qkv(4, T, S, 2, 16, backend)
    check_numerics(
        with_options(attention, **options), with_options(eager, **options), dtype, values
    )


@dtypes
@directions
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize(("T", "S"), [(20, 20), (64, 64), (7, 50)])
def test_numerics_with_dropout(backend, check_numerics, T, S, dropout_p, causal, dtype):
    """The mask's row is the (token, head) of the output and its column the key."""
    B, H = 3, 2
    rng = torch.tensor([77, 2**33 + 5], device=backend)
    keep = torch.empty(B, H, T, S, dtype=torch.bool, device=backend)
    mask = dropout_mask(B * T * H, S, dropout_p, rng, site=3)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        keep[b, h, t] = mask[(b * T + t) * H + h]
    lengths = torch.tensor([S, S - 3, 0], dtype=torch.int32, device=backend)
    shared = {"causal": causal, "key_lengths": lengths, "dropout_p": dropout_p}
    ours = with_options(attention, rng=rng, site=3, **shared)
    check_numerics(
        ours, with_options(eager, keep=keep, **shared), dtype, qkv(B, T, S, H, 32, backend)
    )


@dtypes
@directions
def test_numerics_of_views_of_a_packed_projection(backend, check_numerics, causal, dtype):
    B, T, H, D = 2, 50, 3, 64

    def packed(function):
        def call(projection):
            # Tokens, q/k/v, heads, as a linear layer leaves them; none of the views is contiguous.
            return function(*projection.view(B, T, 3, H, D).unbind(2), causal=causal)

        return call

    values = {"projection": torch.randn(B, T, 3 * H * D, device=backend)}
    check_numerics(packed(attention), packed(eager), dtype, values)


@pytest.mark.parametrize("layout", ["heads first", "every other token", "expanded keys"])
def test_strides_do_not_matter(backend, layout):
    q, k, v = qkv(2, 40, 40, 2, 64, backend).values()
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "every other token":
        q, k, v = (x[:, ::2] for x in (q, k, v))
    else:
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    copies = [x.detach().contiguous().clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn(q.shape, device=backend).transpose(0, 1).contiguous().transpose(0, 1)
    for inputs in (leaves, copies):
        attention(*inputs, causal=True).backward(grad)
    torch.testing.assert_close(attention(*leaves), attention(*copies))
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad)


@dtypes
@pytest.mark.parametrize("scale", [0.0, 0.02, 0.5])
def test_numerics_of_another_scale(backend, check_numerics, scale, dtype):
    options = {"scale": scale, "causal": True}
    values = qkv(2, 20, 20, 2, 16, backend)
    check_numerics(
        with_options(attention, **options), with_options(eager, **options), dtype, values
    )


def test_large_scores_do_not_overflow(backend):
    """Scores around 1e4: every query attends to one key alone, its own."""
    q = torch.eye(16, device=backend).mul(200).view(1, 16, 1, 16)
    v = torch.randn(1, 16, 1, 16, device=backend)
    torch.testing.assert_close(attention(q, q, v, scale=1.0), v)
    torch.testing.assert_close(attention(-q, -q, v, scale=1.0), v)


def test_equal_scores_give_the_mean_of_the_visible_values(backend):
    _, k, v = qkv(2, 9, 9, 2, 8, backend).values()
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=backend)
    out = attention(torch.zeros_like(k), k, v, causal=True, key_lengths=lengths)
    for b, t in itertools.product(range(2), range(9)):
        seen = min(t + 1, int(lengths[b]))
        torch.testing.assert_close(out[b, t], v[b, :seen].mean(0))


def test_queries_that_see_no_key_give_zero(backend):
    q, k, v = (x.requires_grad_() for x in qkv(2, 9, 5, 2, 8, backend).values())
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=backend)
    out = attention(q, k, v, causal=True, key_lengths=lengths)
    out.backward(torch.ones_like(out))
    assert not out[0].any() and not out[1, :4].any()
    assert out[1, 4:].all()
    assert not q.grad[0].any() and not k.grad[0].any() and not v.grad[0].any()
    assert not q.grad[1, :4].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_padded_keys_do_not_reach_the_output(backend):
    q, k, v = qkv(2, 9, 9, 2, 8, backend).values()
    lengths = torch.tensor([3, 7], dtype=torch.int32, device=backend)
    out = attention(q, k, v, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = 1e4, -1e4
    assert torch.equal(attention(q, k, v, key_lengths=lengths), out)


def test_one_query_against_a_cache_is_the_last_row_of_causal_attention(backend):
    q, k, v = qkv(2, 33, 33, 2, 64, backend).values()
    room = torch.full((2, 50, 2, 64), torch.nan, device=backend)
    cached_k, cached_v = room.clone(), room.clone()
    cached_k[:, :33], cached_v[:, :33] = k, v
    last = attention(q[:, -1:], cached_k[:, :33], cached_v[:, :33], causal=True)
    torch.testing.assert_close(last, attention(q, k, v, causal=True)[:, -1:])


@pytest.mark.parametrize(
    ("B", "T", "S", "H"), [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)]
)
def test_empty_inputs(backend, B, T, S, H):
    q, k, v = (x.requires_grad_() for x in qkv(B, T, S, H, 8, backend).values())
    out = attention(q, k, v)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(B, T, H, 8, device=backend))
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(backend, dropout_p, causal):
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 4, 3, 2, 8, backend).values())
    lengths = torch.tensor([3, 2], dtype=torch.int32, device=backend)
    rng = torch.tensor([5, 6], device=backend)
    options = {"causal": causal, "key_lengths": lengths, "dropout_p": dropout_p, "rng": rng}
    torch.autograd.gradcheck(with_options(attention, **options), (q, k, v))


def test_only_the_asked_for_gradients_come_back(backend):
    q, k, v = qkv(1, 5, 5, 1, 8, backend).values()
    k.requires_grad_()
    attention(q, k, v).sum().backward()
    assert q.grad is None and v.grad is None
    expected = torch.autograd.grad(eager(q.double(), k.double(), v.double()).sum(), k)[0]
    torch.testing.assert_close(k.grad, expected, atol=1e-6, rtol=1e-5)


def test_a_second_derivative_is_an_error(backend):
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 3, 1, 8, backend).values())
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@dtypes
def test_the_same_inputs_give_the_same_bits(backend, dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(2, 65, 65, 2, 64, backend).values())
    rng = torch.tensor([1, 2], device=backend)
    runs = []
    for _ in range(2):
        out = attention(q, k, v, causal=True, dropout_p=0.2, rng=rng)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_without_a_state_follows_torchs_seed(backend):
    q, k, v = qkv(2, 20, 20, 2, 16, backend).values()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(q, k, v, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@directions
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_projection_gives_the_bits_of_its_parts(backend, dtype, dropout_p, causal):
    qkv = torch.randn(3, 33, 3, 2, 24, device=backend).to(dtype).requires_grad_()
    lengths = torch.tensor([33, 0, 20], dtype=torch.int32, device=backend)
    rng = torch.tensor([7, 8], device=backend)
    options = {"causal": causal, "dropout_p": dropout_p, "key_lengths": lengths, "rng": rng}
    grad_out = torch.randn(3, 33, 2, 24, device=backend).to(dtype)
    out = attention_qkvpacked(qkv, **options)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    expected = attention(*qkv.unbind(2), **options)
    (expected_grad,) = torch.autograd.grad(expected, qkv, grad_out)
    assert torch.equal(out, expected) and torch.equal(grad, expected_grad)
    with torch.no_grad():
        assert torch.equal(attention_qkvpacked(qkv, **options), expected)


def test_packed_projection_of_another_shape_is_refused(refuses):
    for shape in ((2, 5, 2, 3, 8), (5, 3, 2, 8)):
        refuses(
            ValueError, ("(B, T, 3, H, D)", str(shape)), attention_qkvpacked, torch.randn(shape)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(backend, threads, dtype):
    if backend == "cuda":
        pytest.skip("threads are the CPU's")
    packed = torch.randn(2, 150, 3, 3, 40).to(dtype).requires_grad_()
    grad_out = torch.randn(2, 150, 3, 40).to(dtype)
    options = {"causal": True, "dropout_p": 0.2, "rng": torch.tensor([1, 2])}
    results = []
    for count in (1, 2, 3):
        threads(count)
        out = attention_qkvpacked(packed, **options)
        results.append((out, *torch.autograd.grad(out, packed, grad_out)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))
