"""cp.async of the emulator: what it copies and when it is there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

SHARED = ".shared .align 16 .b8 tile[2048];"
COPY = """
    mov.u32 %r9, tile;
    mad.lo.u32 %r9, %t, SIZE, %r9;
    mad.wide.u32 %rd1, %t, SIZE, %x;
    OPCODE [%r9], [%rd1], SIZEREST;
    cp.async.wait_all;
    ld.shared.b32 %r1, [%r9];
    ld.shared.b32 %r2, [%r9+LAST];
    mad.wide.u32 %rd2, %t, 8, %out;
    st.global.v2.b32 [%rd2], {%r1, %r2};
"""


def copy(opcode: str, size: int, rest: str = "") -> str:
    text = COPY.replace("OPCODE", opcode).replace("REST", rest)
    return text.replace("LAST", str(size - 4)).replace("SIZE", str(size))


def words(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1 << 32, count, np.uint32)


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("cp.async.ca.shared.global", 4),
        ("cp.async.ca.shared::cta.global.L2::128B", 8),
        ("cp.async.cg.shared.global", 16),
    ],
)
def test_copies(opcode, size):
    x = words(32 * size // 4)
    out = run(copy(opcode, size), variables=SHARED, x=x, out=zeros(64))["out"].reshape(32, 2)
    rows = x.reshape(32, -1)
    assert np.array_equal(out, rows[:, [0, -1]])


def test_what_the_source_lacks_is_zero_and_not_read():
    x = words(4)
    body = "mov.u32 %r3, 6;" + copy("cp.async.ca.shared.global", 8, ", %r3")
    out = run(body, 1, variables=SHARED, x=x[:2], out=zeros(2))["out"]
    assert out.tolist() == [x[0], x[1] & 0xFFFF]
    # Without a source the address does not matter.
    body = "mov.u32 %r3, 0;" + copy("cp.async.cg.shared.global", 16, ", %r3")
    out = run(body.replace("[%rd1]", "[%rd7+3]"), 1, variables=SHARED, x=x, out=zeros(2))["out"]
    assert out.tolist() == [0, 0]


@pytest.mark.parametrize("negated", ["", "!"])
def test_a_predicate_ignores_the_source(negated):
    x = words(64)
    body = f"""
        setp.lt.u32 %p1, %t, 8;
        createpolicy.fractional.L2::evict_last.b64 %rd9, 1.0;
        {copy("cp.async.ca.shared.global.L2::cache_hint", 8, f", {negated}%p1, %rd9")}
    """
    out = run(body, variables=SHARED, x=x, out=zeros(64))["out"].reshape(32, 2)
    ignored = (np.arange(32) < 8) ^ bool(negated)
    assert np.array_equal(out, np.where(ignored[:, None], 0, x.reshape(32, 2)))


GROUPS = """
    mov.u32 %r9, tile;
    mad.lo.u32 %r9, %t, 4, %r9;
    cp.async.ca.shared.global [%r9], [%own_x], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r9+256], [%own_y], 4;
    cp.async.commit_group;
    WAIT;
    ld.shared.b32 %r1, [%r9+OFFSET];
    st.global.b32 [%own_out], %r1;
