"""Launches of Triton kernels at less cost for the host than Triton's own.

At every launch Triton binds the arguments by name and writes down what it specialises kernels on as
text, to find the kernel that it compiled for their like. Here that is a tuple, and a launch of a
kind that was made before goes straight to the launcher of the compiled kernel. The rest is left to
Triton: the first launch of a kind, arguments of other types, and all launches while a profiler
watches them. Environment variables of Triton count at a first launch.

A wrapper that is called again with tensors of the same shapes and strides makes the same launch but
for their addresses. What it made of those numbers, it can keep as a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_INT32 = 2**31

_Argument = TypeVar("_Argument", Tensor, Tensor | None)

# The launcher of a compiled kernel, with what it takes beside grid and arguments.
_Found = tuple[Callable[..., None], Any, Any, tuple[Any, ...]]


def _reader(
    types: Sequence[type], is_specialised: Sequence[bool]
) -> Callable[..., tuple[Any, ...]] | None:
    """A function of arguments of these types, which returns what Triton specialises on, or more.

    None if it is not known of one of the types. The function is written out, argument by argument,
    in half the time of a loop. What it returns begins with 0, or there is an integer that is not
    specialised and not from 0 to 2**31 - 1: its width counts.
    """
    names = [f"a{i}" for i in range(len(types))]
    parts, integers, addresses = [], ["0"], ["0"]
    for name, kind, specialised in zip(names, types, is_specialised, strict=False):
        if issubclass(kind, Tensor):
            parts.append(f"{name}.dtype")
            addresses.append(f"{name}.data_ptr()")
        elif kind is int and not specialised:
            integers.append(name)
        elif kind in (int, bool):
            parts.append(name)
        elif kind.__name__ == "TensorDescriptor":  # of Triton or Gluon
            parts += [f"{name}.base.dtype", f"(*{name}.block_shape,)"]
            parts.append(f"getattr({name}, 'layout', None)")
        elif kind not in (float, NoneType):
            return None
    # Mostly all addresses are multiples of 16, which is one number then.
    each = ", ".join(f"{address} & 15 == 0" for address in addresses)
    aligned = f"({' | '.join(addresses)}) & 15 and ({each})"
    result = ", ".join([f"({' | '.join(integers)}) >> 31", aligned, *parts])
    return eval(f"lambda {', '.join(names)}: ({result},)")


def _width(value: int) -> int:
    """What tells apart the integers that become i32, i64 and u64."""
    return (value < -_INT32) + (value >= _INT32) + (value >= 2**63)


def _is_watched() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class CachedLaunch:
    """A kernel that is launched as always, kernel[grid](*arguments, **constants and options).

    It runs on the device of its first argument, on the current stream there. Constants come by
    name, all other arguments by position.
    """

    def __init__(self, function: JITFunction) -> None:
        self.function = function
        self._readers: dict[tuple[type, ...], Callable[..., tuple[Any, ...]] | None] = {}
        self._kernels: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def read(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Equal for arguments on which Triton specialises a kernel alike; None if not known."""
        types = (*map(type, args),)
        try:
            read = self._readers[types]
        except KeyError:
            specialised = [not p.do_not_specialize for p in self.function.params]
            read = self._readers[types] = _reader(types, specialised)
        if read is None:
            return None
        found = read(*args)
        if found[0]:
            found += (*(_width(value) for value in args if type(value) is int),)
        return read, found  # the first stands for the types

    def key(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
        """Equal for arguments and options of which Triton makes one kernel; None if not known."""
        found = self.read(args)
        if found is None:
            return None
        constants = options.values()
        # Their types, as 1 and 1.0 and True are equal.
        return *found, *options, *constants, *map(type, constants)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        active, first = driver.active, args[0]
        device = active.get_current_device()
        home = (first if isinstance(first, Tensor) else first.base).get_device()
        if home not in (device, -1):
            with torch.cuda.device(home):
                return self._launch(grid, *args, **options)
        self.launch(active, device, (*grid, 1, 1)[:3], args, options)

    def launch(
        self,
        active: Any,
        device: int,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> _Found | None:
        """Launch on the current device; return what does so again, if that is known."""
        key = active, device, self.key(args, options)
        found = self._kernels.get(key)
        if found is not None and not _is_watched():
            run, handle, metadata, constants = found
            stream = active.get_current_stream(device)
            run(*grid, stream, handle, metadata, None, None, None, *args, *constants)
            return found
        kernel = self.function[grid](*args, **options)
        rest = self.function.params[len(args) :]
        # One that was but compiled, and not loaded onto a device, has no module.
        if key[2] and getattr(kernel, "module", None) and all(p.is_constexpr for p in rest):
            constants = (*(options.get(p.name, p.default) for p in rest),)
            found = kernel.run, kernel.function, kernel.packed_metadata, constants
            self._kernels[key] = found
        return found


class Launch:
    """A launch that lacks but its tensors, which are the first arguments of its kernel.

    The next arguments are `numbers`. The first tensors arrive in the kernel as the descriptors of
    others of the same shapes and strides, `boxes`, if there are any.
    """

    def __init__(
        self,
        kernel: CachedLaunch,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        options: dict[str, Any],
        boxes: tuple[Any, ...] = (),
    ) -> None:
        self.kernel, self.numbers, self.options = kernel, numbers, options
        self.grid = (*grid, 1, 1)[:3]
        self._boxes = boxes
        self._kernels: dict[tuple[Any, ...], _Found] = {}

    def arguments(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that the kernel takes by position."""
        return *self._boxed(tensors), *self.numbers

    def _boxed(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return *map(with_base, self._boxes, tensors), *tensors[len(self._boxes) :]

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        active = driver.active
        device = active.get_current_device()
        home = first.get_device()
        if home not in (device, -1):
            with torch.cuda.device(home):
                return self(first, *others)
        tensors = first, *others
        key = active, device, self.kernel.read(tensors)
        found = self._kernels.get(key)
        if self._boxes:
            tensors = self._boxed(tensors)
        if found is not None and not _is_watched():
            run, handle, metadata, rest = found
            stream = active.get_current_stream(device)
            run(*self.grid, stream, handle, metadata, None, None, None, *tensors, *rest)
            return
        args = *tensors, *self.numbers
        known = self.kernel.launch(active, device, self.grid, args, self.options)
        if known is not None:
            *launcher, constants = known
            self._kernels[key] = *launcher, (*self.numbers, *constants)


def with_base(descriptor: Any, base: Tensor) -> Any:
    """The descriptor of a tensor of the same dtype, shape and strides, which are not checked again.

    Its address has to be a multiple of 16, as that of the first one had.
    """
    other = object.__new__(type(descriptor))
    other.__dict__.update(descriptor.__dict__, base=base)
    return other


@lru_cache(maxsize=64)
def _architecture(active: Any, device: int) -> int:
    with torch.cuda.device(device):
        return active.get_current_target().arch


def architecture(t: Tensor) -> int:
    """Of the GPU that has `t`: 80, 90, ..."""
    return _architecture(driver.active, t.get_device())


def contiguous(t: _Argument) -> _Argument:
    """`t`, or a copy whose elements are dense and in order."""
    return t if t is None else t.contiguous()


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`. Where it has that already, `to` takes most of a microsecond to see it."""
    return t if t.dtype == dtype else t.to(dtype)


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`. The one of Triton takes a microsecond."""
    return -(-size // block)
