"""The comparison with a card, with the emulator in the card's place: faithful, and not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which brings the disassembler")

from tests.ptx.card import Card, CardError, retargeted
from tests.ptx.comparison import Bound
from tests.ptx.conformance import agree, corpus, main
from tests.ptx.conformance_instructions import ELEMENTWISE, of_registers, one, signature
from tests.ptx.conformance_kernels import products
from tests.ptx.emulator import Module
from tests.ptx.exact import size

needs_ptxas = pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas on PATH")


class StandIn:
    """The emulator with a card's name; `edit` changes the PTX that it runs."""

    name, driver, capability = "stand-in", "0.0", (9, 0)

    def __init__(self, edit=lambda ptx: ptx):
        self.load = lambda ptx: Module(edit(ptx))


def some(step: int = 23):
    """A part of every family."""
    seen: Counter[str] = Counter()
    for comparison in corpus():
        seen[comparison.family] += 1
        few = comparison.family in ("mma", "warp", "matrix_moves")
        if comparison.family != "kernels" and (few or seen[comparison.family] % step == 1):
            yield comparison


def test_the_emulator_agrees_with_itself(capsys, tmp_path):
    file = tmp_path / "results.json"
    assert main(["--json", str(file)], open_card=StandIn, comparisons=some) == 0
    results = json.loads(file.read_text())
    assert results["card"] == "stand-in" and results["capability"] == "9.0"
    assert {"arithmetic", "convert", "warp", "mma", "wgmma"} <= set(results["families"])
    for name, family in results["families"].items():
        assert family["compared"] and family["values"] > family["compared"], name
        assert not family["disagreed"] + family["refused"] + family["left_out"], name
    assert "wgmma" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "opcode", "planted"),
    [
        ("arithmetic", "add.u32", "sub.u32"),
        ("floating", "fma.rn.f32", "fma.rz.f32"),
        ("floating", "add.rn.f16x2", "sub.rn.f16x2"),
        ("special_functions", "ex2.approx.f32", "lg2.approx.f32"),
        ("convert", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
        ("compare", "setp.lt.s32", "setp.le.s32"),
    ],
)
def test_a_difference_is_found_and_named(family, opcode, planted, capsys):
    def card():
        return StandIn(lambda ptx: ptx.replace(f"{opcode} d", f"{planted} d"))

    others = "xor.b32", "min.s32"
    comparisons = [one(family, opcode), *(one("other", name) for name in others)]
    assert main([], open_card=card, comparisons=lambda: comparisons) == 1
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if "card 0x" in line]
    assert named and all(line.startswith(f"{opcode}: result 0[") for line in named)
    assert all(" of a=0x" in line and "emulator 0x" in line for line in named)


def test_what_the_isa_leaves_open_is_not_compared():
    """Division by zero, which gives anything."""

    def card():
        divide = "div.u32 d, a, b;"
        zeros = f".reg .pred %z; setp.eq.u32 %z, b, 0; {divide} @%z mov.u32 d, 5;"
        return StandIn(lambda ptx: ptx.replace(divide, zeros))

    comparison = one("arithmetic", "div.u32")
    assert not comparison.defined.all()
    assert main([], open_card=card, comparisons=lambda: [comparison]) == 0
    open_too = dataclasses.replace(comparison, defined=None)
    assert main([], open_card=card, comparisons=lambda: [open_too]) == 1


def test_a_difference_of_a_tensor_core_is_found(capsys):
    product = next(products())
    assert product.family == "mma"

    def card():
        # A different row of A: the second register instead of the first.
        return StandIn(lambda ptx: ptx.replace("{%a0, %a1,", "{%a1, %a0,"))

    assert main([], open_card=card, comparisons=lambda: [product]) == 1
    assert product.name in capsys.readouterr().out


def test_what_the_card_refuses_counts(capsys):
    def refuse(ptx):
        raise CardError("cuModuleLoadDataEx: no such instruction")

    assert main([], open_card=lambda: StandIn(refuse), comparisons=lambda: [one("a", "not.b32")])
    assert "not.b32: CardError: cuModuleLoadDataEx" in capsys.readouterr().out


