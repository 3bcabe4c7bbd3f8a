"""Races: each planted one stands next to its correct twin."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

SHARED = ".shared .align 16 .b8 tile[2048];"
WORD = "mov.u32 %r9, tile; mad.lo.u32 %r9, %t, 4, %r9; xor.b32 %r8, %r9, 128;"
# Two warps; a thread's own word is at %r9, that of its partner in the other warp at %r8.
PLAIN = {
    "write then read": "st.shared.b32 [%r9], %t; BARRIER ld.shared.b32 %r1, [%r8];",
    "read then write": (
        "st.shared.b32 [%r9], %t; bar.sync 0;"
        "ld.shared.b32 %r1, [%r8]; BARRIER st.shared.b32 [%r9], 5;"
    ),
    "write then write": "st.shared.b32 [%r9], %t; BARRIER st.shared.b32 [%r8], 5;",
    "vectors": (
        "and.b32 %r7, %r9, 0xfffffff0; st.shared.b32 [%r9], %t; BARRIER"
        " xor.b32 %r7, %r7, 128; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r7];"
    ),
    "atomic then read": "red.shared.add.u32 [%r9], 1; BARRIER ld.shared.b32 %r1, [%r8];",
    "read then atomic": ("ld.shared.b32 %r1, [%r9]; BARRIER atom.shared.add.u32 %r1, [%r8], 1;"),
    "atomic then write": "red.shared.add.u32 [%r9], 1; BARRIER st.shared.b32 [%r8], 5;",
}


@pytest.mark.planted_bug
@pytest.mark.parametrize("case", PLAIN)
def test_warps_that_share_memory_need_a_barrier(case):
    # The words are written before, by their owners' partners.
    body = f"{WORD} st.shared.b32 [%r8], 0; bar.sync 0; {PLAIN[case]}"
    run(body.replace("BARRIER", "bar.sync 0;"), 64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^race: (read|write|atomic) of shared\+\d+ by warp"):
        run(body.replace("BARRIER", ""), 64, variables=SHARED)
    run(body.replace("BARRIER", ""), 64, variables=SHARED, checks=False)


@pytest.mark.planted_bug
@pytest.mark.parametrize("accesses", [("st", "ld"), ("ld", "st"), ("st", "st")])
def test_a_race_is_found_whichever_warp_runs_first(accesses):
    statements = {"st": "st.shared.b32 [%r9], 3;", "ld": "ld.shared.b32 %r1, [%r9];"}
    body = f"""
        {WORD}
        st.shared.b32 [%r8], 0;
        bar.sync 0;
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra other;
        {statements[accesses[0]]}
        bra done;
    other:
        {statements[accesses[1]].replace("%r9", "WORD")}
    done:
    """
    run(body.replace("WORD", "%r9"), 64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^race: .* by warp 1 "):
        run(body.replace("WORD", "%r8"), 64, variables=SHARED)


def test_warps_may_write_different_bytes_of_a_word():
    body = """
        mov.u32 %r9, tile;
        mov.u16 %h1, 1;
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra other;
        st.shared.b16 [%r9], %h1;
        bra done;
    other:
        st.shared.b16 [%r9+OFFSET], %h1;
    done:
        BARRIER
        ld.shared.b32 %r1, [%r9];
    """
    right = body.replace("BARRIER", "bar.sync 0;").replace("OFFSET", "2")
    run(right, 64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^race: write of shared\+0"):
        run(right.replace("%r9+2", "%r9+0"), 64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^race: read of shared\+0"):
        run(right.replace("bar.sync 0;", ""), 64, variables=SHARED)


def test_atomics_of_several_warps_do_not_race():
    body = f"""
        {WORD}
        setp.eq.u32 %p1, %t, 0;
        @%p1 st.shared.b32 [%r9], 0;
        bar.sync 0;
        mov.u32 %r1, tile;
        atom.shared.add.u32 %r2, [%r1], 1;
        atom.shared.max.u32 %r2, [%r1], 1;
    """
    run(body, 128, variables=SHARED)


@pytest.mark.planted_bug
def test_a_flag_in_shared_memory_orders_warps_if_there_are_fences():
    body = f"""
        {WORD}
        setp.eq.u32 %p1, %t, 0;
        mov.u32 %r7, tile;
        @%p1 st.shared.b32 [%r7+1024], 0;
        bar.sync 0;
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra consumer;
        st.shared.b32 [%r9], %t;
        RELEASE
        st.volatile.shared.b32 [%r7+1024], 1;
        bra done;
    consumer:
        ld.volatile.shared.b32 %r1, [%r7+1024];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra consumer;
        ACQUIRE
        ld.shared.b32 %r1, [%r8];
        st.global.b32 [%own_out], %r1;
    done:
    """
    right = body.replace("RELEASE", "membar.cta;").replace("ACQUIRE", "fence.acq_rel.cta;")
    out = run(right, 64, variables=SHARED, out=zeros(64))["out"]
    assert np.array_equal(out[32:], np.arange(32))
    for release, acquire in (("", "fence.sc.cta;"), ("membar.gl;", "")):
        wrong = body.replace("RELEASE", release).replace("ACQUIRE", acquire)
        with pytest.raises(PtxError, match=r"^race: read of shared"):
            run(wrong, 64, variables=SHARED, out=zeros(64))


# ---- between blocks

ACROSS = {
    "write, write": "st.global.b32 [%x], 5;",
    "write, reads": (
        "setp.eq.u32 %p1, %b, 0; @%p1 st.global.b32 [%x], 5; @!%p1 ld.global.b32 %r1, [%x];"
    ),
    "read, writes": (
        "setp.ne.u32 %p1, %b, 0; @%p1 st.global.b32 [%x], 5; @!%p1 ld.global.b32 %r1, [%x];"
    ),
    "reads, write": (
        "setp.eq.u32 %p1, %b, 3; @%p1 st.global.b32 [%x], 5; @!%p1 ld.global.b32 %r1, [%x];"
    ),
    "atomic, write": (
        "setp.eq.u32 %p1, %b, 3; @%p1 st.global.b32 [%x], 5; @!%p1 red.global.add.u32 [%x], 1;"
    ),
    "atomic, read": (
        "setp.eq.u32 %p1, %b, 3; @%p1 ld.global.b32 %r1, [%x]; @!%p1 red.global.add.u32 [%x], 1;"
    ),
    "copy, write": (
        "setp.eq.u32 %p1, %b, 3; @%p1 st.global.b32 [%x], 5; mov.u32 %r1, tile;"
        "@!%p1 cp.async.ca.shared.global [%r1], [%x], 4;"
    ),
    "atomics of a block": "red.relaxed.cta.global.add.u32 [%x], 1;",
}


@pytest.mark.planted_bug
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", ACROSS)
def test_blocks_that_share_a_word(case, seed):
    arguments = {"threads": 1, "grid": 4, "variables": SHARED, "seed": seed}
    with pytest.raises(PtxError, match=r"^race: (read|write) of x\+0 .* by block \("):
        run(ACROSS[case], x=zeros(1), **arguments)
    # With a word for each block, there is nothing to find.
    run("mad.wide.u32 %x, %b, 4, %x;" + ACROSS[case], x=zeros(4), **arguments)


@pytest.mark.parametrize(
    "statement",
    [
        "ld.global.b32 %r1, [%x];",
        "red.global.add.u32 [%x], 1;",
        "atom.global.gpu.acq_rel.add.u32 %r1, [%x], 1; ld.volatile.global.b32 %r1, [%x];",
        "st.relaxed.gpu.global.b32 [%x], 1; ld.acquire.sys.global.b32 %r1, [%x];",
    ],
)
def test_what_blocks_may_do_to_one_word(statement):
    run(statement, 64, 5, x=zeros(1))


@pytest.mark.planted_bug
def test_neighbours_within_a_word_do_not_race():
    body = """
        mad.wide.u32 %rd1, %g, 2, %x;
        ld.global.b16 %h1, [%rd1];
        st.global.b16 [%rd1], %h1;
    """
    x = np.arange(15, dtype=np.uint16)
    assert np.array_equal(run(body, 3, 5, x=x)["x"], x)
    with pytest.raises(PtxError, match=r"^race: "):
        run(body.replace("%g, 2", "%t, 2"), 3, 5, x=x)


LAST = """
    st.global.b32 [%own_x], %g;
    bar.sync 0;
    RELEASE
    setp.ne.u32 %p1, %t, 0;
    mov.u32 %r9, tile;
    @%p1 bra wait;
    ATOMIC;
    st.shared.b32 [%r9], %r1;
    ACQUIRE
