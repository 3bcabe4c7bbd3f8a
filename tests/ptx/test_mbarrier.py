"""mbarriers: phases, counts and states by the PTX ISA, and the bugs that they are to show."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.hopper_ptx import copy_out, module, refuses, run, wait

SEEDS = (None, 0, 1, 2)
BARS = ".shared .align 8 .b8 bars[32];"
INIT = "    setp.eq.u32 %p0, %t, 0;\n    @%p0 mbarrier.init.shared::cta.b64 [bars], {count};\n"
SYNC = "    bar.sync 0;\n"

# Every thread stores a word, meets the others at the barrier, and reads its mirror image's.
EXCHANGE = """
    mov.u32 %r0, words;
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %r0, %r1;
    st.shared.u32 [%r1], %t;
    {arrive}
    {wait}
    mov.u32 %r2, 63;
    sub.u32 %r2, %r2, %t;
    shl.b32 %r2, %r2, 2;
    add.u32 %r2, %r0, %r2;
    ld.shared.u32 %r3, [%r2];
    shl.b32 %r4, %t, 2;
    cvt.u64.u32 %x0, %r4;
    add.u64 %x0, %out, %x0;
    st.global.u32 [%x0], %r3;
"""
WORDS = ".shared .align 4 .b8 words[256];"
WAIT_STATE = """
AGAIN:
    mbarrier.{kind}.shared::cta.b64 %p1, [bars], %x1{hint};
    @!%p1 bra AGAIN;"""


def exchange(arrive: str, wait: str, count: int = 64, init: str = INIT + SYNC):
    body = init.format(count=count) + EXCHANGE.format(arrive=arrive, wait=wait)
    return module(body, shared=BARS + WORDS)


ARRIVE = "mbarrier.arrive.shared::cta.b64 %x1, [bars];"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("arrive", "wait", "count"),
    [
        pytest.param(ARRIVE, wait("bars", 0), 64, id="parity"),
        pytest.param(ARRIVE, WAIT_STATE.format(kind="try_wait", hint=""), 64, id="state"),
        pytest.param(ARRIVE, WAIT_STATE.format(kind="try_wait", hint=", 1000"), 64, id="hint"),
        pytest.param(ARRIVE, WAIT_STATE.format(kind="test_wait", hint=""), 64, id="test_wait"),
        pytest.param(
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [bars], 3;",
            wait("bars", 0),
            192,
            id="count-3",
        ),
        pytest.param(
            "mov.u64 %x2, bars;\n    cvta.shared.u64 %x2, %x2;\n"
            "    mbarrier.arrive.release.cta.b64 _, [%x2];",
            wait("bars", 0),
            64,
            id="generic",
        ),
    ],
)
def test_exchange_is_ordered(arrive: str, wait: str, count: int, seed: int | None) -> None:
    out = run(exchange(arrive, wait, count), 256, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(out, np.arange(64)[::-1])


@pytest.mark.planted_bug
@pytest.mark.parametrize(
    ("kind", "arrive", "wait", "count", "init"),
    [
        pytest.param("uninitialised|race", ARRIVE, "", 64, INIT + SYNC, id="no-wait"),
        pytest.param("deadlock", ARRIVE, wait("bars", 1), 64, INIT + SYNC, id="wrong-parity"),
        pytest.param("deadlock", ARRIVE, wait("bars", 0), 65, INIT + SYNC, id="too-few-arrivals"),
        pytest.param("race", ARRIVE, wait("bars", 0), 64, INIT, id="unordered-init"),
        pytest.param(
            "race",
            "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [bars];",
            wait("bars", 0),
            64,
            INIT + SYNC,
            id="relaxed-arrive",
        ),
        pytest.param(
            "race",
            ARRIVE,
            wait("bars", 0).replace(".parity", ".parity.relaxed.cta"),
            64,
            INIT + SYNC,
            id="relaxed-wait",
        ),
        pytest.param("barrier", ARRIVE, wait("bars", 0), 64, "", id="no-init"),
        pytest.param("barrier", ARRIVE, wait("bars", 0), 0, INIT + SYNC, id="count-0"),
    ],
)
def test_exchange_with_a_bug(kind: str, arrive: str, wait: str, count: int, init: str) -> None:
    refuses(kind, exchange(arrive, wait, count, init), 256)


RING = """
    setp.eq.u32 %p0, %t, 0;
    @%p0 mbarrier.init.shared::cta.b64 [bars], 32;
    @%p0 mbarrier.init.shared::cta.b64 [bars+8], 32;
    bar.sync 0;
    mov.u32 %r0, words;
    and.b32 %r1, %t, 31;
    shl.b32 %r1, %r1, 2;
    add.u32 %r1, %r0, %r1;
    mov.u32 %r2, 0;
    mov.u32 %r5, 0;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra CONSUMER;
