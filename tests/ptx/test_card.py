"""card.py against a driver that is not one: a C library that keeps its memory on the host.

Its only kernel copies, and writes down how it was launched. So the calls are checked, their types
and their order of arguments as in cuda.h, and nothing of a GPU.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.card import Card, CardError
from tests.ptx.emulator import TensorMap

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")

DRIVER = Path(__file__).parent / "host_driver.c"

PTX = """.version 8.4
.target sm_90a
.address_size 64
.visible .entry copy(.param .u64 from, .param .u64 to, .param .u32 count, .param .f32 scale,
                     .param .align 64 .b8 map[128]) {
ret;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    out = folder / "libdriver.so"
    subprocess.run(["cc", "-w", "-shared", "-fPIC", str(DRIVER), "-o", str(out)], check=True)
    return str(out)


def test_a_launch(library):
    card = Card(library)
    assert (card.name, card.driver, card.capability) == ("host", "12.4", (8, 6))
    module = card.load(PTX)
    x = np.arange(1000, dtype=np.uint32)
    source, target = module.upload(x, "x"), module.allocate(4 * 1000 + 36 + 128, "y")
    tensor_map = TensorMap(source.address, 2, (64, 20), (128,), (32, 4), swizzle=3)
    arguments = [source, target, 1000, 1.5, tensor_map]
    module.launch("copy", (5, 6), 96, arguments, dynamic_shared=70000, seed=1)
    found = module.download(target).view(np.uint32)
    assert np.array_equal(found[:1000], x)
    (scale,) = struct.unpack("<I", struct.pack("<f", 1.5))
    assert found[1000:1009].tolist() == [5, 6, 1, 96, 1, 1, 70000, 70000, scale]
    encoded = found[1009:].view(np.uint8).tobytes()
    wanted = (1, 2, source.address, 64, 20, 128, 32, 4, 1, 1, 3, 0)
    assert struct.unpack("<12Q", encoded[:96]) == wanted
    module.close()


def test_what_the_driver_refuses_has_its_words(library):
    card = Card(library)
    with pytest.raises(CardError, match=r"(?s)LoadDataEx: some words \(218\).*line 3: broken"):
        card.load(PTX.replace("copy", "broken"))
    module = card.load(PTX.replace("copy", "other"))
    with pytest.raises(CardError, match="cuModuleGetFunction: some words"):
        module.launch("other", (1,), 32, [])
    with pytest.raises(CardError, match="cuNoSuchFunction: this driver is too old"):
        card.call("cuNoSuchFunction")
