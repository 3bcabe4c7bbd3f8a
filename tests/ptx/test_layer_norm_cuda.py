"""The library's LayerNorm for CUDA, executed as compiled, against eager PyTorch and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

from fastformer._dropout import dropout_scale, dropout_threshold
from fastformer.ops import dropout_mask
from fastformer.ops.layer_norm import _refuse_cuda
from tests.ptx import nvcc
from tests.ptx.cases import cuda_kernels
from tests.ptx.emulator import PtxError
from tests.ptx.library_cases import LAYER_NORM_CU
from tests.ptx.nvcc import Shifted

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

ARCHS = pytest.mark.parametrize("arch", ["80", "90a"])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {F32: "float", BF16: "__nv_bfloat16", F16: "__half"}
EPS, RNG, SITE = 1e-5, (2**62 - 3, 2**33 + 7), 2
WARP, BLOCK, SCALAR = 0, 1, 2


@pytest.fixture(scope="session")
def configure(native):
    """layer_norm_launch of csrc/cuda/layer_norm.h: (mode, threads, blocks)."""
    return native.layer_norm.launch


def array(t: Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return (t if t.dtype == F32 else t.view(torch.int16)).numpy().copy()


def poison(dtype: torch.dtype, *shape: int) -> np.ndarray:
    return array(torch.full(shape, float("nan"), dtype=dtype))


def tensor(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(a.copy()).view(dtype)


class Runner:
    """The two launchers, on tensors of the CPU; `shift` moves the rows read by so many elements."""

    def __init__(self, arch: str, configure: Any, shift: int = 0) -> None:
        self.kernels, self.configure, self.shift = (
            cuda_kernels(LAYER_NORM_CU, arch),
            configure,
            shift,
        )
        self.modes: list[int] = []
        self.seed = 1

    def rows(self, t: Tensor) -> Any:
        flat = np.concatenate([np.zeros(self.shift, array(t).dtype), array(t).reshape(-1)])
        return Shifted(flat, self.shift) if self.shift else flat

    def launch(self, what: str, types: tuple[torch.dtype, ...], N: int, C: int, arguments) -> None:
        bits = self.shift * types[1].itemsize
        low = any(dtype != F32 for dtype in types)
        mode, threads, blocks = self.configure(N, C, low, bits, what == "bwd")
        self.modes.append(mode)
        name = f"layer_norm_{what}_kernel<{', '.join(NAMES[d] for d in types)}, {mode}>"
        self.kernels.launch(name, blocks, threads, arguments, seed=self.seed)

    @staticmethod
    def dropout(p: float) -> tuple[Any, int, int, float]:
        """rng, site, threshold, scale."""
        if not p:
            return 0, 0, 0, 0.0
        scale = dropout_scale(p)
        return np.array(RNG), SITE, dropout_threshold(p), scale

    def forward(self, x, residual, weight, bias, out_dtype, p=0.0):
        N, C = residual.shape
        types = (residual.dtype if x is None else x.dtype, residual.dtype, out_dtype)
        total, normed = poison(residual.dtype, N, C), poison(out_dtype, N, C)
        mean, rstd = poison(F32, N), poison(F32, N)
        rng, site, threshold, scale = self.dropout(p)
        arguments = [
            0 if x is None else self.rows(x),
            self.rows(residual),
            array(weight.float()),
            0 if bias is None else array(bias.float()),
            total,
            normed,
            mean,
            rstd,
            *(rng, N, C, EPS, site, threshold, scale),
        ]
        self.launch("fwd", types, N, C, arguments)
        stats = tensor(mean, F32), tensor(rstd, F32)
        return tensor(normed, out_dtype), tensor(total, residual.dtype), *stats

    def backward(self, grad, passed, rows, weight, mean, rstd, x_dtype, p=0.0):
        N, C = rows.shape
        types = (x_dtype or rows.dtype, rows.dtype, grad.dtype)
        grad_x, grad_rows = poison(types[0], N, C), poison(rows.dtype, N, C)
        grad_weight, grad_bias = poison(weight.dtype, C), poison(weight.dtype, C)
        sums = poison(F32, max(1, min(N, 256)), 2, C)
        tickets = np.zeros(17, np.int32)
        rng, site, threshold, scale = self.dropout(p)
        arguments = [
            array(grad),
            0 if passed is None else array(passed),
            self.rows(rows),
            array(weight.float()),
            array(mean),
            array(rstd),
            grad_x if x_dtype else 0,
            grad_rows,
            grad_weight,
            grad_bias,
            sums,
            tickets,
            *(rng, N, C, site, threshold, scale, list(NAMES).index(weight.dtype)),
        ]
        self.launch("bwd", types, N, C, arguments)
        assert not tickets.any()  # as the next launch needs them
        affine = tensor(grad_weight, weight.dtype), tensor(grad_bias, weight.dtype)
        return tensor(grad_x, types[0]), tensor(grad_rows, rows.dtype), *affine


def eager(values, out_dtype, keep, p, add):
    """normed and total; in the dtypes of `values` or in float64."""
    x, residual, weight, bias = (values[name] for name in ("x", "residual", "weight", "bias"))
    total = residual
    if add:
        x = x if keep is None else x * keep * dropout_scale(p)
        total = residual + x
    affine = [None if t is None else t.to(total.dtype) for t in (weight, bias)]
    normed = F.layer_norm(total, total.shape[-1:], *affine, EPS)
    return normed if total.dtype == torch.float64 else normed.to(out_dtype), total


def judge(runner, N, C, types, *, add=True, has_bias=True, p=0.0, passed=True, affine=F32):
    """Run forward and backward and hold each result to the rule of numerics."""
    x_dtype, s_dtype, out_dtype = types
    draw = {
        "x": (torch.randn(N, C) + 1).to(x_dtype) if add else None,
        "residual": (2 * torch.randn(N, C) + 1).to(s_dtype),
        "weight": (1 + 0.5 * torch.randn(C)).to(affine),
        "bias": torch.randn(C).to(affine) if has_bias else None,
    }
    grad, grad_total = torch.randn(N, C).to(out_dtype), torch.randn(N, C).to(s_dtype)
    keep = dropout_mask(N, C, p, torch.tensor(RNG), SITE) if p else None

    def differentiate(double):
        leaves = {
            name: None if t is None else (t.double() if double else t.clone()).requires_grad_()
            for name, t in draw.items()
        }
        outputs = eager(leaves, out_dtype, keep, p, add)
        upstream = [grad, grad_total if add and passed else torch.zeros(N, C)]
        torch.autograd.backward(
            outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        )
        found = {"normed": outputs[0].detach(), "total": outputs[1].detach()}
        return found | {f"grad {n}": t.grad for n, t in leaves.items() if t is not None}

    normed, total, mean, rstd = runner.forward(
        draw["x"], draw["residual"], draw["weight"], draw["bias"], out_dtype, p
    )
    if not add:
        total = draw["residual"]
    grads = runner.backward(
        grad,
        grad_total if add and passed else None,
        total,
        draw["weight"],
        mean,
        rstd,
        x_dtype if add else None,
        p,
    )
    found = dict(zip(("grad x", "grad residual", "grad weight", "grad bias"), grads, strict=True))
    found |= {"normed": normed, "total": total}
    exact, peer = differentiate(True), differentiate(False)
    for name, expected in exact.items():
        error = (found[name].double() - expected).abs().max().item()
        allowed = 2 * (peer[name].double() - expected).abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    if keep is not None:
        assert torch.equal(found["grad x"] != 0, keep & (found["grad residual"] != 0))
    return found


DTYPES = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "float16": (F16, F16, F16),
    "bfloat16-float32-stream": (BF16, F32, BF16),
    "float16-float32-stream": (F16, F32, F16),
    "float32-to-bfloat16": (F32, F32, BF16),
    "float32-to-float16": (F32, F32, F16),
}
dtypes = pytest.mark.parametrize("types", DTYPES.values(), ids=DTYPES)


@ARCHS
@dtypes
@pytest.mark.parametrize("C", [20, 127, 768, 1023])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_add_layer_norm(configure, arch, C, types, p):
    runner = Runner(arch, configure)
    judge(runner, 5, C, types, p=p, has_bias=C != 127, passed=C != 20)
    wide = C % 8 == 0 or (C % 4 == 0 and set(types) == {F32})
    assert runner.modes == [WARP if wide else SCALAR] * 2


@ARCHS
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float32-to-bfloat16"])
@pytest.mark.parametrize("C", [1, 127, 768])
def test_layer_norm_alone(configure, arch, C, name):
    judge(Runner(arch, configure), 7, C, DTYPES[name], add=False, has_bias=C != 127)


@ARCHS
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize(("C", "mode"), [(1032, BLOCK), (8192, BLOCK), (8191, SCALAR)])
def test_a_block_per_row(configure, arch, name, C, mode):
    runner = Runner(arch, configure)
    judge(runner, 3, C, DTYPES[name], p=0.1)
    assert runner.modes == [mode] * 2


@ARCHS
@dtypes
@pytest.mark.parametrize("C", [20, 127, 768])
def test_masks_are_those_of_the_definition(configure, arch, C, types):
    x, residual = torch.ones(5, C).to(types[0]), torch.zeros(5, C).to(types[1])
    runner = Runner(arch, configure)
    _, total, _, _ = runner.forward(x, residual, torch.ones(C), None, types[2], 0.3)
    assert torch.equal(total != 0, dropout_mask(5, C, 0.3, torch.tensor(RNG), SITE))


@ARCHS
@dtypes
def test_misaligned_rows(configure, arch, types):
    runner = Runner(arch, configure, shift=1)
    judge(runner, 3, 64, types, p=0.1)
    assert runner.modes == [SCALAR] * 2


@ARCHS
@pytest.mark.parametrize(("N", "C"), [(1031, 20), (259, 33)], ids=str)
def test_blocks_that_walk_several_rows(configure, arch, N, C):
    judge(Runner(arch, configure), N, C, DTYPES["float32"])


@ARCHS
@pytest.mark.parametrize("affine", [BF16, F16], ids=str)
def test_weights_of_lower_precision(configure, arch, affine):
    judge(Runner(arch, configure), 9, 40, (affine,) * 3, affine=affine)


def test_no_rows_give_zeros(configure):
    rows, stats = torch.empty(0, 20), torch.empty(0)
    runner = Runner("90a", configure)
    *_, grad_weight, grad_bias = runner.backward(
        rows, None, rows, torch.ones(20), stats, stats, None
    )
    assert not grad_weight.any() and not grad_bias.any()


@ARCHS
def test_the_order_of_blocks_does_not_show(configure, arch):
    """70 blocks, in five groups."""
    grad, rows, weight = torch.randn(70, 33), torch.randn(70, 33), torch.randn(33)
    stats = rows.mean(1), rows.var(1).rsqrt()
    runs = []
    for seed in (1, 2):
        runner = Runner(arch, configure)
        runner.seed = seed
        runs.append(runner.backward(grad, None, rows, weight, *stats, None)[2:])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.planted_bug
def test_sums_are_read_behind_fences_only(configure):
    grad, rows, weight = torch.randn(4, 33), torch.randn(4, 33), torch.randn(33)
    stats = rows.mean(1), rows.var(1).rsqrt()
    runner = Runner("80", configure)
    ptx = runner.kernels.ptx
    assert "membar.gl;" in ptx
    runner.kernels = runner.kernels.with_ptx(ptx.replace("membar.gl;", ""))
    with pytest.raises(PtxError, match=r"^race: read of "):
        runner.backward(grad, None, rows, weight, *stats, None)


@ARCHS
@pytest.mark.parametrize("C", [768, 1023])
def test_a_large_mean_does_not_swallow_the_variance(configure, arch, C):
    """One pass over x and x * x would lose all digits here."""
    x, weight = torch.randn(3, C) + 3000, torch.ones(C)
    normed, *_ = Runner(arch, configure).forward(None, x, weight, None, F32)
    exact = F.layer_norm(x.double(), (C,), None, None, EPS)
    allowed = 2 * (F.layer_norm(x, (C,), None, None, EPS) - exact).abs().max() + 1e-6
    assert (normed - exact).abs().max() <= allowed


def meta(dtype, C=64):
    return torch.empty(4, C, dtype=dtype)


@pytest.mark.parametrize(
    ("words", "x", "residual", "out"),
    [
        (("residual bfloat16",), meta(F32), meta(BF16), F32),
        (("x float64",), meta(torch.float64), meta(torch.float64), torch.float64),
        (("result bfloat16",), meta(F16), meta(F16), BF16),
        (("at most 8192", "8200"), meta(F32, 8200), meta(F32, 8200), F32),
    ],
    ids=["lower residual", "float64", "two lower precisions", "long rows"],
)
def test_refusals(words, x, residual, out):
    reason = _refuse_cuda(x, residual, x[0], None, EPS, out, 0.0, None, 0)
    assert all(word in reason for word in words)
    stats = torch.empty(4), torch.empty(4)
    back = (x.to(out), None, residual, x[0], *stats, x.dtype, 0.0, None, 0)
    assert all(word in _refuse_cuda(*back) for word in words)


@dtypes
def test_what_is_taken(types):
    x, residual, out = types
    args = (meta(x), meta(residual), meta(F32)[0], None, EPS, out, 0.0, None, 0)
    assert _refuse_cuda(*args) is None
    if x == residual:
        assert _refuse_cuda(meta(x), meta(F32)[0], None, EPS, out) is None
        assert _refuse_cuda(meta(out), meta(x), meta(F32)[0], meta(F32), meta(F32)) is None
