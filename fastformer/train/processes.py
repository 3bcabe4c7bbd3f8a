"""The processes of a run: the group that torchrun starts, and the signals that end it."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastformer.train.config import RunError


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process trains on."""

    rank: int = 0
    world_size: int = 1

    def agreed_path(self, path: Path) -> Path:
        """The path that the leading process chose."""
        names = [str(path)]
        if self.world_size > 1:
            dist.broadcast_object_list(names)
        return Path(names[0])


@contextmanager
def join_group(device: torch.device) -> Iterator[tuple[Share, torch.device]]:
    """Join the process group when torchrun started us; give each process its own GPU."""
    if "WORLD_SIZE" not in os.environ:
        yield Share(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size()), device
        dist.barrier()  # none leaves while another still needs it
    finally:
        # A sharded model holds on to the group in reference cycles; freed after the group, at the
        # end of the process, it can abort it.
        gc.collect()
        dist.destroy_process_group()


class Interrupted(RunError):
    """SIGINT or SIGTERM came; a checkpoint was saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers SIGINT or SIGTERM until the step is over; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def _receive(self, number: int, frame: object) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, share: Share, device: torch.device) -> int | None:
        """The signal that any of the processes received."""
        if share.world_size == 1:
            return self.number
        number = torch.tensor(self.number or 0, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number) or None


def ignore_interrupt(worker: int) -> None:
    """For data workers: Ctrl-C reaches every process of a terminal, and one must answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
