"""ld and st of the emulator: values, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

SHARED = ".shared .align 16 .b8 tile[1024];"
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def random_bytes(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(
    ("vector", "type_name", "size"),
    [
        ("", "b8", 1),
        ("", "u16", 2),
        ("", "b32", 4),
        ("", "s64", 8),
        (".v4", "u8", 1),
        (".v2", "b16", 2),
        (".v2", "b32", 4),
        (".v4", "u32", 4),
        (".v2", "b64", 8),
    ],
)
def test_copies_every_type_and_vector(space, vector, type_name, size):
    count = int(vector[2:] or 1)
    registers = ", ".join(f"{REGISTERS[size]}{10 + k}" for k in range(count))
    registers = f"{{{registers}}}" if vector else registers
    total = size * count
    through = {
        "global": "",
        "shared": f"""
            mov.u32 %r1, tile;
            mad.lo.u32 %r1, %t, {total}, %r1;
            st.shared{vector}.{type_name} [%r1], {registers};
            ld.shared::cta{vector}.{type_name} {registers}, [%r1];""",
        "generic": f"""
            mov.u64 %rd5, tile;
            cvta.shared.u64 %rd5, %rd5;
            mad.wide.u32 %rd5, %t, {total}, %rd5;
            st{vector}.{type_name} [%rd5], {registers};
            ld{vector}.{type_name} {registers}, [%rd5];""",
    }[space]
    body = f"""
        mad.wide.u32 %rd1, %t, {total}, %x;
        mad.wide.u32 %rd2, %t, {total}, %out;
        ld.global{vector}.{type_name} {registers}, [%rd1+{total}];
        {through}
        st.global{vector}.{type_name} [%rd2], {registers};
    """
    x = random_bytes(33 * total)
    result = run(body, variables=SHARED, x=x, out=np.zeros(32 * total, np.uint8))
    assert np.array_equal(result["out"], x[total:])


@pytest.mark.parametrize(
    ("type_name", "dtype", "extended"),
    [
        ("s8", np.int8, np.int32),
        ("u8", np.uint8, np.uint32),
        ("s16", np.int16, np.int32),
        ("u16", np.uint16, np.uint32),
    ],
)
def test_loads_extend_to_wider_registers(type_name, dtype, extended):
    size = np.dtype(dtype).itemsize
    body = f"""
        mad.wide.u32 %rd1, %t, {size}, %x;
        ld.global.{type_name} %r1, [%rd1];
        st.global.b32 [%own_out], %r1;
    """
    x = random_bytes(32 * size).view(dtype)
    out = run(body, x=x, out=zeros(32))["out"]
    assert np.array_equal(out, x.astype(extended).view(np.uint32))


def test_a_narrow_store_takes_the_low_bits():
    body = """
        ld.global.b32 %r1, [%own_x];
        mad.wide.u32 %rd3, %t, 1, %out;
        st.global.u8 [%rd3], %r1;
    """
    x = random_bytes(128).view(np.uint32)
    out = run(body, x=x, out=np.zeros(32, np.uint8))["out"]
    assert np.array_equal(out, x.astype(np.uint8))


@pytest.mark.parametrize(
    "load",
    [
        "ld.global.ca.b32 %r1, [%own_x]",
        "ld.weak.global.cg.u32 %r1, [%own_x]",
        "ld.volatile.global.b32 %r1, [%own_x]",
        "ld.global.nc.L1::no_allocate.L2::128B.b32 %r1, [%own_x]",
        "ld.global.L1::evict_first.L2::cache_hint.b32 %r1, [%own_x], %rd9",
        "ld.relaxed.gpu.global.b32 %r1, [%own_x]",
        "ld.global.acquire.gpu.b32 %r1, [%own_x]",
        "ld.acquire.sys.b32 %r1, [%own_x]",
        "ldu.global.b32 %r1, [%own_x]",
    ],
)
@pytest.mark.parametrize(
    "store",
    [
        "st.global.wt.b32 [%own_out], %r1",
        "st.global.L1::evict_last.L2::cache_hint.b32 [%own_out], %r1, %rd9",
        "st.volatile.global.b32 [%own_out], %r1",
        "st.release.gpu.global.b32 [%own_out], %r1",
        "st.global.relaxed.sys.b32 [%own_out], %r1",
    ],
)
def test_modifiers_of_order_and_caching_move_the_same_bits(load, store):
    body = f"""
        createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
        prefetch.global.L2 [%own_x];
        {load};
        {store};
    """
    x = random_bytes(128).view(np.uint32)
    assert np.array_equal(run(body, x=x, out=zeros(32))["out"], x)


@pytest.mark.parametrize(
    "statement",
    [
        "ld.global.b128 %rd1, [%own_x]",
        "ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%x]",
        "ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%x]",
        "ld.global.v2.b32 {%r0, %r1, %r2}, [%x]",
        "ld.global.L1::evict_never.b32 %r1, [%own_x]",
        "ld.global.L2::cache_hint.b32 %r1, [%own_x]",
        "ld.global.b32 %r1, [%own_x], %rd9",
        "ld.global.b32 %h1, [%own_x]",
        "ld.global.f32 %rd1, [%own_x]",
        "ld.global.b32 %p1, [%own_x]",
        "ld.relaxed.global.b32 %r1, [%own_x]",
        "ld.relaxed.gpu.gpu.b32 %r1, [%own_x]",
        "st.const.b32 [%own_x], %r1",
        "st.acquire.gpu.b32 [%own_x], %r1",
        "st.global.b64 [%x], %r1",
    ],
)
def test_unknown_forms_and_wrong_operands_are_unsupported(statement):
    with pytest.raises(PtxError, match=r"^unsupported: .*\n  at line"):
        run(f"{statement};", x=zeros(32))


@pytest.mark.planted_bug
@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%rd1]", "st.global.b32 [%rd1], %t"])
def test_global_bounds_name_the_allocation(access):
    body = f"""
        mad.wide.u32 %rd1, %t, 4, %x;
        add.u64 %rd1, %rd1, 4;
        {access};
    """
    run(body, threads=31, x=zeros(32), y=zeros(32))
    with pytest.raises(PtxError, match=r"^bounds: .*x\+128 \(size 128\)"):
        run(body, x=zeros(32), y=zeros(32))


@pytest.mark.planted_bug
def test_an_access_before_the_first_allocation_is_out_of_bounds():
    with pytest.raises(PtxError, match=r"^bounds: "):
        run("mov.u64 %rd1, 64; ld.global.b32 %r1, [%rd1];", x=zeros(1))


@pytest.mark.planted_bug
def test_shared_bounds():
    body = """
        mov.u32 %r1, tile;
        mad.lo.u32 %r1, %t, 16, %r1;
        st.shared.v4.b32 [%r1], {%t, %t, %t, %t};
    """
    run(body, threads=64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^bounds: store of 16 bytes at shared\+1024"):
        run(body, threads=96, variables=SHARED)


@pytest.mark.planted_bug
def test_a_vector_must_be_aligned_as_a_whole():
    body = """
        mad.wide.u32 %rd1, %t, 8, %x;
        ld.global.v2.b32 {%r1, %r2}, [%rd1+OFFSET];
    """
    run(body.replace("OFFSET", "8"), x=zeros(66))
    with pytest.raises(PtxError, match=r"^alignment: load of 8 bytes at x\+4"):
        run(body.replace("OFFSET", "4"), x=zeros(66))


@pytest.mark.planted_bug
def test_uninitialised_global_memory_is_not_read():
    read = "ld.global.b32 %r1, [%own_x]; st.global.b32 [%own_out], %r1;"
    out = run("st.global.b32 [%own_x], %t;" + read, x=128, out=zeros(32))["out"]
    assert np.array_equal(out, np.arange(32))
    with pytest.raises(PtxError, match=r"^uninitialised: load of 4 bytes at x\+0"):
        run(read, x=128, out=zeros(32))


@pytest.mark.planted_bug
def test_uninitialised_shared_memory_is_not_read():
    body = """
        mov.u32 %r1, tile;
        mad.lo.u32 %r1, %t, 8, %r1;
        st.shared.b32 [%r1], %t;
        SECOND
        ld.shared.v2.b32 {%r2, %r3}, [%r1];
    """
    run(body.replace("SECOND", "st.shared.b32 [%r1+4], 7;"), variables=SHARED)
    with pytest.raises(PtxError, match=r"^uninitialised: load of 8 bytes at shared\+0"):
        run(body.replace("SECOND", ""), variables=SHARED)


def test_threads_that_do_not_take_part_may_have_any_address():
    body = """
        setp.lt.u32 %p1, %t, 16;
        mov.u64 %rd1, 3;
        @%p1 mov.u64 %rd1, %own_x;
        mov.u32 %r1, 5;
        @%p1 ld.global.b32 %r1, [%rd1];
        @%p1 st.global.b32 [%rd1], %t;
        st.global.b32 [%own_out], %r1;
    """
    x = np.arange(100, 132, dtype=np.uint32)
    result = run(body, x=x, out=zeros(32))
    assert np.array_equal(result["out"], np.where(np.arange(32) < 16, x, 5))
    assert np.array_equal(result["x"], np.where(np.arange(32) < 16, np.arange(32), x))


def test_local_memory_is_private_to_a_thread():
    body = """
        .local .align 8 .b8 depot[8];
        mov.u64 %rd1, depot;
        st.local.b32 [%rd1], %t;
        cvta.local.u64 %rd2, %rd1;
        st.b32 [%rd2+4], 9;
        ld.local.v2.b32 {%r1, %r2}, [depot];
        add.u32 %r1, %r1, %r2;
        st.global.b32 [%own_out], %r1;
    """
    out = run(body, threads=64, out=zeros(64))["out"]
    assert np.array_equal(out, np.arange(64) + 9)


@pytest.mark.planted_bug
@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("ld.local.b32 %r1, [depot]", r"^uninitialised: .* local\+0 \(size 8\) of thread 0"),
        ("st.local.b32 [depot+8], %t", r"^bounds: .*local\+8 \(size 8\)"),
        ("st.local.b32 [depot+4096], %t", r"^bounds: .*local\+4096 \(size 8\)"),
        ("st.local.v2.b32 [depot+4], {%t, %t}", r"^alignment: .*local\+4"),
    ],
)
def test_local_memory_is_checked(access, message):
    with pytest.raises(PtxError, match=message):
        run(f".local .align 8 .b8 depot[8];\n{access};")


def test_variables_of_the_module():
    variables = """
        .const .align 4 .b8 table[8] = {1, 2, 0, 0, 255, 0xff, 0xff, 0xff};
        .global .align 4 .f32 half = 0f3F000000;
        .visible .global .align 4 .u32 counter[32];
    """
    body = """
        ld.const.s32 %r1, [table+4];
        mov.u64 %rd1, table;
        cvta.const.u64 %rd1, %rd1;
        ld.u16 %r2, [%rd1];
        ld.global.b32 %r3, [half];
        ld.global.b32 %r4, [counter+124];
        st.global.v4.b32 [%out], {%r1, %r2, %r3, %r4};
    """
    out = run(body, variables=variables, out=zeros(4))["out"]
    assert out.tolist() == [0xFFFFFFFF, 0x201, 0x3F000000, 0]


@pytest.mark.planted_bug
@pytest.mark.parametrize("space", ["global", "shared"])
def test_threads_of_one_instruction_must_not_store_different_values_to_one_address(space):
    body = f"""
        mov.u32 %r1, tile;
        mov.u32 %r2, VALUE;
        st.{space}.b32 [{"%x" if space == "global" else "%r1"}], %r2;
    """
    run(body.replace("VALUE", "7"), threads=64, variables=SHARED, x=zeros(1))
    with pytest.raises(PtxError, match=r"^race: threads store different values to (x|shared)\+0"):
        run(body.replace("VALUE", "%t"), threads=64, variables=SHARED, x=zeros(1))


@pytest.mark.planted_bug
def test_discarded_memory_is_no_longer_written():
    body = "discard.global.L2 [%x], 128; ld.global.b32 %r1, [%x+OFFSET];"
    run(body.replace("OFFSET", "128"), threads=1, x=zeros(64))
    with pytest.raises(PtxError, match=r"^uninitialised: .* x\+124"):
        run(body.replace("OFFSET", "124"), threads=1, x=zeros(64))
    with pytest.raises(PtxError, match=r"^alignment: "):
        run("discard.global.L2 [%x+4], 128;", threads=1, x=zeros(64))
