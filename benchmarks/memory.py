"""Peak memory of one variant, measured in a process of its own.

    python -m benchmarks.memory <variant> <case> [--dropout P] [--threads N] [--infer]
    python -m benchmarks.memory --all [--out FOLDER]

The first prints by how many MB the resident memory of a steady step exceeds that before the first
step, when the model, its data and an optimiser without state exist: activations, gradients,
temporaries and the optimiser's state. The second makes a table of all variants that need no
compiler, in memory.md and memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import CASES, DEFAULT
from benchmarks.harness import compiled
from benchmarks.steps import VARIANTS, Trainer

_STEPS = 3


def peak_mb(variant: str, case: str, dropout: float, learns: bool) -> float | None:
    """Run this file as a process and return what it prints; None, with a warning, if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", variant, case]
    command += ["--dropout", str(dropout), "--threads", str(torch.get_num_threads())]
    command += [] if learns else ["--infer"]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        warnings.warn(f"memory of {variant} on {case}: {result.stderr[-500:]}", stacklevel=2)
        return None
    return float(result.stdout.split()[-1])


def _resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _forget_peak() -> None:
    """Let VmHWM start again from the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_peak(variant: str, case: str, dropout: float, learns: bool) -> float:
    chosen = VARIANTS[variant]
    if chosen.compile:
        # The compiler's own memory is not that of the step.
        compiled(torch.nn.Linear(8, 8))(torch.randn(8, 8)).sum().backward()
    trainer = Trainer(chosen, CASES[case], dropout=dropout, learns=learns)
    run = trainer.step if learns else trainer.infer
    before = _resident_mb("VmRSS")
    run()
    _forget_peak()
    for _ in range(_STEPS):
        run()
    return _resident_mb("VmHWM") - before


def measure_all(given: argparse.Namespace) -> None:
    """Print the table of all cases; write it, and the JSON, into the folder that was given."""
    names = [
        name
        for name, variant in VARIANTS.items()
        if not (variant.kind == "gemm" or variant.compile or variant.is_library)
    ]
    peaks: dict[str, dict[str, float]] = {}
    for case in DEFAULT:
        found = {n: peak_mb(n, case, given.dropout, not given.infer) for n in names}
        peaks[case] = {name: peak for name, peak in found.items() if peak is not None}
    rows = [
        [case, *(f"{found[n]:.0f}" if n in found else "failed" for n in names)]
        for case, found in peaks.items()
    ]
    table = report.markdown(["case", *names], rows)
    print(table)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        title = "## Peak memory of a forward pass" if given.infer else "## Peak memory of a step"
        text = f"{title}, in MB beyond model and data\n\n{table}\n"
        (given.out / "memory.md").write_text(text)
        facts = {"machine": report.machine(), "versions": report.versions()}
        record = {"peak_mb": peaks, "dropout": given.dropout, **facts}
        (given.out / "memory.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("variant", choices=VARIANTS, nargs="?")
    parser.add_argument("case", choices=CASES, nargs="?")
    parser.add_argument("--all", action="store_true", help="every variant and usual case")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--infer", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON of --all")
    given = parser.parse_args()
    if given.all == (given.case is not None):
        parser.error("name a variant and a case, or give --all")
    torch.set_num_threads(given.threads)
    if given.all:
        measure_all(given)
    else:
        print(measure_peak(given.variant, given.case, given.dropout, not given.infer))


if __name__ == "__main__":
    main()
