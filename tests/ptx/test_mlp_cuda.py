"""The feed-forward layer's CUDA kernels, executed as compiled, between PyTorch's own products."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

from fastformer._dropout import dropout_scale, dropout_threshold
from fastformer.ops import dropout_mask
from fastformer.ops.mlp import _refuse_cuda
from tests.ptx import nvcc
from tests.ptx.launchers import Launchers
from tests.ptx.library_cases import MLP_CU

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = {F32: 0, BF16: 1, F16: 2}  # fastformer_dtype
RNG, SITE = (2**62 - 3, 2**33 + 7), 2
POINTER, WORD = ctypes.c_void_p, ctypes.c_int64


class Settings(ctypes.Structure):
    """What the arguments of GELU, forward and backward, end with."""

    _fields_ = (
        *((name, WORD) for name in ("N", "F", "site")),
        ("scale", ctypes.c_float),
        ("threshold", ctypes.c_uint32),
        ("type", ctypes.c_int),
        ("tanh", ctypes.c_int),
    )


class GeluForward(ctypes.Structure):
    _fields_ = (*((name, POINTER) for name in ("pre", "hidden", "rng")), ("settings", Settings))


class GeluBackward(ctypes.Structure):
    _pointers = ("pre", "grad", "hidden", "grad_bias", "sums", "rng")
    _fields_ = (*((name, POINTER) for name in _pointers), ("settings", Settings))


class ColumnSums(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("rows", "out", "sums")),
        *((name, WORD) for name in ("N", "F")),
        ("type", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def launchers(tmp_path_factory):
    return Launchers(MLP_CU, tmp_path_factory.mktemp("mlp"))


def array(t: Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return (t if t.dtype == F32 else t.view(torch.int16)).numpy().copy()


def poison(dtype: torch.dtype, *shape: int) -> np.ndarray:
    return array(torch.full(shape, float("nan"), dtype=dtype))


def tensor(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(a.copy()).view(dtype)


class Runner:
    """The three launchers, on tensors of the CPU; `shift` moves what is read by so many elements.

    `wide` has whether each pass over rows made accesses of 16 bytes; `seed` is that of the blocks'
    order.
    """

    def __init__(self, launchers: Launchers, arch: str, *, shift: int = 0, seed: int = 1) -> None:
        self.launchers, self.arch, self.shift, self.seed = launchers, arch, shift, seed
        self.wide: list[bool] = []

    def rows(self, t: Tensor) -> np.ndarray:
        flat = array(t).reshape(-1)
        return np.concatenate([np.zeros(self.shift, flat.dtype), flat])[self.shift :]

    def call(self, launcher: str, structure, arrays: list[np.ndarray | None], *rest) -> None:
        pointers = [None if a is None else a.ctypes.data for a in arrays]
        names = self.launchers.call(
            f"fastformer_{launcher}",
            structure(*pointers, *rest),
            [a if a.base is None else a.base for a in arrays if a is not None],
            self.arch,
            seed=self.seed,
        )
        self.wide += [name.endswith("true>") for name in names if "add_sums" not in name]

    def settings(self, like: Tensor, tanh: bool, p: float) -> tuple[np.ndarray | None, Settings]:
        threshold, scale = dropout_threshold(p), dropout_scale(p)
        settings = (SITE, scale, threshold, TYPES[like.dtype], tanh)
        return np.array(RNG) if p else None, Settings(*like.shape, *settings)

    def sums(self, rows: int, cols: int) -> np.ndarray:
        return poison(F32, self.launchers.library.fastformer_mlp_sum_rows(WORD(rows)), cols)

    def gelu(self, pre: Tensor, tanh: bool, p: float = 0.0) -> Tensor:
        hidden = poison(pre.dtype, *pre.shape)
        rng, settings = self.settings(pre, tanh, p)
        self.call("gelu_fwd", GeluForward, [self.rows(pre), hidden, rng], settings)
        return tensor(hidden, pre.dtype)

    def gelu_bwd(self, pre: Tensor, grad: Tensor, tanh: bool, p: float = 0.0) -> tuple[Tensor, ...]:
        """The gradient of pre, the hidden activation, the gradient of the bias."""
        results = array(grad), poison(pre.dtype, *pre.shape), poison(pre.dtype, pre.shape[1])
        rng, settings = self.settings(pre, tanh, p)
        arrays = [self.rows(pre), *results, self.sums(*pre.shape), rng]
        self.call("gelu_bwd", GeluBackward, arrays, settings)
        return tuple(tensor(result, pre.dtype) for result in results)

    def column_sums(self, rows: Tensor) -> Tensor:
        out = poison(rows.dtype, rows.shape[1])
        arrays = [self.rows(rows), out, self.sums(*rows.shape)]
        self.call("column_sums", ColumnSums, arrays, *rows.shape, TYPES[rows.dtype])
        return tensor(out, rows.dtype)


def layer(runner: Runner, grad, x, w1, b1, w2, b2, tanh, p):
    """The output and the five gradients, as csrc/ops/mlp.cpp puts them together."""
    pre = F.linear(x, w1, b1)
    out = F.linear(runner.gelu(pre, tanh, p), w2, b2)
    grad_pre, hidden, grad_b1 = runner.gelu_bwd(pre, grad @ w2, tanh, p)
    grads = grad_pre @ w1, grad_pre.t() @ x, grad_b1, grad.t() @ hidden, runner.column_sums(grad)
    return out, *grads


def eager(grad, x, w1, b1, w2, b2, tanh, keep, p):
    leaves = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2)]
    x, w1, b1, w2, b2 = leaves
    hidden = F.gelu(F.linear(x, w1, b1), approximate="tanh" if tanh else "none")
    if keep is not None:
        hidden = hidden * keep * dropout_scale(p)
    out = F.linear(hidden, w2, b2)
    out.backward(grad.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def judge(runner: Runner, N: int, hidden: int, dtype: torch.dtype, tanh: bool, p: float = 0.0):
    """Run forward and backward and hold each result to the rule of numerics."""
    C = 24
    shapes = {"x": (N, C), "w1": (hidden, C), "b1": (hidden,), "w2": (C, hidden), "b2": (C,)}
    fan_in = {"w1": C, "w2": hidden}
    values = [
        (torch.randn(shape) / math.sqrt(fan_in.get(name, 1))).to(dtype)
        for name, shape in shapes.items()
    ]
    grad = torch.randn(N, C).to(dtype)
    keep = dropout_mask(N, hidden, p, torch.tensor(RNG), SITE) if p else None
    found = layer(runner, grad, *values, tanh, p)
    exact = eager(grad, *(v.double() for v in values), tanh, keep, p)
    peer = eager(grad, *values, tanh, keep, p)
    names = ("out", *(f"grad {name}" for name in shapes))
    for name, ours, expected, theirs in zip(names, found, exact, peer, strict=True):
        error = (ours.double() - expected).abs().max().item()
        allowed = 2 * (theirs.double() - expected).abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# dtype, tanh, dropout, N, hidden: tiles that end within, and rows of any alignment.
CASES = {
    "bfloat16": (BF16, False, 0.0, 18, 264),
    "bfloat16-tanh-odd": (BF16, True, 0.3, 20, 127),
    "float32-dropout": (F32, False, 0.3, 18, 260),
    "float16-tanh": (F16, True, 0.0, 18, 264),
    "one-row": (BF16, False, 0.0, 1, 256),
    "float16-odd": (F16, False, 0.3, 20, 63),
    "float32-tanh-odd": (F32, True, 0.0, 20, 257),
}
RUNS = [("90a", name) for name in CASES] + [("80", name) for name in [*CASES][:3]]


@pytest.mark.parametrize(("arch", "case"), RUNS)
def test_numerics(launchers, arch, case):
    dtype, tanh, p, N, hidden = CASES[case]
    runner = Runner(launchers, arch)
    judge(runner, N, hidden, dtype, tanh, p)
    # The last are the sums of grad_out, whose rows have 24 elements.
    assert runner.wide == [hidden * dtype.itemsize % 16 == 0] * 2 + [True]


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu_and_its_slope_on_a_dense_grid(launchers, tanh):
    far = torch.tensor([20.0, 100.0, 1e4, 1e10, 1e25])
    x = torch.cat([torch.linspace(-14, 14, 1013), far, -far, torch.tensor([torch.nan])])
    x = x.view(4, 256).requires_grad_()
    exact = F.gelu(x.double(), approximate="tanh" if tanh else "none")
    exact.sum().backward()
    runner = Runner(launchers, "90a")
    slope, again, _ = runner.gelu_bwd(x.detach(), torch.ones(4, 256), tanh)
    found = runner.gelu(x.detach(), tanh)
    assert torch.equal(found.nan_to_num(7), again.nan_to_num(7))
    for ours, expected in ((found, exact.detach()), (slope, x.grad)):
        torch.testing.assert_close(
            ours.double(), expected.double(), rtol=2e-7, atol=1.5e-6, equal_nan=True
        )


@pytest.mark.parametrize(("dtype", "cols"), [(BF16, 264), (F16, 63), (F32, 260)], ids=str)
def test_masks_are_those_of_the_definition(launchers, dtype, cols):
    pre, p = torch.full((19, cols), 2.0).to(dtype), 0.3
    keep = dropout_mask(19, cols, p, torch.tensor(RNG), SITE)
    runner = Runner(launchers, "90a")
    results = runner.gelu(pre, False, p), *runner.gelu_bwd(pre, torch.ones_like(pre), False, p)[:2]
    assert all(torch.equal(result != 0, keep) for result in results)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_misaligned_rows(launchers, dtype):
    runner = Runner(launchers, "90a", shift=1)
    judge(runner, 9, 64, dtype, True, 0.1)
    assert runner.wide == [False] * 3


def test_blocks_in_any_order_give_the_same_bits(launchers):
    pre, grad = torch.randn(2, 83, 12)
    runs = [Runner(launchers, "90a", seed=seed).gelu_bwd(pre, grad, True) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    grad_pre, _, bias = runs[0]
    torch.testing.assert_close(bias.double(), grad_pre.double().sum(0), rtol=0, atol=1e-5)


def test_many_rows_have_few_sums(launchers):
    """More than 2048: a warp adds those of its block before the blocks are added."""
    rows = torch.randint(-9, 10, (2051, 8)).float()
    assert launchers.library.fastformer_mlp_sum_rows(WORD(10**9)) <= 256
    assert torch.equal(Runner(launchers, "90a").column_sums(rows), rows.sum(0))


@pytest.mark.parametrize("cols", [20, 0])
def test_no_rows_give_zeros(launchers, cols):
    nothing, runner = torch.empty(0, cols), Runner(launchers, "90a")
    assert not runner.gelu_bwd(nothing, nothing, False)[2].any()
    assert runner.gelu(nothing, False).shape == (0, cols)
    assert not runner.column_sums(nothing).any()


def test_a_type_that_is_none_is_an_error(launchers):
    arguments = GeluForward(None, None, None, Settings(1, 8, type=3))
    with pytest.raises(RuntimeError, match="fastformer_gelu_fwd: CUDA error 1"):
        launchers.call("fastformer_gelu_fwd", arguments, [], "90a")


def test_refusals():
    x = torch.empty(2, 8)
    assert "got float64" in _refuse_cuda(x.double())
    assert all(_refuse_cuda(x.to(dtype)) is None for dtype in TYPES)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(("N", "cols"), [(1, 8), (17, 255), (3000, 512), (10**6, 3072)])
def test_launches_cover_all_rows_and_columns(native, N, cols, sums) -> None:
    launch = native.mlp.launch(N, cols, 2, 0, sums)
    rows = launch.row_blocks * launch.rows_per_block
    assert N <= rows < N + launch.rows_per_block
    assert launch.blocks == launch.row_blocks * math.ceil(cols / 256)
    assert launch.wide == (cols % 8 == 0)
    assert not native.mlp.launch(N, cols, 2, 2, sums).wide  # an address that 16 does not divide
    if sums:
        assert launch.row_blocks <= native.mlp.max_sums
