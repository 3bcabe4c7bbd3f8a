"""Memory of large results: kept for the next, safe while in use, given back when asked."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastformer
from fastformer import _library, ops

pytestmark = pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))


def large() -> torch.Tensor:
    """A result of 1 MiB."""
    return ops.linear(torch.randn(512, 64), torch.randn(512, 64))


@pytest.fixture(autouse=True)
def _nothing_idle():
    gc.collect()
    fastformer.release_memory()


def test_the_memory_of_a_dead_tensor_is_used_again():
    first = large()
    address = first.data_ptr()
    del first
    assert large().data_ptr() == address


def test_a_view_keeps_the_memory():
    first = large()
    view, address = first[:1], first.data_ptr()
    expected = view.clone()
    del first
    second = large()
    assert second.data_ptr() != address and torch.equal(view, expected)


def test_results_are_ordinary_tensors():
    out = large()
    assert out.device == torch.device("cpu") and out.is_contiguous()
    assert out.data_ptr() % 64 == 0 and out.stride() == (512, 1)
    assert torch.equal(out.clone(), out)


def test_idle_memory_is_given_back():
    out = large()
    assert fastformer.release_memory() == 0  # nothing is idle
    del out
    assert fastformer.release_memory() >= 2**20
    assert fastformer.release_memory() == 0


def test_small_results_are_left_to_the_c_library():
    out = ops.linear(torch.randn(8, 64), torch.randn(64, 64))
    del out
    assert fastformer.release_memory() == 0


def test_threads_do_not_share_a_block():
    wrong = []

    def work(seed: int) -> None:
        x = torch.full((512, 64), float(seed))
        w = torch.eye(64).repeat(8, 1)
        for _ in range(50):
            out = ops.linear(x, w)
            if not bool((out == seed).all()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_environment_turns_it_off():
    code = (
        "import torch, fastformer\n"
        "out = fastformer.linear(torch.randn(512, 64), torch.randn(512, 64))\n"
        "del out\n"
        "print(fastformer.release_memory())\n"
    )
    command = [sys.executable, "-c", code]
    for setting, expected in (("0", 0), ("1", 2**20)):
        found = subprocess.run(
            command,
            env={**os.environ, "FASTFORMER_CPU_CACHE": setting},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(found.stdout) == expected
