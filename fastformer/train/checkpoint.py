"""Checkpoints: one safetensors file with weights, optimiser state, the step and a digest of it all.

A file is written under a temporary name, synced and renamed, so that a crash at any moment leaves
the older ones untouched; the digest tells a damaged file from a good one. Nothing random is
stored: batches and dropout are functions of (seed, step).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastformer.train.config import RunError
from fastformer.train.shards import spread, whole

KEEP = 3
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name ("model/...", "optimizer/...") and what else the run has to remember."""

    step: int
    tensors: dict[str, Tensor]
    progress: dict[str, Any]


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one clear RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, OSError) and error.errno in full:
            why = os.strerror(error.errno or 0)
        elif any(f"os error {number}" in str(error) for number in full):
            why = "no space left on device"
        else:
            raise
        raise RunError(
            f"cannot write {path}: {why}; free some space and go on with --resume"
            " (earlier checkpoints are intact)"
        ) from None


def check_space(folder: Path, parameters: int) -> None:
    """Raise RunError unless one checkpoint more than will be kept fits on the disk of `folder`."""
    needed = (KEEP + 1) * 12 * parameters  # float32 weights and two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"not enough space in {folder}: checkpoints need {needed / 1e6:,.0f} MB,"
            f" {free / 1e6:,.0f} MB are free; choose another --out"
        )


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that determine the rest of a run, on the CPU; called by every process of a
    sharded run, as each holds a part."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = whole(value)
    return tensors


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    """Copy the tensors of a checkpoint back. Raises RunError when they belong to another model."""
    wanted = {f"model/{name}": p for name, p in model.named_parameters()}
    found = {name for name in tensors if name.startswith("model/")}
    reshaped = {n for n in found & set(wanted) if tensors[n].shape != wanted[n].shape}
    different = sorted((found ^ set(wanted)) | reshaped)
    if different:
        raise RunError(f"{path} holds another model: {different[0]} does not fit")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(spread(tensors[name], parameter))
    # load_state_dict numbers parameters in the order of the groups, and moves state where it
    # belongs.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(ordered):
        name = names[id(parameter)]
        prefix = f"optimizer/{name}/"
        found_state = {
            key.removeprefix(prefix): spread(value, parameter)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if found_state:
            state[index] = found_state
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that `path` is at every moment either the old or the new file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming_full_disk(path):
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.umask(umask := os.umask(0))
            temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner reads
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest three."""
    path = folder / f"step-{step:08d}.safetensors"
    metadata = {
        "format": "fastformer-checkpoint-1",
        "step": str(step),
        "progress": json.dumps(progress),
        "sha256": _digest(tensors),
    }
    write_tensors(path, tensors, metadata)
    for old in list_checkpoints(folder)[KEEP:]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises RunError, naming the fault, when the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != "fastformer-checkpoint-1":
            raise RunError(f"{path} is damaged or not a checkpoint of fastformer")
        if _digest(tensors) != metadata["sha256"]:
            raise RunError(f"{path} is damaged: its contents do not match its digest")
        return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["progress"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, and a line for each damaged one that was passed over.

    (None, []) for a folder without any. Raises RunError when there are some and all are damaged.
    """
    faults: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load(path), faults
        except RunError as error:
            faults.append(str(error))
    if faults:
        raise RunError(
            f"no usable checkpoint in {folder}: {faults[0]}"
            + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")
            + "; restore one from a backup, or start anew with another --out"
        )
    return None, []
