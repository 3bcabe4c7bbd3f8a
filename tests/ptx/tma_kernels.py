"""Kernels of one copy by TMA, and what their boxes should hold by NumPy."""

from __future__ import annotations

import numpy as np

from tests.ptx.emulator import Module, TensorMap
from tests.ptx.hopper_ptx import copy_out, fill, module, wait

SEEDS = (None, 0, 1, 2, 3)

SHARED = ".shared .align 1024 .b8 tile[8192];\n.shared .align 8 .b8 bars[64];"

MAP = ".param .align 64 .b8 map[128]"

MAP_ADDRESS = "    mov.b64 %x0, map;\n    cvta.param.u64 %x0, %x0;\n"

FENCE_INIT = "@%p0 fence.mbarrier_init.release.cluster;"

SYNC = "    bar.sync 0;\n"

ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def tensor(module: Module, array: np.ndarray, box: tuple[int, ...], **options: object) -> TensorMap:
    """The map of a contiguous array, whose box is given in the order of its shape."""
    buffer = module.upload(array, "tensor")
    strides = tuple(array.strides[::-1][1:])
    sizes = array.shape[::-1]
    return TensorMap(buffer.address, array.itemsize, sizes, strides, box[::-1], **options)


def random_array(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    bytes = np.random.default_rng(0).integers(
        1, 255, int(np.prod(shape)) * np.dtype(dtype).itemsize
    )
    return bytes.astype(np.uint8).view(dtype).reshape(shape)


def cut(
    array: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...], outside: int
) -> np.ndarray:
    """The box of an array that is surrounded by `outside`."""
    width = max(box) + max(map(abs, corner))
    padded = np.pad(array, width, constant_values=outside)
    return padded[tuple(slice(c + width, c + width + b) for c, b in zip(corner, box, strict=True))]


def swizzled(box: np.ndarray, swizzle: int, first_row: int = 0) -> np.ndarray:
    """The bytes of a box whose rows are as long as the swizzle, chunk by chunk."""
    rows = np.ascontiguousarray(box).reshape(-1, box.shape[-1]).view(np.uint8)
    chunks = rows.shape[1] // 16
    per_line = 8 // chunks  # rows in 128 bytes
    out = np.empty_like(rows)
    for r in range(len(rows)):
        turn = ((r + first_row) // per_line) % chunks if swizzle else 0
        for c in range(chunks):
            at = 16 * (c ^ turn)
            out[r, at : at + 16] = rows[r, 16 * c : 16 * c + 16]
    return out.ravel()


def load_kernel(bytes: int, load: str, *, place: int = 0, **parts: str) -> Module:
    """Thread 0 loads `bytes` to a place in the tile, everyone waits and stores it to `out`."""
    body = f"""
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [bars], 1;
    {parts.get("fence", FENCE_INIT)}
{MAP_ADDRESS}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {parts.get("expected", bytes)};
    @%p0 {load}
{SYNC}
{parts.get("wait", wait("bars", 0))}
{copy_out("tile", bytes, 64, place)}"""
    return module(body, parameters=MAP, shared=SHARED)


def box_load(corner: tuple[int, ...], place: int = 0) -> str:
    inner = ", ".join(map(str, corner[::-1]))
    return (
        f"cp.async.bulk.tensor.{len(corner)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
        f" [tile+{place}], [%x0, {{{inner}}}], [bars];"
    )


GOOD_LOAD = box_load((1, 2))


def store_kernel(store: str, **parts: str) -> Module:
    """Everyone fills the tile with 0, 1, 2, ..., and thread 0 stores it."""
    commit, waiting = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
    body = f"""
    setp.eq.u32 %p0, %t, 0;
{MAP_ADDRESS}
{parts.get("filling", fill("tile", 512, 64))}
    {parts.get("fence", "fence.proxy.async.shared::cta;")}
{SYNC}
    @%p0 {store}
    @%p0 {parts.get("commit", commit)}
    {parts.get("before", "")}
    @%p0 {parts.get("wait", waiting)}
{SYNC if parts.get("sync", "yes") else ""}
    {parts.get("after", "")}"""
    return module(body, parameters=f"{MAP}, .param .u64 source", shared=SHARED)


def box_store(corner: tuple[int, ...], reduction: str = "") -> str:
    inner = ", ".join(map(str, corner[::-1]))
    name = f"cp.{'reduce.' if reduction else ''}async.bulk.tensor"
    dot = f".{reduction}" if reduction else ""
    return f"{name}.{len(corner)}d.global.shared::cta{dot}.bulk_group [%x0, {{{inner}}}], [tile];"


OWN = "@%p0 st.shared.u32 [tile], %t;"

READ_WAIT = "cp.async.bulk.wait_group.read 0;"

# Thread 0 stores the tile to `out` and reads the first word of it back into the last but one.
LINEAR_STORE = "cp.async.bulk.global.shared::cta.bulk_group [%out], [tile], 512;"