"""


@pytest.mark.parametrize(
    ("wait", "offset", "fine"),
    [
        ("cp.async.wait_group 0", 256, True),
        ("cp.async.wait_all", 256, True),
        ("cp.async.wait_group 1", 0, True),
        ("cp.async.wait_group 1", 256, False),
        ("cp.async.wait_group 2", 0, False),
        ("bar.sync 0", 0, False),
    ],
)
def test_groups_are_waited_for_in_order(wait, offset, fine):
    body = GROUPS.replace("WAIT", wait).replace("OFFSET", str(offset))
    x, y = words(64), words(128)[64:]
    arguments = {"variables": SHARED, "x": x, "y": y, "out": zeros(64)}
    if fine:
        out = run(body, 64, **arguments)["out"]
        assert np.array_equal(out, y if offset else x)
    else:
        with pytest.raises(PtxError, match=r"^in flight: load .* shared\+"):
            run(body, 64, **arguments)


@pytest.mark.planted_bug
def test_a_store_into_a_copy_that_is_in_flight():
    body = """
        mov.u32 %r9, tile;
        cp.async.ca.shared.global [%r9], [%x], 4;
        WAIT
        st.shared.b32 [%r9], 5;
    """
    run(body.replace("WAIT", "cp.async.wait_all;"), 1, variables=SHARED, x=zeros(1))
    with pytest.raises(PtxError, match=r"^in flight: store .* shared\+0"):
        run(body.replace("WAIT", ""), 1, variables=SHARED, x=zeros(1))


def test_a_copy_still_in_flight_at_the_end_is_no_error():
    body = "mov.u32 %r9, tile; cp.async.ca.shared.global [%r9], [%x], 4;"
    run(body, 1, variables=SHARED, x=zeros(1))


@pytest.mark.planted_bug
def test_waiting_is_for_the_own_thread_only():
    body = """
        mov.u32 %r9, tile;
        mad.lo.u32 %r9, %t, 4, %r9;
        cp.async.ca.shared.global [%r9], [%own_x], 4;
        cp.async.wait_all;
        BARRIER
        xor.b32 %r8, %r9, 128;
        ld.shared.b32 %r1, [%r8];
        st.global.b32 [%own_out], %r1;
    """
    x = words(64)
    arguments = {"variables": SHARED, "x": x, "out": zeros(64)}
    out = run(body.replace("BARRIER", "bar.sync 0;"), 64, **arguments)["out"]
    assert np.array_equal(out, x[np.arange(64) ^ 32])
    with pytest.raises(PtxError, match=r"^race: read of shared"):
        run(body.replace("BARRIER", ""), 64, **arguments)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("cp.async.cg.shared.global [%r9], [%x], 8", r"^unsupported: "),
        ("cp.async.ca.shared.global [%r9], [%x], 12", r"^unsupported: "),
        ("cp.async.ca.shared.global [%r9], [%x], 4, 4, 4", r"^unsupported: "),
        ("cp.async.ca.shared.global [%r9], [%x], 4, 5", r"^bounds: "),
        ("cp.async.ca.shared.global [%r9], [%x+2], 4", r"^alignment: .* x\+2"),
        ("cp.async.ca.shared.global [%r9+4], [%x], 8", r"^alignment: .* shared\+4"),
        ("cp.async.ca.shared.global [%r9], [%x+8], 4", r"^bounds: .* x\+8 \(size 8\)"),
        ("cp.async.ca.shared.global [%r9], [%x+8], 4, 1", r"^bounds: .* x\+8 \(size 8\)"),
        ("cp.async.ca.shared.global [%r9+2048], [%x], 4", r"^bounds: .* shared\+2048"),
        ("cp.async.ca.shared.global [%r9], [%y], 4", r"^uninitialised: .* y\+0"),
    ],
)
def test_copies_are_checked(statement, message):
    with pytest.raises(PtxError, match=message):
        run(f"mov.u32 %r9, tile; {statement};", 1, variables=SHARED, x=zeros(2), y=8)


ARRIVALS = """
    mov.u32 %r9, tile;
    mad.lo.u32 %r9, %t, 4, %r9;
    mov.u32 %r8, barrier;
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared.b64 [%r8], COUNT;
    bar.sync 0;
    cp.async.ca.shared.global [%r9], [%own_x], 4;
    cp.async.mbarrier.arriveNOINC.shared.b64 [%r8];
    OWN
spin:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r8], 0;
    @!%p2 bra spin;
    xor.b32 %r7, %r9, 128;
    ld.shared.b32 %r1, [%r7];
    st.global.b32 [%own_out], %r1;
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("noinc", "count", "own"),
    [
        (".noinc", 64, ""),
        ("", 64, "mbarrier.arrive.shared.b64 %rd9, [%r8];"),
        (".noinc", 128, "mbarrier.arrive.shared.b64 %rd9, [%r8];"),
    ],
)
def test_an_mbarrier_tells_of_the_copies_of_other_threads(noinc, count, own, seed):
    variables = SHARED + ".shared .align 8 .b64 barrier;"
    body = ARRIVALS.replace("NOINC", noinc).replace("COUNT", str(count)).replace("OWN", own)
    x = words(64)
    out = run(body, 64, variables=variables, seed=seed, x=x, out=zeros(64))["out"]
    assert np.array_equal(out, x[np.arange(64) ^ 32])


@pytest.mark.planted_bug
def test_what_comes_after_the_arrival_is_not_released_by_it():
    variables = SHARED + ".shared .align 8 .b64 barrier;"
    body = ARRIVALS.replace("NOINC", ".noinc").replace("COUNT", "64")
    own = "st.shared.b32 [%r9+OFFSET], 5;"
    body = body.replace("OWN", own).replace("[%r7]", "[%r7+OFFSET]")
    with pytest.raises(PtxError, match=r"^race: read of shared"):
        run(body.replace("OFFSET", "256"), 64, variables=variables, x=words(64), out=zeros(64))
    # Before it, it is.
    first = own + "cp.async.ca.shared.global [%r9], [%own_x], 4;"
    moved = body.replace(own, "").replace("cp.async.ca.shared.global [%r9], [%own_x], 4;", first)
    run(moved.replace("OFFSET", "256"), 64, variables=variables, x=words(64), out=zeros(64))
