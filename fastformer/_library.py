"""Own the operator library `fastformer` and load the compiled kernels into it.

Python defines every schema, the compiled library only registers implementations, and either may
come first. Without the library the ops still run, on their other kernels.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from fastformer import _checkout

library = torch.library.Library("fastformer", "DEF")
library.define("build_info() -> str")
library.define("release_memory() -> int")


def _load() -> tuple[Path | None, str | None]:
    path = _checkout.library_path()
    if path is None:
        return None, (
            "the compiled library fastformer/_C.so does not exist; build it with"
            " `pip install --no-build-isolation -v .`, which also says why a build failed"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return None, (
            f"the compiled library does not load under torch {torch.__version__} ({reason});"
            " fastformer needs torch 2.11 or newer and a library built for this machine"
        )
    return path, None


LOADED: Path | None
WHY_NOT: str | None
LOADED, WHY_NOT = _load()
"""Where the compiled library was loaded from, or else the reason and the remedy."""


def build_info() -> dict[str, str]:
    """What the compiled library was built from and for, as words; "none" for what is not there.

    Keys: version, source (hash of csrc/), cpu_isa (instruction set in use), cuda_runtime,
    cuda_archs, torch ("cuda" if this process's torch can give it a CUDA stream, else "cpu").
    """
    info = dict.fromkeys(("source", "cpu_isa", "cuda_runtime", "cuda_archs"), "none")
    info |= {"version": _checkout.version(), "torch": "cuda" if torch.version.cuda else "cpu"}
    if LOADED is not None:
        text = torch.ops.fastformer.build_info.default()
        info |= dict(line.split("=", 1) for line in text.splitlines())
    return info


def _warn_if_stale() -> None:
    source = _checkout.source_hash()
    if LOADED is not None and source is not None and build_info()["source"] != source:
        warnings.warn(
            f"fastformer: {LOADED} was not built from the sources in {_checkout.ROOT / 'csrc'};"
            " rebuild with `python setup.py build_ext --inplace`",
            stacklevel=2,
        )


_checkout.install_finder()
_warn_if_stale()


def release_memory() -> int:
    """Return to the system what the CPU ops keep of freed tensors; return its size in bytes.

    Results of 256 KiB and more lie in blocks that are used again when their tensor is gone, as
    those of a GPU are. FASTFORMER_CPU_CACHE=0 in the environment keeps none.
    """
    return torch.ops.fastformer.release_memory.default() if LOADED is not None else 0
