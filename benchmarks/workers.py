"""Each variant of a model in a process of its own, which is how its users run it.

In one process, memory that one variant holds keeps glibc from returning what another frees, and so
spares it page faults that it has on its own: naive code would look up to a third faster.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import TrainingCase
from benchmarks.gate import WrongResult, check_close
from benchmarks.harness import first_line
from benchmarks.steps import VARIANTS, LinearProducts, Trainer


@dataclass(frozen=True)
class Job:
    """What a process runs: a variant of a case, in training or inference."""

    variant: str
    case: TrainingCase
    dropout: float = 0.0
    learns: bool = True
    device: str = "cpu"


class Worker:
    """A process with one variant, ready to run; use it in a with statement.

    What fails in it is raised here: WrongResult, or RuntimeError with the first line of the error.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, job, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(patience=0.0 if kind is KeyboardInterrupt else 10.0)

    def close(self, patience: float = 10.0) -> None:
        """End the process, which has that many seconds to finish what it is at."""
        self._connection.close()  # which ends it
        self._process.join(timeout=patience)
        self._process.terminate()
        self._process.join()

    def save_results(self, path: Path) -> None:
        """Write loss and gradients of the first step, or the logits."""
        self._ask("save_results", path)

    def check_results(self, path: Path) -> None:
        """Compare them with those at `path`, see gate.py."""
        self._ask("check_results", path)

    def run(self) -> None:
        """Take one step, or infer once."""
        self._ask("run")

    def gpu_peak_mb(self) -> float:
        """By how much the memory of one run exceeds that before the first one."""
        return self._ask("gpu_peak_mb")

    def _ask(self, request: str, *arguments: Any) -> Any:
        try:
            self._connection.send((request, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError):  # an OSError too where we have closed it ourselves
            raise RuntimeError(f"its process ended, exit code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class Served:
    """What a worker does, in its process."""

    def __init__(self, job: Job) -> None:
        variant = VARIANTS[job.variant]
        self._dtype, self._learns, self._device = variant.dtype, job.learns, job.device
        self._trainer: Trainer | None = None
        self._run: Callable[[], object]
        if variant.kind == "gemm":
            self._run = LinearProducts(
                variant.dtype, job.case, learns=job.learns, device=job.device
            ).run
            return
        trainer = Trainer(
            variant, job.case, dropout=job.dropout, learns=job.learns, device=job.device
        )
        if job.device == "cuda":
            self._first_mb = torch.cuda.memory_allocated() / 2**20
        self._run = trainer.step if job.learns else trainer.infer
        self._trainer = trainer

    def _results(self) -> dict[str, Tensor]:
        trainer = self._trainer
        if trainer is None:
            return {}
        if self._learns:
            return trainer.first_step()
        logits, real = trainer.infer(), trainer.batch.real
        return {"logits": logits if real is None else logits[real]}

    def save_results(self, path: Path) -> None:
        torch.save(self._results(), path)

    def check_results(self, path: Path) -> None:
        found = self._results()
        check_close(found, torch.load(path) if found else {}, self._dtype)
        if self._device == "cuda":
            torch.cuda.empty_cache()  # the other processes need memory too

    def run(self) -> None:
        if gc.isenabled():
            gc.collect()
            gc.disable()
        self._run()
        if self._device == "cuda":
            torch.cuda.synchronize()

    def gpu_peak_mb(self) -> float:
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated() / 2**20 - self._first_mb


def _serve(connection: Connection, job: Job, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business, which then ends us
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # else a pool of processes stays behind
    served: Served | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            if served is None:
                served = Served(job)
            answer = getattr(served, request)(*arguments)
        except WrongResult as wrong:
            answer = wrong
        except Exception as other:  # may be one that cannot be sent
            answer = RuntimeError(first_line(other))
        try:
            connection.send(answer)
        except OSError:  # nobody waits for it any more
            return
