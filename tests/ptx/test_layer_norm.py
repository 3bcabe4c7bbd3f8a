"""The Triton kernels of LayerNorm, executed as compiled, through the public functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import fastformer
from fastformer import add_layer_norm, layer_norm
from fastformer.kernels.layer_norm import _tickets
from fastformer.ops import dropout_mask
from tests.ptx.emulator import PtxError

N = 7
SITE = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"]
newer_triton = pytest.mark.newer_triton
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
widths = pytest.mark.parametrize("C", [20, 127, 768, 1023])
has_bias = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])


def affine(C: int, has_bias: bool, device: str) -> dict[str, Tensor]:
    weight, bias = 1 + 0.5 * torch.randn(C), torch.randn(C)
    tensors = {"weight": weight} | ({"bias": bias} if has_bias else {})
    return {name: value.to(device) for name, value in tensors.items()}


def eager(x, weight, bias=None):
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def eager_add(x, residual, weight, bias=None, *, keep=None, dropout_p=0.0):
    if keep is not None:
        x = x * keep / (1 - round(dropout_p * 65536) / 65536)
    total = residual + x
    return eager(total, weight, bias), total


def rng_and_keep(device: str, C: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """A state whose halves are all in use, and the reference's mask."""
    rng = torch.tensor([-(2**61) + 12345, 2**35 + 7], device=device)
    if dropout_p == 0.0:
        return rng, None
    with fastformer.backend("reference"):
        return rng, dropout_mask(N, C, dropout_p, rng, SITE)


@newer_triton
@dtypes
@widths
@has_bias
def test_layer_norm(target, triton, check_numerics, has_bias, C, dtype):
    values = {"x": 2 * torch.randn(N, C).to(target.device) + 1}
    with triton(checks=True, seed=C) as launches:
        check_numerics(layer_norm, eager, dtype, values | affine(C, has_bias, target.device))
    assert [launch.name for launch in launches] in ([], [NAMES[0], *NAMES])


@newer_triton
@dtypes
@widths
@pytest.mark.parametrize(
    ("dropout_p", "has_bias"), [(0.0, True), (0.3, False)], ids=["bias", "dropout"]
)
def test_add_layer_norm(target, triton, check_numerics, dropout_p, has_bias, C, dtype):
    rng, keep = rng_and_keep(target.device, C, dropout_p)
    values = {name: torch.randn(N, C).to(target.device) for name in ("x", "residual")}

    def ours(**tensors):
        return add_layer_norm(**tensors, dropout_p=dropout_p, rng=rng, site=SITE)

    def peer(**tensors):
        return eager_add(**tensors, keep=keep, dropout_p=dropout_p)

    with triton(checks=True, seed=C) as launches:
        check_numerics(ours, peer, dtype, values | affine(C, has_bias, target.device))
    assert [launch.name for launch in launches] in ([], [NAMES[0], *NAMES])


@newer_triton
@dtypes
def test_a_float32_residual_beside_lower_precision(target, triton, check_numerics, dtype):
    rng, keep = rng_and_keep(target.device, 768, 0.1)

    def ours(**tensors):
        normed, total = add_layer_norm(**tensors, dropout_p=0.1, rng=rng, site=SITE)
        assert total.dtype == torch.float32 and normed.dtype == dtype
        return normed, total

    def peer(x, residual, weight, bias):
        total = eager_add(x.to(residual.dtype), residual, weight, bias, keep=keep, dropout_p=0.1)
        return total[0].to(x.dtype), total[1]

    values = {name: torch.randn(N, 768).to(target.device) for name in ("x", "residual")}
    kept = ("residual", "weight", "bias")
    with triton(checks=True):
        check_numerics(ours, peer, dtype, values | affine(768, True, target.device), kept=kept)


@newer_triton
@widths
@pytest.mark.parametrize("dropout_p", [2**-16, 0.5, 0.99999])
def test_the_mask_is_that_of_the_reference(target, triton, dropout_p, C):
    rng, keep = rng_and_keep(target.device, C, dropout_p)
    x = torch.ones(N, C, device=target.device, requires_grad=True)
    weight = torch.ones(C, device=target.device)
    with triton():
        _, total = add_layer_norm(
            x, torch.zeros_like(x), weight, dropout_p=dropout_p, rng=rng, site=SITE
        )
        total.backward(torch.ones_like(total))
    assert torch.equal(total != 0, keep)
    assert torch.equal(x.grad != 0, keep)


def test_sums_over_many_programs_are_the_same_bits_every_time(target, triton, monkeypatch):
    """The order in which blocks run must not show: 37 programs, in three groups."""
    monkeypatch.setattr("fastformer.kernels.layer_norm._TILES_PER_PROGRAM", 1)
    rows, C = 37, 1023
    x = torch.randn(rows, C).to(target.device)
    grad_out = torch.randn(rows, C).to(target.device)
    weight = affine(C, False, target.device)["weight"]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    eager(*exact).backward(grad_out.double())
    runs = []
    for seed in (1, 2):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with triton(seed=seed, checks=True):
            layer_norm(*leaves).backward(grad_out)
            assert not _tickets(x).any()  # as the next launch needs them
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for found, leaf in zip(runs[0], exact, strict=True):
        assert (found - leaf.grad).norm() < 1e-6 * leaf.grad.norm()


