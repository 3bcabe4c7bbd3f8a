"""The output folder of a run: claimed by one process, never overwritten by another run.

config.json  tokenizer.json  checkpoints/  model.safetensors
log.csv  tensorboard/  curves.png  samples.txt  summary.json
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from fastformer.train.checkpoint import naming_full_disk
from fastformer.train.config import RunError

_LOCK = ".lock"
_IN_USE = "--out {} is in use by another run; wait for it, or choose another folder"


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def free_name(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of name-2, name-3, ... that does not exist."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


class RunFolder:
    """Context manager that creates and locks the folder; before the lock nothing is touched."""

    def __init__(self, path: Path, resume: bool, leader: bool = True) -> None:
        self.path, self.resume, self.leader = path, resume, leader
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        if not self.leader:  # one process of a group holds the lock for all
            return self
        if self.resume and not self.path.is_dir():
            raise RunError(f"--resume: no such folder: {self.path}; check --out")
        try:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "a")
        except OSError as error:
            raise RunError(f"--out {self.path}: {error.strerror}; choose another folder") from None
        try:
            # A record lock, unlike flock, is not inherited by forked workers: it ends with its
            # process.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise RunError(_IN_USE.format(self.path)) from None
        return self

    def _refuse_foreign(self) -> None:
        if self.resume or not self.path.is_dir():
            return
        if any(p.name != _LOCK for p in self.path.iterdir()):
            if _is_locked(self.path / _LOCK):
                raise RunError(_IN_USE.format(self.path))
            raise RunError(
                f"--out {self.path} is not empty; add --resume to go on with the run in it,"
                " or choose another folder"
            )

    def __exit__(self, *exception: object) -> None:
        if self._lock is None:
            return
        if [p.name for p in self.path.iterdir()] == [_LOCK]:  # the run ended before it began
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in one piece: readers see the old or the new one."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in one piece."""
        path, temporary = self.path / name, self.path / f".{name}.tmp"
        with naming_full_disk(path):
            try:
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def read_config(path: Path) -> dict[str, Any] | None:
    """The parsed config.json of a run, None when there is none; RunError when it is damaged."""
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not {"kind", "train", "model"} <= values.keys():
            raise ValueError("it lacks kind, train or model")
        return values
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error}; restore it or choose another --out") from None