wait:
    bar.sync 0;
    ld.shared.b32 %r1, [%r9];
    mov.u32 %r2, %nctaid.x;
    sub.u32 %r2, %r2, 1;
    setp.ne.u32 %p1, %r1, %r2;
    @%p1 bra done;
    mad.wide.u32 %rd1, %t, 4, %x;
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
sum:
    ld.global.b32 %r5, [%rd1];
    add.u32 %r3, %r3, %r5;
    add.u64 %rd1, %rd1, 256;
    add.u32 %r4, %r4, 1;
    setp.le.u32 %p1, %r4, %r2;
    @%p1 bra sum;
    mad.wide.u32 %rd2, %t, 4, %out;
    st.global.b32 [%rd2], %r3;
done:
"""


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    ("release", "atomic", "acquire", "fine"),
    [
        ("membar.gl;", "atom.global.inc.u32 %r1, [%count], 99", "membar.gl;", True),
        ("fence.sc.sys;", "atom.global.add.u32 %r1, [%count], 1", "fence.acq_rel.gpu;", True),
        ("", "atom.global.gpu.acq_rel.add.u32 %r1, [%count], 1", "", True),
        ("", "atom.global.release.gpu.add.u32 %r1, [%count], 1", "fence.acq_rel.gpu;", True),
        ("membar.gl;", "atom.global.acquire.gpu.add.u32 %r1, [%count], 1", "", True),
        ("", "atom.global.add.u32 %r1, [%count], 1", "membar.gl;", False),
        ("membar.gl;", "atom.global.add.u32 %r1, [%count], 1", "", False),
        ("membar.cta;", "atom.global.add.u32 %r1, [%count], 1", "membar.gl;", False),
        ("membar.gl;", "atom.global.cta.add.u32 %r1, [%count], 1", "membar.gl;", False),
    ],
)
def test_the_last_block_sums_up(release, atomic, acquire, fine, seed):
    body = LAST.replace("RELEASE", release).replace("ATOMIC", atomic).replace("ACQUIRE", acquire)
    arguments = {"variables": SHARED, "seed": seed, "count": zeros(1), "out": zeros(64)}
    if fine:
        out = run(body, 64, 5, x=5 * 64 * 4, **arguments)["out"]
        assert np.array_equal(out, np.arange(5 * 64).reshape(5, 64).sum(axis=0))
    else:
        with pytest.raises(PtxError, match=r"^race: "):
            run(body, 64, 5, x=5 * 64 * 4, **arguments)


@pytest.mark.planted_bug
def test_order_is_passed_on_from_block_to_block():
    # Block b waits for block b - 1 only, and reads what block 0 has written.
    body = """
        setp.eq.u32 %p1, %b, 0;
        mad.wide.u32 %rd1, %b, 4, %flags;
        @%p1 st.global.b32 [%x], 7;
        @%p1 bra ready;
    spin:
        ld.acquire.gpu.global.b32 %r1, [%rd1];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra spin;
    ready:
        ld.global.b32 %r2, [%x];
        st.global.b32 [%own_out], %r2;
        st.ORDER.gpu.global.b32 [%rd1+4], 1;
    """
    arguments = {"x": 4, "flags": zeros(5), "out": zeros(4)}
    for seed in range(3):
        out = run(body.replace("ORDER", "release"), 1, 4, seed=seed, **arguments)["out"]
        assert out.tolist() == [7, 7, 7, 7]
    with pytest.raises(PtxError, match=r"^race: read of x\+0"):
        run(body.replace("ORDER", "relaxed"), 1, 4, **arguments)


@pytest.mark.planted_bug
def test_a_write_after_many_ordered_reads():
    body = """
        ld.global.b32 %r2, [%x];
        RELEASE
        atom.global.add.u32 %r1, [%count], 1;
        membar.gl;
        setp.ne.u32 %p1, %r1, 3;
        @%p1 bra done;
        st.global.b32 [%x], 8;
    done:
    """
    arguments = {"x": zeros(1), "count": zeros(1)}
    assert run(body.replace("RELEASE", "membar.gl;"), 1, 4, **arguments)["x"].tolist() == [8]
    with pytest.raises(PtxError, match=r"^race: write of x\+0"):
        run(body.replace("RELEASE", ""), 1, 4, **arguments)
