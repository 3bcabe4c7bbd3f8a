"""Launches by kernels/launch.py against those of Triton itself, with a stub for the driver."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastformer.kernels.launch import CachedLaunch, Launch, with_base  # noqa: E402
from tests.ptx.triton_compile import stub_launcher  # noqa: E402
from tests.ptx.triton_launch import emulated  # noqa: E402

newer_triton = pytest.mark.newer_triton


@triton.jit(do_not_specialize=["N"])
def _kernel(
    x_ptr,
    y_ptr,
    N,
    stride,
    scale,
    BLOCK: tl.constexpr,
    TWICE: tl.constexpr = False,
):
    """Where an address is a multiple of 16 bytes, these accesses are as wide."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + stride + offs) * scale + N
    if y_ptr is not None:
        x += tl.load(y_ptr + offs)
    if TWICE:
        x *= 2
    tl.store(x_ptr + stride + offs, x)


X, Y = torch.ones(512), torch.ones(512)
USUAL = {"x": X, "y": Y, "N": 64, "stride": 16, "scale": 0.5}
OPTIONS = {"BLOCK": 256, "num_warps": 2}
OTHERS = {
    "dtype": {"x": X.bfloat16()},
    "alignment": {"x": X[1:]},
    "alignment of another": {"y": Y[1:]},
    "no tensor": {"y": None},
    "a stride of one": {"stride": 1},
    "a stride that 16 does not divide": {"stride": 17},
    "a wide stride": {"stride": 2**32},
    "a wide integer": {"N": 2**31},
    "a wide negative integer": {"N": -(2**31) - 1},
    "an integer for a float": {"scale": 2},
    "a constant": {"BLOCK": 128},
    "a constant that has a default": {"TWICE": True},
    "warps": {"num_warps": 4},
}


def calls_of(launches, kernel, settings):
    """What reaches the launcher: the grid, the machine code, the arguments up to the constants."""
    del launches[:]
    for given in settings:
        options = {name: given[name] for name in given if name not in USUAL}
        kernel[(3,)](*(given[name] for name in USUAL), **options)
    return [(call[:3], call[4], call[9:14]) for call in launches]


@pytest.fixture
def launches():
    calls = []
    with stub_launcher(80, lambda *call: calls.append(call)):
        yield calls


@pytest.fixture
def runs(monkeypatch):
    """The kernels that Triton itself has launched."""
    found, run = [], JITFunction.run

    def counted(function, *args, **kw):
        found.append(function)
        return run(function, *args, **kw)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


@newer_triton
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_arguments_are_another_kernel(launches, runs, other):
    usual = USUAL | OPTIONS
    settings = [usual, usual | other, usual, usual | other]
    expected = calls_of(launches, _kernel, settings)
    del runs[:]
    found = calls_of(launches, CachedLaunch(_kernel), settings)
    assert found == expected
    assert len(runs) == 2
    assert found[0][1] != found[1][1]


@newer_triton
def test_the_same_key_is_the_same_specialisation(launches):
    """Of all that an argument may be, against what Triton makes of it."""
    values = [X, X[1:], X[4:], X.half(), torch.nn.Parameter(X), None, True, False, 0.5, 1.0]
    values += [0, 1, 2, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]
    matrix = X.view(32, 16)
    values += [TensorDescriptor.from_tensor(matrix, block) for block in ([1, 16], [2, 8], [2, 8])]
    constants = [0, 1, 1.0, True, 2, "a", None]
    usual = USUAL | OPTIONS
    settings = [usual | {name: v} for name in ("x", "y", "N", "stride", "scale") for v in values]
    settings += [usual | {name: v} for name in ("BLOCK", "TWICE", "num_warps") for v in constants]
    settings += [USUAL | {"BLOCK": 256, name: 2} for name in ("num_warps", "num_stages")]
    device = driver.active.get_current_device()
    *_, binder = _kernel.device_caches[device]
    kernel, found = CachedLaunch(_kernel), {}
    for given in settings:
        args = tuple(given[name] for name in USUAL)
        options = {name: given[name] for name in given if name not in USUAL}
        _, specialisation, others = binder(*args, **options)
        found.setdefault(kernel.key(args, options), set()).add(f"{specialisation} {others}")
    assert len(found) < len(settings)
    assert all(len(specialisations) == 1 for specialisations in found.values())


def test_what_is_not_known_is_left_to_triton(launches, runs):
    class Wrapped:
        def __init__(self, base):
            self.base, self.dtype = base, base.dtype

        def data_ptr(self):
            return self.base.data_ptr()

    usual = USUAL | OPTIONS
    assert len(calls_of(launches, CachedLaunch(_kernel), [usual | {"y": Wrapped(Y)}] * 2)) == 2
    assert len(runs) == 2


def test_hooks_see_every_launch(launches, runs):
    seen, kernel = [], CachedLaunch(_kernel)
    calls_of(launches, kernel, [USUAL | OPTIONS])
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        calls_of(launches, kernel, [USUAL | OPTIONS] * 2)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(runs) == 3 and launches[-1][7] is knobs.runtime.launch_enter_hook


TENSORS = [(X, Y), (X.bfloat16(), Y), (X[1:], Y), (X, Y[1:]), (X, None), (X[4:], Y[8:])]


@newer_triton
def test_a_launch_that_is_kept_looks_at_its_tensors(launches, runs):
    kept = Launch(CachedLaunch(_kernel), (3,), (64, 16, 0.5), OPTIONS)
    for x, y in TENSORS:
        expected = calls_of(launches, _kernel, [USUAL | OPTIONS | {"x": x, "y": y}])
        del launches[:]
        kept(x, y)
        kept(x, y)
        assert [(call[:3], call[4], call[9:14]) for call in launches] == 2 * expected
    assert len(runs) == len(TENSORS) + 5  # the last one is as the first


def test_hooks_see_a_launch_that_is_kept(launches, runs):
    seen, kept = [], Launch(CachedLaunch(_kernel), (3,), (64, 16, 0.5), OPTIONS)
    kept(X, Y)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        kept(X, Y)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    kept(X, Y)
    assert len(runs) == 2 and [call[7] is not None for call in launches] == [True, True, False]


@newer_triton
def test_a_descriptor_of_another_tensor(launches):
    a, b = torch.ones(32, 16), torch.ones(32, 16)
    like = TensorDescriptor.from_tensor(a, [4, 16])
    assert with_base(like, b) == TensorDescriptor.from_tensor(b, [4, 16])
    assert like.base is a


def test_kernels_that_were_only_compiled_are_not_kept(runs):
    kernel = CachedLaunch(_kernel)
    for arch in (80, 90, 80):
        x = X.clone()
        with emulated(arch) as launches:
            for _ in range(2):
                kernel[(1,)](x, Y, 0, 16, 0.5, BLOCK=256)
        assert [launch.arch for launch in launches] == [arch, arch]
        assert (x[16:272] == 1.75).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_streams_graphs_and_devices_of_a_gpu():
    kernel = CachedLaunch(_kernel)
    device = f"cuda:{torch.cuda.device_count() - 1}"
    x, y = X.to(device), Y.to(device)
    for _ in range(2):
        kernel[(1,)](x, y, 0, 16, 0.5, BLOCK=256)
    assert (x[16:272] == 1.75).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        kernel[(1,)](x, y, 0, 16, 0.5, BLOCK=256)
    assert (x[16:272] == 1.75).all()
    graph.replay()
    torch.cuda.synchronize(device)
    assert (x[16:272] == 1.875).all()
