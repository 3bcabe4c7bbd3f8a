"""Exchanges between the lanes of a warp, whole and divergent, and waits for late lanes."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.instructions import warp
from tests.ptx.exact import integer
from tests.ptx.one_instruction import opcodes, run

FULL = 0xFFFFFFFF
_RANDOM = np.random.default_rng(0)


def _values(threads: int, bits: int = 32) -> np.ndarray:
    return _RANDOM.integers(0, 1 << bits, threads, dtype=np.uint64).astype(f"u{bits // 8}")


# ---- shfl


def _shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudo-code of the PTX ISA."""
    segment, clamp, b = c >> 8 & 31, c & 31, b & 31
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    if mode == "up":
        j = lane - b
        return (j, True) if j >= last else (lane, False)
    j = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
    return (j, True) if j <= last else (lane, False)


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str, width: int) -> None:
    """Two warps; constants, and registers that differ between lanes."""
    a, b = _values(64), _values(64)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for distance in (0, 1, 2, 5, 16, 31):
        fixed, inside, varied = run(
            f"shfl.sync.{mode}.b32 d|p, a, {distance}, {c}, -1;"
            f"add.u32 %b, b, {distance}; shfl.sync.{mode}.b32 e, a, %b, {c}, -1;",
            registers=".reg .b32 %b;",
            a=a,
            b=b & 31,
            d=np.uint32,
            p=bool,
            e=np.uint32,
            threads=64,
        )
        for thread in range(64):
            base, lane = thread // 32 * 32, thread % 32
            source, valid = _shuffled(mode, lane, distance, c)
            assert (fixed[thread], inside[thread]) == (a[base + source], valid)
            source, _ = _shuffled(mode, lane, int(b[thread] & 31) + distance, c)
            assert varied[thread] == a[base + source]


def test_shfl_to_its_own_source() -> None:
    a = _values(32)
    (found,) = run("shfl.sync.bfly.b32 a, a, 1, 31, -1; mov.b32 d, a;", a=a, d=np.uint32)
    assert (found == a[np.arange(32) ^ 1]).all()


def test_shfl_within_half_a_warp() -> None:
    """The lower lanes exchange while the others go around."""
    a = _values(64)
    (found,) = run(
        """
        mov.u32 %l, %laneid; setp.lt.u32 %p, %l, 16; mov.b32 d, 0;
        @!%p bra DONE;
        shfl.sync.down.b32 d, a, 1, 0x101F, 0xFFFF;
        DONE:
        """,
        registers=".reg .b32 %l; .reg .pred %p;",
        a=a,
        d=np.uint32,
        threads=64,
    )
    for thread in range(64):
        lane = thread % 32
        source = thread + 1 if lane < 15 else thread
        assert found[thread] == (a[source] if lane < 16 else 0)


def test_whole_warps_of_a_block() -> None:
    """Two of three warps exchange, each with another register for its mask."""
    a = _values(96)
    shuffled, bits, total = run(
        """
        mov.u32 %w, %warpid; setp.ne.u32 %p, %w, 1; mov.b32 d, 0; mov.b32 e, 0; mov.b32 f, 0;
        selp.b32 %m, -1, 0, %p; setp.lt.s32 %q, a, 0;
        @%p shfl.sync.up.b32 d, a, 1, 0, %m;
        @%p vote.sync.ballot.b32 e, %q, %m;
        @%p redux.sync.xor.b32 f, a, %m;
        """,
        registers=".reg .b32 %w, %m; .reg .pred %p, %q;",
        a=a,
        d=np.uint32,
        e=np.uint32,
        f=np.uint32,
        threads=96,
    )
    for warp_index in range(3):
        part = slice(32 * warp_index, 32 * warp_index + 32)
        if warp_index == 1:
            assert not (shuffled[part].any() or bits[part].any() or total[part].any())
            continue
        values = a[part]
        assert shuffled[part].tolist() == [values[0], *values[:-1]]
        assert (bits[part] == sum(int(x >> 31) << i for i, x in enumerate(values.tolist()))).all()
        assert (total[part] == np.bitwise_xor.reduce(values)).all()