PRODUCER:
    and.b32 %r3, %r2, 1;
    xor.b32 %r4, %r3, 1;
    {wait_empty}
    mul.lo.u32 %r6, %r2, %t;
    st.shared.u32 [%r1], %r6;
    mbarrier.arrive.shared::cta.b64 _, [bars];
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p2, %r2, 7;
    @%p2 bra PRODUCER;
    ret;
CONSUMER:
    and.b32 %r3, %r2, 1;
    {wait_full}
    ld.shared.u32 %r6, [%r1];
    add.u32 %r5, %r5, %r6;
    {arrive_empty}
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p2, %r2, 7;
    @%p2 bra CONSUMER;
    and.b32 %r7, %t, 31;
    shl.b32 %r7, %r7, 2;
    cvt.u64.u32 %x0, %r7;
    add.u64 %x0, %out, %x0;
    st.global.u32 [%x0], %r5;
"""
RING_PARTS = {
    "wait_empty": wait("bars+8", "%r4"),
    "wait_full": wait("bars", "%r3"),
    "arrive_empty": "mbarrier.arrive.shared::cta.b64 _, [bars+8];",
}


def ring(**parts: str):
    return module(RING.format(**{**RING_PARTS, **parts}), shared=BARS + WORDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_producer_and_consumer(seed: int | None) -> None:
    out = run(ring(), 128, seed=seed).view(np.uint32)
    np.testing.assert_array_equal(out, np.arange(32) * sum(range(7)))


@pytest.mark.planted_bug
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("race|deadlock", {"wait_empty": ""}, id="no-wait-for-empty"),
        pytest.param("race|uninitialised", {"wait_full": ""}, id="no-wait-for-full"),
        pytest.param("deadlock", {"wait_empty": wait("bars+8", "%r3")}, id="parity-of-empty"),
        pytest.param(
            "race|uninitialised|deadlock",
            {"wait_full": "xor.b32 %r3, %r3, 1;" + wait("bars", "%r3")},
            id="parity-of-full",
        ),
        pytest.param("deadlock", {"arrive_empty": ""}, id="no-arrival-at-empty"),
    ],
)
def test_producer_and_consumer_with_a_bug(kind: str, parts: dict[str, str]) -> None:
    refuses(kind, ring(**parts), 128)


def alone(*lines: str):
    """A kernel of one thread with a barrier of two arrivals; %r0 to %r3 are its output."""
    text = "\n    ".join(
        [
            *(f"mov.u32 %r{i}, 0;" for i in range(4)),
            "mbarrier.init.shared::cta.b64 [bars], 2;",
            *lines,
            *(f"st.global.u32 [%out+{4 * i}], %r{i};" for i in range(4)),
        ]
    )
    return module(text, shared=BARS)


ONE = "mbarrier.arrive.shared::cta.b64 %x1, [bars];"
PARTIAL = "mbarrier.arrive.noComplete.shared::cta.b64 %x1, [bars], 1;"
COUNT = "mbarrier.pending_count.b64 %r0, %x1;"
OVER = ("mbarrier.test_wait.parity.shared::cta.b64 %p1, [bars], 0;", "@%p1 mov.u32 %r1, 1;")
EXPECT = "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bars], {};"
COMPLETE = "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bars], {};"
EXPECT_ARRIVE = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {};"
DROP = "mbarrier.arrive_drop.shared::cta.b64 _, [bars];"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param([ONE, *OVER], [0, 0], id="one-of-two"),
        pytest.param([ONE, ONE, *OVER], [0, 1], id="two-of-two"),
        pytest.param([PARTIAL, COUNT, *OVER], [2, 0], id="pending-count"),
        pytest.param([EXPECT.format(16), ONE, ONE, *OVER], [0, 0], id="bytes-pending"),
        pytest.param([EXPECT.format(16), ONE, ONE, COMPLETE.format(16), *OVER], [0, 1], id="bytes"),
        pytest.param(
            [COMPLETE.format(16), ONE, EXPECT_ARRIVE.format(16), *OVER], [0, 1], id="bytes-first"
        ),
        pytest.param([DROP, ONE, *OVER], [0, 1], id="drop"),
        # A drop lowers the counts of the phases that follow.
        pytest.param([DROP, ONE, ONE, *OVER], [0, 0], id="drop-two-phases"),
        pytest.param([DROP, ONE, PARTIAL.replace("noComplete.", ""), *OVER], [0, 0], id="count-1"),
        pytest.param(
            ["mbarrier.inval.shared::cta.b64 [bars];", "st.shared.u32 [bars], %t;"],
            [0, 0],
            id="reuse-after-inval",
        ),
    ],
)
def test_counts(lines: list[str], expected: list[int]) -> None:
    out = run(alone(*lines), 16, threads=1).view(np.uint32)
    np.testing.assert_array_equal(out[:2], expected)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        pytest.param("barrier", ["mbarrier.init.shared::cta.b64 [bars], 2;"], id="double-init"),
        pytest.param("barrier", ["st.shared.u32 [bars+4], %t;"], id="ordinary-store"),
        pytest.param("barrier", ["ld.shared.u32 %r0, [bars];"], id="ordinary-load"),
        pytest.param("barrier", ["mbarrier.init.shared::cta.b64 [bars+12], 1;"], id="misaligned"),
        pytest.param("barrier", ["mbarrier.arrive.shared::cta.b64 _, [bars], 3;"], id="too-many"),
        pytest.param("barrier", ["mbarrier.arrive.shared::cta.b64 _, [bars+8];"], id="no-init"),
        pytest.param("barrier", ["mbarrier.inval.shared::cta.b64 [bars];", ONE], id="after-inval"),
        pytest.param("barrier", [ONE, PARTIAL], id="noComplete-completes"),
        pytest.param("barrier", [ONE, COUNT], id="count-of-another-state"),
        pytest.param("barrier", [EXPECT.format((1 << 20) - 1)] * 2, id="too-many-bytes"),
        pytest.param("barrier", [COMPLETE.format((1 << 20) - 1)] * 2, id="too-few-bytes"),
        pytest.param("barrier", [OVER[0].replace(" 0;", " 2;")], id="parity-2"),
        pytest.param(
            "barrier",
            [
                ONE,
                *[ONE.replace("%x1", "%x2")] * 3,
                OVER[0].replace(".parity", "").replace("0;", "%x1;"),
            ],
            id="old-state",
        ),
        pytest.param("bounds", ["mbarrier.init.shared::cta.b64 [bars+4096], 1;"], id="bounds"),
        pytest.param(
            "unsupported",
            ["mbarrier.arrive.release.gpu.shared::cta.b64 _, [bars];"],
            id="no-such-scope",
        ),
    ],
)
def test_misuse(kind: str, lines: list[str]) -> None:
    refuses(kind, alone(*lines), 16, threads=1)


def test_a_look_ahead_is_no_wait() -> None:
    """A thread that finds a phase unfinished may go on to finish it itself."""
    lines = [ONE, *OVER, ONE, *OVER, "@%p1 mov.u32 %r2, 1;"]
    out = run(alone(*lines), 16, threads=1).view(np.uint32)
    np.testing.assert_array_equal(out[:3], [0, 1, 1])


def test_successful_waits_may_fail_once() -> None:
    """try_wait may give up early: the first one of a thread does, with checks on."""
    try_wait = OVER[0].replace("test_wait", "try_wait")
    lines = [ONE, ONE, try_wait, "@%p1 mov.u32 %r0, 1;", try_wait, "@%p1 mov.u32 %r1, 1;"]
    for checks, expected in ((True, [0, 1]), (False, [1, 1])):
        out = run(alone(*lines), 16, threads=1, checks=checks).view(np.uint32)
        np.testing.assert_array_equal(out[:2], expected)


def test_arrivals_of_an_ended_warp() -> None:
    """Threads that finish early leave the others their arrivals."""
    body = (
        INIT.format(count=32)
        + SYNC
        + """
    mov.u32 %r0, words;
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %r0, %r1;
    setp.lt.u32 %p1, %t, 32;
    @%p1 st.shared.u32 [%r1], %t;
    @%p1 add.u32 %r2, %t, 32;
    @%p1 st.shared.u32 [%r1+128], %r2;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [bars];
    @%p1 bra END;
"""
        + wait("bars", 0)
        + copy_out("words", 256, 64)
        + "\nEND:\n"
    )
    out = run(module(body, shared=BARS + WORDS), 256, checks=True)
    np.testing.assert_array_equal(out.view(np.uint32)[32:], np.arange(32, 64))
