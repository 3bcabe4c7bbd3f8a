"""Tables, charts and JSON of measured rows: ratios first, and what machine they belong to."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastformer
from benchmarks.cases import GPU_BACKENDS
from benchmarks.harness import OURS, Benchmark, Row

# glibc returns freed blocks of these sizes to the system, and page faults follow; raised, it keeps
# them. The variables are read at the start of a process.
RAISED = {name: str(2**40) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}

_INK, _GRID = "#333333", "#dddddd"
_GREYS = ("#777777", "#c2c2c2")
_COLORS = {  # dark: float32, light: bfloat16
    "fastformer": ("#c4501b", "#eb9a62"),
    "naive": ("#2f5d8a", "#94b7d8"),
    "eager": ("#4d7d4c", "#a8cda5"),
    "compile": ("#6d5b94", "#bcb1d6"),
    "compile-eager": ("#6d5b94", "#bcb1d6"),
    "compile-naive": ("#8f8a2b", "#d3cf8c"),
    "fused": ("#2f5d8a", "#94b7d8"),
    "loop": ("#2f5d8a", "#94b7d8"),
    "compile-loop": ("#8f8a2b", "#d3cf8c"),
    "hugging-face": ("#a8842c", "#e3cb8a"),
    "timm": ("#2b7d8f", "#8fcbd6"),
    "torchvision": ("#8f2b62", "#d68fb8"),
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is aligned in plain text too."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[cell.ljust(widths[i]) for i, cell in enumerate(line)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def ms_cell(row: Row, variant: str) -> str:
    if variant in row.failed:
        return "failed"
    if variant not in row.samples:
        return ""
    ms = row.ms[variant]
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def variants_of(rows: Iterable[Row]) -> list[str]:
    """All variants in the order of their first row, those that failed last."""
    rows = list(rows)
    measured = [name for row in rows for name in row.samples]
    return list(dict.fromkeys(measured + [name for row in rows for name in row.failed]))


def best(row: Row, names: Iterable[str]) -> str | None:
    """The fastest of `names` that was measured."""
    return min((name for name in names if name in row.samples), key=row.ms.get, default=None)


def _rivals(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in (OURS, *GPU_BACKENDS)]


def rates(row: Row) -> tuple[float, float] | None:
    """TFLOP/s and TB/s of the fastest of our kernels, where the work is known."""
    fastest = best(row, (OURS, *GPU_BACKENDS))
    if row.work is None or fastest is None:
        return None
    return row.work.rates(row.ms[fastest])


def op_table(rows: list[Row]) -> str:
    """How many times as fast as the best and as each rival an op is, then the milliseconds.

    On a GPU also what the fastest of our kernels gets out of it.
    """
    names = variants_of(rows)
    rivals = _rivals(names)
    has_rates = any(row.work for row in rows)
    head = ["case", "vs best", *(f"vs {name}" for name in rivals)]
    head += ["TFLOP/s", "TB/s"] if has_rates else []
    head += [f"{name} ms" for name in names]
    cells = []
    for row in rows:
        found = rates(row) or ()
        cells.append(
            [
                row.case,
                times(row.ratio(best(row, rivals))),
                *(times(row.ratio(rival)) for rival in rivals),
                *([f"{rate:.3g}" for rate in found] if found else [""] * 2 * has_rates),
                *(ms_cell(row, name) for name in names),
            ]
        )
    return markdown(head, cells)


def op_record(row: Row) -> dict[str, Any]:
    rivals = _rivals(row.samples)
    ratios = {f"vs_{name}": row.ratio(name) for name in rivals}
    fastest = best(row, rivals)
    found = rates(row)
    return {
        "case": row.case,
        "vs_best": row.ratio(fastest),
        **ratios,
        "best": fastest,
        **({} if found is None else {"tflops": found[0], "tb_per_s": found[1]}),
        "ms": row.ms,
    }


def notes(rows: list[Row]) -> list[str]:
    """What a reader of the table has to know: missing rivals, samples that were disturbed."""
    lines = [
        f"{row.case}: {name} failed, {why}" for row in rows for name, why in row.failed.items()
    ]
    absent: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for missing in row.absent.items():
            absent.setdefault(missing, []).append(row.case)
    for (name, why), without in absent.items():
        where = "" if len(without) == len(rows) else f" from {', '.join(without)}"
        lines.append(f"{name} is absent{where}: {why}")
    disturbed, taken = (sum(getattr(row, name) for row in rows) for name in ("disturbed", "taken"))
    if disturbed:
        lines.append(
            f"warning: other processes disturbed {disturbed} of {taken} samples;"
            " measure again on a quiet machine"
        )
    return lines


def allocator() -> str:
    """ "raised" or "default"."""
    raised = all(os.environ.get(name) == value for name, value in RAISED.items())
    return "raised" if raised else "default"


def machine() -> dict[str, Any]:
    """The hardware and the settings that a figure belongs to."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "allocator": allocator(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
    }


