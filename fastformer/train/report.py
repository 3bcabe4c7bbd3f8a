"""What a run shows and leaves behind: lines, bars, CSV, TensorBoard, samples and curves."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastformer.train.checkpoint import naming_full_disk
from fastformer.train.data import Progress as ProgressCallback
from fastformer.train.folder import RunFolder

_SAMPLE_HEADER = "=== step {} ==="


class Screen:
    """Lines for people and log files; bars on a terminal only."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(highlight=False, quiet=silent)

    @property
    def width(self) -> int:
        """Columns of the terminal; 100 where there is none."""
        return self.console.width if self.console.is_terminal else 100

    def line(self, text: str = "") -> None:
        """Print one line as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(
        self, description: str, total: int | None, start: int = 0
    ) -> Iterator[ProgressCallback]:
        """Show a bar while the block runs; call what it yields with (done, total)."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        shown = self.console.is_terminal and not self.console.quiet
        with Progress(
            *columns, console=self.console, transient=True, disable=not shown
        ) as progress:
            task = progress.add_task(description, total=total, completed=start)
            yield lambda done, of: progress.update(task, completed=done, total=of)


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:04:05."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Log:
    """log.csv, TensorBoard events and samples.txt of a run; a resumed run continues them."""

    def __init__(self, folder: RunFolder, columns: tuple[str, ...], first_step: int) -> None:
        self.path, self.columns = folder / "log.csv", columns
        self._samples = folder / "samples.txt"
        # What an interrupted run logged after the checkpoint that is gone on from is forgotten; a
        # run that starts at step 0, again or not, logs that step too.
        kept = first_step if first_step > 0 else -1
        self._drop_rows_after(kept)
        self._drop_samples_after(kept)
        self._tensorboard = _tensorboard_writer(folder / "tensorboard", first_step)

    def _drop_rows_after(self, step: int) -> None:
        rows = read_log(self.path) if self.path.exists() else []
        with naming_full_disk(self.path), open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= step)

    def _drop_samples_after(self, step: int) -> None:
        if not self._samples.exists():
            return
        text = self._samples.read_text(encoding="utf-8")
        for match in re.finditer(_SAMPLE_HEADER.format(r"(\d+)"), text):
            if int(match[1]) > step:
                text = text[: match.start()]
                break
        self._samples.write_text(text, encoding="utf-8")

    def row(self, **values: Any) -> None:
        """Append one row; columns without a value stay empty."""
        with naming_full_disk(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )
        if self._tensorboard is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, values["step"])

    def sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt."""
        with naming_full_disk(self._samples), open(self._samples, "a", encoding="utf-8") as file:
            file.write(f"{_SAMPLE_HEADER.format(step)}\n{text}\n\n")

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def _tensorboard_writer(path: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the package tensorboard is optional
        return None
    return SummaryWriter(str(path), purge_step=first_step + 1)


def read_log(path: Path) -> list[dict[str, str]]:
    """Rows of a log.csv; a last row cut short by a crash is left out."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]


def plot_curves(log: Path, picture: Path, title: str) -> None:
    """Draw training and validation loss, and accuracy where there is one, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log)

    def series(column: str) -> tuple[list[int], list[float]]:
        points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
        return [step for step, _ in points], [value for _, value in points]

    accuracy = series("val_accuracy")
    panels = 2 if accuracy[0] else 1
    figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 4.2), squeeze=False)
    loss_axis = axes[0][0]
    loss_axis.plot(*series("loss"), label="training", linewidth=1)
    loss_axis.plot(*series("val_loss"), label="validation", marker="o", markersize=3)
    loss_axis.set(xlabel="step", ylabel="loss (nats)", title=title)
    loss_axis.legend()
    loss_axis.grid(alpha=0.3)
    if panels == 2:
        axis = axes[0][1]
        axis.plot(*accuracy, label="validation", marker="o", markersize=3, color="tab:orange")
        axis.set(xlabel="step", ylabel="accuracy", title=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with naming_full_disk(picture):
        figure.savefig(picture, dpi=120)
    plt.close(figure)
