"""All that is worth knowing of a GPU, in a few minutes: `make gpu-bench`.

Every file runs in a process of its own, the most telling ones first; what does not fit into the
time is named. The tables come last, together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.command import RESULTS

# The options keep torch.compile, which takes most of the time, to where it is a serious rival.
FILES = {
    "ceilings": (),
    "layer_norm": (),
    "attention": ("--no-compile",),
    "attention_varlen": ("--no-compile",),
    "mlp": (),
    "linear_cross_entropy": ("--no-compile",),
    "training_step": ("--precision", "bfloat16", "--rounds", "5"),
    "dropout": ("--no-compile",),
    "inference": ("--precision", "bfloat16", "--no-compile"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="no file runs past these")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    tables, missing = [], []
    for name, options in FILES.items():
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", "cuda", *options]
        try:
            left = max(1.0, deadline - time.monotonic())
            done = subprocess.run(
                command, cwd=RESULTS.parents[1], stdout=subprocess.PIPE, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            missing.append(name)
            continue
        tables.append(done.stdout)
        if done.returncode:
            missing.append(name)
    print("\n".join(tables))
    if missing:
        raise SystemExit(f"not measured, or not wholly: {', '.join(missing)}")


if __name__ == "__main__":
    main()
