"""Fair timing: variants take turns, medians are compared, and a wrong result forbids a figure."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastformer

Variant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """Median milliseconds of each variant of one case."""

    case: str
    ms: dict[str, float]

    def ratio(self, rival: str) -> float:
        """How many times faster fastformer is than `rival`."""
        return self.ms[rival] / self.ms["fastformer"]


def measure(case: str, variants: dict[str, Variant], rounds: int = 30) -> Row:
    """Time the variants in turns (A B C A B C ...), after one warm-up round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return Row(case, {name: statistics.median(values) for name, values in times.items()})


def table(rows: list[Row]) -> str:
    """A markdown table, the ratios first."""
    names = list(rows[0].ms)
    rivals = [name for name in names if name != "fastformer"]
    head = ["case", *(f"faster than {r}" for r in rivals), *(f"{n} ms" for n in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row.ratio(r):.2f}x" for r in rivals] + [f"{row.ms[n]:.3f}" for n in names]
        lines.append("| " + " | ".join([row.case, *cells]) + " |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """The hardware and the versions that a figure belongs to."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "torch": torch.__version__,
        "fastformer": fastformer.__version__,
        "python": platform.python_version(),
    }


def main(name: str, cases: Callable[[], list[Row]]) -> None:
    """Run one benchmark as a command: print its table, and write JSON where --json says."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    rows = cases()
    print(table(rows))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        result = {"rows": [asdict(row) for row in rows], "machine": machine()}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
