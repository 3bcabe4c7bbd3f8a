"""The same library under a CUDA build of torch, on a machine that need not have CUDA.

FASTFORMER_TEST_CUDA_TORCH names a folder with an unpacked CUDA wheel of torch (`pip download
--no-deps torch==2.11.0`, then unzip). Its libraries ask for CUDA's; stand-ins whose every function
fails are enough to import torch and to run CPU ops.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer import _library

UNPACKED = os.environ.get("FASTFORMER_TEST_CUDA_TORCH", "")
CUDA_LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*)\]")
CUDA_SYMBOL = re.compile(r" U ((?:_*cu|nccl|nv)\w+)")

LOOK = """
import torch
from fastformer import _library
from fastformer.ops import dropout
rng = torch.tensor([1, 2])
kept = torch.ops.fastformer.dropout_mask.cpu(64, 64, 0.5, rng, 0).sum().item()
print(torch.version.cuda is not None, _library.WHY_NOT, _library.build_info()["torch"], kept)
"""


def make_stand_ins(torch: Path, folder: Path) -> Path:
    """Fill `folder` with empty CUDA libraries; return one, to preload, that has their functions."""
    libraries = sorted(map(str, (torch / "lib").glob("*.so*")))
    needed = subprocess.run(["readelf", "-d", *libraries], capture_output=True, text=True).stdout
    wanted = subprocess.run(["nm", "-D", "-u", *libraries], capture_output=True, text=True).stdout
    source, functions = folder / "stand_ins.c", folder / "functions.so"
    names = sorted(set(CUDA_SYMBOL.findall(wanted)))
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    gcc = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC"]
    subprocess.run([*gcc, str(source), "-o", str(functions)], check=True)
    for name in set(CUDA_LIBRARY.findall(needed)):
        soname = f"-Wl,-soname,{name}"
        empty = [*gcc, soname, "-x", "c", os.devnull, "-o", str(folder / name)]
        subprocess.run(empty, check=True)
    return functions


@pytest.mark.slow
@pytest.mark.skipif(not UNPACKED, reason="FASTFORMER_TEST_CUDA_TORCH names no unpacked CUDA torch")
def test_library_finds_the_cuda_stream_of_a_cuda_torch(run, tmp_path) -> None:
    assert _library.LOADED is not None, _library.WHY_NOT
    if _library.build_info()["cuda_runtime"] == "none":
        pytest.skip("this library was built without CUDA kernels (no nvcc)")
    functions = make_stand_ins(Path(UNPACKED) / "torch", tmp_path)
    result = run(
        sys.executable,
        "-c",
        LOOK,
        PYTHONPATH=UNPACKED,
        LD_LIBRARY_PATH=tmp_path,
        LD_PRELOAD=functions,
    )
    assert result.returncode == 0, result.stderr
    cuda, why_not, torch, kept = result.stdout.split()
    assert (cuda, why_not, torch) == ("True", "None", "cuda")
    assert 1800 < int(kept) < 2300
