"""mov: registers, vectors, constants, special registers, addresses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import Module, PtxError
from tests.ptx.exact import array, samples, size
from tests.ptx.one_instruction import check, run


@pytest.mark.parametrize(
    "kind", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred"]
)
def test_mov_keeps_bits(kind: str) -> None:
    check(f"mov.{kind}", [kind], kind, lambda a: a)


@pytest.mark.parametrize(("whole", "count"), [("b64", 2), ("b64", 4), ("b32", 2)])
def test_mov_of_vectors(whole: str, count: int) -> None:
    (values,) = samples([whole], seed=6)
    bits = 8 * size(whole) // count
    names = list("pqrs")[:count]
    *pieces, again = run(
        f"mov.{whole} {{{', '.join(names)}}}, a; mov.{whole} d, {{{', '.join(names)}}};",
        a=array(values, whole),
        **{name: np.dtype(f"u{bits // 8}").type for name in names},
        d=np.dtype(f"u{size(whole)}").type,
    )
    for k, piece in enumerate(pieces):
        assert piece.tolist() == [x >> bits * k & ((1 << bits) - 1) for x in values]
    assert again.tolist() == values


def test_mov_of_vectors_leaves_out_and_repeats() -> None:
    a = np.array([0x0123456789ABCDEF], np.uint64)
    swapped, high = run(
        "mov.b64 {x, y}, a; mov.b64 d, {y, x}; mov.b64 {_, e}, a;",
        registers=".reg .b32 x, y;",
        a=a,
        d=np.uint64,
        e=np.uint32,
    )
    assert (int(swapped[0]), int(high[0])) == (0x89ABCDEF01234567, 0x01234567)


@pytest.mark.parametrize(
    "body", ["mov.b64 {d, d, d}, a;", "mov.b32 {d, d}, a;", "mov.u64 {d, d}, a;", "mov.b8 d, a;"]
)
def test_mov_refuses_what_does_not_fit(body: str) -> None:
    with pytest.raises(PtxError, match="at line") as error:
        run(body, a=np.zeros(1, np.uint64), d=np.uint32)
    assert error.value.kind == "unsupported"


def test_mov_of_constants_and_special_registers() -> None:
    found = run(
        """
        mov.u32 a, 0xFFFFFFFF; mov.s32 b, -2; mov.f32 c, 0f3FC00000; mov.b32 d, 0f7FC00001;
        mov.f64 e, 0d3FF8000000000000; mov.b16 f, 0x3F80; mov.u32 g, %laneid; mov.u32 h, %tid.x;
        mov.u32 i, %ntid.x; mov.u32 j, %ctaid.x; mov.u32 k, %warpid; mov.u32 l, %lanemask_lt;
        mov.pred m, 1; mov.u32 o, %nctaid.x; mov.u32 s, WARP_SZ;
        """,
        threads=48,
        **dict.fromkeys("abcd", np.uint32),
        e=np.uint64,
        f=np.uint16,
        **dict.fromkeys("ghijkl", np.uint32),
        m=bool,
        o=np.uint32,
        s=np.uint32,
    )
    *constants, lane, thread, size_, block, warp, below, true, grid, lanes = found
    wanted = [0xFFFFFFFF, 0xFFFFFFFE, 0x3FC00000, 0x7FC00001, 0x3FF8000000000000, 0x3F80]
    assert [int(x[0]) for x in constants] == wanted
    index = np.arange(48)
    assert (lane == index % 32).all() and (warp == index // 32).all() and (thread == index).all()
    assert (lanes == 32).all()
    assert (size_ == 48).all() and (block == 0).all() and (grid == 1).all() and true.all()
    assert below.tolist() == [(1 << i % 32) - 1 for i in range(48)]


def test_mov_of_addresses() -> None:
    """Shared variables in order, with their offsets; a parameter."""
    module = Module(
        """.version 8.4
        .target sm_90a
        .address_size 64
        .shared .align 16 .b8 first[20];
        .shared .align 16 .b8 second[16];
        .visible .entry kernel(.param .u64 out, .param .u32 number) {
        .reg .b32 %a, %b, %c; .reg .b64 %p, %d;
        ld.param.u64 %p, [out];
        mov.u32 %a, first; mov.b32 %b, second; mov.u32 %c, second+4; mov.b64 %d, number;
        st.global.u32 [%p], %a; st.global.u32 [%p+4], %b; st.global.u32 [%p+8], %c;
        st.global.u64 [%p+16], %d;
        ret;
        }"""
    )
    out = module.allocate(24, "out")
    module.launch("kernel", (1,), 1, [out, 5])
    values = module.download(out).view(np.uint32)
    assert [*values[:3].tolist(), int(values[4])] == [0, 32, 36, 8]


def test_mov_with_an_unknown_symbol_or_register() -> None:
    for body in ("mov.u32 d, nothing;", "mov.u32 d, %nothing;", "mov.u32 %nothing, 1;"):
        with pytest.raises(PtxError, match="at line"):
            run(body, threads=1, d=np.uint32)
