"""The comparisons of conformance.py of tensor cores, what feeds them, and whole kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tests.ptx import matrix_kernels, nvcc
from tests.ptx.comparison import EXACT, Bound, Comparison, Load
from tests.ptx.emulator.types import to_bf16
from tests.ptx.matrix_kernels import names
from tests.ptx.triton_compile import ROOT

# Tensor cores add in an order and a precision of their own: by types of accumulator and operands.
PRODUCTS = {
    "f32": Bound(relative=2**-16, nan_open=True),
    "f16": Bound(relative=2**-8, nan_open=True),
    "s32": EXACT,
    "8 bits": Bound(relative=2**-10, nan_open=True),  # Hopper keeps about 14 bits of a sum
}
# Kernels with functions that are approximate, and sums whose order is not fixed.
KERNEL = Bound(relative=2**-6, nan_open=True)


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
    """What nvcc makes of the kernels of corpus_cases.py."""
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
    from tests.ptx.library_cases import DROPOUT_CU

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
