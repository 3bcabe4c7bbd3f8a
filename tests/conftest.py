"""Seeds, poisoned memory, the backends under test, and the rule of numerics they all obey."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

os.environ["FASTFORMER_POISON"] = "1"  # for the blocks that the library itself allocates

import fastformer
from fastformer import _library
from tests.native import build as native_build

# (backend, device) per op. A kernel that joins the library is put to every test of its op by one
# more pair here; the module under test names its op in OP.
REFERENCE = (("reference", "cpu"), ("reference", "cuda"))
BACKENDS = {
    "attention": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")),
    "attention_varlen": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")),
    "layer_norm": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")),
    "linear": (*REFERENCE, ("cpu", "cpu")),
    "embedding": (*REFERENCE, ("cpu", "cpu")),
    "mlp": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")),
    "linear_cross_entropy": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda")),
    "dropout": (*REFERENCE, ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")),
}

# What kernels take; the reference takes all, float64 too.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Of some ops they take less; float32 attention from few queries has tests of its own.
_HALVES = (torch.bfloat16, torch.float16)
DTYPES_OF = {("attention", "cuda"): _HALVES, ("attention_varlen", "cuda"): _HALVES}

# A GPU machine may have torch and pytest and no network: what needs more is left out there.
_TRAIN_PACKAGES = ("hypothesis", "matplotlib", "PIL", "rich", "sklearn", "tokenizers", "tyro")
_MISSING = [name for name in _TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
collect_ignore = ["train", "test_readme.py", "ops/test_fuzz.py"] if _MISSING else []


def pytest_report_header() -> str:
    left_out = f"left out {', '.join(collect_ignore)}: no {', '.join(_MISSING)}"
    return left_out if _MISSING else "all packages for training are installed"


_POISONED = [Path(__file__).parent / folder for folder in ("ops", "models", "ptx")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marks = {"cuda": pytest.mark.gpu}
        cases = [
            pytest.param(case, id="-".join(case), marks=marks.get(case[1], ()))
            for case in BACKENDS[metafunc.module.OP]
        ]
        metafunc.parametrize("backend", cases, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the dtypes that a backend does not take, whose refusals have tests of their own."""

    def foreign(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "backend" not in params or item.module.OP == "dropout":
            return False  # the mask of dropout has no dtype
        name, _ = params["backend"]
        dtype = params.get("dtype", torch.float32)
        if "gradcheck" in item.name:
            dtype = torch.float64
        taken = DTYPES_OF.get((item.module.OP, name), DTYPES.get(name))
        return taken is not None and dtype not in taken

    config.hook.pytest_deselected(items=[item for item in items if foreign(item)])
    items[:] = [item for item in items if not foreign(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here rather than in the fixture, so that the summary has one line per reason, not per test.
    if "backend" in getattr(item, "fixturenames", ()):
        name, device = item.callspec.params["backend"]
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
        if name in ("cpu", "cuda") and _library.WHY_NOT is not None:
            pytest.skip(_library.WHY_NOT)
        if name == "triton" and importlib.util.find_spec("triton") is None:
            pytest.skip("needs Triton, which there is for Linux only")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one backend; yield the device its tensors live on."""
    name, device = request.param
    with fastformer.backend(name):
        yield device


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """What tests ask of the C++ code, see tests/native/module.cpp."""
    reason = native_build.why_not()
    if reason is not None:
        pytest.skip(reason)
    return native_build.load()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what torch.empty returns, in Python and in C++, with NaN, or the largest integer."""
    if request.path.parent not in _POISONED:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _evaluate(
    function: Function, values: dict[str, Tensor], upstream: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the outputs' shapes as a list to draw upstream from."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if upstream is not None:
        grads = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
        torch.autograd.backward(outputs, grads)
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"no gradient for {name}"
            results[f"gradient of {name}"] = leaf.grad
    return results, outputs


def _error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.fixture
def check_numerics() -> Callable[..., None]:
    """The rule of numerics: no output and no gradient of `ours` may be further from float64 than
    twice the error of eager PyTorch in the same dtype, plus 1e-6."""

    def check(
        ours: Function,
        eager: Function,
        dtype: torch.dtype,
        values: dict[str, Tensor],
        *,
        kept: tuple[str, ...] = (),
    ) -> None:
        """`values` are float32 inputs; all but those named in `kept` are rounded to `dtype` first.

        Both functions take the inputs by name and return a tensor or several.
        """
        rounded = {n: v.float() if n in kept else v.to(dtype) for n, v in values.items()}
        doubled = {name: value.double() for name, value in rounded.items()}
        with torch.no_grad():
            _, outputs = _evaluate(ours, rounded, None)
        # A scalar is a loss, where backward starts from 1.
        upstream = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
        exact, _ = _evaluate(eager, doubled, upstream)
        eager_found, _ = _evaluate(eager, rounded, upstream)
        found, outputs = _evaluate(ours, rounded, upstream)
        for name, expected in exact.items():
            assert found[name].shape == expected.shape, name
            allowed = 2 * _error(eager_found[name], expected) + 1e-6
            error = _error(found[name], expected)
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        for name, value in rounded.items():
            assert found[f"gradient of {name}"].dtype == value.dtype, name

    return check


@pytest.fixture
def refuses() -> Callable[..., None]:
    """Assert that a call raises with all `words` in the message and changes no argument."""

    def check(error: type[Exception], words: tuple[str, ...], call: Function, *args, **kwargs):
        tensors = [a for a in itertools.chain(args, kwargs.values()) if isinstance(a, Tensor)]
        before = [t.detach().clone() for t in tensors]
        with pytest.raises(error) as caught:
            call(*args, **kwargs)
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, f"{missing} not in {caught.value}"
        assert all(t.is_meta or torch.equal(t, b) for t, b in zip(tensors, before, strict=True))

    return check
