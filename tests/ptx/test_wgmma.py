"""wgmma against float64: types, sizes, and every layout of shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.matrix_kernels import run
from tests.ptx.wgmma_kernels import WIDTHS, Product, unfragment


@pytest.mark.parametrize("major", ["KK", "KN", "MK", "MN"])
@pytest.mark.parametrize("a_width", WIDTHS)
@pytest.mark.parametrize("b_width", WIDTHS)
def test_layouts(a_width: int, b_width: int, major: str) -> None:
    product = Product(
        n=72,
        a_width=a_width,
        b_width=b_width,
        a_mn_major=major[0] == "M",
        b_mn_major=major[1] == "N",
        steps=4,
    )
    product.check(product.run())


@pytest.mark.parametrize("fragment", [False, True], ids=["descriptor", "registers"])
@pytest.mark.parametrize(
    "types",
    [
        "f32.bf16.bf16",
        "f32.f16.f16",
        "f16.f16.f16",
        "f32.tf32.tf32",
        "f32.e4m3.e5m2",
        "f16.e5m2.e5m2",
        "s32.s8.u8",
    ],
)
def test_types(types: str, fragment: bool) -> None:
    product = Product(n=32, types=types, fragment=fragment, steps=3)
    product.check(product.run())


@pytest.mark.parametrize("n", [8, 24, 136, 256])
def test_sizes(n: int) -> None:
    product = Product(n=n, b_mn_major=n % 16 == 8)
    product.check(product.run())


@pytest.mark.parametrize("fragment", [False, True], ids=["descriptor", "registers"])
@pytest.mark.parametrize(("scale_a", "scale_b"), [(-1, 1), (1, -1), (-1, -1)])
def test_negation(scale_a: int, scale_b: int, fragment: bool) -> None:
    product = Product(scale_a=scale_a, scale_b=scale_b, fragment=fragment, steps=2)
    product.check(product.run())


def test_accumulators_of_no_value_are_overwritten() -> None:
    product = Product(scale_d="%p0")
    product.c[:] = np.nan
    assert not np.isnan(product.reference).any()
    product.check(product.run(f"setp.ne.u32 %p0, 0, 0;\n{product.body}"))


def test_a_predicate_that_accumulates() -> None:
    product = Product()
    body = product.body.replace("%desc1, 1,", "%desc1, %p0,")
    product.check(product.run(f"setp.eq.u32 %p0, 0, 0;\n{body}"))


def test_two_warpgroups() -> None:
    product = Product(n=32, steps=2)
    product.check(product.run(threads=256))


def test_one_warpgroup_of_two_beside_a_lone_warp() -> None:
    """160 threads, as a kernel with a warp of its own for copies has."""
    product = Product(n=32)
    body = f"""
    setp.ge.u32 %p0, %thread, 128;
    @%p0 bra DONE;
    {product.body}
    DONE:
    """
    inputs = {name: np.pad(array, ((0, 32), (0, 0))) for name, array in product.inputs.items()}
    out = run(body, inputs, {"d": product.count}, threads=160, shared=product.image)
    product.check(unfragment(out["d"][:128], product.dtype, product.n))


def test_warps_that_come_later_are_waited_for() -> None:
    product = Product()
    body = f"""
    setp.lt.u32 %p0, %thread, 96;
    @%p0 bra LATER;
    MEET:
    {product.body}
    bra DONE;
    LATER:
    mov.u32 %word, 0;
    bra MEET;
    DONE:
    """
    product.check(product.run(body))
