"""Low-precision copies of weights, which an optimiser keeps beside the float32 masters.

Under torch.autocast the ops cast each weight at each use, one more pass over all parameters. An
optimiser that has just computed a weight can write it a second time in low precision for almost
nothing; `fastformer.AdamW` does so and registers the copy here.

A copy counts as long as its master's version and address are those recorded with it, so any change
that autograd can see is noticed. A write through `weight.data` is one that it cannot see: copies
exist only where the user has asked an optimiser for them, and between its steps such writes must
not happen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies: Any = WeakTensorKeyDictionary()  # master -> weak reference to its WeightCopy


class WeightCopy:
    """Memory for a copy of `weight` in `dtype`, used by `cast` while this object lives."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.tensor = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self._state: tuple[int, int] | None = None
        _copies[weight] = weakref.ref(self)

    def is_written(self, weight: Tensor) -> None:
        """Let the copy stand for `weight`, which it now equals, until the weight changes."""
        self._state = (weight._version, weight.data_ptr())

    def stands_for(self, weight: Tensor) -> bool:
        """Whether the weight is what it was when the copy was written."""
        unchanged = self._state == (weight._version, weight.data_ptr())
        return unchanged and self.tensor.shape == weight.shape


def cast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `weight` in `dtype`: itself, its valid copy, or a fresh one. None stays None."""
    if weight is None or weight.dtype == dtype:
        return weight
    # A graph is traced once and run after any number of steps.
    if not torch.compiler.is_compiling() and (reference := _copies.get(weight)) is not None:
        copy = reference()
        if copy is not None and copy.tensor.dtype == dtype and copy.stands_for(weight):
            return copy.tensor
    return weight.to(dtype)


def grad_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What an op that computes in `dtype` shall give the gradient of `weight` in.

    A float32 master takes the float32 sums of the product, which are thus never rounded.
    """
    return torch.float32 if weight.dtype == torch.float32 else dtype
