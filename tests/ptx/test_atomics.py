"""atom and red of the emulator, against a loop over the threads."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.handwritten import run, zeros

SHARED = ".shared .align 16 .b8 tile[1024];"
OPERATIONS = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "inc": lambda old, x: 0 if old >= x else old + 1,
    "dec": lambda old, x: x if old == 0 or old > x else old - 1,
    "exch": lambda old, x: x,
}


def expected(op: str, start: np.ndarray, words: np.ndarray, values: np.ndarray):
    """The final words and what each thread has found, one thread after another."""
    dtype = start.dtype
    memory, found = [int(v) for v in start], []
    for word, value in zip(words, values, strict=True):
        found.append(memory[word])
        low = OPERATIONS[op](memory[word], int(value)) & ((1 << 8 * dtype.itemsize) - 1)
        memory[word] = int(np.array(low, f"u{dtype.itemsize}").view(dtype))
    return np.array(memory, dtype), np.array(found, dtype)


@pytest.mark.parametrize("words", [1, 5, 64])
@pytest.mark.parametrize(
    ("op", "type_name", "dtype"),
    [
        ("add", "u32", np.uint32),
        ("add", "u64", np.uint64),
        ("min", "s32", np.int32),
        ("min", "u32", np.uint32),
        ("max", "s64", np.int64),
        ("max", "u64", np.uint64),
        ("and", "b32", np.uint32),
        ("or", "b64", np.uint64),
        ("xor", "b32", np.uint32),
        ("inc", "u32", np.uint32),
        ("dec", "u32", np.uint32),
        ("exch", "b32", np.uint32),
        ("exch", "b64", np.uint64),
    ],
)
def test_threads_take_turns(op, type_name, dtype, words):
    size = np.dtype(dtype).itemsize
    r = "%r1" if size == 4 else "%rd9"
    body = f"""
        mad.wide.u32 %rd1, %t, 4, %index;
        ld.global.b32 %r2, [%rd1];
        mad.wide.u32 %rd2, %r2, {size}, %memory;
        mad.wide.u32 %rd3, %t, {size}, %x;
        mad.wide.u32 %rd4, %t, {size}, %found;
        ld.global.b{8 * size} {r}, [%rd3];
        atom.global.gpu.relaxed.{op}.{type_name} {r}, [%rd2], {r};
        st.global.b{8 * size} [%rd4], {r};
    """
    random = np.random.default_rng(1)
    index = random.integers(0, words, 64).astype(np.uint32)
    if op in ("inc", "dec"):
        start, x = np.full(words, 3, dtype), np.full(64, 5, dtype)
    else:
        start, x = (random.integers(0, 256, n * size, np.uint8).view(dtype) for n in (words, 64))
    result = run(body, 64, index=index, memory=start, x=x, found=np.zeros(64, dtype))
    memory, found = expected(op, start, index, x)
    assert np.array_equal(result["memory"], memory)
    assert np.array_equal(result["found"], found)


@pytest.mark.parametrize(("bits", "register"), [(16, "%h"), (32, "%r"), (64, "%rd")])
def test_one_thread_wins_a_compare_and_swap(bits, register):
    dtype = np.dtype(f"u{bits // 8}")
    r1, r2, r3 = (f"{register}{10 + k}" for k in range(3))
    body = f"""
        mad.wide.u32 %rd1, %t, {dtype.itemsize}, %found;
        mad.wide.u32 %rd2, %t, {dtype.itemsize}, %x;
        ld.global.b{bits} {r1}, [%rd2];
        mov.b{bits} {r2}, 7;
        atom.global.acq_rel.gpu.cas.b{bits} {r3}, [%lock], {r2}, {r1};
        st.global.b{bits} [%rd1], {r3};
    """
    x = np.arange(100, 132).astype(dtype)
    lock = np.array([7], dtype)
    result = run(body, lock=lock, x=x, found=np.zeros(32, dtype))
    assert result["lock"].tolist() == [100]
    assert result["found"].tolist() == [7] + [100] * 31


def test_shared_atomics_and_red():
    body = """
        mov.u32 %r1, tile;
        setp.eq.u32 %p1, %t, 0;
        @%p1 st.shared.b32 [%r1], 1000;
        bar.sync 0;
        red.shared.add.u32 [%r1], %t;
        bar.sync 0;
        ld.shared.b32 %r2, [%r1];
        st.global.b32 [%own_out], %r2;
    """
    out = run(body, 128, variables=SHARED, out=zeros(128))["out"]
    assert (out == 1000 + 127 * 64).all()


def test_float_sums_round_after_every_thread():
    # 2^24 + 1 rounds back to 2^24 each time, while 32 together would not.
    x = np.array([2.0**24], np.float32)
    result = run("red.global.add.f32 [%x], 0f3F800000;", x=x)
    assert result["x"].tolist() == [2.0**24]
    result = run("red.global.add.f64 [%x], 0d3FF0000000000000;", x=np.array([2.0**24]))
    assert result["x"].tolist() == [2.0**24 + 32]


def test_only_global_sums_flush_subnormal_values():
    small = np.array([2.0**-130], np.float32)
    body = """
        mov.u32 %r1, tile;
        ld.global.f32 %f1, [%x];
        st.shared.f32 [%r1], %f1;
        red.shared.add.f32 [%r1], %f1;
        ld.shared.f32 %f2, [%r1];
        st.global.f32 [%out], %f2;
        red.global.add.f32 [%x], %f1;
    """
    result = run(body, 1, variables=SHARED, x=small, out=np.zeros(1, np.float32))
    assert result["out"].tolist() == [2.0**-129]
    assert result["x"].tolist() == [0]


@pytest.mark.parametrize(
    ("type_name", "start", "total"),
    [
        # 1 + 2 in the high half, 1.5 + 0.5 in the low one
        ("bf16x2", 0x3F80_3FC0, 0x4040_4000),
        ("f16x2", 0x3C00_3E00, 0x4200_4000),
    ],
)
def test_packed_halves(type_name, start, total):
    addend = {"bf16x2": 0x4000_3F00, "f16x2": 0x4000_3800}[type_name]
    x = np.array([start, start], np.uint32)
    body = f"""
        mov.u32 %r1, {addend};
        atom.global.gpu.acq_rel.add.noftz.{type_name} %r2, [%x], %r1;
        st.global.b32 [%out], %r2;
    """
    result = run(body, 1, x=x, out=zeros(1))
    assert result["x"].tolist() == [total, start]
    assert result["out"].tolist() == [start]


@pytest.mark.parametrize(
    ("type_name", "start", "one", "total"),
    [("bf16", 0x4380, 0x3F80, 0x4380), ("f16", 0x5C00, 0x3C00, 0x5C04)],
)
def test_halves_round_to_nearest_even(type_name, start, one, total):
    # 256 + 1, which float16 has and bfloat16 has not.
    body = f"mov.b16 %h1, {one}; red.global.add.noftz.{type_name} [%x], %h1;"
    result = run(body, 1, x=np.array([start], np.uint16))
    assert result["x"].tolist() == [total]


@pytest.mark.parametrize(
    "opcode",
    ["atom.global.add.v4.f32", "atom.global.v4.f32.add", "atom.gpu.global.relaxed.add.v4.f32"],
)
def test_vectors_of_floats(opcode):
    body = f"""
        mov.f32 %f1, 0f3F800000;
        mov.f32 %f2, 0f40000000;
        {opcode} {{%f3, %f4, %f5, %f6}}, [%x], {{%f1, %f2, %f1, %f2}};
        mad.wide.u32 %rd1, %t, 16, %out;
        st.global.v4.f32 [%rd1], {{%f3, %f4, %f5, %f6}};
    """
    x = np.arange(4, dtype=np.float32)
    result = run(body, 2, x=x, out=np.zeros(8, np.float32))
    step = np.array([1, 2, 1, 2])
    assert np.array_equal(result["x"], x + 2 * step)
    assert np.array_equal(result["out"], np.concatenate([x, x + step]))


def test_vectors_of_halves():
    body = """
        mov.b32 %r1, 0x3F803F80;
        red.global.add.noftz.v2.bf16x2 [%x], {%r1, %r1};
    """
    result = run(body, 2, x=np.array([0x3F80] * 4, np.uint16))
    assert result["x"].tolist() == [0x4040] * 4


@pytest.mark.parametrize(
    "statement",
    [
        "atom.global.add.b32 %r1, [%x], %r1",
        "atom.global.add.f16 %h1, [%x], %h1",
        "atom.global.min.f32 %f1, [%x], %f1",
        "atom.global.gpu.sys.add.u32 %r1, [%x], %r1",
        "atom.gpu.gpu.add.u32 %r1, [%x], %r1",
        "atom.global.cas.b32 %r1, [%x], %r1",
        "atom.global.add.u32 %r1, [%x], %r1, %r2",
        "atom.shared.add.v2.f32 {%f1, %f2}, [%r1], {%f1, %f2}",
        "red.global.acquire.gpu.add.u32 [%x], %r1",
        "red.global.exch.b32 [%x], %r1",
        "atom.global.add.u64 %r1, [%x], %rd1",
    ],
)
def test_unknown_forms_and_wrong_operands_are_unsupported(statement):
    with pytest.raises(PtxError, match=r"^unsupported: "):
        run(f"{statement};", x=zeros(4))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("red.global.add.u64 [%x+4], 1", r"^alignment: atomic of 8 bytes at x\+4"),
        ("red.global.add.v4.f32 [%x+8], {%f1, %f1, %f1, %f1}", r"^alignment: .* x\+8"),
        ("red.global.add.u32 [%x+16], 1", r"^bounds: .* x\+16 \(size 16\)"),
        ("red.global.add.u32 [%y], 1", r"^uninitialised: .* y\+0"),
    ],
)
def test_atomics_are_checked(statement, message):
    with pytest.raises(PtxError, match=message):
        run(f"{statement};", x=zeros(4), y=16)


def test_a_lock_goes_from_block_to_block():
    body = """
    take:
        atom.global.acq_rel.gpu.cas.b32 %r1, [%lock], 0, 1;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra take;
        ld.global.b32 %r2, [%sum];
        add.u32 %r2, %r2, 1;
        st.global.b32 [%sum], %r2;
        atom.global.gpu.acq_rel.exch.b32 %r1, [%lock], 0;
    """
    assert run(body, 1, 40, lock=zeros(1), sum=zeros(1))["sum"].tolist() == [40]
