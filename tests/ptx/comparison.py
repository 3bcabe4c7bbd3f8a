"""What conformance.py compares: a kernel, and how close its results must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Load = Callable[[str], Any]  # makes a Module, or what has its interface, of PTX


@dataclass(frozen=True)
class Bound:
    """How far a result may be from the emulator's: not at all, unless something is given.

    `ulps` are units in the last place, `relative` counts from the largest result. Where `nan_open`
    any NaN will do for another. `mask` has the bits that count.
    """

    ulps: int = 0
    relative: float = 0.0
    nan_open: bool = False
    mask: int = 0xFFFFFFFFFFFFFFFF


EXACT = Bound()


@dataclass(frozen=True)
class Comparison:
    """One kernel: `run` takes what makes a Module of PTX, and returns the results' bits.

    `kinds` are the results' types. `inputs` of an element-wise kernel, one element per thread, are
    shown where a result differs; results that are not `defined` are not compared.
    """

    family: str
    name: str
    run: Callable[[Load], list[np.ndarray]]
    kinds: tuple[str, ...]
    bound: Bound = EXACT
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    defined: np.ndarray | None = None
