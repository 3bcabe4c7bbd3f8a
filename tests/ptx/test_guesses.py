"""Loops of compare-and-swap that begin with a plain load: races where they are none, and are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

# As LLVM and nvcc write the addition of what has no atomic one.
ADD = """
    ld.global.b32 %r1, [%x];
again:
    add.u32 %r2, %r1, 3;
    atom.relaxed.gpu.global.cas.b32 %r3, [%x], %r1, %r2;
    setp.ne.b32 %p1, %r3, %r1;
    mov.b32 %r1, %r3;
    @%p1 bra again;
    st.global.b32 [%own_old], %r3;
"""
COPIED = """
    ld.global.b32 %r3, [%x];
again:
    mov.b32 %r1, %r3;
    add.u32 %r2, %r1, 3;
    atom.global.cas.b32 %r3, [%x], %r1, %r2;
    setp.eq.u32 %p1, %r1, %r3;
    @!%p1 bra again;
"""
HALVES = """
    and.b64 %rd1, %x, -4;
    cvt.u32.u64 %r9, %x;
    and.b32 %r9, %r9, 3;
    shl.b32 %r9, %r9, 3;
    ld.global.u32 %r4, [%rd1];
again:
    shr.u32 %r5, %r4, %r9;
    cvt.u16.u32 %h1, %r5;
    add.u16 %h1, %h1, 3;
    cvt.u32.u16 %r6, %h1;
    shl.b32 %r6, %r6, %r9;
    mov.b32 %r7, 0xffff;
    shl.b32 %r7, %r7, %r9;
    not.b32 %r8, %r7;
    and.b32 %r8, %r4, %r8;
    or.b32 %r6, %r8, %r6;
    atom.global.relaxed.gpu.cas.b32 %r10, [%rd1], %r4, %r6;
    setp.ne.b32 %p1, %r10, %r4;
    mov.b32 %r4, %r10;
    @%p1 bra again;
