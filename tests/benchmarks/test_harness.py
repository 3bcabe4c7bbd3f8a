"""Turns, medians and disturbed samples, on variants and samples that are known."""

from __future__ import annotations

import json

import pytest

from benchmarks import harness, report
from benchmarks.harness import OURS, Benchmark, Row, Settings, measure
from benchmarks.test_speed import Replay

ROWS = [
    Row("small", {OURS: [3.0, 1.0, 2.0], "eager": [8.0, 9.0, 100.0], "compile": [4.0, 4.0, 4.0]}),
    Row("large", {OURS: [5.0], "eager": [4.0]}, failed={"compile": "BackendError: no compiler"}),
]


def _turns(rounds: int) -> tuple[str, Row]:
    log: list[str] = []
    variants = {name: lambda name=name: log.append(name) for name in (OURS, "b", "c")}
    row = measure("x", variants, Settings(rounds=rounds, sample_ms=0.0))
    return "".join(name[0] for name in log), row


def test_variants_take_turns_and_another_one_begins_each_round() -> None:
    order, row = _turns(4)
    # The first call of each warms up, and so does the one before each sample.
    assert order == "fbc" + "ffbbcc" + "bbccff" + "ccffbb" + "ffbbcc"
    assert row.taken == 12 and {len(s) for s in row.samples.values()} == {4}


def test_a_sample_is_long_enough_and_counted_per_call(monkeypatch) -> None:
    calls: list[str] = []

    def sample(run, iterations, device):
        calls.append(iterations)
        return 0.5, False

    monkeypatch.setattr(harness, "_sample", sample)
    row = measure("x", {OURS: lambda: None}, Settings(rounds=2, sample_ms=20.0))
    assert calls == [1, 40, 40]
    assert row.ms == {OURS: 0.5}


def test_disturbed_samples_are_taken_again_but_not_for_ever(monkeypatch) -> None:
    taken: list[int] = []

    def sample(run, iterations, device):
        taken.append(iterations)
        return 1.0, True

    monkeypatch.setattr(harness, "_sample", sample)
    row = measure("x", {OURS: lambda: None, "eager": lambda: None}, Settings(rounds=4))
    assert len(taken) == 2 + 8 + 4
    assert row.disturbed == 8
    assert any("8 of 8 samples" in note for note in report.notes([row]))


def test_a_busy_machine_disturbs_and_a_quiet_one_does_not(monkeypatch) -> None:
    """The others used 0, then 9 seconds of CPU time."""
    clock = iter([0.0, 0.0, 0.0, 9.0])
    monkeypatch.setattr(harness, "_busy_seconds", lambda: next(clock))
    assert not harness._sample(lambda: None, 1)[1]
    assert harness._sample(lambda: None, 1)[1]


def test_a_rival_that_raises_is_named_and_ours_is_an_error() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler\nmore")

    settings = Settings(rounds=1, sample_ms=0.0)
    row = measure("x", {OURS: lambda: None, "compile": broken}, settings)
    assert list(row.samples) == [OURS]
    assert row.failed == {"compile": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        measure("x", {OURS: broken, "eager": lambda: None}, settings)


def test_ratios_are_of_medians() -> None:
    small, large = ROWS
    assert small.ratio("eager") == 4.5 and small.ratio("compile") == 2.0
    assert large.ratio("eager") == 0.8 and large.ratio("compile") is None
    assert report.op_record(small)["vs_best"] == 2.0
    assert report.op_record(large)["best"] == "eager"


def test_the_table_shows_ratios_first_and_failures() -> None:
    head, _, small, large = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.op_table(ROWS).splitlines()
    )
    assert head[:4] == ["case", "vs best", "vs eager", "vs compile"]
    assert small == ["small", "2.00x", "4.50x", "2.00x", "2.000", "9.000", "4.000"]
    assert large == ["large", "0.80x", "0.80x", "", "5.000", "4.000", "failed"]
    assert report.notes(ROWS) == ["large: compile failed, BackendError: no compiler"]


def test_results_are_written(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    benchmark = Benchmark("op", "An op", lambda o: [], report.op_table, report.op_record)
    report.write(benchmark, ROWS, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "op.json").read_text())
    assert written["rows"][0]["ms"] == {OURS: 2.0, "eager": 9.0, "compile": 4.0}
    assert written["rows"][1]["failed"] == ROWS[1].failed
    assert written["machine"]["threads"] >= 1 and written["versions"]["torch"]
    assert "4.50x" in (tmp_path / "new" / "op.md").read_text()
    assert (tmp_path / "new" / "op.png").read_bytes().startswith(b"\x89PNG")


def test_replayed_samples_are_what_a_runner_measures() -> None:
    samples, measured = [0.25, 0.5, 4.0], []
    replay = Replay(samples)
    for _ in range(replay.rounds):
        start = replay.clock()
        replay.tick()
        measured.append(replay.clock() - start)
    assert measured == samples
