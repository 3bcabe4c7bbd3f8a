"""The Triton kernels of attention, executed as compiled, through the public functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer.ops import attention, attention_qkvpacked, dropout_mask
from tests.ops.test_attention import eager

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SITE = 3
NAMES = ["_attention_short_fwd_kernel", "_attention_short_bwd_kernel"]


@dataclass(frozen=True)
class Case:
    """One call of attention; S is T unless given, `lengths` are those of the keys."""

    dtype: torch.dtype
    T: int
    D: int
    S: int | None = None
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    H: int = 1

    @property
    def id(self) -> str:
        words = [str(self.dtype)[6:], f"T{self.T}", f"S{self.S}" if self.S else "", f"D{self.D}"]
        words += ["causal"] * self.causal + ["lengths"] * (self.lengths is not None)
        words += [f"dropout{self.dropout_p}"] * (self.dropout_p > 0)
        return "-".join(word for word in words if word)

    @property
    def batch(self) -> int:
        return len(self.lengths) if self.lengths else 1

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S

    def inputs(self, device: str) -> dict[str, Tensor]:
        tokens = {"q": self.T, "k": self.keys, "v": self.keys}
        shapes = {name: (self.batch, count, self.H, self.D) for name, count in tokens.items()}
        return {name: torch.randn(shape).to(device) for name, shape in shapes.items()}

    def options(self, device: str) -> dict:
        found = {"causal": self.causal, "scale": self.scale, "dropout_p": self.dropout_p}
        if self.lengths is not None:
            found["key_lengths"] = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        if self.dropout_p:
            # Both halves of both numbers are in use.
            found["rng"] = torch.tensor([-(2**61) + 12345, 2**35 + 7], device=device)
            found["site"] = SITE
        return found

    def keep(self, options: dict) -> Tensor | None:
        """The reference's mask (B, H, T, S): its row is the (token, head) of the output."""
        if not self.dropout_p:
            return None
        B, T, H, S = self.batch, self.T, self.H, self.keys
        with fastformer.backend("reference"):
            mask = dropout_mask(B * T * H, S, self.dropout_p, options["rng"], SITE)
        return mask.view(B, T, H, S).transpose(1, 2)


CASES = [
    Case(BF16, 1, 64),
    Case(BF16, 1, 64, S=197, causal=True),
    Case(BF16, 20, 64, causal=True),
    Case(BF16, 64, 64, H=3),
    Case(BF16, 63, 64, S=20, causal=True),  # the first 43 queries see no key
    Case(BF16, 197, 64),
    Case(BF16, 300, 64, S=173, causal=True, H=2),  # the first tile ends with one key of a tile
    Case(BF16, 50, 64, causal=True, lengths=(50, 0, 17), dropout_p=0.2, H=2),
    Case(BF16, 50, 80, S=63, lengths=(63, 33)),
    Case(FP16, 128, 64, causal=True, dropout_p=0.5),
    Case(FP16, 150, 128, causal=True, lengths=(150,)),
    Case(FP16, 64, 16, S=63),
    Case(FP16, 197, 24, dropout_p=2**-16),
    Case(FP32, 63, 64, causal=True),
    Case(FP32, 50, 128, S=80, lengths=(80, 0), dropout_p=0.1),
    Case(FP32, 70, 64, causal=True, dropout_p=0.1),
    Case(FP32, 40, 128, S=20),
    Case(FP32, 70, 16, scale=0.0),
    Case(FP32, 20, 8, scale=-0.3, H=3),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_numerics(target, triton, check_numerics, case):
    options = case.options(target.device)
    peer_options = {name: value for name, value in options.items() if name not in ("rng", "site")}
    keep = case.keep(options)

    def ours(q, k, v):
        return attention(q, k, v, **options)

    def peer(q, k, v):
        return eager(q, k, v, keep=keep, **peer_options)

    with triton(checks=True) as launches:
        check_numerics(ours, peer, case.dtype, case.inputs(target.device))
    assert [launch.name for launch in launches] in ([], [NAMES[0], *NAMES])


@pytest.mark.parametrize("T", [100, 260], ids=["one-tile", "two-tiles"])
def test_a_packed_projection_gives_the_bits_of_its_parts(target, triton, T):
    """The kernels read views, and write the three gradients into one packed tensor."""
    qkv = torch.randn(1, T, 3, 2, 64, dtype=BF16).to(target.device).requires_grad_()
    grad_out = torch.randn(1, T, 2, 64, dtype=BF16).to(target.device)
    with triton(checks=True):
        out = attention_qkvpacked(qkv, causal=True)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        parts = [part.detach().contiguous().requires_grad_() for part in qkv.unbind(2)]
        expected = attention(*parts, causal=True)
        expected.backward(grad_out)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b.grad) for a, b in zip(grad.unbind(2), parts, strict=True))


