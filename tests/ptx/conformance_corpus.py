"""What conformance.py runs on a card and in the emulator, and how close the results must be."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from tests.ptx import matrix_kernels, nvcc, one_instruction
from tests.ptx.emulator.instructions import (
    arithmetic,
    compare,
    convert,
    floating,
    logic,
    special_functions,
    warp,
)
from tests.ptx.emulator.types import to_bf16
from tests.ptx.exact import array, samples, unsigned
from tests.ptx.matrix_kernels import names
from tests.ptx.one_instruction import opcodes
from tests.ptx.triton_compile import ROOT

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
# Approximate functions, by opcode and type. The PTX ISA bounds the error against the exact value,
# to which the emulator rounds, so one is added for that rounding. The errors that are absolute
# there (sin, cos, lg2) hold in a range from which the samples are drawn.
APPROXIMATE = {
    "ex2.f32": Bound(ulps=3),
    "ex2.f16": Bound(ulps=2),
    "ex2.bf16": Bound(ulps=2),
    "lg2.f32": Bound(ulps=3),
    "sin.f32": Bound(ulps=9),  # 2^-20.5, of values from 1/2
    "cos.f32": Bound(ulps=9),
    "tanh.f32": Bound(ulps=2**13 + 1),  # 2^-11
    "tanh.f16": Bound(ulps=2),
    "tanh.bf16": Bound(ulps=2),
    "rcp.f32": Bound(ulps=2),
    "sqrt.f32": Bound(ulps=3),
    "rsqrt.f32": Bound(ulps=3),
    "rsqrt.f64": Bound(ulps=2**24, nan_open=True),  # the ISA gives no bound
    "div.f32": Bound(ulps=3),
}
# Angles whose sine and cosine are at least a half, and logarithms' operands away from 1.
_RANGES = {"sin": (0.6, 1.5), "cos": (-1.0, 1.0), "lg2": (2.0, 2.0**60)}
# Tensor cores add in an order and a precision of their own: by types of accumulator and operands.
PRODUCTS = {
    "f32": Bound(relative=2**-16, nan_open=True),
    "f16": Bound(relative=2**-8, nan_open=True),
    "s32": EXACT,
    "8 bits": Bound(relative=2**-10, nan_open=True),  # Hopper keeps about 14 bits of a sum
}
# Kernels with functions that are approximate, and sums whose order is not fixed.
KERNEL = Bound(relative=2**-6, nan_open=True)
_OPEN_NAN = ("neg", "abs")  # "NaN inputs yield an unspecified NaN"


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


def corpus() -> Iterator[Comparison]:
    """Everything that is compared."""
    for module in ELEMENTWISE:
        yield from instructions(module)
    yield from carries()
    yield from shuffles()
    yield from matrices()
    yield from products()
    if nvcc.WHY_NOT is None:
        yield from cuda_kernels()


# ---- one instruction

ELEMENTWISE = (arithmetic, floating, special_functions, convert, compare, logic)
_COUNTS = {
    **dict.fromkeys(["neg", "abs", "not", "cnot", "bfind", "clz", "popc", "brev", "testp"], 1),
    **dict.fromkeys(["ex2", "tanh", "lg2", "sin", "cos", "rcp", "sqrt", "rsqrt"], 1),
    **dict.fromkeys(["mad", "fma", "sad", "dp4a", "prmt", "shf"], 3),
}
_WORDS = ("bfind", "clz", "popc")
_CARRIES = ("addc", "subc", "madc")
_COMBINE = ("and", "or", "xor")


def signature(opcode: str) -> tuple[list[str], str]:
    """The types of the operands and of the result, as exact.py names them."""
    parts = opcode.split(".")
    base, kind = parts[0], parts[-1]
    if base == "cvt":
        if parts[-2] in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and kind == "f32":
            return ["f32", "f32"], _stored(parts[-2])
        return [_stored(kind)], _stored(parts[-2])
    if base == "setp":
        return [kind, kind, *_third(parts)], "pred"
    if base == "set":
        return [kind, kind, *_third(parts)], parts[-2]
    if base == "selp":
        return [kind, kind, "pred"], kind
    if base == "slct":
        return [parts[-2], parts[-2], kind], parts[-2]
    if base == "testp":
        return [kind], "pred"
    if base == "dp4a":
        return ["b32"] * 3, "u32"
    if base in ("shl", "shr"):
        return [kind, "u32"], kind
    if base == "bfe":
        return [kind, "u32", "u32"], kind
    if base == "bfi":
        return [kind, kind, "u32", "u32"], kind
    if base == "prmt":
        return ["b32"] * 3, "b32"
    if "wide" in parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return ([kind, kind] if base == "mul" else [kind, kind, wide]), wide
    return [kind] * _COUNTS.get(base, 2), "u32" if base in _WORDS else kind


def _third(parts: list[str]) -> list[str]:
    return ["pred"] if set(parts) & set(_COMBINE) else []


def _stored(kind: str) -> str:
    """Bytes are kept in 16-bit registers."""
    if kind in ("e4m3x2", "e5m2x2"):
        return "u16"
    return f"{kind[0]}16" if kind in ("u8", "s8") else kind


def of_registers(module: ModuleType) -> list[str]:
    """The opcodes of a module that take registers and give one."""
    return [
        opcode
        for opcode in opcodes(module)
        if opcode.split(".")[0] not in (*_CARRIES, "cvta", "isspacep", "lop3")
        and ".cc" not in opcode
        # A packed comparison has two destinations.
        and not (opcode.startswith("setp") and opcode.endswith("x2"))
    ]


def instructions(module: ModuleType) -> Iterator[Comparison]:
    """A comparison for each of these opcodes."""
    family = module.__name__.split(".")[-1]
    for opcode in of_registers(module):
        yield one(family, opcode)
    if module is logic:
        for table in range(0, 256, 5):
            yield one(family, "lop3.b32", ["b32"] * 3, "b32", tail=f", {table:#x}")


def one(
    family: str,
    opcode: str,
    kinds: list[str] | None = None,
    result: str = "",
    *,
    tail: str = "",
) -> Comparison:
    """An instruction on edge cases and random numbers, `tail` after its operands."""
    if kinds is None:
        kinds, result = signature(opcode)
    base, *rest = opcode.split(".")
    columns = samples(kinds, seed=zlib.crc32(opcode.encode()))
    arrays = [array(x, kind) for x, kind in zip(columns, kinds, strict=True)]
    if base in _RANGES:
        low, high = _RANGES[base]
        values = np.linspace(low, high, len(arrays[0]), dtype=np.float32)
        arrays = [values.view(np.uint32)]
    inputs = dict(zip("abce", arrays, strict=False))
    defined = None
    if base in ("div", "rem") and result[0] in "us":
        defined = inputs["b"] != 0
    elif base == "div" and "approx" in rest:  # by a subnormal number it has no bound
        magnitude = inputs["b"] & np.uint32(0x7FFFFFFF)
        defined = (magnitude == 0) | (magnitude >= 1 << 23)
    output = bool if result == "pred" else unsigned(result)

    def run(load: Load) -> list[np.ndarray]:
        body = f"{opcode} d, {', '.join(inputs)}{tail};"
        return one_instruction.run(body, machine=load, **inputs, d=output)

    bound = EXACT
    if "approx" in rest or "full" in rest:
        bound = APPROXIMATE[f"{base}.{result.removesuffix('x2')}"]
    elif base in _OPEN_NAN or result == "f64":
        bound = Bound(nan_open=True)
    elif result == "tf32":
        bound = Bound(mask=0xFFFFE000)  # a tensor core ignores the others
    return Comparison(family, opcode + tail, run, (result,), bound, inputs, defined)


def _several(
    family: str, name: str, body: str, kinds: list[str], results: dict[str, str], **options: Any
) -> Comparison:
    columns = samples(kinds, seed=zlib.crc32(name.encode()))
    inputs = {n: array(x, k) for n, x, k in zip("abcd", columns, kinds, strict=False)}
    outputs = {n: bool if k == "pred" else unsigned(k) for n, k in results.items()}

    def run(load: Load) -> list[np.ndarray]:
        return one_instruction.run(body, machine=load, **options, **inputs, **outputs)

    return Comparison(family, name, run, tuple(results.values()), inputs=inputs)


def carries() -> Iterator[Comparison]:
    """Sums and products of two words, by the carry."""
    for kind in ("u32", "s32", "u64", "s64"):
        for base in ("add", "sub"):
            body = f"{base}.cc.{kind} r, a, b; {base}c.cc.{kind} s, c, d; {base}c.{kind} t, a, d;"
            results = dict.fromkeys("rst", kind)
            yield _several("arithmetic", f"{base}.cc.{kind}", body, [kind] * 4, results)
        body = f"mad.lo.cc.{kind} r, a, b, c; madc.hi.{kind} s, a, b, d;"
        yield _several(
            "arithmetic", f"mad.lo.cc.{kind}", body, [kind] * 4, dict.fromkeys("rs", kind)
        )


def shuffles() -> Iterator[Comparison]:
    """What the lanes of whole warps tell each other."""
    for mode, clamp in (("up", 0), ("down", 31), ("bfly", 31), ("idx", 31), ("down", 0x181F)):
        for distance in (1, 3, 16):
            body = f"shfl.sync.{mode}.b32 r|s, a, {distance}, {clamp:#x}, -1;"
            name = f"shfl.sync.{mode}.b32 {distance}, {clamp:#x}"
            yield _several("warp", name, body, ["b32"], {"r": "b32", "s": "pred"})
    for opcode in one_instruction.opcodes(warp, "redux"):
        kind = "b32" if opcode.endswith("b32") else opcode[-3:]
        yield _several("warp", opcode, f"{opcode} r, a, -1;", [kind], {"r": kind})
    for mode in ("all", "any", "uni", "ballot"):
        result = "b32" if mode == "ballot" else "pred"
        opcode = f"vote.sync.{mode}.{result}"
        yield _several("warp", opcode, f"{opcode} r, a, -1;", ["pred"], {"r": result})


# ---- matrices


def _matrix(
    family: str,
    name: str,
    body: str,
    inputs: dict[str, np.ndarray],
    kind: str,
    count: int,
    bound: Bound = EXACT,
    **options: Any,
) -> Comparison:
    """A kernel of matrix_kernels.py with the result %d."""

    def run(load: Load) -> list[np.ndarray]:
        out = matrix_kernels.run(body, inputs, {"d": count}, machine=load, **options)
        return [out["d"].ravel()]

    return Comparison(family, name, run, (kind,), bound)


def matrices() -> Iterator[Comparison]:
    """ldmatrix, stmatrix and movmatrix."""
    from tests.ptx.test_matrix_moves import SHARED, addresses, move

    shared = SHARED.view(np.uint8).ravel()
    for count in (1, 2, 4):
        for transposed in (False, True):
            opcode = move("ldmatrix", count, transposed)
            where = addresses(count, 2)
            where[where >= shared.size] = 0  # a card may look at addresses that do not count
            body = f"{opcode} {names('d', count)}, [%a0];"
            inputs = {"a": where}
            yield _matrix(
                "matrix_moves", opcode, body, inputs, "b32", count, threads=64, shared=shared
            )
    words = np.random.default_rng(1).integers(0, 2**32, (64, 1)).astype(np.uint32)
    opcode = "movmatrix.sync.aligned.m8n8.trans.b16"
    yield _matrix("matrix_moves", opcode, f"{opcode} %d0, %a0;", {"a": words}, "b32", 1, threads=64)


def _product_bound(types: str) -> Bound:
    return PRODUCTS["8 bits" if "e4m3" in types or "e5m2" in types else types.split(".")[0]]


def products() -> Iterator[Comparison]:
    """mma and wgmma: types, sizes, layouts of shared memory."""
    from tests.ptx.test_mma import CASES, Problem, instruction
    from tests.ptx.wgmma_kernels import WIDTHS, Product

    for k, types in CASES:
        problem = Problem(k, types, warps=3)
        target = "sm_90a" if "e4m3" in types else "sm_80"
        yield _matrix(
            "mma",
            instruction(k, types),
            problem.text(),
            problem.inputs,
            _element(types),
            problem.inputs["c"].shape[1],
            _product_bound(types),
            threads=96,
            publish="",
            target=target,
        )
    kinds = ["f32.bf16.bf16", "f32.f16.f16", "f16.f16.f16", "f32.tf32.tf32", "f32.e4m3.e5m2"]
    problems = [
        Product(n=32, types=types, fragment=fragment, steps=3)
        for types in (*kinds, "f16.e5m2.e5m2", "s32.s8.u8")
        for fragment in (False, True)
    ]
    problems += [
        Product(n=72, a_width=width, b_width=width, a_mn_major=a, b_mn_major=b, steps=4)
        for width in WIDTHS
        for a in (False, True)
        for b in (False, True)
    ]
    problems += [Product(n=n) for n in (8, 24, 136, 256)]
    for product in problems:
        how = f"n{product.n} {product.types} {'registers' if product.fragment else 'shared'}"
        layout = f"{product.a_width}{'MK'[not product.a_mn_major]}"
        layout += f" {product.b_width}{'NK'[not product.b_mn_major]}"
        yield _matrix(
            "wgmma",
            f"wgmma.mma_async {how} {layout}",
            product.body,
            product.inputs,
            _element(product.types),
            product.count,
            _product_bound(product.types),
            threads=128,
            shared=product.image,
        )


def _element(types: str) -> str:
    """The results' type, of which a register of f16 holds two."""
    kind = types.split(".")[0]
    return "f16x2" if kind == "f16" else kind


