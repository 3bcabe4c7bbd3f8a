"""All that is worth knowing of a GPU, in a few minutes: `make gpu-bench`.

Every file runs in a process of its own, the most telling ones first, and may take its share of the
time that is left; then it is interrupted and reports what it has. The tables come last, together,
and say what there was no time for.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.command import RESULTS

_PATIENCE = 20.0  # seconds in which an interrupted file reports


@dataclass(frozen=True)
class File:
    """A file of benchmarks, its share of the time relative to the others, and its options."""

    name: str
    share: float
    options: tuple[str, ...] = ()


# torch.compile, which takes most of the time, is left to where it is a serious rival.
_COMPILED = ("--cases", "gpt2,vit-b16,bert-7.7m-t20")
FILES = (
    File("ceilings", 1.0),
    File("training_step", 8.0, ("--precision", "bfloat16", "--no-memory")),
    File("attention", 2.0, ("--no-compile",)),
    File("layer_norm", 2.0, _COMPILED),
    File("linear_cross_entropy", 1.5, ("--no-compile",)),
    File("mlp", 1.5, _COMPILED),
    File("attention_varlen", 1.0, ("--no-compile",)),
    File("inference", 2.0, ("--precision", "bfloat16", "--no-compile", "--no-memory")),
    File("dropout", 1.0, ("--no-compile",)),
)


def measure(file: File, seconds: float) -> tuple[str, bool]:
    """What the file printed when it was done or its time was over, and whether it is all."""
    command = [sys.executable, "-m", f"benchmarks.bench_{file.name}", "--device", "cuda"]
    process = subprocess.Popen(
        [*command, *file.options], cwd=RESULTS.parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    return out, process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all files together")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes - _PATIENCE
    tables, missing = [], []
    for index, file in enumerate(FILES):
        left = max(0.0, deadline - time.monotonic())
        share = file.share / sum(other.share for other in FILES[index:])
        table, complete = measure(file, share * left)
        tables.append(table)
        missing += [] if complete else [file.name]
    print("\n".join(tables))
    if missing:
        raise SystemExit(f"not measured, or not wholly: {', '.join(missing)}")


if __name__ == "__main__":
    main()