def test_shfl_from_a_lane_that_takes_no_part() -> None:
    body = """
        mov.u32 %l, %laneid; setp.lt.u32 %p, %l, 16; mov.b32 d, 0;
        @%p shfl.sync.down.b32 d, a, 1, 31, 0xFFFF;
    """
    with pytest.raises(PtxError, match="thread 15 reads lane 16") as error:
        run(body, registers=".reg .b32 %l; .reg .pred %p;", a=_values(32), d=np.uint32)
    assert error.value.kind == "warp"


def test_shfl_from_a_thread_that_the_block_does_not_have() -> None:
    with pytest.raises(PtxError, match="thread 35 reads lane 4") as error:
        run("shfl.sync.down.b32 d, a, 1, 31, -1;", a=_values(36), d=np.uint32, threads=36)
    assert error.value.kind == "warp"


def test_shfl_of_a_lane_outside_its_own_mask() -> None:
    with pytest.raises(PtxError, match="thread 16 is not in its own member mask 0xffff") as error:
        run("shfl.sync.idx.b32 d, a, 0, 31, 0xFFFF;", a=_values(32), d=np.uint32)
    assert error.value.kind == "warp"


def test_masks_that_disagree() -> None:
    body = """
        mov.u32 %l, %laneid; setp.lt.u32 %p, %l, 16; selp.b32 %m, 0x1FFFF, 0xFFFF0000, %p;
        shfl.sync.bfly.b32 d, a, 1, 31, %m;
    """
    with pytest.raises(PtxError, match="different masks") as error:
        run(body, registers=".reg .b32 %l, %m; .reg .pred %p;", a=_values(32), d=np.uint32)
    assert error.value.kind == "warp"


# ---- vote, match, redux, elect

_PART = 0x0F0F00FF  # the lanes that execute in the divergent cases
_DIVERGENT = f"""
    mov.u32 %l, %laneid; shl.b32 %b, 1, %l; and.b32 %b, %b, {_PART:#x}; setp.ne.u32 %g, %b, 0;
"""
_REGISTERS = ".reg .b32 %l, %b; .reg .pred %g;"


def _lanes(part: int) -> list[int]:
    return [lane for lane in range(32) if part >> lane & 1]


@pytest.mark.parametrize("part", [FULL, _PART])
@pytest.mark.parametrize("true", [0, FULL, _PART, 0x00010000, 0x12345678])
def test_vote(part: int, true: int) -> None:
    flags = np.array([bool(true >> lane & 1) for lane in range(32)] * 2)
    prepare, guard = ("", "") if part == FULL else (_DIVERGENT, "@%g ")
    everyone, some, same, bits = run(
        f"mov.pred p, 0; mov.pred q, 0; mov.pred r, 0; mov.b32 d, 0; {prepare}"
        f"{guard}vote.sync.all.pred p, a, {part:#x}; {guard}vote.sync.any.pred q, a, {part:#x};"
        f"{guard}vote.sync.uni.pred r, a, {part:#x}; {guard}vote.sync.ballot.b32 d, !a, {part:#x};",
        registers=_REGISTERS,
        a=flags,
        p=bool,
        q=bool,
        r=bool,
        d=np.uint32,
        threads=64,
    )
    for thread in range(64):
        inside = bool(part >> thread % 32 & 1)
        found = (everyone[thread], some[thread], same[thread], bits[thread])
        both = (true & part == part, bool(true & part))
        wanted = (*both, both[0] or not both[1], part & ~true)
        assert found == (wanted if inside else (False, False, False, 0))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("part", [FULL, _PART])