# ---- whole kernels


def cuda_kernels() -> Iterator[Comparison]:
    """What nvcc makes of the kernels of cases.py."""
    folder = ROOT / "tests" / "ptx" / "kernels"
    for arch in ("80", "90a"):
        for name, run, kinds, bound in (
            ("dropout_mask", _dropout, ("u8",), EXACT),
            ("layer_norm", _layer_norm, ("bf16", "bf16", "f32", "f32", "f32", "f32"), KERNEL),
            ("flash_fwd", _flash, ("bf16", "f32"), KERNEL),
        ):
            title = f"{name} sm_{arch}"
            yield Comparison("kernels", title, partial(run, folder, arch), kinds, bound)
    run = partial(_qk, folder)
    yield Comparison("kernels", "qk_wgmma sm_90a", run, ("f32",), PRODUCTS["f32"])


def _draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _dropout(folder: Any, arch: str, load: Load) -> list[np.ndarray]:
    from tests.ptx.cases import DROPOUT_CU

    rows, columns = 20, 101
    keep = np.full((rows, columns), 2, np.uint8)
    arguments = [keep, np.array([2**62 - 3, 2**33 + 7]), rows, columns, 2, 6554]
    kernels = nvcc.CudaKernels(DROPOUT_CU, arch)
    kernels.launch("dropout_mask_kernel", 1, 256, arguments, machine=load)
    return [keep.ravel()]


