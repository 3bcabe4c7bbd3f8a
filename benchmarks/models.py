"""Benchmarks of whole models: the gate, the rows and their table, for training and inference."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import CASES, DEFAULT, GPU, TrainingCase
from benchmarks.gate import WrongResult
from benchmarks.harness import (
    OURS,
    Benchmark,
    Case,
    Options,
    Row,
    Settings,
    first_line,
    measure,
)
from benchmarks.library_models import has_models, why_absent
from benchmarks.memory import peak_mb
from benchmarks.steps import VARIANTS, Variant
from benchmarks.workers import Job, Worker

OURS_BF16 = f"{OURS}-bf16"
RIVALS = [name for name, variant in VARIANTS.items() if variant.is_rival]
RIVALS_FLOAT32 = [name for name in RIVALS if VARIANTS[name].dtype == torch.float32]


def chosen(options: Options, compile: bool, kind: str | None = None) -> dict[str, Variant]:
    """The variants of a run, of models of one `kind` if it is given.

    On a CPU naive float32, which all are compared with, is always one of them. On a GPU it would
    take the memory and the time of several others, and naive code is not compiled.
    """
    both = torch.float32, torch.bfloat16
    dtypes = {"float32": both[:1], "bfloat16": both[1:]}

    def runs(name: str, variant: Variant) -> bool:
        if variant.is_library and not (options.libraries or options.on_gpu):
            return False
        if variant.is_library and kind is not None and not has_models(variant.kind, kind):
            return False
        if name == "naive" and not options.on_gpu:
            return True
        if variant.compile and (not compile or (options.on_gpu and variant.kind == "naive")):
            return False
        if options.precision == "float32-rivals":
            return variant.kind == "ours" or variant.dtype == torch.float32
        return variant.dtype in dtypes.get(options.precision, both)

    return {name: variant for name, variant in VARIANTS.items() if runs(name, variant)}


def _why_absent(case: TrainingCase, options: Options, variant: Variant) -> str | None:
    if not variant.is_library:
        return None
    if options.dropout:
        return "its dropout is not in the same places"
    return why_absent(variant.kind, case.kind, case.config)


def _run(case: TrainingCase, options: Options, learns: bool, settings: Settings) -> list[Row]:
    failed: dict[str, str] = {}
    device = settings.device
    variants = chosen(options, settings.compile, case.kind)
    reasons = {name: _why_absent(case, options, variant) for name, variant in variants.items()}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}

    def job(name: str) -> Job:
        return Job(name, case, options.dropout, learns, device)

    with ExitStack() as stack:
        true = Path(stack.enter_context(TemporaryDirectory())) / "naive.pt"
        names = [name for name in variants if name not in absent]
        workers = {
            name: stack.enter_context(Worker(job(name)))
            for name in dict.fromkeys((*names, "naive"))
        }
        workers["naive"].save_results(true)
        if "naive" not in names:
            workers.pop("naive").close()  # and so give back its memory
        for name in names:
            try:
                workers[name].check_results(true)
            except (WrongResult, RuntimeError) as error:
                if not VARIANTS[name].is_rival:
                    raise
                # A rival that cannot be compiled, or computes something else, is reported as such.
                wrong = isinstance(error, WrongResult)
                failed[name] = first_line(error) if wrong else str(error)
                workers.pop(name).close()
        row = measure(case.name, {n: w.run for n, w in workers.items()}, settings, failed)
        row.absent = absent
        if options.memory and device == "cuda":
            with_memory = (n for n in row.samples if VARIANTS[n].kind != "gemm")
            row.peak_mb = {name: workers[name].gpu_peak_mb() for name in with_memory}
    row.dropout = options.dropout
    if options.memory and device == "cpu":
        for name in row.samples:
            if VARIANTS[name].kind != "gemm":
                peak = peak_mb(name, case.name, options.dropout, learns)
                row.peak_mb |= {} if peak is None else {name: peak}
    return [row]


def model_cases(learns: bool, options: Options) -> list[Case]:
    variants = tuple(chosen(options, compile=True))
    return [
        Case(name, (name,), variants, partial(_run, CASES[name], options, learns))
        for name in options.cases or (GPU if options.on_gpu else DEFAULT)
    ]


def record(row: Row) -> dict[str, Any]:
    """What counts of a row: `vs_` are speed-ups of our fastest variant, unless named otherwise.

    vs_naive: over naive float32. vs_best: over the fastest of all rivals, in any precision.
    vs_eager_fp32: of our float32 over the fastest float32 rival. vs: over every rival. gemm_share:
    the part of our time that the matrix products of the linear layers take alone.
    """
    ours = report.best(row, (OURS, OURS_BF16))
    best, best_float32 = report.best(row, RIVALS), report.best(row, RIVALS_FLOAT32)
    return {
        "case": row.case,
        "dropout": row.dropout,
        "vs_naive": row.ratio("naive", ours),
        "vs_best": row.ratio(best, ours),
        "vs_eager_fp32": row.ratio(best_float32, OURS),
        "vs": {name: row.ratio(name, ours) for name in RIVALS if name in row.samples},
        "gemm_share_bf16": row.ratio("gemm-bf16", OURS_BF16),
        "gemm_share_fp32": row.ratio("gemm", OURS),
        "ours": ours,
        "best": best,
        "best_fp32": best_float32,
        "ms": row.ms,
        "peak_mb": row.peak_mb,
    }


def table(rows: list[Row]) -> str:
    """The ratios of `record`, then those over every rival, milliseconds and peak memory."""
    head = ["case", "vs naive", "vs best", "the best", "float32 vs best float32", "its best"]
    head += ["GEMM share bf16", "GEMM share float32"]
    cells = []
    for row in rows:
        found = record(row)
        shares = (found["gemm_share_bf16"], found["gemm_share_fp32"])
        cells.append(
            [
                row.case + (f", dropout {row.dropout}" if row.dropout else ""),
                report.times(found["vs_naive"]),
                report.times(found["vs_best"]),
                found["best"] or "",
                report.times(found["vs_eager_fp32"]),
                found["best_fp32"] or "",
                *("" if share is None else f"{share:.0%}" for share in shares),
            ]
        )
    parts = [report.markdown(head, cells)]
    names = report.variants_of(rows)
    rivals = [name for name in names if VARIANTS[name].is_rival]
    ratios = [
        [row.case, *(report.times(record(row)["vs"].get(name)) for name in rivals)] for row in rows
    ]
    parts.append("Over each rival:\n\n" + report.markdown(["case", *rivals], ratios))
    times = [[row.case, *(report.ms_cell(row, name) for name in names)] for row in rows]
    parts.append("Milliseconds:\n\n" + report.markdown(["case", *names], times))
    if any(row.peak_mb for row in rows):
        names = [name for name in names if VARIANTS[name].kind != "gemm"]
        peaks = [
            [row.case, *(f"{row.peak_mb[n]:.0f}" if n in row.peak_mb else "" for n in names)]
            for row in rows
        ]
        parts.append(
            "Peak memory in MB beyond model and data:\n\n"
            + report.markdown(["case", *names], peaks)
        )
    return "\n\n".join(parts)


def model_benchmark(name: str, about: str, *, learns: bool) -> Benchmark:
    cases = partial(model_cases, learns)
    return Benchmark(name, about, cases, table, record, of_models=True)
