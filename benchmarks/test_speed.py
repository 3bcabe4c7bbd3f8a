"""Every measurement as an entry of pytest-benchmark: `pytest benchmarks -k layer_norm`.

pytest-benchmark carries the statistics: it sums up, saves and compares runs (--benchmark-autosave,
--benchmark-compare). It does not do the timing, as it cannot make variants take turns: the first
entry of a case measures all its variants with harness.measure, and each entry then replays its
samples on a clock that advances by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.cases import SMALLEST
from benchmarks.conftest import ROWS
from benchmarks.harness import QUICK, Benchmark, Case, Options, Row, Settings, Unavailable

FILES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
BENCHMARKS: list[Benchmark] = [import_module(f"benchmarks.{name}").BENCHMARK for name in FILES]

# A case of whole models may take minutes, all of them compilation.
pytestmark = pytest.mark.timeout(0)


class Replay:
    """A clock on which each call of `tick` lasts as long as the next sample (in seconds)."""

    def __init__(self, samples: list[float]) -> None:
        self._samples, self._now = iter(samples), 0.0
        self.rounds = len(samples)

    def clock(self) -> float:
        return self._now

    def tick(self) -> None:
        self._now += next(self._samples)


class Measured:
    """The rows of the cases measured so far, in the stash that the report at the end reads."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._outcomes: dict[str, list[Row] | Exception] = {}
        self._reported: dict[str, list[Row]] = {}

    def rows(self, benchmark: Benchmark, case: Case) -> list[Row]:
        key = f"{benchmark.name} {case.name}"
        if key not in self._outcomes:
            try:
                self._outcomes[key] = rows = case.run(self._settings(benchmark))
            except Exception as error:
                self._outcomes[key] = error
            else:
                if benchmark.name not in self._reported:
                    self._reported[benchmark.name] = []
                    self._config.stash[ROWS].append((benchmark, self._reported[benchmark.name]))
                self._reported[benchmark.name] += rows
        outcome = self._outcomes[key]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _settings(self, benchmark: Benchmark) -> Settings:
        if self._config.getoption("--quick"):
            return QUICK
        rounds = self._config.getoption("--rounds") or benchmark.settings.rounds
        return replace(benchmark.settings, rounds=rounds)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Measured:
    return Measured(pytestconfig)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = Options(cases=(SMALLEST,) if metafunc.config.getoption("--quick") else ())
    entries = [
        pytest.param(benchmark, case, row, variant, id=f"{benchmark.name}-{row}-{variant}")
        for benchmark in BENCHMARKS
        for case in benchmark.cases(options)
        for row in case.rows
        for variant in case.variants
    ]
    metafunc.parametrize(("entry_of", "case", "row", "variant"), entries)


@pytest.fixture
def replay(
    request: pytest.FixtureRequest,
    measured: Measured,
    entry_of: Benchmark,
    case: Case,
    row: str,
    variant: str,
) -> Replay:
    try:
        rows = measured.rows(entry_of, case)
    except Unavailable as error:
        pytest.skip(str(error))
    found = next(r for r in rows if r.case == row)
    if variant not in found.samples:
        pytest.skip(found.failed.get(variant, "not measured in this case"))
    replay = Replay([ms / 1e3 for ms in found.samples[variant]])
    # Seen by the benchmark fixture, which is made after this one.
    request.node.add_marker(
        pytest.mark.benchmark(group=f"{entry_of.name} {row}", timer=replay.clock)
    )
    return replay


def test_speed(replay: Replay, benchmark: Callable[..., object]) -> None:
    benchmark.pedantic(replay.tick, rounds=replay.rounds)
