"""The counters of csrc/cuda/tickets.h: which of them a launch gets."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from tests.ptx import nvcc
from tests.ptx.launchers import STUB
from tests.ptx.nvcc import FLAGS

pytestmark = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

COUNT = 17
_SOURCE = f"""
#include "cuda/tickets.h"
extern "C" int find(unsigned *scratch, void *stream, unsigned **tickets) {{
  return fastformer::find_tickets(scratch, {COUNT}, static_cast<cudaStream_t>(stream), tickets);
}}
"""
_Words = ctypes.c_uint * COUNT


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tickets")
    (folder / "tickets.cu").write_text(_SOURCE)
    command = [nvcc.find_nvcc(), *FLAGS, "-shared", "-Xcompiler", "-fPIC,-w", "-cudart", "none"]
    command += ["-Xlinker", "-Bsymbolic", str(folder / "tickets.cu"), str(STUB)]
    subprocess.run([*command, "-o", str(folder / "tickets.so")], check=True)
    return ctypes.CDLL(str(folder / "tickets.so"))


@pytest.fixture
def find(library):
    """The counters of a stream, those of a launch that is captured in `scratch`."""

    def find(stream, device=0, scratch=None):
        ctypes.c_int.in_dll(library, "stub_device").value = device
        ctypes.c_int.in_dll(library, "stub_is_capturing").value = scratch is not None
        found = ctypes.POINTER(_Words)()
        assert library.find(scratch, ctypes.c_void_p(stream), ctypes.byref(found)) == 0
        return found.contents

    return find


def test_streams_have_counters_of_their_own(find):
    found = [find(stream, device) for device in (0, 1) for stream in (None, 8, 16)]
    assert len({ctypes.addressof(tickets) for tickets in found}) == len(found)
    assert not any(any(tickets) for tickets in found)


def test_the_launches_of_a_stream_share_theirs_and_none_zeroes_them(find):
    first = find(24)
    first[3] = 5
    second = find(24)
    assert ctypes.addressof(second) == ctypes.addressof(first) and second[3] == 5


def test_what_is_captured_has_its_own_which_the_graph_zeroes(find):
    kept = find(32)
    kept[0] = 1
    for _ in range(2):
        scratch = _Words(*range(1, COUNT + 1))
        found = find(32, scratch=scratch)
        assert ctypes.addressof(found) == ctypes.addressof(scratch) and not any(scratch)
    assert ctypes.addressof(find(32)) == ctypes.addressof(kept) and kept[0] == 1
