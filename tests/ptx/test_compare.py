"""Comparisons and choices by them: every opcode, on edge cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.emulator.instructions import compare
from tests.ptx.exact import array, decode, encode, flushed, integer, samples, specials
from tests.ptx.one_instruction import check, opcodes, run


def _holds(name: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in ("lo", "ls", "hi", "hs"):
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[name]
    if unordered:
        return name.endswith("u")
    order = (a > b) - (a < b)
    return {
        "eq": order == 0,
        "ne": order != 0,
        "lt": order < 0,
        "le": order <= 0,
        "gt": order > 0,
        "ge": order >= 0,
    }[name[:2]]


_COMBINE = {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}


def _value(bits: int, kind: str, parts: list[str]) -> float:
    if kind[0] != "f" and kind != "bf16":
        return integer(bits, kind)
    value = decode(bits, kind)
    return flushed(value, kind) if "ftz" in parts else value


def _pairs(kind: str) -> tuple[list[int], list[int]]:
    """Edge cases, equal ones among them."""
    a, b = samples([kind, kind], seed=5)
    edges = specials(kind)
    return a + edges, b + edges


@pytest.mark.parametrize(
    "kind",
    ["b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64", "f16", "bf16", "f32", "f64"],
)
def test_setp(kind: str) -> None:
    """All comparisons of a type: plain, with both destinations, combined with a predicate."""
    a, b = _pairs(kind)
    c = np.arange(len(a)) % 3 == 0
    arrays = {"a": array(a, kind), "b": array(b, kind), "c": c}
    for opcode in opcodes(compare, "setp"):
        parts = opcode.split(".")
        if parts[-1] != kind:
            continue
        combine = next((x for x in parts if x in _COMBINE), None)
        third = ", !c" if combine else ""
        found = run(
            f"{opcode} p|q, a, b{third}; {opcode} r, a, b{third};",
            **arrays,
            p=bool,
            q=bool,
            r=bool,
        )
        for x, y, z, *results in zip(a, b, c.tolist(), *found, strict=True):
            holds = _holds(parts[1], _value(x, kind, parts), _value(y, kind, parts))
            both = [holds, not holds]
            if combine:
                both = [_COMBINE[combine](value, not z) for value in both]
            assert results == [*both, both[0]], f"{opcode} of {x:#x}, {y:#x}"


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_setp_of_pairs(kind: str) -> None:
    a, b = _pairs(kind)
    c = np.arange(len(a)) % 3 == 0
    single = kind.removesuffix("x2")
    for opcode in opcodes(compare, "setp"):
        parts = opcode.split(".")
        if parts[-1] != kind:
            continue
        combine = next((x for x in parts if x in _COMBINE), None)
        body = f"{opcode} p|q, a, b{', c' if combine else ''};"
        p, q = run(body, a=array(a, kind), b=array(b, kind), c=c, p=bool, q=bool)
        for x, y, z, low, high in zip(a, b, c.tolist(), p, q, strict=True):
            for shift, result in ((0, low), (16, high)):
                values = [_value(bits >> shift & 0xFFFF, single, parts) for bits in (x, y)]
                holds = _holds(parts[1], *values)
                wanted = _COMBINE[combine](holds, z) if combine else holds
                assert result == wanted, f"{opcode} of {x:#x}, {y:#x}"
    with pytest.raises(PtxError, match="two destinations"):
        run(f"setp.eq.{kind} p, a, b;", a=array(a, kind), b=array(b, kind), p=bool)


@pytest.mark.parametrize("opcode", opcodes(compare, "set")[::7])  # every choice, not every product
def test_set(opcode: str) -> None:
    parts = opcode.split(".")
    result, kind = parts[-2:]
    combine = next((x for x in parts if x in _COMBINE), None)
    true = encode(1.0, "f32") if result == "f32" else 0xFFFFFFFF

    def reference(a: int, b: int, c: int = 0) -> int:
        holds = _holds(parts[1], _value(a, kind, parts), _value(b, kind, parts))
        return true if (_COMBINE[combine](holds, bool(c)) if combine else holds) else 0

    check(opcode, [kind, kind, *(["pred"] if combine else [])], result, reference)


@pytest.mark.parametrize("opcode", opcodes(compare, "selp"))
def test_selp(opcode: str) -> None:
    kind = opcode.split(".")[-1]
    check(opcode, [kind, kind, "pred"], kind, lambda a, b, c: a if c else b)


@pytest.mark.parametrize("opcode", opcodes(compare, "slct"))
def test_slct(opcode: str) -> None:
    *parts, kind, chooser = opcode.split(".")
    check(
        opcode,
        [kind, kind, chooser],
        kind,
        lambda a, b, c: a if _value(c, chooser, parts) >= 0 else b,
    )


@pytest.mark.parametrize("opcode", opcodes(compare, "testp"))
def test_testp(opcode: str) -> None:
    _, test, kind = opcode.split(".")

    def reference(bits: int) -> int:
        x = decode(bits, kind)
        normal = math.isfinite(x) and abs(x) >= 2.0 ** (-126 if kind == "f32" else -1022)
        return {
            "finite": math.isfinite(x),
            "infinite": math.isinf(x),
            "number": not math.isnan(x),
            "notanumber": math.isnan(x),
            "normal": normal,
            "subnormal": math.isfinite(x) and not normal and x != 0,
        }[test]

    check(opcode, [kind], "pred", reference)


def test_every_comparison_is_tested() -> None:
    bases = {op.split(".")[0] for op in opcodes(compare)}
    assert bases == {"setp", "set", "selp", "slct", "testp"}
    types = {op.split(".")[-1] for op in opcodes(compare, "setp")}
    integers = {f"{letter}{bits}" for letter in "bus" for bits in (16, 32, 64)}
    assert types == {*integers, "f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}


def test_unknown_comparisons_are_refused() -> None:
    one = np.zeros(1, np.uint32)
    for opcode in ("setp.lo.s32", "setp.equ.u32", "setp.lt.b32", "setp.eq.ftz.u32", "setp.u32"):
        with pytest.raises(PtxError, match=rf"at line \d+: {opcode} p, a, a") as error:
            run(f"{opcode} p, a, a;", a=one, p=bool)
        assert error.value.kind == "unsupported"
    halves = np.zeros(1, np.uint16)
    for opcode in ("set.lt.f32.f16", "set.eq.and.f32.bf16", "set.ltu.ftz.f32.f16"):
        with pytest.raises(PtxError, match=rf"at line \d+: {opcode} d, a, a") as error:
            run(f"{opcode} d, a, a;", a=halves, d=np.uint32)
        assert error.value.kind == "unsupported"


def test_pairs_of_comparisons_and_choices_agree() -> None:
    """max(a, b) as selp(a, b, a > b), over all pairs of edge cases."""
    edges = specials("s32")
    a, b = (array(list(x), "s32") for x in zip(*itertools.product(edges, edges), strict=True))
    (found,) = run(
        "setp.gt.s32 %p, a, b; selp.b32 d, a, b, %p;",
        registers=".reg .pred %p;",
        a=a,
        b=b,
        d=np.int32,
    )
    assert (found == np.maximum(a.view(np.int32), b.view(np.int32))).all()
