"""Options of `pytest benchmarks`, and the tables that it prints and writes at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.command import RESULTS
from benchmarks.harness import Benchmark, Row

ROWS = pytest.StashKey[list[tuple[Benchmark, list[Row]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastformer")
    group.addoption("--rounds", type=int, help="samples of each variant")
    group.addoption("--quick", action="store_true", help="one case, one sample, no compile")
    group.addoption("--out", type=Path, help="folder of tables, JSON and charts")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    folder = config.getoption("--out") or (None if config.getoption("--quick") else RESULTS)
    for benchmark, rows in config.stash[ROWS]:
        if rows:
            terminalreporter.write_line("\n" + report.text(benchmark, rows))
            if folder:
                report.write(benchmark, rows, folder)
