"""The bugs that the asynchrony of wgmma invites, each beside what it should have been."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.matrix_kernels import PUBLISH, names, run
from tests.ptx.wgmma_kernels import COMMIT, FENCE, WAIT, Product


@pytest.mark.planted_bug
def test_an_accumulator_that_is_read_or_written_before_the_wait() -> None:
    product = Product(n=16)
    read, write = "mov.b32 %other, %d3;\n", "mov.b32 %d3, 0;\n"
    for use in (read, write):
        wrong = product.body.replace(WAIT, use + WAIT)
        assert "%d3" in product.refused(wrong, "in flight")
    product.check(product.run(product.body.replace(WAIT, WAIT + read)))
    product.check(product.run(product.body.replace(WAIT, "mov.b32 %other, %c3;\n" + WAIT)))


@pytest.mark.planted_bug
def test_a_wait_that_leaves_the_last_group() -> None:
    product = Product(n=16)
    wrong = product.body.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1")
    product.refused(wrong, "in flight")
    product.check(product.run(wrong + "wgmma.wait_group.sync.aligned 0;\n"))
    product.check(product.run(wrong.replace(COMMIT, COMMIT + COMMIT)))


@pytest.mark.planted_bug
def test_a_missing_commit_group() -> None:
    product = Product(n=16)
    assert "wait" in product.refused(product.body.replace(COMMIT, ""), "in flight")
    # Even where the results are never looked at.
    unused = product.body.replace(COMMIT, "") + "ret;"
    assert "commit_group" in product.refused(unused, "in flight")


@pytest.mark.planted_bug
def test_a_missing_wait() -> None:
    product = Product(n=16)
    assert "wait_group" in product.refused(product.body.replace(WAIT, "") + "ret;", "in flight")


@pytest.mark.planted_bug
def test_a_missing_fence() -> None:
    product = Product(n=16, fragment=True)
    message = product.refused(product.body.replace(FENCE, ""), "in flight")
    assert "wgmma.fence is missing" in message
    # Of a second product, after its accumulators or its A have been written.
    for register in ("%d2", "%a0x1"):
        write = f"add.u32 {register}, {register}, 0;\n"
        again = write + FENCE + product.products + COMMIT + WAIT
        product.run(product.body + again)
        message = product.refused(product.body + again.replace(FENCE, ""), "in flight")
        assert "wgmma.fence is missing" in message
        assert register in message


@pytest.mark.planted_bug
def test_a_fence_of_the_other_warpgroup_does_not_count() -> None:
    product = Product(n=16)
    skip = "setp.ge.u32 %p0, %thread, 128;\n"
    product.check(product.run(skip + product.body, threads=256))
    guarded = product.body.replace(FENCE, f"@%p0 {FENCE}")
    product.refused(skip + guarded, "in flight", threads=256)


def test_registers_in_flight_belong_to_a_warpgroup() -> None:
    """The second warpgroup uses registers of the names that the first one's wgmma is writing."""
    product = Product(n=16)
    issue = f"{FENCE}{product.products}{COMMIT}"
    body = f"""
    {product.load_c}
    setp.ge.u32 %p0, %thread, 128;
    @%p0 bra SECOND;
    {issue}
    bar.sync 0;
    bra DONE;
    SECOND:
    bar.sync 0;
    USE
    {issue}
    DONE:
    {WAIT}
    """
    fine = "mov.b32 %other, %d1;\nmov.b32 %d1, %other;\n"
    product.check(product.run(body.replace("USE", fine), threads=256))
    wrong = body.replace("bra DONE", "mov.b32 %other, %d1;\nbra DONE").replace("USE", "")
    product.refused(wrong, "in flight", threads=256)


def test_a_guard_keeps_the_registers_in_flight_from_use() -> None:
    """Only the second warpgroup reads, and it has waited."""
    product = Product(n=16)
    body = f"""
    {product.load_c}{FENCE}{product.products}{COMMIT}
    setp.ge.u32 %p0, %thread, 128;
    @%p0 {WAIT}
    @%p0 mov.b32 %other, %d1;
    @%p0 mov.b32 %d1, %other;
    {WAIT}
    """
    product.check(product.run(body, threads=256))
    product.refused(
        body.replace("@%p0 mov.b32 %other", "@!%p0 mov.b32 %other"), "in flight", threads=256
    )


@pytest.mark.planted_bug
def test_an_input_in_registers_that_is_used_before_the_wait() -> None:
    product = Product(n=16, fragment=True)
    for use in ("mov.b32 %other, %a0x2;\n", "mov.b32 %a0x2, 0;\n"):
        assert "%a0x2" in product.refused(product.body.replace(WAIT, use + WAIT), "in flight")
        product.check(product.run(product.body.replace(WAIT, WAIT + use)))


@pytest.mark.planted_bug
def test_two_products_that_share_accumulators() -> None:
    """Allowed in flight for the same registers, refused when they only overlap."""
    product = Product(n=16)
    second = product.instruction(scale_d="0").split("\n", 2)[2]
    once = Product(n=16, scale_d="0")
    out = product.run(product.body.replace(COMMIT, second + COMMIT))
    once.check(out)
    shifted = [f"%d{(i + 1) % product.count}" for i in range(product.count)]
    overlapping = second.replace(names("d", product.count), f"{{{', '.join(shifted)}}}")
    product.refused(product.body.replace(COMMIT, overlapping + COMMIT), "in flight")


