"""wgmma kernels of one warpgroup: matrices in shared memory, their descriptors, the product.

Matrices are put into shared memory as the figures of the PTX ISA draw them: core matrices, whose
16-byte chunks a swizzle permutes within each 8 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.ptx.emulator import PtxError
from tests.ptx.matrix_kernels import names, pack, run

TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
MODES = {16: 0, 128: 1, 64: 2, 32: 3}  # of the descriptor, by bytes of the swizzle
WIDTHS = (16, 32, 64, 128)


def encode(values: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned elements, and the float64 values that they have."""
    if type_name == "tf32":
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(np.float64)
    if type_name in ("s8", "u8"):
        whole = np.clip(np.round(40 * values), -128 if type_name == "s8" else 0, 127)
        return whole.astype(np.int8).view(np.uint8), whole
    tensor = torch.from_numpy(values.astype(np.float32)).to(TORCH[type_name])
    signed = tensor.view(torch.int8 if tensor.itemsize == 1 else torch.int16).numpy()
    return signed.view(f"u{signed.itemsize}"), tensor.double().numpy()


@dataclass
class Placed:
    """A matrix (rows of M or N, K) in shared memory, and its descriptor.

    `width` is that of the swizzle in bytes, 16 for none, for which the distances between core
    matrices are larger than they need be, so that a wrong one is noticed.
    """

    bits: np.ndarray
    start: int
    width: int = 128
    mn_major: bool = False

    def __post_init__(self) -> None:
        # An atom is 8 rows of `width` bytes, and the pattern of its swizzle.
        atom = 8 * self.width
        along, across = self.atoms
        self.along, self.across = atom, atom * along
        if self.width == 16:
            self.along, self.across = atom + 16, (atom + 16) * along + 48
        end = self.start + (across - 1) * self.across + (along - 1) * self.along + atom
        self.end = -(-end // 1024) * 1024

    @property
    def lines(self) -> np.ndarray:
        """The matrix with its contiguous direction last."""
        return self.bits.T if self.mn_major else self.bits

    @property
    def atoms(self) -> tuple[int, int]:
        rows, columns = self.lines.shape
        return -(-columns * self.bits.itemsize // self.width), -(-rows // 8)

    def write(self, image: np.ndarray) -> None:
        size = self.bits.itemsize
        for (row, column), value in np.ndenumerate(self.lines):
            along, byte = divmod(column * size, self.width)
            across, line = divmod(row, 8)
            chunk, inside = divmod(byte, 16)
            # Lines of 128 bytes: each permutes the chunks by its own number.
            chunk ^= line * self.width // 128 % (self.width // 16)
            at = self.start + across * self.across + along * self.along
            at += line * self.width + 16 * chunk + inside
            image[at : at + size] = np.frombuffer(value.tobytes(), np.uint8)

    @property
    def strides(self) -> tuple[int, int]:
        """The leading and the stride byte offset of the descriptor."""
        if self.width == 16 and self.mn_major:
            return self.across, self.along
        if self.width != 16 and not self.mn_major:
            return 16, self.across  # the leading one does not count
        return self.along, self.across

    def descriptor(self, offset: int = 0) -> int:
        """`offset` in bytes: of a part of K."""
        leading, stride = self.strides
        out = (self.start + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32
        return out | MODES[self.width] << 62


def place_a(lane: int, i: int, size: int) -> tuple[int, int]:
    """Row within the warp's 16 and column of the A element i of a lane."""
    g, t, width = lane >> 2, lane % 4, 4 // size
    register, inside = divmod(i, width)
    row = g if register in (0, 2) else g + 8
    return row, t * width + inside + (4 * width if register >= 2 else 0)


def place_d(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane % 4
    return g + 8 * ((i // 2) % 2), 8 * (i // 4) + t * 2 + (i & 1)


def fragment(matrix: np.ndarray, per_lane: int, place) -> np.ndarray:
    """Registers (threads, n) of a matrix with 16 rows per warp."""
    out = np.empty((2 * len(matrix), per_lane), matrix.dtype)
    for thread in range(len(out)):
        for i in range(per_lane):
            row, column = place(thread % 32, i)
            out[thread, i] = matrix[16 * (thread // 32) + row, column]
    return pack(out)


def unfragment(registers: np.ndarray, dtype: type, n: int) -> np.ndarray:
    elements = np.ascontiguousarray(registers).view(dtype)
    out = np.full((len(registers) // 2, n), np.nan)
    for thread, row in enumerate(elements):
        for i, value in enumerate(row):
            r, column = place_d(thread % 32, i)
            out[16 * (thread // 32) + r, column] = value
    return out


@dataclass
class Product:
    """D (64, N) = C + A (64, K) @ B (N, K).T of one warpgroup, and the kernel that makes it."""

    n: int = 16
    types: str = "f32.bf16.bf16"
    a_width: int = 128
    b_width: int = 128
    a_mn_major: bool = False
    b_mn_major: bool = False
    fragment: bool = False
    steps: int = 1  # wgmma instructions along K
    scale_a: int = 1
    scale_b: int = 1
    scale_d: str = "1"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.n)
        self.d_type, a_type, b_type = self.types.split(".")
        self.dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[self.d_type]
        size = {"tf32": 4, "f16": 2, "bf16": 2}.get(a_type, 1)
        self.size, self.k = size, 32 // size
        depth = self.k * self.steps
        self.a_bits, a = encode(rng.standard_normal((64, depth)), a_type)
        b_bits, b = encode(rng.standard_normal((self.n, depth)), b_type)
        self.c = (10 * rng.standard_normal((64, self.n))).astype(self.dtype)
        self.reference = self.scale_a * self.scale_b * (a @ b.T)
        if self.scale_d == "1":
            self.reference = self.reference + self.c
        self.a = Placed(self.a_bits, 1024, self.a_width, self.a_mn_major)
        self.b = Placed(b_bits, self.a.end, self.b_width, self.b_mn_major)
        # What belongs to no matrix is NaN in every type, and -1 in the integers.
        self.image = np.full(self.b.end, 0xFF, np.uint8)
        self.a.write(self.image)
        self.b.write(self.image)
        self.count = self.n // 2 * np.dtype(self.dtype).itemsize // 4

    def advance(self, placed: Placed, step: int) -> int:
        """The offset of a step in K."""
        if placed.mn_major:
            return step * self.k // 8 * placed.across
        if placed.width == 16:
            return 2 * step * placed.along
        return 32 * step // placed.width * placed.along + 32 * step % placed.width

    def instruction(self, step: int = 0, **changes: object) -> str:
        a = names(f"a{step}x", 4) if self.fragment else "%desc0"
        tail = [str(changes.get("scale_d", self.scale_d))]
        if self.d_type != "s32":
            tail += [str(self.scale_a), str(self.scale_b)]
        if self.size == 2:
            tail += [] if self.fragment else [str(int(self.a_mn_major))]
            tail += [str(int(self.b_mn_major))]
        opcode = f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}.{self.types}"
        operands = [changes.get("d", names("d", self.count)), a, "%desc1", *tail]
        descriptors = "".join(
            f"mov.b64 %desc{i}, {placed.descriptor(self.advance(placed, step))};\n"
            for i, placed in enumerate((self.a, self.b))
        )
        return f"{descriptors}{opcode} {', '.join(map(str, operands))};\n"

    @property
    def products(self) -> str:
        return "".join(self.instruction(step) for step in range(self.steps))

    @property
    def load_c(self) -> str:
        return "".join(f"mov.b32 %d{i}, %c{i};\n" for i in range(self.count))

    @property
    def body(self) -> str:
        return f"{self.load_c}{FENCE}{self.products}{COMMIT}{WAIT}"

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        inputs = {"c": fragment(self.c, self.n // 2, place_d)}
        if self.fragment:
            for step in range(self.steps):
                part = self.a_bits[:, step * self.k : (step + 1) * self.k]
                inputs[f"a{step}x"] = fragment(
                    part, 16 // self.size, lambda lane, i: place_a(lane, i, self.size)
                )
        return inputs

    def run(self, body: str | None = None, **options) -> np.ndarray:
        options = {"threads": 128, "shared": self.image, **options}
        inputs = {
            name: np.tile(array, (options["threads"] // 128, 1))
            for name, array in self.inputs.items()
        }
        out = run(body or self.body, inputs, {"d": self.count}, **options)
        return unfragment(out["d"], self.dtype, self.n)

    def check(self, out: np.ndarray) -> None:
        if self.d_type == "s32":
            np.testing.assert_array_equal(out, self.reference)
            return
        bound = 2**-9 if self.d_type == "f16" else 2**-18
        error = np.abs(out - np.concatenate([self.reference] * (len(out) // 64)))
        assert error.max() <= bound * np.abs(self.reference).max()

    def refused(self, body: str, kind: str, **options) -> str:
        with pytest.raises(PtxError) as error:
            self.run(body, **options)
        assert error.value.kind == kind, str(error.value)
        return str(error.value)


FENCE = "wgmma.fence.sync.aligned;\n"
COMMIT = "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
