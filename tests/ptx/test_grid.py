"""Blocks that take turns: waiting for one another, deadlocks, order."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError, grid
from tests.ptx.handwritten import run, zeros


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """Blocks that spin should not do it for long."""
    monkeypatch.setattr(grid, "TURN", 100)


WAIT = """
spin:
    ld.acquire.gpu.global.b32 %r1, [ADDRESS];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra spin;
"""


@pytest.mark.parametrize("later", [1, 40])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_block_may_wait_for_a_later_one(later, seed):
    body = f"""
        setp.ne.u32 %p2, %b, 0;
        @%p2 bra other;
        {WAIT.replace("ADDRESS", "%flag")}
        ld.global.b32 %r2, [%x];
        st.global.b32 [%out], %r2;
        bra done;
    other:
        setp.ne.u32 %p2, %b, {later};
        @%p2 bra done;
        st.global.b32 [%x], 7;
        st.release.gpu.global.b32 [%flag], 1;
    done:
    """
    out = run(body, 1, later + 1, seed=seed, flag=zeros(1), x=4, out=zeros(1))["out"]
    assert out.tolist() == [7]


def test_blocks_meet_at_a_barrier_of_the_whole_grid():
    body = f"""
        st.global.b32 [%own_x], %g;
        bar.sync 0;
        setp.ne.u32 %p1, %t, 0;
        @%p1 bra meet;
        membar.gl;
        red.global.add.u32 [%count], 1;
    spin:
        ld.volatile.global.b32 %r1, [%count];
        setp.lt.u32 %p1, %r1, 17;
        @%p1 bra spin;
        membar.gl;
    meet:
        bar.sync 0;
        mov.u32 %r2, {17 * 32 - 1};
        sub.u32 %r2, %r2, %g;
        mad.wide.u32 %rd1, %r2, 4, %x;
        ld.global.b32 %r3, [%rd1];
        st.global.b32 [%own_out], %r3;
    """
    count = 17 * 32
    out = run(body, 32, 17, x=4 * count, count=zeros(1), out=zeros(count))
    assert np.array_equal(out["out"], np.arange(count)[::-1])


def test_two_blocks_that_wait_for_each_other():
    body = f"""
        mad.wide.u32 %rd1, %b, 4, %flags;
        mov.u32 %r3, 1;
        sub.u32 %r3, %r3, %b;
        mad.wide.u32 %rd2, %r3, 4, %flags;
        EARLY
        {WAIT.replace("ADDRESS", "%rd2")}
        st.release.gpu.global.b32 [%rd1], 1;
    """
    run(body.replace("EARLY", "st.release.gpu.global.b32 [%rd1], 1;"), 1, 2, flags=zeros(2))
    with pytest.raises(PtxError) as caught:
        run(body.replace("EARLY", ""), 1, 2, flags=zeros(2), steps_limit=5_000)
    assert caught.value.kind == "deadlock"
    for block in ("(0, 0, 0)", "(1, 0, 0)"):
        assert f"1 threads of block {block} at line" in str(caught.value)


def test_warps_that_wait_at_different_barriers():
    body = """
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra other;
        bar.sync 1, 64;
        bra done;
    other:
        bar.sync SECOND, 64;
    done:
    """
    run(body.replace("SECOND", "1"), 64, 2)
    with pytest.raises(PtxError) as caught:
        run(body.replace("SECOND", "2"), 64, 2)
    assert caught.value.kind == "deadlock"
    for barrier in (1, 2):
        assert f"bar.sync {barrier}, 64" in str(caught.value)


ORDER = """
    atom.global.add.u32 %r1, [%count], 1;
    mad.wide.u32 %rd1, %r1, 4, %out;
    st.global.b32 [%rd1], %b;
"""


def order(seed: int | None) -> list[int]:
    return run(ORDER, 1, 40, seed=seed, count=zeros(1), out=zeros(40))["out"].tolist()


def test_blocks_come_in_order_or_in_one_by_seed():
    assert order(None) == list(range(40))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(40))


def test_all_blocks_of_three_dimensions_run():
    body = """
        mov.u32 %r1, %ctaid.z;
        mov.u32 %r2, %ctaid.y;
        mad.lo.u32 %r1, %r1, 3, %r2;
        mad.lo.u32 %r1, %r1, 4, %b;
        mad.wide.u32 %rd1, %r1, 4, %out;
        st.global.b32 [%rd1], %r1;
    """
    assert run(body, 1, (4, 3, 2), out=zeros(24))["out"].tolist() == list(range(24))
