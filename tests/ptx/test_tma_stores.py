"""Stores and reductions by TMA: what they move, and the bugs that they are to show."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.hopper_ptx import module, refuses, run, wait
from tests.ptx.tma_kernels import (
    LINEAR_STORE,
    OWN,
    READ_WAIT,
    SEEDS,
    SHARED,
    box_store,
    random_array,
    store_kernel,
    swizzled,
    tensor,
)


def put(array: np.ndarray, corner: tuple[int, int], box: np.ndarray) -> np.ndarray:
    """The array with a box written into it, as far as it reaches."""
    out = array.copy()
    for r, c in np.ndindex(*box.shape):
        y, x = corner[0] + r, corner[1] + c
        if 0 <= y < array.shape[0] and 0 <= x < array.shape[1]:
            out[y, x] = box[r, c]
    return out


def unswizzled(flat: np.ndarray, shape: tuple[int, int], swizzle: int) -> np.ndarray:
    """The box whose swizzled items are `flat`."""
    order = swizzled(np.arange(flat.size, dtype=flat.dtype).reshape(shape), swizzle)
    box = np.empty_like(flat)
    box[order.view(flat.dtype)] = flat
    return box.reshape(shape)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (14, 7), (20, 0)])
@pytest.mark.parametrize(
    ("swizzle", "box"), [(0, (16, 8)), (1, (16, 8)), (2, (8, 16)), (3, (4, 32))]
)
def test_store(
    swizzle: int, box: tuple[int, int], corner: tuple[int, int], seed: int | None
) -> None:
    array = random_array((17, 40), np.uint32)
    kernel = store_kernel(box_store(corner))
    target = tensor(kernel, array, box, swizzle=swizzle)
    run(kernel, 16, target, seed=seed)
    found = kernel.memory.data[target.address - (1 << 32) :][: array.nbytes].view(np.uint32)
    filled = unswizzled(np.arange(128, dtype=np.uint32), box, swizzle)
    np.testing.assert_array_equal(found.reshape(array.shape), put(array, corner, filled))


OTHER = "setp.eq.u32 %p1, %t, 32;\n    @%p1 st.shared.u32 [tile], %t;"


@pytest.mark.planted_bug
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("proxy", {"fence": ""}, id="no-fence"),
        pytest.param("race", {"before": OWN}, id="overwritten-before-wait"),
        pytest.param("race", {"after": OTHER, "sync": ""}, id="overwritten-by-others"),
        pytest.param("in flight", {"wait": READ_WAIT.replace("0;", "1;")}, id="waits-for-others"),
        pytest.param("in flight", {"wait": "mov.u32 %r0, 0;"}, id="no-wait"),
        pytest.param("in flight", {"commit": "mov.u32 %r0, 0;"}, id="no-commit"),
    ],
)
def test_store_with_a_bug(kind: str, parts: dict[str, str], seed: int | None) -> None:
    kernel = store_kernel(box_store((1, 2)), **parts)
    target = tensor(kernel, random_array((17, 40), np.uint32), (4, 32), swizzle=3)
    refuses(kind, kernel, 16, target, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("waiting", [READ_WAIT, "cp.async.bulk.wait_group 0;"])
@pytest.mark.parametrize("after", [{"after": OWN, "sync": ""}, {"after": OTHER}])
def test_store_without_a_bug(after: dict[str, str], waiting: str, seed: int | None) -> None:
    """The twin: the tile is overwritten once it has been read, and that is not stored."""
    array = random_array((17, 40), np.uint32)
    kernel = store_kernel(box_store((1, 2)), wait=waiting, **after)
    target = tensor(kernel, array, (4, 32))
    run(kernel, 16, target, seed=seed)
    found = kernel.memory.data[target.address - (1 << 32) :][: array.nbytes].view(np.uint32)
    filled = np.arange(128, dtype=np.uint32).reshape(4, 32)
    np.testing.assert_array_equal(found.reshape(array.shape), put(array, (1, 2), filled))


BACK = "@%p0 ld.global.u32 %r1, [%out+508];\n    @%p0 st.global.u32 [%out+512], %r1;"


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_store_is_read_back(seed: int | None) -> None:
    kernel = store_kernel(LINEAR_STORE, after=BACK)
    found = run(kernel, 516, bytes(128), seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, [*range(128), 127])
    refuses("in flight", store_kernel(LINEAR_STORE, after=BACK, wait=READ_WAIT), 516, bytes(128))


BF16 = (np.arange(256) % 7).astype(np.float32) - 3


def bf16(x: np.ndarray) -> np.ndarray:
    """Bits of values that bfloat16 has."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("operation", "type_name", "old", "wanted"),
    [
        pytest.param(
            "add",
            "u32",
            np.full(128, 2**32 - 5, np.uint32),
            np.arange(128, dtype=np.uint32) - np.uint32(5),
            id="add-u32",
        ),
        pytest.param(
            "max", "s32", np.full(128, -1, np.int32), np.arange(128, dtype=np.int32), id="max-s32"
        ),
        pytest.param(
            "min",
            "s32",
            np.full(128, 50, np.int32),
            np.minimum(np.arange(128, dtype=np.int32), 50),
            id="min-s32",
        ),
        pytest.param(
            "xor",
            "b32",
            np.full(128, 0xFF, np.uint32),
            np.arange(128, dtype=np.uint32) ^ np.uint32(0xFF),
            id="xor-b32",
        ),
        pytest.param(
            "and",
            "b32",
            np.full(128, 0x55, np.uint32),
            np.arange(128, dtype=np.uint32) & np.uint32(0x55),
            id="and-b32",
        ),
        pytest.param(
            "or",
            "b32",
            np.full(128, 0x55, np.uint32),
            np.arange(128, dtype=np.uint32) | np.uint32(0x55),
            id="or-b32",
        ),
    ],
)
def test_reductions_of_integers(
    operation: str, type_name: str, old: np.ndarray, wanted: np.ndarray, seed: int | None
) -> None:
    linear = (
        f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{type_name}"
        " [%x2], [tile], 512;"
    )
    kernel = store_kernel("ld.param.u64 %x2, [map];\n    @%p0 " + linear)
    target = kernel.upload(old, "target")
    run(kernel, 16, target.address.to_bytes(8, "little").ljust(128, b"\0"), seed=seed)
    np.testing.assert_array_equal(kernel.download(target).view(old.dtype), wanted)
    map_type = {"b32": "u32"}.get(type_name, type_name)
    kernel = store_kernel(box_store((0, 0), operation))
    box = tensor(kernel, old.reshape(4, 32), (4, 32), type=map_type)
    run(kernel, 16, box, seed=seed)
    found = kernel.memory.data[box.address - (1 << 32) :][:512].view(old.dtype)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("type_name", "new", "old", "wanted"),
    [
        pytest.param(
            "f32",
            np.full(128, 0.1, np.float32),
            np.full(128, 3, np.float32),
            np.full(128, np.float32(0.1) + np.float32(3)),
            id="f32",
        ),
        pytest.param(
            "f16",
            np.full(256, 0.1, np.float16),
            np.full(256, 3, np.float16),
            np.full(256, np.float16(3.1)),
            id="f16",
        ),
        # 1 + 2^-8 lies between two bfloat16 values and goes to the even one.
        pytest.param(
            "bf16",
            bf16(np.full(256, 2.0**-8)),
            bf16(np.ones(256)),
            bf16(np.ones(256)),
            id="bf16-ties-to-even",
        ),
        pytest.param("bf16", bf16(BF16), bf16(BF16), bf16(2 * BF16), id="bf16"),
    ],
)
def test_sums_of_floats(
    type_name: str, new: np.ndarray, old: np.ndarray, wanted: np.ndarray
) -> None:
    filling = """
    ld.param.u64 %x5, [source];
    mov.u32 %r2, tile;
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %r2, %r1;
    cvt.u64.u32 %x4, %r1;
    add.u64 %x5, %x5, %x4;
    ld.global.b32 %r3, [%x5];
    st.shared.b32 [%r2], %r3;
    ld.global.b32 %r3, [%x5+256];
    st.shared.b32 [%r2+256], %r3;"""
    kernel = store_kernel(box_store((0, 0), "add"), filling=filling)
    source = kernel.upload(new, "source")
    box = tensor(kernel, old.reshape(4, -1), (4, old.size // 4), type=type_name)
    run(kernel, 16, box, source)
    found = kernel.memory.data[box.address - (1 << 32) :][:512].view(old.dtype)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("type_name", "dtype"), [("", np.uint32), ("f64", np.float64)])
def test_sums_of_no_such_type(type_name: str, dtype: type) -> None:
    kernel = store_kernel(box_store((0, 0), "add"))
    box = tensor(kernel, np.zeros((4, 8), dtype), (4, 8), type=type_name)
    refuses("unsupported", kernel, 16, box)


@pytest.mark.parametrize("reduction", ["", "add"])
def test_stores_start_inside(reduction: str) -> None:
    """Boxes of loads may begin before the tensor, those of stores may not."""
    kernel = store_kernel(box_store((-1, 2), reduction))
    box = tensor(kernel, np.zeros((17, 40), np.uint32), (4, 32), type="u32")
    refuses("bounds", kernel, 16, box)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("waiting", [READ_WAIT, ""])
def test_a_load_tells_nothing_of_a_store(waiting: str, seed: int | None) -> None:
    """Waiting for a load does not say that an earlier store has read its source."""
    load = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [tile+1024], [%x2], 512, [bars];"
    )
    before = f"""
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;
    ld.param.u64 %x2, [source];
    @%p0 {load}
    bar.sync 0;
    {wait("bars", 0)}
    @%p0 {waiting or "mov.u32 %r0, 0;"}
    {OWN}"""
    kernel = store_kernel(LINEAR_STORE, before=before)
    source = kernel.upload(np.zeros(128, np.uint32), "source")
    if not waiting:
        refuses("race", kernel, 512, bytes(128), source, seed=seed)
        return
    found = run(kernel, 512, bytes(128), source, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, np.arange(128))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_add_and_do_not_overwrite(seed: int | None) -> None:
    """Reductions of several blocks add up; stores of several blocks to one box are a race."""
    array = np.zeros((4, 32), np.uint32)
    kernel = store_kernel(box_store((0, 0), "add"))
    target = tensor(kernel, array, (4, 32), type="u32")
    kernel.launch("kernel", (5,), 64, [0, target], seed=seed)
    found = kernel.memory.data[target.address - (1 << 32) :][:512].view(np.uint32)
    np.testing.assert_array_equal(found, 5 * np.arange(128))
    kernel = store_kernel(box_store((0, 0)))
    target = tensor(kernel, array, (4, 32))
    with pytest.raises(PtxError) as caught:
        kernel.launch("kernel", (2,), 64, [0, target], seed=seed)
    assert caught.value.kind == "race"


