"""Loads by TMA: what they move, and the bugs that they are to show."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import Module, TensorMap
from tests.ptx.hopper_ptx import copy_out, module, refuses, run, wait
from tests.ptx.tma_kernels import (
    GOOD_LOAD,
    ITEMS,
    MAP,
    SEEDS,
    SHARED,
    box_load,
    cut,
    load_kernel,
    random_array,
    swizzled,
    tensor,
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (-2, 7), (9, -3), (-40, 0)])
@pytest.mark.parametrize(
    ("swizzle", "item", "box", "place"),
    [
        pytest.param(0, 2, (5, 24), 0, id="none-odd-box"),
        pytest.param(0, 4, (7, 12), 128, id="none-at-128"),
        pytest.param(1, 2, (10, 16), 0, id="32"),
        pytest.param(1, 8, (9, 4), 128, id="32-at-128"),
        pytest.param(2, 2, (7, 32), 256, id="64-at-256"),
        pytest.param(2, 1, (11, 64), 0, id="64-bytes"),
        pytest.param(3, 2, (13, 64), 0, id="128"),
        pytest.param(3, 4, (6, 32), 384, id="128-at-384"),
    ],
)
def test_load(
    swizzle: int,
    item: int,
    box: tuple[int, int],
    place: int,
    corner: tuple[int, int],
    seed: int | None,
) -> None:
    bytes = box[0] * box[1] * item
    array = random_array((17, 80), ITEMS[item])
    kernel = load_kernel(bytes, box_load(corner, place), place=place)
    found = run(kernel, bytes, tensor(kernel, array, box, swizzle=swizzle), seed=seed)
    first_row = place // (box[1] * item)
    wanted = swizzled(cut(array, corner, box, 0), swizzle, first_row)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_load_of_rank(rank: int) -> None:
    array = random_array((3, 4, 5, 6, 8)[-rank:], np.float32)
    box, corner = (2, 3, 2, 3, 4)[-rank:], (2, -1, 4, 1, 3)[-rank:]
    bytes = 4 * int(np.prod(box))
    kernel = load_kernel(bytes, box_load(corner))
    found = run(kernel, bytes, tensor(kernel, array, box)).view(np.float32)
    np.testing.assert_array_equal(found, cut(array, corner, box, 0).ravel())


def test_outside_is_nan() -> None:
    array = np.arange(64, dtype=np.float16).reshape(4, 16)
    kernel = load_kernel(6 * 32, box_load((-1, 2)))
    found = run(kernel, 192, tensor(kernel, array, (6, 16), nan_fill=True)).view(np.float16)
    wanted = np.full((6, 16), np.nan)
    wanted[1:5, :14] = array[:, 2:]
    np.testing.assert_array_equal(found.reshape(6, 16), wanted)


@pytest.mark.planted_bug
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "load", "parts"),
    [
        pytest.param("in flight|race", GOOD_LOAD, {"wait": ""}, id="no-wait"),
        pytest.param("in flight|race|deadlock", GOOD_LOAD, {"wait": wait("bars", 1)}, id="parity"),
        pytest.param("deadlock", GOOD_LOAD, {"expected": "496"}, id="too-few-bytes"),
        pytest.param("deadlock", GOOD_LOAD, {"expected": "528"}, id="too-many-bytes"),
        pytest.param("alignment", box_load((1, 2), 16), {}, id="misaligned-box"),
        pytest.param("bounds", box_load((1, 2), 7936), {}, id="outside-shared-memory"),
        pytest.param("barrier", GOOD_LOAD.replace("[bars]", "[bars+8]"), {}, id="other-barrier"),
        pytest.param("launch", box_load((1, 2, 3)), {}, id="rank"),
        pytest.param("alignment", GOOD_LOAD.replace("%x0", "%x0+8"), {}, id="misaligned-map"),
        pytest.param(
            "race|in flight", GOOD_LOAD + "\n@%p0 " + GOOD_LOAD, {"expected": "1024"}, id="twice"
        ),
        pytest.param(
            "unsupported",
            GOOD_LOAD.replace("::bytes", "::bytes.multicast::cluster").replace(";", ", %r0;"),
            {},
            id="multicast",
        ),
        pytest.param(
            "unsupported", GOOD_LOAD.replace("global.", "global.im2col."), {}, id="im2col"
        ),
    ],
)
def test_load_with_a_bug(kind: str, load: str, parts: dict[str, str], seed: int | None) -> None:
    kernel = load_kernel(512, load, **parts)
    box = tensor(kernel, random_array((17, 80), np.uint32), (4, 32), swizzle=3)
    refuses(kind, kernel, 512, box, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_load_without_a_bug(seed: int | None) -> None:
    """The twin of the kernels above, with a cache hint and another fence."""
    hint = GOOD_LOAD.replace("::bytes", "::bytes.L2::cache_hint").replace(";", ", %x3;")
    kernel = load_kernel(512, hint, fence="fence.proxy.async;")
    array = random_array((17, 80), np.uint32)
    found = run(kernel, 512, tensor(kernel, array, (4, 32), swizzle=3), seed=seed)
    np.testing.assert_array_equal(found, swizzled(cut(array, (1, 2), (4, 32), 0), 3))


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_load(seed: int | None) -> None:
    load = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [tile], [%x1+32], 512, [bars];"
    )
    kernel = load_kernel(512, "ld.param.u64 %x1, [map];\n    @%p0 " + load)
    array = random_array((160,), np.uint32)
    address = kernel.upload(array, "source").address.to_bytes(8, "little")
    found = run(kernel, 512, address.ljust(128, b"\0"), seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, array[8:136])
    for old, new, kind in (
        ("+32", "+24", "alignment"),
        ("512", "500", "alignment"),
        ("+32", "+1024", "bounds"),
    ):
        text = "ld.param.u64 %x1, [map];\n    @%p0 " + load.replace(old, new)
        wrong = load_kernel(512, text)
        source = wrong.upload(array, "source").address.to_bytes(8, "little")
        refuses(kind, wrong, 512, source.ljust(128, b"\0"))


# Warp 0 loads rows of a tensor to two stages of 512 bytes, warps 1 and 2 add them up.
RING = """
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    @%p0 mbarrier.init.shared::cta.b64 [bars+8], 1;
    @%p0 mbarrier.init.shared::cta.b64 [bars+16], 64;
    @%p0 mbarrier.init.shared::cta.b64 [bars+24], 64;
    @%p0 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    mov.b64 %x0, map;
    cvta.param.u64 %x0, %x0;
    mov.u32 %r0, bars;
    mov.u32 %r1, 0;
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
LOOP:
    and.b32 %r2, %r1, 1;
    shr.u32 %r3, %r1, 1;
    and.b32 %r3, %r3, 1;
    xor.b32 %r10, %r3, 1;
    shl.b32 %r4, %r2, 3;
    add.u32 %r4, %r0, %r4;
    shl.b32 %r5, %r2, 9;
    mov.u32 %r6, tile;
    add.u32 %r5, %r6, %r5;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra CONSUME;
    @!%p0 bra NEXT;
    {wait_empty}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {expected};
    shl.b32 %r7, %r1, 2;
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r5], \
[%x0, {{0, %r7}}], [%r4];
    bra.uni NEXT;