@pytest.mark.parametrize(
    "layout",
    ["heads first", "every other token", "expanded", "transposed", "odd gaps", "off the grid"],
)
def test_strides_do_not_matter(target, triton, layout):
    q, k, v = Case(FP32, 40, 16, H=2, lengths=(40, 40)).inputs(target.device).values()
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "every other token":
        q, k, v = (x[:, ::2] for x in (q, k, v))
    elif layout == "expanded":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    elif layout == "transposed":
        q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k))
    elif layout == "odd gaps":
        q, k, v = (torch.cat([x, x[..., :3]], 3)[..., :16] for x in (q, k, v))
    else:  # an address that 16 does not divide
        q, k, v = (torch.cat([x[..., 8:], x], 3)[..., 1:17] for x in (q, k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    copies = [x.detach().contiguous().clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn(q.shape, device=target.device).transpose(0, 1).contiguous().transpose(0, 1)
    lengths, rng = torch.tensor([[20, 5], [17, 6]], device=target.device).T
    options = {"key_lengths": lengths.int(), "rng": rng.contiguous(), "dropout_p": 0.2}
    strided = {"key_lengths": torch.stack([lengths, rng], 1).int()[:, 0], "rng": rng}
    outs = []
    with triton():
        for inputs, changed in ((leaves, strided), (copies, {})):
            outs.append(attention(*inputs, **options | changed))
            outs[-1].backward(grad)
    assert torch.equal(*outs)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, copies, strict=True))


@pytest.mark.parametrize("dropout_p", [2**-16, 0.5, 0.99999])
def test_the_mask_is_that_of_the_reference(target, triton, dropout_p):
    """With unit vectors as values an output is the row of its weights, 0 where it was dropped."""
    case = Case(FP32, 20, 32, S=32, lengths=(32, 32), dropout_p=dropout_p, H=2)
    options = case.options(target.device)
    q, k, _ = case.inputs(target.device).values()
    v = torch.eye(32, device=target.device)[None, :, None].expand(2, -1, 2, -1).contiguous()
    v.requires_grad_()
    with triton():
        out = attention(torch.zeros_like(q), k, v, **options)
        (out.detach() * out).sum().backward()
    keep = case.keep(options)
    assert torch.equal(out.detach().transpose(1, 2) != 0, keep)
    assert torch.equal(v.grad.diagonal(dim1=1, dim2=3) != 0, keep.any(2))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
def test_the_same_inputs_give_the_same_bits(target, triton, dtype):
    """Whatever the order in which programs run, in two tiles of queries or more."""
    case = Case(dtype, 70 if dtype == FP32 else 260, 64, causal=True, dropout_p=0.2)
    options = case.options(target.device)
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs(target.device).values()]
    runs = []
    for seed in (1, 2):
        with triton(seed=seed, checks=True):
            out = attention(*inputs, **options)
            runs.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_queries_that_see_no_key_give_zero_and_padding_is_never_read(target, triton):
    case = Case(BF16, 50, 64, S=40, causal=True, lengths=(0, 40, 9))
    options = case.options(target.device)
    q, k, v = (x.to(BF16) for x in case.inputs(target.device).values())
    for b, length in enumerate(case.lengths):
        k[b, length:], v[b, length:] = math.nan, math.inf
    with triton():
        out, lse = torch.ops.fastformer.attention_fwd(
            q, k, v, options["key_lengths"], True, 0.1, 0.0, None, 0
        )
        grads = torch.ops.fastformer.attention_bwd(
            out, q, k, v, out, lse, options["key_lengths"], True, 0.1, 0.0, None, 0
        )
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not out[0].any() and not out[1:, :10].any() and out[1:, 10:].any(-1).all()
    assert not grads[0][0].any() and not grads[0][1:, :10].any()
    assert (lse[0] == -math.inf).all() and (lse[1:, :, :10] == -math.inf).all()
    assert lse[1:, :, 10:].isfinite().all()
    for b, length in enumerate(case.lengths):
        assert not grads[1][b, length:].any() and not grads[2][b, length:].any()


