"""Fair timing: variants take turns, medians are compared, and other processes are noticed.

The turns (A B C A B C ..., another one first in each round) are why pytest-benchmark does not do
the timing: its runner measures all of A, then all of B, and a clock that slows down in between
becomes a ratio. It is given our samples instead, see test_speed.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Variant = Callable[[], object]

OURS = "fastformer"
# A sample is disturbed when other processes used more CPU time than this meanwhile. The kernel
# counts in ticks of 10 ms on every core.
_TOLERATED_SHARE, _TOLERATED_SECONDS = 0.05, 0.02
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Settings:
    """How long to measure: samples per variant and the milliseconds that one should last.

    With `sample_ms` 0 a sample is one call. `device` is "cpu" or "cuda".
    """

    rounds: int = 7
    sample_ms: float = 20.0
    compile: bool = True
    device: str = "cpu"


QUICK = Settings(rounds=1, sample_ms=0.0, compile=False)


@dataclass(frozen=True)
class Work:
    """What an op has to do at least: its floating-point operations, and the bytes it has to move.

    Each input and each result counts once, whatever a kernel makes of it.
    """

    flop: float
    bytes: float

    def rates(self, ms: float) -> tuple[float, float]:
        """TFLOP/s and TB/s of doing it in `ms` milliseconds."""
        return self.flop / ms / 1e9, self.bytes / ms / 1e9


@dataclass
class Row:
    """The samples of each variant of one case in milliseconds, and why some variants have none.

    `failed` has rivals that could not do it, `absent` those that are not installed, or that others
    publish for other models.
    """

    case: str
    samples: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    disturbed: int = 0
    dropout: float = 0.0
    peak_mb: dict[str, float] = field(default_factory=dict)
    work: Work | None = None

    @property
    def ms(self) -> dict[str, float]:
        """Medians."""
        return {name: statistics.median(values) for name, values in self.samples.items()}

    @property
    def taken(self) -> int:
        return sum(map(len, self.samples.values()))

    def ratio(self, rival: str | None, ours: str | None = OURS) -> float | None:
        """How many times as fast as `rival` `ours` is; None where one was not measured."""
        ms = self.ms
        return ms[rival] / ms[ours] if rival in ms and ours in ms else None


@dataclass(frozen=True)
class Case:
    """Rows that share their data and a gate.

    `run` raises WrongResult where ours does not pass it, Unavailable where this version lacks the
    op. A variant may be missing from the rows.
    """

    name: str
    rows: tuple[str, ...]
    variants: tuple[str, ...]
    run: Callable[[Settings], list[Row]]


@dataclass(frozen=True)
class Options:
    """What to cover: cases by name (none: the usual ones), and how whole models are run.

    `libraries`: against the models of other libraries too, as on a GPU always.
    """

    cases: tuple[str, ...] = ()
    on_gpu: bool = False
    libraries: bool = False
    dropout: float = 0.0
    precision: str = "both"
    memory: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One file of measurements.

    `table` and `record` say how rows are shown and what of them goes into JSON. `of_models`: the
    options of whole models apply, and what is measured lasts long enough for a sample.
    """

    name: str
    about: str
    cases: Callable[[Options], list[Case]]
    table: Callable[[list[Row]], str]
    record: Callable[[Row], dict[str, Any]]
    of_models: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(rounds=5, sample_ms=0.0) if self.of_models else Settings()


class Unavailable(Exception):
    """What is to be measured does not exist in this version of fastformer."""


def _busy_seconds() -> float:
    """CPU seconds that all processes and the hypervisor used, 0 where the system does not tell."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(value) for value in stat.readline().split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it has started."""
    ticks = 0
    for child in multiprocessing.active_children():
        try:
            stat = Path(f"/proc/{child.pid}/stat").read_text()
        except OSError:  # it has ended, or the system does not tell
            continue
        user, system = stat.rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return sum(os.times()[:2]) + ticks / _TICKS


def _sample(run: Variant, iterations: int, device: str = "cpu") -> tuple[float, bool]:
    """Milliseconds per call, and whether other processes disturbed it.

    A call that is not timed comes first: whoever trains or infers does so in a row, while here the
    turns of others have emptied the caches and put the threads to sleep.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    run()
    wait()
    busy, own = _busy_seconds(), _own_seconds()
    start = time.perf_counter()
    for _ in range(iterations):
        run()
    wait()
    seconds = time.perf_counter() - start
    if device != "cpu":
        return 1e3 * seconds / iterations, False  # the CPU is not what was measured
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    disturbed = others > _TOLERATED_SHARE * seconds + _TOLERATED_SECONDS
    return 1e3 * seconds / iterations, disturbed


def measure(
    case: str,
    variants: dict[str, Variant],
    settings: Settings,
    failed: dict[str, str] | None = None,
) -> Row:
    """Time the variants in turns, with garbage collection off, after a call of each to warm up.

    A rival that raises in that call is left out, with its reason in the row; `failed` names those
    that never got so far. A disturbed sample is taken again, but no more than half as many samples
    as were asked for, after which the row counts those that stayed disturbed.
    """
    failed, iterations = dict(failed or {}), {}
    for name, run in variants.items():
        try:
            run()
        except Exception as error:
            if name.startswith(OURS):
                raise
            failed[name] = first_line(error)
            continue
        ms = _sample(run, 1, settings.device)[0] if settings.sample_ms else 1.0
        iterations[name] = max(1, round(settings.sample_ms / max(ms, 1e-3)))
    names = list(iterations)
    row = Row(case, {name: [] for name in names}, failed)
    repeats = settings.rounds * len(names) // 2
    gc.disable()
    try:
        for turn in range(settings.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                ms, disturbed = _sample(variants[name], iterations[name], settings.device)
                while disturbed and repeats:
                    repeats -= 1
                    ms, disturbed = _sample(variants[name], iterations[name], settings.device)
                row.disturbed += disturbed
                row.samples[name].append(ms)
    finally:
        gc.enable()
    return row


def first_line(error: Exception) -> str:
    """An exception in one line, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for static shapes, the only ones that are measured.

    All rivals of a case share their code, so dynamo needs a higher limit of recompilations; going
    over it is an error, since dynamo would quietly run eager code.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Make dynamo forget earlier cases, which count towards its limit; free what they held."""
    torch.compiler.reset()
    gc.collect()