def _layer_norm(folder: Any, arch: str, load: Load) -> list[np.ndarray]:
    M, C, rows = 7, 768, 3
    x, grad_out = to_bf16(_draw(M, C) + 1), to_bf16(_draw(M, C, seed=1))
    weight, bias = _draw(C, seed=2), _draw(C, seed=3)
    y, grad_x = np.zeros((2, M, C), np.uint16)
    mean, rstd = np.zeros((2, M), np.float32)
    grad_weight, grad_bias = np.zeros((2, C), np.float32)
    kernels = nvcc.CudaKernels(folder / "layer_norm.cu", arch)
    arguments = [x, weight, bias, y, mean, rstd, C, 1e-5]
    kernels.launch("layer_norm_fwd_kernel<4>", M, 128, arguments, machine=load)
    arguments = [x, weight, grad_out, mean, rstd, grad_x, grad_weight, grad_bias, M, C, rows]
    kernels.launch("layer_norm_bwd_kernel<4>", -(-M // rows), 128, arguments, machine=load)
    return [a.ravel() for a in (y, grad_x, mean, rstd, grad_weight, grad_bias)]


def _flash(folder: Any, arch: str, load: Load) -> list[np.ndarray]:
    N, D = 200, 64
    q, k, v = (to_bf16(_draw(2, N, D, seed=seed)) for seed in range(3))
    out, lse = np.zeros((2, N, D), np.uint16), np.zeros((2, N), np.float32)
    arguments = [q, k, v, out, lse, N, D**-0.5 / np.log(2)]
    nvcc.CudaKernels(folder / "flash_attention.cu", arch).launch(
        "flash_fwd_kernel<64, true>",
        (-(-N // 64), 2),
        128,
        arguments,
        dynamic_shared=5 * 64 * D * 2,
        machine=load,
    )
    return [out.ravel(), lse.ravel()]


def _qk(folder: Any, load: Load) -> list[np.ndarray]:
    N = 256
    q, k = to_bf16(_draw(N, 64)), to_bf16(_draw(N, 64, seed=1))
    s = np.zeros((N, N), np.float32)
    tiles = [nvcc.Tiled(matrix, (64, 64)) for matrix in (q, k)]
    nvcc.CudaKernels(folder / "qk_wgmma.cu", "90a").launch(
        "qk_kernel", N // 64, 256, [*tiles, s, N], dynamic_shared=3 * 8192 + 64, machine=load
    )
    return [s.ravel()]