@pytest.mark.parametrize("size", [(0, 5, 5, 2), (2, 0, 5, 2), (2, 5, 0, 2), (2, 5, 5, 0)], ids=str)
def test_empty_inputs(target, triton, size):
    B, T, S, H = size
    q = torch.randn(B, T, H, 16, device=target.device, requires_grad=True)
    k, v = (torch.randn(B, S, H, 16, device=target.device, requires_grad=True) for _ in range(2))
    with triton():
        out = attention(q, k, v)
        out.sum().backward()
    assert out.shape == q.shape and not out.any()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


def test_scores_of_any_size_do_not_overflow(target, triton):
    """Scores around 1e4: every query attends to one key alone, its own."""
    q = torch.eye(16, device=target.device).mul(200).view(1, 16, 1, 16)
    v = torch.randn(1, 16, 1, 16).to(target.device)
    with triton():
        torch.testing.assert_close(attention(q, q, v, scale=1.0), v)
        torch.testing.assert_close(attention(q, -q, v, scale=-1.0), v)


@pytest.mark.parametrize(
    ("T", "S", "D", "names"),
    [
        (513, 1, 16, ["{long}_fwd", "long_bwd_q", "long_bwd_kv"]),
        (17, 257, 72, ["{long}_fwd", "long_bwd_q", "long_bwd_kv"]),
        (2, 600, 16, ["long_fwd", "decode_combine", "long_bwd_q", "long_bwd_kv"]),
        (1, 512, 64, ["short_fwd", "short_bwd"]),
    ],
)
def test_the_size_chooses_the_kernels(target, triton, check_numerics, T, S, D, names):
    case = Case(BF16, T, D, S=S, causal=True)
    options = case.options(target.device)

    def ours(q, k, v):
        return attention(q, k, v, **options)

    with triton(checks=True) as launches:
        check_numerics(ours, partial(eager, **options), BF16, case.inputs(target.device))
    if launches:  # forward twice, then backward
        ran = [launch.name for launch in launches]
        names = [name.format(long="hopper" if target.arch == 90 else "long") for name in names]
        forward = [f"_attention_{name}_kernel" for name in names if "bwd" not in name]
        assert ran[: 2 * len(forward)] == 2 * forward
        assert sorted(ran[2 * len(forward) :]) == sorted(
            f"_attention_{name}_kernel" for name in names if "bwd" in name
        )


def test_what_the_kernels_refuse(target, triton):
    q = torch.randn(1, 5, 1, 16, device=target.device, dtype=torch.float64)
    with triton(), pytest.raises(RuntimeError, match="got float64"):
        attention(q, q, q)


def test_the_choice_is_explained(target, triton):
    q = torch.randn(2, 40, 2, 16, device=target.device)
    with triton():
        explained = fastformer.explain("attention", q, q[:, :7], q[:, :7])
        packed = fastformer.explain("attention_qkvpacked", q[:, :, None].expand(-1, -1, 3, -1, -1))
    assert set(explained.chosen.values()) == set(packed.chosen.values()) == {"triton"}
