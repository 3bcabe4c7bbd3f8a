"""The choice of kernel: what is explained, forced, refused, warned about and restored."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fastformer
from fastformer import _library, ops
from fastformer.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
RNG = torch.tensor([1, 2])
built = pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))


def mask():
    return ops.dropout_mask(4, 16, 0.5, RNG)


def chosen_for_a_mask():
    return ops.explain("dropout", torch.zeros(4, 16), 0.5, rng=RNG).chosen["dropout_mask"]


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(_library, "WHY_NOT", "the compiled library is not there today")
    monkeypatch.setattr(dispatch, "_warned", set())


@built
def test_explain_names_the_kernel_and_why_not_the_others():
    text = str(ops.explain("dropout", torch.zeros(4, 16), 0.5, rng=RNG))
    lines = text.splitlines()
    assert lines[0] == "dropout_mask: cpu (C++ kernels for the CPU)"
    assert "  not cuda: it takes cuda tensors, these are on cpu" in lines
    assert "  not triton: it takes cuda tensors, these are on cpu" in lines
    assert "  not reference: cpu is preferred here" in lines
    assert len(lines) == len(dispatch.BACKENDS)


@built
def test_explain_names_the_dtype_that_a_kernel_refuses():
    rows, weight = torch.zeros(6, 8), torch.zeros(8)
    refused = "not cpu: it takes float32 and bfloat16, got"
    assert f"{refused} float64" in str(ops.explain("layer_norm", rows.double(), weight.double()))
    with torch.autocast("cpu", torch.float16):
        assert f"{refused} float16" in str(ops.explain("layer_norm", rows, weight))
    assert ops.explain("layer_norm", rows, weight).chosen["layer_norm_fwd"] == "cpu"


def test_explain_covers_forward_and_backward():
    q = torch.zeros(1, 3, 1, 8)
    explanation = ops.explain("attention", q, q, q, causal=True)
    assert explanation.chosen.keys() == {"attention_fwd", "attention_bwd"}
    for raw, kernel in explanation.chosen.items():
        assert f"{raw}: {kernel} ({dispatch.BACKENDS[kernel]})" in str(explanation)
        assert explanation.reasons[raw].keys() == dispatch.BACKENDS.keys() - {kernel}


def test_explain_says_what_is_forced():
    with ops.backend("reference"):
        explanation = ops.explain("dropout", torch.zeros(4, 16), 0.5, rng=RNG)
    assert explanation.chosen == {"dropout_mask": "reference"}
    if _library.WHY_NOT is None:
        assert explanation.reasons["dropout_mask"]["cpu"] == "'reference' is forced"


def test_explain_says_when_the_forced_backend_cannot_run():
    with ops.backend("triton"):
        explanation = ops.explain("dropout", torch.zeros(4, 16), 0.5, rng=RNG)
    assert str(explanation).startswith("dropout_mask: none (nothing can run)")
    assert "not triton: it takes cuda tensors" in str(explanation)


def test_explain_names_the_op_that_a_backend_does_not_have():
    text = str(ops.explain("linear", torch.zeros(6, 8), torch.zeros(9, 8)))
    assert "not triton: there is no triton kernel for linear_fwd in this version" in text


def test_explain_of_dropout_that_draws_nothing_is_empty():
    assert ops.explain("dropout", torch.zeros(4, 16), 0.0).chosen == {}


def test_explain_runs_nothing():
    """Meta tensors have no memory: whatever ran would fail or show."""
    q = torch.zeros(2, 5, 4, 16, device="meta")
    assert ops.explain("attention", q, q, q).chosen["attention_fwd"] == "reference"


def test_every_public_op_can_be_explained():
    rows, weight = torch.zeros(6, 8), torch.zeros(8)
    q = torch.zeros(6, 1, 8)
    starts = torch.tensor([0, 6], dtype=torch.int32)
    calls = {
        "attention": (q[None], q[None], q[None]),
        "attention_varlen": (q, q, q, starts, starts, 6, 6),
        "attention_qkvpacked": (torch.stack((q, q, q), 1)[None],),
        "attention_varlen_qkvpacked": (torch.stack((q, q, q), 1), starts, 6),
        "layer_norm": (rows, weight),
        "add_layer_norm": (rows, rows, weight),
        "linear": (rows, torch.zeros(9, 8)),
        "embedding": (torch.zeros(6, dtype=torch.long), rows),
        "mlp": (rows, torch.zeros(8, 8), None, torch.zeros(8, 8), None),
        "linear_cross_entropy": (rows, torch.zeros(9, 8), torch.zeros(6, dtype=torch.long)),
        "dropout": (rows, 0.5),
    }
    not_ops = {"backend", "explain", "dropout_mask"}
    assert calls.keys() == set(ops.__all__) - not_ops
    raw = {name for op, call in calls.items() for name in ops.explain(op, *call).chosen}
    # Those of the optimiser and of the gradients of its copies.
    assert raw == dispatch.automatic("cpu").keys() - {"adamw_step"}


@pytest.mark.parametrize(
    ("name", "hint"), [("atention", "'attention'"), ("layernorm", "'layer_norm'"), ("xyz", None)]
)
def test_explain_of_an_unknown_op_suggests_the_nearest(name, hint):
    with pytest.raises(ValueError, match="unknown op") as caught:
        ops.explain(name)
    message = str(caught.value)
    assert (f"did you mean {hint}?" in message) if hint else ("did you mean" not in message)
    assert "linear_cross_entropy" in message


@pytest.mark.parametrize(
    ("name", "hint"), [("tritn", "'triton'"), ("CUDA", None), ("refernce", "'reference'")]
)
def test_an_unknown_backend_suggests_the_nearest(name, hint):
    with pytest.raises(ValueError, match="backend: unknown backend") as caught, ops.backend(name):
        pytest.fail("the block must not be entered")
    message = str(caught.value)
    assert (f"did you mean {hint}?" in message) if hint else ("did you mean" not in message)
    assert "cpu, cuda, triton, reference" in message


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("cuda", "it takes cuda tensors, these are on cpu"),
        ("triton", "it takes cuda tensors, these are on cpu"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_an_error(name, rule):
    with ops.backend(name), pytest.raises(RuntimeError) as caught:
        mask()
    message = str(caught.value)
    assert message.startswith(
        f"dropout_mask: backend {name!r} was asked for but cannot run: {rule}."
    )
    assert "Available here: reference" in message


def test_forcing_reaches_backward():
    x = torch.randn(4, 16, requires_grad=True)
    out = ops.dropout(x, 0.5, rng=RNG)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="dropout_mask: backend 'triton'"):
        out.sum().backward()


def test_forced_cpu_without_the_library_says_how_to_get_it(without_library):
    with ops.backend("cpu"), pytest.raises(RuntimeError, match="the compiled library is not there"):
        mask()


@built
def test_backends_nest_and_come_back_after_errors():
    assert chosen_for_a_mask() == "cpu"
    with ops.backend("reference"):
        with ops.backend("cpu"):
            assert chosen_for_a_mask() == "cpu"
        assert chosen_for_a_mask() == "reference"
        with pytest.raises(KeyError), ops.backend("triton"):
            raise KeyError
        assert chosen_for_a_mask() == "reference"
        with pytest.raises(ValueError, match="unknown backend"), ops.backend("nothing"):
            pass
        assert chosen_for_a_mask() == "reference"
    assert chosen_for_a_mask() == "cpu"


def test_a_forced_backend_reaches_every_thread():
    found = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: found.append(chosen_for_a_mask()))
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_a_slow_fallback_warns_once_and_gives_the_same_result(without_library):

    with pytest.warns(UserWarning, match="dropout_mask runs on the slower 'reference'") as caught:
        first = mask()
    assert "because 'cpu' cannot run: the compiled library is not there today" in str(
        caught[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mask(), first)
    with ops.backend("reference"):
        assert torch.equal(mask(), first)


def test_a_forced_backend_does_not_warn(without_library):
    with warnings.catch_warnings(), ops.backend("reference"):
        warnings.simplefilter("error")
        mask()


def python(code, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, text=True, capture_output=True)


PRINT_CHOICE = """
import torch, fastformer
print(fastformer.explain("dropout", torch.zeros(4, 16), 0.5).chosen["dropout_mask"])
with fastformer.backend("triton"):
    print(fastformer.explain("dropout", torch.zeros(4, 16), 0.5).chosen["dropout_mask"])
