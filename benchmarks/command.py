"""The command line of each file: `python -m benchmarks.bench_<name>`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import CASES, SMALLEST
from benchmarks.gate import WrongResult
from benchmarks.harness import QUICK, Benchmark, Options, Row, Unavailable, first_line

RESULTS = Path(__file__).parent / "results"


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{benchmark.name}", description=benchmark.about
    )
    add = parser.add_argument
    add("--cases", type=_case_names, default=(), help=f"of {', '.join(CASES)}, with commas")
    add("--rounds", type=int, default=benchmark.settings.rounds, help="samples of each variant")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: at the sizes for a GPU")
    add("--threads", type=int, help="of torch (default: its own choice)")
    add("--json", type=Path, help="write the figures to this file too")
    add("--out", type=Path, help="folder of table, JSON and chart (default: benchmarks/results)")
    add("--quick", action="store_true", help="a smoke test: one case, one sample, no compile")
    add("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    add(
        "--allocator",
        choices=("default", "raised"),
        default="default",
        help=f"raised: glibc keeps freed memory ({', '.join(report.RAISED)})",
    )
    if benchmark.of_models:
        add("--dropout", type=float, default=0.0, help="of attention weights, branches, embeddings")
        add(
            "--precision",
            choices=("both", "float32", "bfloat16", "float32-rivals"),
            default="both",
            help="float32-rivals: ours in both",
        )
        add("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
        add(
            "--libraries",
            action="store_true",
            help="also Hugging Face, timm and torchvision (on a GPU always)",
        )
    return parser


def _case_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}")
    return names


def _usual_folder(device: str) -> Path:
    """The results of each GPU lie in a folder of their own."""
    if device == "cpu":
        return RESULTS
    return RESULTS / torch.cuda.get_device_name().lower().replace(" ", "-")


def _use_allocator(name: str) -> None:
    """Start again with the environment that glibc reads only at the start of a process."""
    if name == "raised" and report.allocator() != name:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | report.RAISED)


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write what was asked for; exit with 1 if a result was wrong.

    Ctrl-C ends the measuring: what was measured until then is reported, and the rest is named.
    """
    given = _parser(benchmark).parse_args(argv)
    _use_allocator(given.allocator)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no NVIDIA GPU, or torch is a CPU build")
    settings = replace(
        benchmark.settings, rounds=given.rounds, compile=given.compile, device=given.device
    )
    names, folder = given.cases, given.out or _usual_folder(given.device)
    if given.quick:
        # Its figures mean nothing, so that they must not replace measured ones.
        settings = replace(QUICK, device=given.device)
        names, folder = names or (SMALLEST,), given.out
    options = Options(cases=names, on_gpu=given.device == "cuda")
    if benchmark.of_models:
        options = replace(
            options,
            dropout=given.dropout,
            precision=given.precision,
            memory=given.memory and not given.quick,
            libraries=given.libraries,
        )
    rows: list[Row] = []
    wrong: list[str] = []
    unmeasured = benchmark.cases(options)
    try:
        while unmeasured:
            case = unmeasured[0]
            print(f"{benchmark.name}: {case.name}", file=sys.stderr, flush=True)
            try:
                rows += case.run(settings)
            except WrongResult as error:
                wrong.append(f"{case.name}: wrong result, not measured: {error}")
            except Unavailable:
                raise
            except Exception as error:  # the other cases may well work
                traceback.print_exc()
                wrong.append(f"{case.name}: not measured: {first_line(error)}")
            del unmeasured[0]
    except Unavailable as error:
        print(f"{benchmark.name}: {error}")
        return
    except KeyboardInterrupt:
        wrong.append(f"{benchmark.name}: interrupted")
    if rows:
        print(report.text(benchmark, rows))
        if folder and (given.out or not unmeasured):  # parts do not replace what is whole
            report.write(benchmark, rows, folder)
        if given.json:
            report.write_json(benchmark, rows, given.json)
    if unmeasured:
        names = ", ".join(case.name for case in unmeasured)
        print(f"\n{benchmark.about}, not measured for lack of time: {names}")
    if wrong:
        raise SystemExit("\n".join(wrong))
