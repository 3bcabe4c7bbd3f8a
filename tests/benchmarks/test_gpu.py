"""The time of `make gpu-bench`, and what is said of what it was too short for."""

from __future__ import annotations

import pytest

from benchmarks import gpu, report
from benchmarks.command import main
from benchmarks.harness import OURS, Benchmark, Case, Row


def _interrupted(settings: object) -> list[Row]:
    raise KeyboardInterrupt


def _fails(settings: object) -> list[Row]:
    raise MemoryError("no memory left")


def _benchmark(*cases: Case) -> Benchmark:
    return Benchmark("x", "X", lambda options: list(cases), report.op_table, report.op_record)


def _case(name: str, run: object = None) -> Case:
    rows = lambda settings: [Row(name, {OURS: [2.0], "eager": [3.0]})]  # noqa: E731
    return Case(name, (name,), (OURS, "eager"), run or rows)  # type: ignore[arg-type]


def test_an_interrupted_file_reports_what_it_has(tmp_path, capsys) -> None:
    cases = (_case("first"), _case("second", _interrupted), _case("third"))
    with pytest.raises(SystemExit, match="x: interrupted"):
        main(_benchmark(*cases), ["--json", str(tmp_path / "x.json")])
    out = capsys.readouterr().out
    assert "| first " in out and "| second " not in out and "1.50x" in out
    assert "X, not measured for lack of time: second, third" in out


def test_a_case_that_fails_does_not_end_the_others(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="first: not measured: MemoryError: no memory left"):
        main(_benchmark(_case("first", _fails), _case("second")), [f"--out={tmp_path}"])
    assert "| second " in capsys.readouterr().out and list(tmp_path.iterdir())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    return now


def test_no_file_takes_the_time_of_the_others(monkeypatch, clock, capsys) -> None:
    """Each file uses all the time it may, and some seconds to report."""
    given: dict[str, float] = {}

    def measure(file: gpu.File, seconds: float) -> tuple[str, bool]:
        given[file.name] = seconds
        clock[0] += seconds + 1.0
        return f"table of {file.name}", file.name != "training_step"

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr("sys.argv", ["gpu", "--minutes", "8"])
    with pytest.raises(SystemExit, match=r"not measured, or not wholly: training_step$"):
        gpu.main()
    assert list(given) == [file.name for file in gpu.FILES] and min(given.values()) > 10
    assert given["training_step"] > 120 and clock[0] < 8 * 60
    assert "table of dropout" in capsys.readouterr().out


def test_time_that_is_left_over_goes_to_the_others(monkeypatch, clock) -> None:
    given: list[float] = []

    def measure(file: gpu.File, seconds: float) -> tuple[str, bool]:
        given.append(seconds)
        return "", True

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr("sys.argv", ["gpu", "--minutes", "8"])
    gpu.main()
    assert given[-1] == pytest.approx(8 * 60 - gpu._PATIENCE)


PROGRAM = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("rows")
    raise SystemExit(1)
"""


def test_a_file_is_interrupted_and_its_output_kept(monkeypatch) -> None:
    """A program stands in for the file."""
    popen = gpu.subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return popen([command[0], "-c", PROGRAM], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    assert gpu.measure(gpu.FILES[0], 1.0) == ("begun\nrows\n", False)