def test_match(part: int, bits: int) -> None:
    """In the first warp a few values, in the second one and the same."""
    a = np.concatenate([_values(32, bits) & np.dtype(f"u{bits // 8}").type(3), np.full(32, 9)])
    a = a.astype(f"u{bits // 8}") << np.dtype(f"u{bits // 8}").type(bits - 8)
    prepare, guard = ("", "") if part == FULL else (_DIVERGENT, "@%g ")
    found, lanes, equal = run(
        f"mov.b32 d, 0; mov.b32 e, 0; mov.pred p, 0; {prepare}"
        f"{guard}match.any.sync.b{bits} d, a, {part:#x};"
        f"{guard}match.all.sync.b{bits} e|p, a, {part:#x};",
        registers=_REGISTERS,
        a=a,
        d=np.uint32,
        e=np.uint32,
        p=bool,
        threads=64,
    )
    for thread in range(64):
        base, lane = thread // 32 * 32, thread % 32
        if not part >> lane & 1:
            assert (found[thread], lanes[thread], equal[thread]) == (0, 0, False)
            continue
        same = sum(1 << j for j in _lanes(part) if a[base + j] == a[thread])
        assert found[thread] == same
        assert (lanes[thread], equal[thread]) == ((part, True) if same == part else (0, False))


_REDUCTIONS = {
    "add": sum,
    "min": min,
    "max": max,
    "and": lambda values: reduce(int.__and__, values),
    "or": lambda values: reduce(int.__or__, values),
    "xor": lambda values: reduce(int.__xor__, values),
}


@pytest.mark.parametrize("part", [FULL, _PART])
@pytest.mark.parametrize("opcode", opcodes(warp, "redux"))
def test_redux(opcode: str, part: int) -> None:
    _, _, operation, kind = opcode.split(".")
    a = _values(64)
    prepare, guard = ("", "") if part == FULL else (_DIVERGENT, "@%g ")
    (found,) = run(
        f"mov.b32 d, 0; {prepare} {guard}{opcode} d, a, {part:#x};",
        registers=_REGISTERS,
        a=a,
        d=np.uint32,
        threads=64,
    )
    for thread in range(64):
        base = thread // 32 * 32
        values = [integer(int(a[base + lane]), kind) for lane in _lanes(part)]
        wanted = _REDUCTIONS[operation](values) & FULL if part >> thread % 32 & 1 else 0
        assert found[thread] == wanted


def test_halves_of_a_warp_at_once() -> None:
    """Each half names itself, in one instruction."""
    a = _values(32)
    total, bits, leader, elected = run(
        """
        mov.u32 %l, %laneid; setp.lt.u32 %p, %l, 16; selp.b32 %m, 0xFFFF, 0xFFFF0000, %p;
        redux.sync.add.u32 d, a, %m; vote.sync.ballot.b32 e, 1, %m; elect.sync f|q, %m;
        """,
        registers=".reg .b32 %l, %m; .reg .pred %p;",
        a=a,
        d=np.uint32,
        e=np.uint32,
        f=np.uint32,
        q=bool,
    )
    for half in (slice(0, 16), slice(16, 32)):
        assert (total[half] == a[half].sum(dtype=np.uint32)).all()
        assert (leader[half] == half.start).all()
        assert elected[half].tolist() == [True] + [False] * 15
    assert (bits[:16] == 0xFFFF).all() and (bits[16:] == 0xFFFF0000).all()


def test_elect_and_activemask() -> None:
    elected, mask, whole = run(
        f"mov.pred p, 0; mov.b32 d, 0; activemask.b32 e; {_DIVERGENT}"
        f"@%g elect.sync _|p, {_PART:#x}; @%g activemask.b32 d;",
        registers=_REGISTERS,
        threads=80,
        p=bool,
        d=np.uint32,
        e=np.uint32,
    )
    for thread in range(80):
        there = _PART & 0xFFFF if thread >= 64 else _PART
        inside = bool(_PART >> thread % 32 & 1)
        assert elected[thread] == (thread % 32 == 0)
        assert mask[thread] == (there if inside else 0)
        assert whole[thread] == (0xFFFF if thread >= 64 else FULL)


# ---- waiting