DOUBLE_BUFFER = """
    setp.eq.u32 %p0, %t, 0;
    mov.u32 %r0, 0;
    mov.u32 %r1, tile;
    shl.b32 %r2, %t, 2;
LOOP:
    @%p0 cp.async.bulk.wait_group.read {behind};
    bar.sync 0;
    and.b32 %r3, %r0, 1;
    shl.b32 %r3, %r3, 8;
    add.u32 %r4, %r1, %r3;
    add.u32 %r5, %r4, %r2;
    shl.b32 %r6, %r0, 8;
    add.u32 %r7, %r6, %r2;
    st.shared.u32 [%r5], %r7;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    cvt.u64.u32 %x0, %r6;
    add.u64 %x0, %out, %x0;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%x0], [%r4], 256;
    @%p0 cp.async.bulk.commit_group;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p1, %r0, 6;
    @%p1 bra LOOP;
    @%p0 cp.async.bulk.wait_group.read 0;
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_two_buffers_of_stores(behind: int, seed: int | None) -> None:
    """One store may be under way while the other buffer is filled, two may not."""
    kernel = module(DOUBLE_BUFFER.format(behind=behind), shared=SHARED)
    if behind == 2:
        refuses("race", kernel, 1536, seed=seed)
        return
    found = run(kernel, 1536, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(found, 4 * np.arange(384))
