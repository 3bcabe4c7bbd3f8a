"""Runs PTX on an NVIDIA GPU with the interface of the emulator's Module, through the CUDA driver.

    card = Card()
    module = card.load(ptx)
    x = module.upload(array, "x")
    module.launch("kernel", (4,), 128, [x, 3, 1.0])

Nothing but libcuda.so.1 is needed; what it does not have or refuses raises CardError.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np

from tests.ptx.emulator import TensorMap
from tests.ptx.emulator.grid import Argument, Buffer, argument_bytes
from tests.ptx.emulator.ptx import parse

# Numbers of cuda.h.
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ERROR_LOG, _ERROR_LOG_BYTES = 5, 6  # CU_JIT_ERROR_LOG_BUFFER*
_LOG_BYTES = 8192
_ITEMS = {1: 0, 2: 1, 4: 2, 8: 4}  # CU_TENSOR_MAP_DATA_TYPE_UINT* by their bytes
_MAP_BYTES, _MAP_ALIGN = 128, 64


class CardError(Exception):
    """There is no GPU, or its driver has refused something."""


class Card:
    """The first GPU of this machine."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise CardError(f"no CUDA driver: {error}") from None
        self.call("cuInit", c_uint(0))
        device = c_int()
        self.call("cuDeviceGet", byref(device), c_int(0))
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, c_int(len(name)), device)
        self.name = name.value.decode()
        self.capability = self._attribute(_MAJOR, device), self._attribute(_MINOR, device)
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        self.driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def _attribute(self, number: int, device: c_int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), c_int(number), device)
        return value.value

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver; CardError with its words where it fails."""
        try:
            code = getattr(self._cuda, function)(*arguments)
        except AttributeError:
            raise CardError(f"{function}: this driver is too old for it") from None
        if code:
            text = c_char_p()
            self._cuda.cuGetErrorString(c_int(code), byref(text))
            words = (text.value or b"unknown error").decode()
            raise CardError(f"{function}: {words} ({code})")

    def load(self, ptx: str) -> CardModule:
        """Compile PTX for this card; CardError with the compiler's log."""
        return CardModule(self, retargeted(ptx, self.capability))


def retargeted(ptx: str, capability: tuple[int, int]) -> str:
    """PTX of sm_90a runs on no other card: let it name one that this card can be, or its own."""
    if capability == (9, 0):
        return ptx
    own = "sm_90" if capability > (9, 0) else f"sm_{capability[0]}{capability[1]}"
    return re.sub(r"^(\s*\.target\s+)sm_90a\b", rf"\g<1>{own}", ptx, count=1, flags=re.M)


class CardModule:
    """PTX on the card, with the global memory that its kernels work on."""

    def __init__(self, card: Card, ptx: str) -> None:
        self._card = card
        self.program = parse(ptx)
        self._module = c_void_p()
        self._buffers: list[Buffer] = []
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        try:
            card.call(
                "cuModuleLoadDataEx",
                byref(self._module),
                c_char_p(ptx.encode()),
                c_uint(2),
                options,
                values,
            )
        except CardError as error:
            words = log.value.decode(errors="replace").strip()
            raise CardError(f"{error}\n{words}" if words else str(error)) from None

    def upload(self, array: np.ndarray, name: str = "buffer") -> Buffer:
        """Copy an array to global memory."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        buffer = self.allocate(len(data), name)
        source = c_void_p(data.ctypes.data)
        self._card.call("cuMemcpyHtoD_v2", c_uint64(buffer.address), source, c_size_t(len(data)))
        return buffer

    def allocate(self, bytes: int, name: str = "buffer", *, written: bool = False) -> Buffer:
        """Reserve global memory, which is zero."""
        address = c_uint64()
        self._card.call("cuMemAlloc_v2", byref(address), c_size_t(max(bytes, 1)))
        buffer = Buffer(address.value, bytes)
        self._buffers.append(buffer)
        self._card.call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), c_size_t(max(bytes, 1)))
        return buffer

    def download(self, buffer: Buffer) -> np.ndarray:
        """The bytes of a buffer."""
        data = np.empty(buffer.bytes, np.uint8)
        target = c_void_p(data.ctypes.data)
        self._card.call("cuMemcpyDtoH_v2", target, c_uint64(buffer.address), c_size_t(len(data)))
        return data

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        threads: int | Sequence[int],
        arguments: Sequence[Argument],
        *,
        dynamic_shared: int = 0,
        **options: Any,
    ) -> int:
        """Run a kernel to its end; the emulator's other `options` mean nothing here."""
        function = c_void_p()
        self._card.call("cuModuleGetFunction", byref(function), self._module, name.encode())
        if dynamic_shared:
            self._card.call(
                "cuFuncSetAttribute", function, c_int(_DYNAMIC_SHARED), c_int(dynamic_shared)
            )
        blocks = (threads,) if isinstance(threads, int) else (*threads,)
        dims = [c_uint(int(n)) for sizes in (grid, blocks) for n in (*sizes, 1, 1)[:3]]
        raw = self._parameters(name, arguments)
        keep = [ctypes.create_string_buffer(data, len(data)) for data in raw]
        pointers = (c_void_p * max(len(keep), 1))(*map(ctypes.addressof, keep))
        shared, stream = c_uint(dynamic_shared), c_void_p()
        self._card.call("cuLaunchKernel", function, *dims, shared, stream, pointers, c_void_p())
        self._card.call("cuCtxSynchronize")
        return 0

    def _parameters(self, name: str, arguments: Sequence[Argument]) -> list[bytes]:
        """The bytes of every parameter; what is missing is zero."""
        parameters = self.program.entries[name].parameters
        raw = [bytes(parameter.bytes) for parameter in parameters]
        for i, argument in enumerate(arguments):
            if isinstance(argument, TensorMap):
                argument = self._tensor_map(argument)
            raw[i] = argument_bytes(parameters[i], argument)
        return raw

    def _tensor_map(self, tensor_map: TensorMap) -> bytes:
        """The descriptor in the layout of the hardware, which only the driver knows."""
        rank = len(tensor_map.sizes)
        memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGN)
        start = -ctypes.addressof(memory) % _MAP_ALIGN
        self._card.call(
            "cuTensorMapEncodeTiled",
            c_void_p(ctypes.addressof(memory) + start),
            c_int(_ITEMS[tensor_map.item_size]),
            c_uint(rank),
            c_void_p(tensor_map.address),
            (c_uint64 * rank)(*tensor_map.sizes),
            (c_uint64 * max(rank - 1, 1))(*tensor_map.strides),
            (c_uint * rank)(*tensor_map.box),
            (c_uint * rank)(*tensor_map.element_strides[:rank]),
            c_int(0),  # interleave
            c_int(tensor_map.swizzle),
            c_int(0),  # promotion in L2
            c_int(int(tensor_map.nan_fill)),
        )
        return memory.raw[start : start + _MAP_BYTES]

    def close(self) -> None:
        """Give back the memory and the code."""
        for buffer in self._buffers:
            self._card.call("cuMemFree_v2", c_uint64(buffer.address))
        self._card.call("cuModuleUnload", self._module)
