"""mma.sync against float64, with fragments laid out by the formulas of the PTX ISA, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.instructions.matrix_types import TF32_BITS, decode
from tests.ptx.matrix_kernels import names, pack, run

TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "e4m3": np.uint8, "e5m2": np.uint8}


def encode(values: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """The elements' bits, and the float64 values that they have."""
    if type_name in ("s8", "u8"):
        bits = values.astype(np.int8 if type_name == "s8" else np.uint8)
        return bits.view(np.uint8), bits.astype(np.float64)
    if type_name == "tf32":
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(np.float64)
    tensor = torch.from_numpy(values.astype(np.float32)).to(TORCH[type_name])
    signed = tensor.view(torch.int8 if tensor.itemsize == 1 else torch.int16).numpy()
    return signed.view(UNSIGNED[type_name]), tensor.double().numpy()


def random_matrix(
    rng: np.random.Generator, shape: tuple[int, ...], type_name: str
) -> tuple[np.ndarray, np.ndarray]:
    if type_name in ("s8", "u8"):
        return encode(rng.integers(-128 if type_name == "s8" else 0, 128, shape), type_name)
    return encode(rng.standard_normal(shape), type_name)


def place_a(k: int, bits: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i."""
    g, t = lane >> 2, lane % 4
    if bits == 16 and k == 16:
        return (g if i < 2 or 4 <= i < 6 else g + 8), t * 2 + (i & 1) + (8 if i >= 4 else 0)
    if bits == 16:
        return (g if i < 2 else g + 8), t * 2 + (i & 1)
    if bits == 32:
        return (g if i in (0, 2) else g + 8), (t if i < 2 else t + 4)
    if k == 16:
        return (g if i < 4 else g + 8), t * 4 + (i & 3)
    return (g if i < 4 or 8 <= i < 12 else g + 8), t * 4 + (i & 3) + (16 if i >= 8 else 0)


def place_b(bits: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element b_i."""
    g, t = lane >> 2, lane % 4
    if bits == 16:
        return t * 2 + (i & 1) + (8 if i >= 2 else 0), g
    if bits == 32:
        return (t if i == 0 else t + 4), g
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), g


