"""Training data as a pure function of (seed, step).

`dataset[step]` is the whole batch of that step, so a resumed run sees the batches it would have
seen, with any number of loader workers and without storing the state of a random generator:

    DataLoader(dataset, sampler=range(first_step, steps), batch_size=None, num_workers=N)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch

Progress = Callable[[int, int], None]
"""Called as `on_progress(done, total)`."""


class DataError(ValueError):
    """Bad input data; the message names the rule, the value and the remedy."""


class Purpose(IntEnum):
    """What a random stream is for: two purposes never share one."""

    WINDOWS = 1
    MASKS = 2
    VALIDATION_MASKS = 3
    ORDER = 4
    AUGMENTATION = 5
    DROPOUT = 6


_MASK64 = (1 << 64) - 1


def derive_seed(*ints: int) -> int:
    """Hash integers to one seed in [0, 2**63), with the finaliser of SplitMix64 after each.

    Neighbouring inputs give unrelated seeds, and order and number of the inputs count, which a
    sum such as `seed + step` does not offer: there (0, 1) and (1, 0) meet.
    (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014, section 4.)
    """
    state = len(ints)
    for value in ints:
        state = (state + 0x9E3779B97F4A7C15 + value) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def random_stream(purpose: Purpose, *ints: int) -> torch.Generator:
    """Return a new CPU generator that depends on nothing but the arguments.

    torch's CPU generator reads the low 32 bits of its seed only, so all of them must be mixed:
    `step << 32` would give every step the same numbers.
    """
    return torch.Generator().manual_seed(derive_seed(int(purpose), *ints))


def visible_files(root: Path) -> tuple[list[Path], list[str]]:
    """List the files below `root`, sorted by path, and the folders that could not be read.

    Names that begin with a dot are passed over; links to folders are not followed (loops).
    """
    files: list[Path] = []
    unreadable: list[str] = []

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=note):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(root).parts), unreadable