CONSUME:
    {wait_full}
    shl.b32 %r7, %t, 2;
    add.u32 %r7, %r5, %r7;
    ld.shared.u32 %r6, [%r7+-128];
    add.u32 %r8, %r8, %r6;
    ld.shared.u32 %r6, [%r7+128];
    add.u32 %r9, %r9, %r6;
    {arrive_empty}
NEXT:
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p2, %r1, 9;
    @%p2 bra LOOP;
    @!%p1 bra END;
    shl.b32 %r7, %t, 2;
    cvt.u64.u32 %x1, %r7;
    add.u64 %x1, %out, %x1;
    st.global.u32 [%x1+-128], %r8;
    st.global.u32 [%x1+128], %r9;
END:
"""

RING_PARTS = {
    "wait_empty": wait("%r4+16", "%r10"),
    "wait_full": wait("%r4", "%r3"),
    "arrive_empty": "mbarrier.arrive.shared::cta.b64 _, [%r4+16];",
    "expected": "512",
}


def ring(**parts: str) -> tuple[Module, TensorMap, np.ndarray]:
    kernel = module(RING.format(**{**RING_PARTS, **parts}), parameters=MAP, shared=SHARED)
    array = random_array((36, 32), np.uint32)
    return kernel, tensor(kernel, array, (4, 32)), array.reshape(9, 128)


@pytest.mark.parametrize("seed", [*SEEDS, 4, 5, 6])
def test_producer_and_consumers(seed: int | None) -> None:
    kernel, box, array = ring()
    found = run(kernel, 512, box, threads=96, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, array.sum(axis=0, dtype=np.uint32))


@pytest.mark.planted_bug
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("in flight|race|barrier", {"wait_empty": ""}, id="no-wait-for-empty"),
        pytest.param("in flight|race|uninitialised", {"wait_full": ""}, id="no-wait-for-full"),
        pytest.param("deadlock", {"wait_empty": wait("%r4+16", "%r3")}, id="parity-of-empty"),
        pytest.param(
            "in flight|race|uninitialised|deadlock",
            {"wait_full": wait("%r4", "%r10")},
            id="parity-of-full",
        ),
        pytest.param("deadlock", {"arrive_empty": ""}, id="no-arrival-at-empty"),
        pytest.param("deadlock", {"expected": "496"}, id="too-few-bytes"),
        pytest.param("deadlock", {"expected": "528"}, id="too-many-bytes"),
        pytest.param(
            "race",
            {"arrive_empty": "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r4+16];"},
            id="relaxed-arrival",
        ),
    ],
)
def test_producer_and_consumers_with_a_bug(
    kind: str, parts: dict[str, str], seed: int | None
) -> None:
    kernel, box, _ = ring(**parts)
    refuses(kind, kernel, 512, box, threads=96, seed=seed)


TWO_LOADS = """
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    @%p0 mbarrier.init.shared::cta.b64 [bars+8], 1;
    ld.param.u64 %x1, [source];
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars+8], 512;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes \
[tile], [%x1], 512, [bars];
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes \
[tile+512], [%x1+512], 512, [bars+8];
    bar.sync 0;
"""


@pytest.mark.parametrize(
    ("kind", "waits", "read"),
    [
        ("", (0, 1), 0),
        ("", (0, 1), 1),
        ("in flight|race", (), 0),
        ("in flight|race", (1,), 0),
        ("in flight|race", (0,), 1),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_wait_for_another_load(
    kind: str, waits: tuple[int, ...], read: int, seed: int | None
) -> None:
    """Each of two loads has a barrier of its own, which does not speak for the other."""
    text = TWO_LOADS + "".join(wait(f"bars+{8 * one}", 0) for one in waits)
    kernel = module(
        text + copy_out("tile", 512, 64, 512 * read),
        parameters=".param .u64 source",
        shared=SHARED,
    )
    array = random_array((256,), np.uint32)
    source = kernel.upload(array, "source")
    if kind:
        refuses(kind, kernel, 512, source, seed=seed)
        return
    found = run(kernel, 512, source, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, array[128 * read :][:128])


def test_a_block_that_ends_before_its_load() -> None:
    """Another block may have the shared memory by the time that the load arrives."""
    kernel = module(TWO_LOADS, parameters=".param .u64 source", shared=SHARED)
    source = kernel.upload(random_array((256,), np.uint32), "source")
    refuses("in flight", kernel, 512, source)
