"""bar, barrier and barrier.cluster of the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

SHARED = ".shared .align 16 .b8 tile[1024];"
WORD = "mov.u32 %r9, tile; mad.lo.u32 %r9, %t, 4, %r9;"


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0",
        "bar.cta.sync 3, 128",
        "barrier.sync 1",
        "barrier.cta.sync.aligned 15, 128",
        "mov.u32 %r1, 2; mov.u32 %r2, 128; barrier.cta.sync %r1, %r2",
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.acquire.aligned",
    ],
)
def test_a_barrier_lets_threads_exchange_data(barrier):
    body = f"""
        {WORD}
        st.shared.b32 [%r9], %t;
        {barrier};
        xor.b32 %r3, %r9, 508;
        ld.shared.b32 %r4, [%r3];
        st.global.b32 [%own_out], %r4;
    """
    out = run(body, 128, variables=SHARED, out=zeros(128))["out"]
    assert np.array_equal(out, np.arange(128) ^ 127)


def test_producers_arrive_and_consumers_wait():
    body = f"""
        {WORD}
        setp.ge.u32 %p1, %t, 64;
        @%p1 bra consumer;
        st.shared.b32 [%r9], %t;
        ARRIVE
        bra done;
    consumer:
        bar.sync 1, 128;
        ld.shared.b32 %r4, [%r9+-256];
        st.global.b32 [%own_out], %r4;
    done:
    """
    out = run(body.replace("ARRIVE", "bar.arrive 1, 128;"), 128, variables=SHARED, out=zeros(128))
    assert np.array_equal(out["out"][64:], np.arange(64))
    with pytest.raises(PtxError, match=r"^deadlock: (.|\n)*bar.sync 1, 128"):
        run(body.replace("ARRIVE", ""), 128, variables=SHARED, out=zeros(128))


def test_pairs_of_warps_use_barriers_of_their_own():
    body = f"""
        {WORD}
        shr.u32 %r1, %t, 6;
        add.u32 %r1, %r1, 1;
        st.shared.b32 [%r9], %t;
        bar.sync %r1, 64;
        xor.b32 %r3, %r9, DISTANCE;
        ld.shared.b32 %r4, [%r3];
        st.global.b32 [%own_out], %r4;
    """
    out = run(body.replace("DISTANCE", "128"), 128, variables=SHARED, out=zeros(128))["out"]
    assert np.array_equal(out, np.arange(128) ^ 32)
    with pytest.raises(PtxError, match=r"^race: read of shared"):
        run(body.replace("DISTANCE", "256"), 128, variables=SHARED, out=zeros(128))


@pytest.mark.parametrize(
    ("barrier", "result"),
    [
        ("bar.red.popc.u32 %r1, 0, %p1", 10),
        ("barrier.cta.red.popc.aligned.u32 %r1, 1, 96, !%p1", 86),
        ("bar.red.and.pred %p2, 0, %p1", 0),
        ("bar.red.or.pred %p2, 0, %p1", 1),
        ("barrier.red.and.pred %p2, 0, 96, !%p3", 1),
    ],
)
def test_reductions(barrier, result):
    body = f"""
        setp.lt.u32 %p1, %t, 10;
        setp.gt.u32 %p3, %t, 999;
        mov.u32 %r1, 0;
        {barrier};
        @%p2 mov.u32 %r1, 1;
        st.global.b32 [%own_out], %r1;
    """
    assert (run(body, 96, out=zeros(96))["out"] == result).all()


@pytest.mark.planted_bug
def test_participants_agree_about_the_count():
    body = """
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra second;
        bar.sync 1, 64;
        bra done;
    second:
        bar.sync 1, COUNT;
    done:
    """
    run(body.replace("COUNT", "64"), 64)
    with pytest.raises(PtxError, match=r"^barrier: barrier 1: .* counts 64 threads, another 96"):
        run(body.replace("COUNT", "96"), 96)


@pytest.mark.parametrize(
    ("barrier", "message"),
    [
        ("bar.sync 16", r"^barrier: barrier 16: there are 16"),
        ("bar.sync 1, 48", r"^barrier: barrier 1: 48 threads of 96"),
        ("bar.sync 1, 128", r"^barrier: barrier 1: 128 threads of 96"),
        ("bar.sync 1, 64", r"^barrier: barrier 1: more than 64 threads"),
        ("bar.arrive 1, 96; bar.arrive 2, 96; bar.sync 16", r"^barrier: barrier 16"),
        ("@%p1 bar.arrive 1, 96; @%p1 bar.sync 1, 96", r"^barrier: .* arrive twice"),
        ("mov.u32 %r1, %t; bar.sync 1, %r1", r"^barrier: barrier 1: threads name counts"),
        ("barrier.cluster.wait", r"^barrier: .* without an arrive"),
        ("@%p1 barrier.cluster.arrive; @%p1 barrier.cluster.arrive", r"^barrier: .* twice"),
        ("bar.arrive 1", r"^unsupported: "),
        ("bar.sync.aligned 1", r"^unsupported: "),
        ("barrier.cluster.arrive.acquire", r"^unsupported: "),
    ],
)
def test_wrong_barriers(barrier, message):
    with pytest.raises(PtxError, match=message):
        run(f"setp.lt.u32 %p1, %t, 32; {barrier};", 96)


@pytest.mark.planted_bug
def test_a_divergent_barrier():
    body = """
        setp.ge.u32 %p1, %t, LIMIT;
        @%p1 bra second;
        bar.sync 0;
        bra done;
    second:
        bar.sync 0;
    done:
    """
    run(body.replace("LIMIT", "32"), 64)
    with pytest.raises(PtxError, match=r"^barrier: barrier 0: divergent"):
        run(body.replace("LIMIT", "48"), 64)
    run(body.replace("LIMIT", "48").replace("bar.", "barrier."), 64)


def test_the_rest_of_a_warp_may_come_later():
    body = """
        setp.ge.u32 %p1, %t, 48;
        mov.u32 %r1, 1;
        @%p1 bra cold;
    back:
        bar.sync 0;
        st.global.b32 [%own_out], %r1;
        bra done;
    cold:
        mov.u32 %r1, 2;
        bra back;
    done:
    """
    out = run(body, 64, out=zeros(64))["out"]
    assert np.array_equal(out, np.where(np.arange(64) < 48, 1, 2))


def test_threads_that_have_ended():
    body = """
        setp.ge.u32 %p1, %t, LIMIT;
        @%p1 exit;
        BARRIER;
        st.global.b32 [%own_out], %t;
    """
    early = body.replace("LIMIT", "40")
    out = run(early.replace("BARRIER", "bar.sync 0"), 96, out=zeros(96))["out"]
    assert np.array_equal(out, np.where(np.arange(96) < 40, np.arange(96), 0))
    with pytest.raises(PtxError, match=r"^deadlock: (.|\n)*bar.sync 0, 96"):
        run(early.replace("BARRIER", "bar.sync 0, 96"), 96, out=zeros(96))


@pytest.mark.planted_bug
def test_the_rest_of_a_warp_may_not_end_instead():
    body = """
        setp.ge.u32 %p1, %t, 16;
        @%p1 bra end;
        bar.sync 0;
    end:
    """
    with pytest.raises(PtxError, match=r"^barrier: barrier 0: divergent, 16 threads have ended"):
        run(body)


def test_the_arrival_of_a_cluster_barrier_releases_and_does_not_wait():
    body = f"""
        {WORD}
        st.shared.b32 [%r9], 1;
        barrier.cluster.arrive.ORDER.aligned;
        ld.shared.b32 %r1, [%r9];
        barrier.cluster.wait.aligned;
        xor.b32 %r3, %r9, 128;
        st.shared.b32 [%r3], %r1;
    """
    # What comes between the halves is not ordered, so the loads race with the later stores ...
    with pytest.raises(PtxError, match=r"^race: write of shared"):
        run(body.replace("ORDER", "release"), 64, variables=SHARED)
    # ... which they do not if they come before.
    swapped = body.replace("ld.shared.b32 %r1, [%r9];", "mov.u32 %r1, 3;")
    run(swapped.replace("ORDER", "release"), 64, variables=SHARED)
    with pytest.raises(PtxError, match=r"^race: write of shared"):
        run(swapped.replace("ORDER", "relaxed"), 64, variables=SHARED)


def test_a_warp_that_spins_lets_others_go_on():
    body = """
        mov.u32 %r9, tile;
        setp.eq.u32 %p1, %t, 0;
        @%p1 st.shared.b32 [%r9], 0;
        bar.sync 0;
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra other;
    spin:
        ld.volatile.shared.b32 %r1, [%r9];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra spin;
        bra done;
    other:
        st.volatile.shared.b32 [%r9], 1;
    done:
    """
    assert run(body, 64, variables=SHARED) == {}
