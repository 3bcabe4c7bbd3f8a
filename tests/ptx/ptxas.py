"""What ptxas says of a kernel: Triton drops it, nvcc prints it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.ptx import sass
from tests.ptx.triton_compile import CACHE, Compiled


def warnings(log: str) -> tuple[str, ...]:
    """Its warnings, and what it calls an information but has a number, as C7510 has."""
    found = re.findall(r"^ptxas\b.*?(?:warning|C\d{4}).*$", log, re.M)
    return tuple(dict.fromkeys(line.strip() for line in found))


def of_triton(compiled: Compiled) -> tuple[str, ...]:
    """The warnings of the ptxas that comes with Triton, called as Triton does."""
    fused = compiled.kernel.metadata.enable_fp_fusion
    return warnings(assemble(compiled.ptx, [] if fused else ["--fmad=false"]))


def assemble(ptx: str, options: Sequence[str] = ()) -> str:
    """The log of assembling PTX for the architecture that it names, which is done once."""
    target = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.M)
    if target is None:
        raise ValueError("the PTX has no .target")
    program = sass.tool("ptxas-blackwell" if int(target[2]) >= 100 else "ptxas")
    command = [program, "-v", f"--gpu-name={target[1]}", *options]
    key = hashlib.sha256(repr((command, os.stat(program).st_size, ptx)).encode()).hexdigest()[:16]
    log = CACHE / "ptxas" / f"{key}.log"
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=log.parent) as folder:
            source, found = Path(folder) / "kernel.ptx", Path(folder) / "log"
            source.write_text(ptx)
            result = subprocess.run(
                [*command, str(source), "-o", f"{folder}/cubin"], capture_output=True, text=True
            )
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
            found.write_text(result.stdout + result.stderr)
            os.replace(found, log)
    return log.read_text()