@pytest.mark.planted_bug
@pytest.mark.parametrize("order", ["relaxed", "release", "acquire"])
def test_sums_are_read_in_order_only(target, triton, monkeypatch, order):
    """The last of four programs must see what the others have stored."""
    if target.arch is None:
        pytest.skip("plants a bug in PTX")
    monkeypatch.setattr("fastformer.kernels.layer_norm._TILES_PER_PROGRAM", 1)
    x = torch.randn(4, 1024, requires_grad=True)
    weight = affine(1024, False, target.device)["weight"]

    def edit(name: str, ptx: str) -> str:
        assert (name == NAMES[1]) == (".acq_rel." in ptx)
        return ptx.replace(".acq_rel.", f".{order}.")

    with triton(checks=True, edit=edit), pytest.raises(PtxError, match=r"^race: (read|write) of "):
        layer_norm(x, weight).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_of_one_stream_can_run_at_the_same_time():
    """Each launch of a graph has its own counters, whatever stream it was captured on."""
    leaves = [torch.randn(4096, 768, device="cuda", requires_grad=True) for _ in range(2)]
    weight = torch.ones(768, device="cuda", requires_grad=True)
    grad = torch.randn(4096, 768, device="cuda")

    def backward(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer_norm(x, weight), (x, weight), grad)

    with fastformer.backend("triton"):
        expected = [backward(x) for x in leaves]
        found, graphs = [], [torch.cuda.CUDAGraph() for _ in leaves]
        for x, graph in zip(leaves, graphs, strict=True):
            with torch.cuda.graph(graph):
                found.append(backward(x))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("used", ["normed", "total"])
def test_add_when_only_one_result_is_used(target, triton, used):
    inputs = {name: torch.randn(N, 20).to(target.device) for name in ("x", "residual")}
    inputs |= affine(20, True, target.device)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    index = ("normed", "total").index(used)
    with triton():
        add_layer_norm(**leaves)[index].square().sum().backward()
    eager_add(**exact)[index].square().sum().backward()
    for name, leaf in leaves.items():
        expected = exact[name].grad
        expected = torch.zeros_like(exact[name]) if expected is None else expected
        torch.testing.assert_close(leaf.grad.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_program_that_walks_over_several_tiles(target, triton, check_numerics, rows):
    """Of 8 rows each, the last of them in part; one row is a whole grid."""
    values = {"x": torch.randn(rows, 127).to(target.device)}
    with triton(checks=True):
        check_numerics(layer_norm, eager, torch.float32, values | affine(127, True, target.device))


def test_strides_do_not_matter(target, triton):
    sizes = ((3, 5, 20), (3, 5, 20), (20,), (20,), (3, 5, 20))
    views = [torch.randn(*size, 2).to(target.device)[..., 0] for size in sizes]
    grad = views.pop()
    leaves = [view.detach().requires_grad_() for view in views]
    exact = [view.detach().double().contiguous().requires_grad_() for view in views]
    with triton():
        add_layer_norm(*leaves)[0].backward(grad)
    eager_add(*exact)[0].backward(grad.double())
    for leaf, copy in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), copy.grad, atol=1e-4, rtol=1e-5)


def test_no_rows(target, triton):
    x = torch.randn(0, 16, device=target.device, requires_grad=True)
    tensors = {n: t.requires_grad_() for n, t in affine(16, True, target.device).items()}
    with triton():
        layer_norm(x, **tensors).sum().backward()
    assert x.grad.shape == (0, 16)
    assert not any(t.grad.any() for t in tensors.values())


def test_what_the_kernels_refuse(target, triton):
    x = torch.randn(2, 8200, device=target.device)
    with triton(), pytest.raises(RuntimeError, match="at most 8192 elements, got 8200"):
        layer_norm(x, x[0])
    with triton(), pytest.raises(RuntimeError, match="got float64"):
        layer_norm(x[:, :8].double(), x[0, :8])


def test_triton_is_not_imported_for_tensors_on_the_cpu():
    program = """
import sys, torch, fastformer
x = torch.randn(2, 8)
fastformer.layer_norm(x, x[0])
print(fastformer.explain("layer_norm", x, x[0]), "triton" in sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not triton: it takes cuda tensors, these are on cpu" in done.stdout
    assert done.stdout.endswith("False\n")


def test_tensors_on_the_cpu_are_refused():
    x = torch.randn(2, 8)
    with fastformer.backend("triton"), pytest.raises(RuntimeError, match="these are on cpu"):
        layer_norm(x, x[0])