def versions() -> dict[str, str]:
    return {
        "fastformer": fastformer.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _bars(axes: Any, rows: list[Row], names: list[str], baseline: str, bars: dict) -> None:
    """Draw the rows as groups of bars into one panel; remember one bar of each name in `bars`."""
    y, ticks = 0.0, []
    for row in rows:
        top = y
        for name in (n for n in names if n in row.samples):
            ratio = row.ratio(baseline, name)
            color = _COLORS.get(name.removesuffix("-bf16"), _GREYS)[name.endswith("-bf16")]
            bars[name] = axes.barh(y, ratio, height=0.9, color=color)
            axes.annotate(
                f"{ratio:.2f}",
                (ratio, y),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=_INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            y += 1
        ticks.append((top + y - 1) / 2)
        y += 0.8
    axes.axvline(1.0, color=_INK, linewidth=1)
    axes.set_yticks(ticks, [row.case for row in rows], fontsize=7)
    axes.set_ylim(y - 0.8, -1)
    axes.set_xlabel(f"times as fast as {baseline} (the line)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.08)


def chart(rows: list[Row], title: str, path: Path) -> None:
    """Horizontal bars: how many times as fast as eager each variant of each case is.

    Without eager, which a precision of bfloat16 alone leaves out, naive is the measure. Where there
    is neither, or no matplotlib, there is no chart.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    # Figure, not pyplot: nothing global is touched and no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    baseline = "eager" if any("eager" in row.samples for row in rows) else "naive"
    rows = [row for row in rows if baseline in row.samples]
    if not rows:
        return
    names = [name for name in variants_of(rows) if name != baseline]
    half = (len(rows) + 1) // 2
    panels = [rows[:half], rows[half:]] if len(rows) > 2 else [rows]
    tallest = max(sum(len(row.samples) for row in panel) for panel in panels)
    figure = Figure(figsize=(6 * len(panels), 1.5 + 0.15 * tallest), layout="constrained")
    FigureCanvasAgg(figure)
    bars: dict[str, Any] = {}
    columns = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axes, panel in zip(columns, panels, strict=True):
        _bars(axes, panel, names, baseline, bars)
    figure.suptitle(title, fontsize=10)
    shown = [name for name in names if name in bars]
    figure.legend(
        [bars[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=6,
        fontsize=7,
        frameon=False,
    )
    figure.savefig(path, dpi=120)


def text(benchmark: Benchmark, rows: list[Row]) -> str:
    """The table, its notes and the machine, in markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in (machine() | versions()).items())
    remarks = "\n".join(f"- {line}" for line in (*notes(rows), facts))
    return f"## {benchmark.about}\n\n{benchmark.table(rows)}\n\n{remarks}"


def write_json(benchmark: Benchmark, rows: list[Row], path: Path) -> None:
    records = [
        {
            **benchmark.record(row),
            "samples": row.taken,
            "disturbed": row.disturbed,
            "failed": row.failed,
            "absent": row.absent,
        }
        for row in rows
    ]
    result = {"rows": records, "machine": machine(), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def write(benchmark: Benchmark, rows: list[Row], folder: Path) -> None:
    """Write <name>.md, <name>.json and <name>.png into `folder`."""
    write_json(benchmark, rows, folder / f"{benchmark.name}.json")
    (folder / f"{benchmark.name}.md").write_text(text(benchmark, rows) + "\n")
    chart(rows, benchmark.about, folder / f"{benchmark.name}.png")
