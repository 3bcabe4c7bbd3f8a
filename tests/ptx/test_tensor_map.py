"""Tensor maps: those of the host, those that a kernel makes or edits, unknown forms."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError, TensorMap
from tests.ptx.hopper_ptx import copy_out, module, refuses, run, wait
from tests.ptx.tma_kernels import (
    GOOD_LOAD,
    SHARED,
    box_load,
    cut,
    load_kernel,
    random_array,
    swizzled,
    tensor,
)


def test_map_larger_than_its_allocation() -> None:
    kernel = load_kernel(512, box_load((15, 0)))
    buffer = kernel.upload(random_array((17, 80), np.uint32), "tensor")
    refuses("bounds", kernel, 512, TensorMap(buffer.address, 4, (80, 20), (320,), (32, 4)))


# As compilers make a descriptor: in shared memory, then copied to global memory with its fence.
MAKE_MAP = """
    ld.param.u64 %x1, [data];
    ld.param.u64 %x0, [scratch];
    setp.eq.u32 %p0, %t, 0;
    setp.lt.u32 %p1, %t, 32;
    shl.b32 %r1, %t, 2;
    mov.u32 %r2, made;
    add.u32 %r1, %r2, %r1;
    mov.u32 %r3, 0;
    @%p1 st.shared.b32 [%r1], %r3;
    mov.u32 %r4, 32;
    mov.u32 %r5, 4;
    mov.u32 %r6, 80;
    mov.u32 %r7, 17;
    mov.u64 %x2, 320;
    @%p0 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [made], %x1;
    @%p0 tensormap.replace.tile.rank.shared::cta.b1024.b32 [made], 0x1;
    @%p0 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [made], 0x0, %r4;
    @%p0 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [made], 0x1, %r5;
    @%p0 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [made], 0x0, %r6;
    @%p0 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [made], 0x1, %r7;
    @%p0 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [made], 0x0, %x2;
    @%p0 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [made], 0x0, 1;
    @%p0 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [made], 0x1, 1;
    @%p0 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [made], 0x2;
    @%p0 tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [made], 0x0;
    @%p0 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [made], 0x3;
    @%p0 tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [made], 0x0;
    @%p1 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned \
[%x0], [made], 0x80;
    {acquire}
    bar.sync 0;
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    fence.proxy.async;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;
    @%p0 {load}
    bar.sync 0;
"""

ACQUIRE = "@%p1 fence.proxy.tensormap::generic.acquire.gpu [%x0], 0x80;"


@pytest.mark.parametrize("acquire", [ACQUIRE, ""])
def test_map_made_by_the_kernel(acquire: str) -> None:
    body = MAKE_MAP.format(acquire=acquire, load=GOOD_LOAD)
    kernel = module(
        body + wait("bars", 0) + copy_out("tile", 512, 64),
        parameters=".param .u64 data, .param .u64 scratch",
        shared=SHARED + "\n.shared .align 128 .b8 made[128];",
    )
    array = random_array((17, 80), np.uint32)
    arguments = kernel.upload(array, "data"), kernel.allocate(128, "scratch")
    if not acquire:
        refuses("proxy", kernel, 512, *arguments)
        return
    found = run(kernel, 512, *arguments)
    np.testing.assert_array_equal(found, swizzled(cut(array, (1, 2), (4, 32), 0), 3))


EDIT_MAP = """
    ld.param.u64 %x0, [address];
    ld.param.u64 %x1, [data];
    setp.eq.u32 %p0, %t, 0;
    @%p0 tensormap.replace.tile.global_address.global.b1024.b64 [%x0], %x1;
    {release}
    {acquire}
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;
    @%p0 {load}
    bar.sync 0;
"""

RELEASE = "@%p0 fence.proxy.tensormap::generic.release.gpu;"

ACQUIRE_ONE = "@%p0 fence.proxy.tensormap::generic.acquire.gpu [%x0], 128;"


@pytest.mark.parametrize(
    ("release", "acquire"), [(RELEASE, ACQUIRE_ONE), ("", ACQUIRE_ONE), (RELEASE, "")]
)
def test_map_edited_by_the_kernel(release: str, acquire: str) -> None:
    body = EDIT_MAP.format(release=release, acquire=acquire, load=GOOD_LOAD)
    kernel = module(
        body + wait("bars", 0) + copy_out("tile", 512, 64),
        parameters=".param .u64 address, .param .u64 data",
        shared=SHARED,
    )
    array = random_array((17, 80), np.uint32)
    old = tensor(kernel, np.zeros_like(array), (4, 32))
    address = kernel.upload(np.frombuffer(old.encode(), np.uint8), "map")
    arguments = address, kernel.upload(array, "data")
    if not (release and acquire):
        refuses("proxy", kernel, 512, *arguments)
        return
    found = run(kernel, 512, *arguments).view(np.uint32)
    np.testing.assert_array_equal(found.reshape(4, 32), cut(array, (1, 2), (4, 32), 0))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("alignment", {"address": (1 << 32) + 8}, id="address"),
        pytest.param("alignment", {"strides": (324,)}, id="stride"),
        pytest.param("launch", {"strides": ()}, id="no-stride"),
        pytest.param("launch", {"box": (32, 257)}, id="box"),
        pytest.param("launch", {"box": (3, 4)}, id="row-of-12-bytes"),
        pytest.param("launch", {"box": (64, 4), "swizzle": 3}, id="row-beyond-swizzle"),
        pytest.param("launch", {"type": "f16"}, id="type-of-another-size"),
        pytest.param("launch", {"sizes": (80, 0)}, id="size-0"),
        pytest.param("unsupported", {"element_strides": (1, 2, 1, 1, 1)}, id="element-stride"),
    ],
)
def test_maps_that_the_driver_would_refuse(kind: str, changes: dict[str, object]) -> None:
    good = {
        "address": 1 << 32,
        "item_size": 4,
        "sizes": (80, 17),
        "strides": (320,),
        "box": (32, 4),
        "type": "f32",
    }
    assert TensorMap.decode(TensorMap(**good).encode()) == TensorMap(**good)
    with pytest.raises(PtxError) as caught:
        TensorMap(**{**good, **changes})
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "line",
    [
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [tile], [%x0],"
        " [bars];",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [tile],"
        " [%x0, {0}], [bars];",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [tile],"
        " [%x0, {0, 0}];",
        "cp.async.bulk.tensor.1d.global.shared::cta.mbarrier::complete_tx::bytes [%x0, {0}],"
        " [tile];",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [tile], [tile],"
        " 16, [bars];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%x0], [tile], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%x0], [tile], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.and.u32 [%x0], [tile], 16;",
        "cp.async.bulk.wait_group %r0;",
        "tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [tile], %r0, %r1;",
        "tensormap.replace.tile.rank.shared::cta.b1024.b64 [tile], %x0;",
        "tensormap.replace.tile.swizzle_atomicity.shared::cta.b1024.b32 [tile], 1;",
        "fence.proxy.tensormap::generic.acquire.gpu [%x0], 64;",
    ],
)
def test_what_is_not_known_raises(line: str) -> None:
    refuses("unsupported", module("    " + line, shared=SHARED), 16)