def test_lanes_that_come_late_are_waited_for() -> None:
    """Lane 0 of each warp goes through code after the exchange, and back to it."""
    a = _values(64)
    (found,) = run(
        """
        mov.u32 %l, %laneid; setp.eq.u32 %p, %l, 0; mov.b32 %b, a;
        @%p bra LATE;
        BACK:
        bar.warp.sync -1;
        shfl.sync.idx.b32 d, %b, 0, 31, -1;
        bra END;
        LATE:
        not.b32 %b, a;
        bra BACK;
        END:
        """,
        registers=".reg .b32 %l, %b; .reg .pred %p;",
        a=a,
        d=np.uint32,
        threads=64,
    )
    assert (found == np.repeat(~a[::32], 32)).all()


def test_a_late_lane_in_every_turn_of_a_loop() -> None:
    """Sum over ten turns of what another lane has made ready each time."""
    (found,) = run(
        """
        mov.u32 %l, %laneid; mov.u32 %i, 0; mov.u32 d, 0;
        LOOP:
        and.b32 %b, %i, 31; setp.eq.u32 %p, %b, %l; mov.b32 %v, 0;
        @%p bra LATE;
        BACK:
        shfl.sync.idx.b32 %w, %v, %b, 31, -1;
        add.u32 d, d, %w; add.u32 %i, %i, 1; setp.lt.u32 %q, %i, 10;
        @%q bra LOOP;
        bra END;
        LATE:
        add.u32 %v, %i, 100;
        bra BACK;
        END:
        """,
        registers=".reg .b32 %l, %b, %i, %v, %w; .reg .pred %p, %q;",
        threads=128,
        d=np.uint32,
    )
    assert (found == sum(100 + i for i in range(10))).all()


def test_exited_lanes_are_not_waited_for() -> None:
    (found,) = run(
        """
        mov.u32 %l, %laneid; setp.ge.u32 %p, %l, 24; mov.u32 d, 7;
        mov.u32 %a, %tid.x; ld.param.u64 %base, [p_d]; mad.wide.u32 %address, %a, 4, %base;
        st.global.b32 [%address], d;
        @%p exit;
        bar.warp.sync -1;
        vote.sync.ballot.b32 d, 1, -1;
        """,
        registers=".reg .b32 %l, %a; .reg .pred %p;",
        threads=32,
        d=np.uint32,
    )
    assert (found[:24] == 0xFFFFFF).all() and (found[24:] == 7).all()


@pytest.mark.parametrize(
    "instruction",
    ["bar.warp.sync -1", "vote.sync.ballot.b32 d, 1, -1", "shfl.sync.bfly.b32 d, d, 1, 31, -1"],
)
def test_lanes_that_wait_for_each_other_at_two_places(instruction: str) -> None:
    body = f"""
        mov.u32 %l, %laneid; setp.lt.u32 %p, %l, 5; mov.b32 d, 0;
        @%p bra OTHER;
        {instruction};
        bra END;
        OTHER:
        {instruction};
        END:
    """
    with pytest.raises(PtxError, match=r"(?s)lanes 0x1f of warp 0 do not come.*at line") as error:
        run(body, registers=".reg .b32 %l; .reg .pred %p;", threads=32, d=np.uint32)
    assert error.value.kind == "warp"


def test_every_opcode_is_tested() -> None:
    tested = {f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")}
    tested |= {f"vote.sync.{mode}.pred" for mode in ("all", "any", "uni")}
    tested |= {f"match.{mode}.sync.b{bits}" for mode in ("any", "all") for bits in (32, 64)}
    tested |= {"vote.sync.ballot.b32", "elect.sync", "activemask.b32", "bar.warp.sync"}
    assert set(opcodes(warp)) == tested | set(opcodes(warp, "redux"))


@pytest.mark.parametrize(
    "body",
    [
        "shfl.bfly.b32 d, d, 1, 31;",
        "shfl.sync.bfly.b32 d, d, 1, 31;",
        "vote.ballot.b32 d, 1;",
        "redux.sync.add.f32 d, d, -1;",
        "shfl.sync.bfly.b64 d, d, 1, 31, -1;",
        "activemask.b32;",
    ],
)
def test_what_is_not_known_is_refused(body: str) -> None:
    with pytest.raises(PtxError, match=r"at line \d+") as error:
        run(body, threads=32, d=np.uint32)
    assert error.value.kind == "unsupported"
