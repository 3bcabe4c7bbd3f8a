"""What the tests have executed: `pytest tests/ptx --ptx-coverage FILE` writes a line per test.

A line is JSON: the test, whether a bug is planted in it, its outcome, whether it failed by a
PtxError, the opcodes that it executed, and the kernels that ran to their end with checks on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ptx.emulator import Module, PtxError, grid


class Recorder:
    """A plugin of pytest that watches the emulator while a test runs."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.opcodes: set[str] = set()
        self.kernels: set[str] = set()
        self._build, self._launch = grid.build, Module.launch

    def pytest_configure(self, config: pytest.Config) -> None:
        # The workers of a run append to the file that the main process has begun.
        if not hasattr(config, "workerinput"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("")
        recorder, original_build, original_launch = self, self._build, self._launch

        def build(program: Any, entry: Any, instruction: Any) -> Any:
            execute, opcode = original_build(program, entry, instruction), instruction.opcode

            def record(block: Any, mask: Any) -> object:
                result = execute(block, mask)
                recorder.opcodes.add(opcode)  # unless it has raised
                return result

            return record

        def launch(module: Module, name: str, *args: Any, **options: Any) -> int:
            steps = original_launch(module, name, *args, **options)
            if options.get("checks", True):
                recorder.kernels.add(_digest(module, name))
            return steps

        grid.build, Module.launch = build, launch  # type: ignore[method-assign]

    def pytest_unconfigure(self) -> None:
        grid.build, Module.launch = self._build, self._launch  # type: ignore[method-assign]

    def pytest_runtest_setup(self) -> None:
        self.opcodes.clear()
        self.kernels.clear()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        outcome = yield
        report = outcome.get_result()  # type: ignore[attr-defined]
        if call.when != "call":
            return
        line = {
            "test": item.nodeid,
            "planted": item.get_closest_marker("planted_bug") is not None,
            "outcome": report.outcome,
            "ptx_error": call.excinfo is not None and call.excinfo.errisinstance(PtxError),
            "opcodes": sorted(self.opcodes),
            "kernels": sorted(self.kernels),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _digest(module: Module, name: str) -> str:
    text = "\n".join(i.text for i in module.program.entries[name].instructions)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