@pytest.mark.planted_bug
@pytest.mark.parametrize("operand", ["a", "b"])
def test_an_operand_that_is_overwritten_in_flight(operand: str) -> None:
    """By another warpgroup's store or by an own one, before the wait or after it."""
    product = Product(n=16)
    at = getattr(product, operand).start
    store = f"setp.eq.u32 %p0, %thread, 0;\n@%p0 st.shared.b32 [%slot+{at}], %word;\n"
    product.refused(product.body.replace(WAIT, store + WAIT), "race")
    # Barriers order nothing that is still in flight.
    product.refused(product.body.replace(WAIT, f"bar.sync 0;\n{store}bar.sync 0;\n{WAIT}"), "race")
    # After the own wait, but the other warps of the warpgroup may still be waiting.
    product.refused(product.body.replace(WAIT, WAIT + store), "race")
    product.check(product.run(product.body.replace(WAIT, f"{WAIT}bar.sync 0;\n{store}")))


@pytest.mark.parametrize(
    ("publish", "kind"),
    [
        ("", "race"),
        ("bar.sync 0;", "proxy"),
        ("fence.proxy.async.shared::cta;", "race"),
        (PUBLISH, None),
    ],
)
def test_operands_from_ordinary_stores(publish: str, kind: str | None) -> None:
    product = Product(n=16)
    if kind is None:
        product.check(product.run(publish=publish))
    else:
        product.refused(product.body, kind, publish=publish)


@pytest.mark.planted_bug
def test_a_part_of_a_warpgroup() -> None:
    product = Product(n=16)
    message = product.refused(f"setp.ge.u32 %p0, %thread, 96;\n@%p0 ret;\n{product.body}", "warp")
    assert "32 threads of a warpgroup never come" in message


@pytest.mark.planted_bug
def test_a_block_that_ends_within_a_warpgroup() -> None:
    product = Product(n=16)
    inputs = {name: np.pad(array, ((0, 32), (0, 0))) for name, array in product.inputs.items()}
    with pytest.raises(PtxError) as error:
        run(product.body, inputs, {"d": product.count}, threads=160, shared=product.image)
    assert error.value.kind == "warp"


@pytest.mark.planted_bug
def test_guards_that_split_a_warpgroup() -> None:
    product = Product(n=16)
    for one in ("wgmma.fence", "wgmma.mma_async", "wgmma.commit_group", "wgmma.wait_group"):
        body = f"setp.lt.u32 %p0, %thread, 64;\n{product.body}"
        product.refused(body.replace(one, f"@%p0 {one}"), "warp")


@pytest.mark.planted_bug
def test_operands_that_differ_between_threads() -> None:
    product = Product(n=16)
    body = f"setp.eq.u32 %p1, %thread, 77;\n{product.body}"
    differing = body.replace("wgmma.mma", "@%p1 mov.b64 %desc1, %desc0;\nwgmma.mma")
    assert "descriptor of B" in product.refused(differing, "warp")
    assert "scale-d" in product.refused(body.replace("%desc1, 1,", "%desc1, %p1,"), "warp")


def changed(product: Product, descriptor: int) -> str:
    old = product.b.descriptor()
    assert str(old) in product.body
    return product.body.replace(str(old), str(descriptor))


def test_descriptors() -> None:
    product = Product(n=16)
    old = product.b.descriptor()
    product.refused(changed(product, old + (1 << 12)), "bounds")  # 64 KiB further
    # One core matrix further, of which the second half lies beyond the end.
    product.refused(changed(product, old + (1024 >> 4)), "bounds")
    product.refused(changed(product, old + (128 >> 4)), "alignment")
    for reserved in (14, 30, 46, 49, 52):
        product.refused(changed(product, old | 1 << reserved), "unsupported")


@pytest.mark.planted_bug
def test_an_operand_that_nothing_has_written() -> None:
    product = Product(n=16)
    product.refused(
        changed(product, product.b.descriptor() + (1024 >> 4)),
        "uninitialised",
        shared_bytes=len(product.image) + 1024,
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n16k16", "n12k16"),
        ("n16k16", "n16k8"),
        ("f32.bf16.bf16", "f16.bf16.bf16"),
        ("1, 1, 0, 0;", "1, 2, 0, 0;"),
        ("1, 1, 0, 0;", "1, 1, 0, 2;"),
        ("1, 1, 0, 0;", "1, 1;"),
        ("%d7}", "%d6}"),
        (", %d7}", "}"),
        ("wait_group.sync.aligned 0", "wait_group.sync.aligned -1"),
    ],
)
def test_what_is_not_known_raises(old: str, new: str) -> None:
    product = Product(n=16)
    assert old in product.body
    with pytest.raises(PtxError) as error:
        product.run(product.body.replace(old, new))
    assert error.value.kind in ("unsupported", "syntax")


def test_the_target_must_have_wgmma() -> None:
    product = Product(n=16)
    for target in ("sm_80", "sm_90"):
        assert "sm_90a" in product.refused(product.body, "unsupported", target=target)


# ---- setmaxnreg


def test_setmaxnreg() -> None:
    product = Product(n=16)
    more = "setmaxnreg.inc.sync.aligned.u32 240;\n"
    product.check(product.run(more + product.body))
    for count in (20, 16, 264, 100):
        product.refused(more.replace("240", str(count)) + product.body, "syntax")
    half = f"setp.lt.u32 %p0, %thread, 64;\n@%p0 {more}"
    product.refused(half + product.body, "warp")
