"""Low-precision copies of weights, which an optimiser keeps beside the float32 masters.

Under torch.autocast the ops cast each weight at each use, one more pass over all parameters. An
optimiser that has just computed a weight can write it a second time in low precision for almost
nothing; `fastformer.AdamW` does so and registers the copy here.

A copy counts as long as its master's version and address are those recorded with it, so any change
that autograd can see is noticed. A write through `weight.data` is one that it cannot see: only an
optimiser that the user has asked for copies registers any, and between its steps such writes must
not happen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# master -> (weak reference to the copy, the master's version and address)
_copies: Any = WeakTensorKeyDictionary()


def register(weight: Tensor, copy: Tensor) -> None:
    """Let `copy` stand for `weight`, which it equals in its own dtype, until the weight changes.

    The caller keeps the copy alive: with an optimiser, its copies are gone.
    """
    _copies[weight] = (weakref.ref(copy), weight._version, weight.data_ptr())


def forget(weight: Tensor) -> None:
    """Undo `register`."""
    _copies.pop(weight, None)


def cast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `weight` in `dtype`: itself, its registered copy, or a fresh one. None stays None."""
    if weight is None or weight.dtype == dtype:
        return weight
    # A graph is traced once and run after any number of steps.
    if not torch.compiler.is_compiling() and (found := _copies.get(weight)) is not None:
        reference, version, address = found
        copy = reference()
        if (
            copy is not None
            and (weight._version, weight.data_ptr()) == (version, address)
            and (copy.dtype, copy.shape) == (dtype, weight.shape)
        ):
            return copy
    return weight.to(dtype)