def test_other_cards_leave_out_what_only_hopper_has(capsys):
    class Older(StandIn):
        capability = (8, 0)

    product = next(c for c in products() if c.family == "wgmma")
    assert main([], open_card=Older, comparisons=lambda: [product]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["wgmma", *"00001"]


def test_without_a_driver_it_says_so(capsys):
    assert main([], open_card=lambda: Card("libno_such_driver.so")) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "needs an NVIDIA GPU" in out and "libno_such_driver" in out


@needs_ptxas
def test_ptxas_takes_what_is_compared(tmp_path):
    """The driver has the same compiler; a sample, as each takes a part of a second."""
    texts = []

    def load(ptx):
        texts.append(ptx)
        return Module(ptx)

    for comparison in some(97):
        comparison.run(load)
    assert len(texts) > 50
    for i, text in enumerate(texts):
        source = tmp_path / f"{i}.ptx"
        source.write_text(text)
        arch = re.search(r"\.target (\w+)", text)[1]
        command = ["ptxas", "-O0", "-arch", arch, str(source), "-o", str(tmp_path / "cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr + text


@needs_ptxas
def test_ptxas_takes_every_opcode_of_one_instruction(tmp_path):
    """In one kernel; registers of no value will do."""
    lines = [".version 8.4", ".target sm_90a", ".address_size 64", ".visible .entry kernel() {"]
    opcodes = [opcode for module in ELEMENTWISE for opcode in of_registers(module)]
    for opcode in opcodes:
        kinds, result = signature(opcode)
        kinds = [result, *kinds]
        names = [f"r{i}" for i in range(len(kinds))]
        declared = " ".join(
            f".reg .{kind if kind == 'pred' else f'b{8 * size(kind)}'} {name};"
            for kind, name in zip(kinds, names, strict=True)
        )
        lines.append(f"{{ {declared} {opcode} {', '.join(names)}; }}")
    source = tmp_path / "all.ptx"
    source.write_text("\n".join([*lines, "ret;", "}"]))
    command = ["ptxas", "-O0", "-arch", "sm_90a", str(source), "-o", str(tmp_path / "cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    refused = [int(line) for line in re.findall(r"line (\d+); error", result.stderr)]
    assert not refused, [lines[line - 1] for line in refused]
    assert result.returncode == 0 and len(opcodes) > 1000, result.stderr


def _f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def test_bounds():
    one_, near, far = 1.0, 1 + 2.0**-22, 1 + 2.0**-10
    ours, theirs = _f32(one_, one_, one_), _f32(one_, near, far)
    assert agree(ours, theirs, "f32", Bound()).tolist() == [True, False, False]
    assert agree(ours, theirs, "f32", Bound(ulps=2)).tolist() == [True, True, False]
    assert agree(ours, theirs, "f32", Bound(relative=2**-9)).all()
    assert agree(ours, theirs, "u32", Bound(ulps=2)).tolist() == [True, False, False]
    nan, other, number = _f32(np.nan), _f32(np.nan) | np.uint32(1), _f32(2.0)
    for bound, good in ((Bound(), False), (Bound(ulps=9), False), (Bound(nan_open=True), True)):
        assert agree(nan, other, "f32", bound)[0] == good
        assert not agree(nan, number, "f32", bound)[0]
        assert not agree(number, nan, "f32", bound)[0]
    assert agree(_f32(0.0), _f32(-0.0), "f32", Bound(ulps=1))[0]
    assert not agree(_f32(1.0), _f32(-1.0), "f32", Bound(ulps=9))[0]
    assert agree(_f32(1.0), _f32(near), "f32", Bound(mask=0xFFFFE000))[0]
    assert not agree(_f32(1.0), _f32(near), "f32", Bound(mask=0xFFFFFFFE))[0]


def test_ptx_is_for_the_card():
    ptx = ".version 8.4\n.target sm_90a\n.address_size 64\n"
    assert retargeted(ptx, (9, 0)) == ptx
    assert ".target sm_80\n" in retargeted(ptx, (8, 0))
    assert ".target sm_90\n" in retargeted(ptx, (10, 0))
    older = ptx.replace("sm_90a", "sm_75")
    assert all(retargeted(older, c) == older for c in itertools.product((8, 9), (0,)))