print(fastformer.explain("dropout", torch.zeros(4, 16), 0.5).chosen["dropout_mask"])
"""


def test_the_environment_variable_forces_a_backend():
    done = python(PRINT_CHOICE, FASTFORMER_BACKEND="reference")
    assert done.stdout.split() == ["reference", "none", "reference"], done.stderr


def test_a_wrong_environment_variable_is_an_error_at_import():
    done = python("import fastformer", FASTFORMER_BACKEND="trition")
    assert done.returncode == 1
    assert "FASTFORMER_BACKEND: unknown backend 'trition', did you mean 'triton'?" in done.stderr


PRINT_FOR_A_GPU = """
from fastformer.ops import dispatch
print(dispatch.automatic("cuda")["layer_norm_fwd"])
"""


@pytest.mark.parametrize("value", ["", "0"])
def test_experimental_kernels_are_passed_over(value):
    done = python(PRINT_FOR_A_GPU, FASTFORMER_EXPERIMENTAL=value)
    assert done.stdout.split() == ["reference"], done.stderr


def test_experimental_kernels_can_be_allowed():
    done = python(PRINT_FOR_A_GPU, FASTFORMER_EXPERIMENTAL="1")
    assert done.stdout.strip() in dispatch.EXPERIMENTAL, done.stderr


def test_explain_says_that_a_kernel_is_experimental(monkeypatch):
    """On a machine with a GPU; elsewhere what it refuses comes first."""
    kernel = dispatch.Kernel(lambda *args: None, lambda *args: None)
    monkeypatch.setitem(dispatch._kernels["dropout_mask"], "triton", kernel)
    text = str(ops.explain("dropout", torch.zeros(4, 16), 0.5, rng=RNG))
    assert "  not triton: it has never run on a GPU; FASTFORMER_EXPERIMENTAL=1" in text


def test_the_environment_variable_naming_an_impossible_backend_fails_at_the_call():
    code = "import torch, fastformer; fastformer.layer_norm(torch.zeros(2, 8), torch.ones(8))"
    done = python(code, FASTFORMER_BACKEND="cuda")
    assert "RuntimeError: layer_norm_fwd: backend 'cuda' was asked for" in done.stderr


def test_raw_ops_record_no_gradient():
    """Autograd belongs to the public functions: a raw op hands out plain tensors."""
    x = torch.randn(4, 16, requires_grad=True)
    out, *_ = torch.ops.fastformer.layer_norm_fwd.default(x, torch.ones(16), None, 1e-5, x.dtype)
    assert not out.requires_grad


def test_the_package_exports_the_ops():
    for name in set(ops.__all__) - {"dropout_mask"}:
        assert getattr(fastformer, name) is getattr(ops, name)
