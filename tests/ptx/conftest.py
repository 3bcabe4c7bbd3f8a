"""One test body for the emulator at every architecture and for a GPU, where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fastformer
from fastformer.ops import dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx-coverage", type=Path, metavar="FILE", help="write what the emulator has executed"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Where pytest is not called for this folder it has not asked for options either.
    file = config.getoption("ptx_coverage", None)
    if file is not None:
        from tests.ptx.recording import Recorder

        config.pluginmanager.register(Recorder(file))


@dataclass(frozen=True)
class Target:
    """Where Triton kernels run: `device` is that of the tensors, `arch` None for the real GPU."""

    device: str
    arch: int | None = None

    @contextmanager
    def run(self, **options: Any) -> Iterator[list]:
        """Run the launches of Triton wrappers in this block; the emulator yields a record of each.

        `options` are those of triton_launch.emulated, which a GPU has no use for.
        """
        if self.arch is None:
            yield []
            torch.cuda.synchronize()
            return
        from tests.ptx.triton_launch import emulated

        with emulated(self.arch, **{"seed": 1, **options}) as launches:
            yield launches


TARGETS = {
    "sm_80": Target("cpu", 80),
    "sm_90a": Target("cpu", 90),
    "gpu": Target("cuda"),
}


@pytest.fixture(
    params=[
        pytest.param(target, id=name, marks=[pytest.mark.gpu] if name == "gpu" else [])
        for name, target in TARGETS.items()
    ]
)
def target(request: pytest.FixtureRequest) -> Target:
    """Emulated sm_80, emulated sm_90a, and the GPU of this machine."""
    if request.param.arch is None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
    return request.param


@pytest.fixture
def triton(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractContextManager[list]]:
    """A block that runs every op by Triton, on the CPU where `target` is emulated."""

    @contextmanager
    def run(**options: Any) -> Iterator[list]:
        with target.run(**options) as launches, fastformer.backend("triton"):
            yield launches

    if target.arch is not None:
        monkeypatch.setattr(dispatch, "_device_type", lambda args: "cuda")
    return run