"""
LOOPS = {"loaded": ADD, "copied": COPIED, "halves": HALVES}


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_additions_by_swaps_do_not_race(name, seed):
    old = {"old": zeros(3 * 40)} if name == "loaded" else {}
    found = run(LOOPS[name], 40, 3, x=zeros(1), seed=seed, **old)
    assert found["x"].tolist() == [3 * 3 * 40]
    if old:
        assert np.array_equal(np.sort(found["old"]), 3 * np.arange(3 * 40))


def test_warps_may_add_so_in_shared_memory():
    body = f"""
        mov.u32 %r9, tile;
        setp.eq.u32 %p2, %t, 0;
        @%p2 st.shared.b32 [%r9], 0;
        bar.sync 0;
        {COPIED.replace("global", "shared").replace("%x", "%r9")}
        bar.sync 0;
        ld.shared.b32 %r8, [%r9];
        st.global.b32 [%own_out], %r8;
    """
    variables = ".shared .align 16 .b8 tile[16];"
    found = run(body, 96, variables=variables, out=zeros(96))["out"]
    assert (found == 3 * 96).all()
    with pytest.raises(PtxError, match=r"^race: (read|atomic) of shared\+0"):
        run(body.replace("bar.sync 0;", "", 1), 96, variables=variables, out=zeros(96))


# What makes of the loop one whose load matters, or that lets a failure pass: old and new text.
MATTERS = {
    "the value is stored": ("again:", "st.global.b32 [%own_old], %r1; again:"),
    "what is computed is stored": ("atom", "st.global.b32 [%own_old], %r2; atom"),
    "it is an address": (
        "again:",
        "mad.wide.u32 %rd1, %r1, 4, %x; st.global.b32 [%rd1], 1; again:",
    ),
    "it decides": ("again:", "setp.gt.u32 %p2, %r1, 99; @%p2 bra done; again:"),
    "it guards": ("again:", "setp.gt.u32 %p2, %r1, 99; @%p2 add.u32 %r4, 1, 1; again:"),
    "the swap compares with another": ("%r1, %r2;\n    setp", "%r4, %r2;\n    setp"),
    "the address changes": ("again:", "again: add.u64 %x, %x, 0;"),
    "another word is compared next": ("mov.b32 %r1, %r3", "mov.b32 %r1, %r4"),
    "the other result goes on": ("setp.ne", "setp.eq"),
    "nothing tests": ("setp.ne.b32 %p1, %r3, %r1", "setp.ne.b32 %p1, %r4, 0"),
    "the test comes too late": (
        "setp.ne.b32 %p1, %r3, %r1;\n    mov.b32 %r1, %r3;",
        "mov.b32 %r1, %r3; setp.ne.b32 %p1, %r3, %r1;",
    ),
    "nothing heeds the test": ("@%p1 bra again;", ""),
    "the test is jumped over": ("setp.ne", "bra done; setp.ne"),
    "no loop": ("@%p1 bra again;", "@%p1 add.u32 %r4, 1, 1;"),
    "an exchange": ("cas.b32 %r3, [%x], %r1,", "exch.b32 %r3, [%x],"),
    "an addition": ("cas.b32 %r3, [%x], %r1,", "add.u32 %r3, [%x],"),
    "no coherent load": ("ld.global.b32", "ld.global.nc.b32"),
}


@pytest.mark.planted_bug
@pytest.mark.parametrize("case", MATTERS)
def test_a_load_that_matters_is_a_race(case):
    before, after = MATTERS[case]
    body = ADD.replace(before, after, 1)
    assert body != ADD
    with pytest.raises(PtxError, match=r"^race: read of x\+0"):
        run(body + "done:", 1, 3, x=zeros(1), old=zeros(3))


@pytest.mark.planted_bug
@pytest.mark.parametrize("seed", range(4))
def test_a_plain_store_is_a_race_with_the_load_all_the_same(seed):
    body = f"""
        setp.eq.u32 %p2, %b, 1;
        @%p2 bra store;
        {COPIED}
        bra done;
    store:
        st.global.b32 [%x], 5;
    done:
    """
    with pytest.raises(PtxError, match=r"^race: (read|write) of x\+0"):
        run(body, 1, 2, x=zeros(1), seed=seed)


@pytest.mark.planted_bug
def test_loads_and_swaps_of_different_sizes_race():
    body = ADD.replace("cas.b32", "cas.b64").replace("ld.global.b32", "ld.global.b64")
    body = body.replace("b32", "b64").replace("u32", "u64").replace("%r", "%rd")
    body = body.replace("st.global.b64 [%own_old], %rd3;", "")
    run(body, 1, 3, x=zeros(2), old=zeros(3))
    narrow = body.replace("ld.global.b64", "ld.global.u32")
    with pytest.raises(PtxError, match=r"^race: read of x\+0"):
        run(narrow, 1, 3, x=zeros(2), old=zeros(3))


@pytest.mark.planted_bug
def test_the_load_acquires_nothing():
    """Block 1 finds what block 0 has left, and its fence comes after a weak read only."""
    body = """
        setp.eq.u32 %p2, %b, 0;
        @!%p2 bra second;
        st.global.b32 [%data], 7;
        membar.gl;
        atom.global.exch.b32 %r9, [%x], 1;
        bra done;
    second:
        ld.global.b32 %r3, [%x];
        membar.gl;
        ld.global.b32 %r5, [%data];
    again:
        mov.b32 %r1, %r3;
        add.u32 %r2, %r1, 3;
        atom.global.cas.b32 %r3, [%x], %r1, %r2;
        setp.ne.u32 %p1, %r1, %r3;
        @%p1 bra again;
    done:
    """
    with pytest.raises(PtxError, match=r"^race: read of data\+0"):
        run(body, 1, 2, x=zeros(1), data=zeros(1))
    strong = body.replace("ld.global.b32 %r3", "ld.relaxed.gpu.global.b32 %r3")
    run(strong, 1, 2, x=zeros(1), data=zeros(1))