def place_c(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane % 4
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def fragment(matrices: np.ndarray, per_lane: int, place) -> np.ndarray:
    """Elements (threads, per_lane) of matrices (warps, rows, columns)."""
    out = np.empty((len(matrices) * 32, per_lane), matrices.dtype)
    for warp, matrix in enumerate(matrices):
        for lane in range(32):
            for i in range(per_lane):
                out[32 * warp + lane, i] = matrix[place(lane, i)]
    return out


def unfragment(elements: np.ndarray, warps: int) -> np.ndarray:
    """The accumulators (warps, 16, 8) of elements (threads, 4)."""
    out = np.full((warps, 16, 8), np.nan)
    for thread, row in enumerate(elements):
        for i, value in enumerate(row):
            out[(thread // 32, *place_c(thread % 32, i))] = value
    return out


def instruction(k: int, types: str) -> str:
    return f"mma.sync.aligned.m16n8k{k}.row.col.{types}"


CASES = [
    (16, "f32.bf16.bf16.f32"),
    (8, "f32.bf16.bf16.f32"),
    (16, "f32.f16.f16.f32"),
    (8, "f32.f16.f16.f32"),
    (16, "f16.f16.f16.f16"),
    (8, "f16.f16.f16.f16"),
    (8, "f32.tf32.tf32.f32"),
    (4, "f32.tf32.tf32.f32"),
    (32, "f32.e4m3.e4m3.f32"),
    (32, "f32.e5m2.e4m3.f32"),
    (32, "s32.s8.s8.s32"),
    (32, "s32.u8.s8.s32"),
    (16, "s32.s8.u8.s32"),
]


class Problem:
    """Random A, B and C for some warps, as registers and as float64 matrices."""

    def __init__(self, k: int, types: str, warps: int) -> None:
        rng = np.random.default_rng(k)
        d_type, a_type, b_type, _ = types.split(".")
        self.d_type, self.warps, self.k, self.types = d_type, warps, k, types
        a_bits, a = random_matrix(rng, (warps, 16, k), a_type)
        b_bits, b = random_matrix(rng, (warps, k, 8), b_type)
        size = 8 * a_bits.itemsize
        c_type = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d_type]
        scale = 1000 if d_type == "s32" else 1
        c = (scale * rng.standard_normal((warps, 16, 8))).astype(c_type)
        self.inputs = {
            "a": pack(fragment(a_bits, 16 * k // 32, lambda lane, i: place_a(k, size, lane, i))),
            "b": pack(fragment(b_bits, 8 * k // 32, lambda lane, i: place_b(size, lane, i))),
            "c": pack(fragment(c, 4, place_c)),
        }
        self.c_type, self.c = c_type, c
        self.reference = a @ b + c

    def text(self) -> str:
        counts = {name: array.shape[1] for name, array in self.inputs.items()}
        operands = [names("d", counts["c"]), *(names(n, counts[n]) for n in "abc")]
        return f"{instruction(self.k, self.types)} {', '.join(operands)};"

    def run(self, body: str | None = None, **options) -> np.ndarray:
        count = self.inputs["c"].shape[1]
        options = {"threads": 32 * self.warps, "publish": "", **options}
        out = run(body or self.text(), self.inputs, {"d": count}, **options)
        return unfragment(out["d"].view(self.c_type).reshape(32 * self.warps, 4), self.warps)


@pytest.mark.parametrize(("k", "types"), CASES, ids=lambda x: str(x))
def test_products(k: int, types: str) -> None:
    problem = Problem(k, types, warps=3)
    out = problem.run(target="sm_80")
    if problem.d_type == "s32":
        np.testing.assert_array_equal(out, problem.reference)
        return
    # Rounding: once for f16, at each of k additions for f32.
    bound = 2**-10 if problem.d_type == "f16" else k * 2**-23
    magnitude = np.abs(problem.reference).max()
    assert np.abs(out - problem.reference).max() <= bound * magnitude


def test_warps_that_do_not_take_part_keep_their_registers() -> None:
    problem = Problem(16, "f32.bf16.bf16.f32", warps=2)
    copies = "\n".join(f"mov.b32 %d{i}, %c{i};" for i in range(4))
    out = problem.run(f"{copies}\nsetp.ge.u32 %p0, %thread, 32;\n@%p0 {problem.text()}")
    np.testing.assert_array_equal(out[0], problem.c[0])
    np.testing.assert_allclose(out[1], problem.reference[1], rtol=1e-5, atol=1e-5)


def test_a_constant_accumulator() -> None:
    problem = Problem(16, "f32.f16.f16.f32", warps=1)
    zeros = "{0f00000000, 0f00000000, 0f00000000, 0f00000000}"
    out = problem.run(problem.text().replace(names("c", 4), zeros))
    np.testing.assert_allclose(out, problem.reference - problem.c, rtol=1e-5, atol=1e-5)


def test_low_bits_of_tf32_are_cut_off() -> None:
    bits = np.array([0x3F801FFF, 0x3F802000, 0xBF803FFF], np.uint32)
    assert TF32_BITS == 0xFFFFE000
    np.testing.assert_array_equal(decode(bits, "tf32"), np.float32([1, 1 + 2**-10, -(1 + 2**-10)]))


@pytest.mark.parametrize("type_name", ["e4m3", "e5m2", "f16", "bf16"])
def test_every_value_of_a_type(type_name: str) -> None:
    unsigned = UNSIGNED[type_name]
    bits = np.arange(2 ** (8 * np.dtype(unsigned).itemsize)).astype(unsigned)
    signed = bits.view(np.int8 if bits.itemsize == 1 else np.int16)
    expected = torch.from_numpy(signed).view(TORCH[type_name]).float().numpy()
    np.testing.assert_array_equal(decode(bits, type_name), expected)


def test_integer_sums_wrap_or_saturate() -> None:
    problem = Problem(32, "s32.u8.u8.s32", warps=1)
    problem.inputs["a"][:] = problem.inputs["b"][:] = 0xFFFFFFFF
    problem.inputs["c"][:] = 2**31 - 1
    total = 2**31 - 1 + 32 * 255 * 255
    assert (problem.run() == total - 2**32).all()
    problem.types = f"satfinite.{problem.types}"
    assert (problem.run() == 2**31 - 1).all()


def test_nan_has_the_bits_of_a_tensor_core() -> None:
    problem = Problem(16, "f32.bf16.bf16.f32", warps=1)
    problem.inputs["a"][:] = 0xFFC1FFC1  # NaN with a sign and a payload
    out = run(problem.text(), problem.inputs, {"d": 4}, threads=32, publish="")
    assert (out["d"] == 0x7FFFFFFF).all()


@pytest.mark.planted_bug
@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("how", ["branch", "guard"])
def test_a_part_of_a_warp_is_refused(how: str, threads: int) -> None:
    problem = Problem(16, "f32.bf16.bf16.f32", warps=threads // 32)
    if how == "guard":
        body = f"setp.lt.u32 %p0, %thread, 16;\n@%p0 {problem.text()}"
    else:
        body = f"setp.lt.u32 %p0, %thread, 16;\n@%p0 bra DONE;\n{problem.text()}\nDONE:\nret;"
    with pytest.raises(PtxError) as error:
        problem.run(body)
    assert error.value.kind == "warp"
    assert "mma.sync" in str(error.value)


def test_lanes_that_come_later_are_waited_for() -> None:
    """Lane 0 of the first warp takes a way whose code comes after the instruction."""
    problem = Problem(16, "f32.bf16.bf16.f32", warps=2)
    out = problem.run(
        f"""
        setp.eq.u32 %p0, %thread, 0;
        @%p0 bra LATER;
        MEET:
        {problem.text()}
        bra DONE;
        LATER:
        mov.u32 %word, 0;
        bra MEET;
        DONE:
        """
    )
    np.testing.assert_allclose(out, problem.reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k16", "k32"),
        ("row.col", "col.row"),
        ("f32.bf16.bf16.f32", "f32.bf16.f16.f32"),
        ("%a3}", "%a3, %a3}"),
        ("mma.sync.aligned", "mma.sync"),
    ],
)
def test_what_is_not_known_raises(old: str, new: str) -> None:
    problem = Problem(16, "f32.bf16.bf16.f32", warps=1)
    assert old in problem.text()
    with pytest.raises(PtxError) as error:
        problem.run(problem.text().replace(old, new))
    assert error.value.kind in ("unsupported", "syntax")
