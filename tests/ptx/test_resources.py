"""What compiled kernels need of a GPU: the rules, the golden files, and that the rules can fail."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

import triton.language as tl  # noqa: E402

from tests.ptx import gates, nvcc, report, sass  # noqa: E402
from tests.ptx.cases import Case  # noqa: E402
from tests.ptx.corpus_cases import CORPUS  # noqa: E402
from tests.ptx.kernels import matmul  # noqa: E402
from tests.ptx.library_cases import LIBRARY  # noqa: E402
from tests.ptx.resources import (  # noqa: E402
    KB,
    Resources,
    blocks_per_multiprocessor,
    compile_only,
    of_triton,
)
from tests.ptx.triton_compile import intercepted  # noqa: E402


def golden(case: Case) -> dict[str, dict]:
    if case.compiler == "nvcc" and nvcc.WHY_NOT:
        pytest.skip(nvcc.WHY_NOT)
    path = report.golden_file(case.compiler)
    return json.loads(path.read_text()) if path.exists() else {}


def _case(case):
    """A parameter of a test; cases of one compilation go to the same worker."""
    marks = [pytest.mark.xdist_group(case.group)] if case.group else []
    return pytest.param(case, id=case.id, marks=marks)


@pytest.mark.parametrize("case", [_case(case) for case in LIBRARY + CORPUS])
def test_kernels_obey_the_rules(case):
    before = golden(case)
    found = []
    for record in case.records():
        key = case.key(record)
        violations = case.violations(record)
        if key in before:
            violations += gates.has_not_drifted(record, before[key])
            if violations:
                violations += report.differences(record, before[key])
        elif before:
            violations.append("not in the golden file: run python -m tests.ptx.report")
        found += [f"{key}: {violation}" for violation in violations]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("compiler", ["triton", "nvcc"])
def test_golden_files_have_no_kernel_that_is_gone(compiler):
    cases = [case for case in LIBRARY + CORPUS if case.compiler == compiler]
    known = golden(cases[0])
    if not known:
        pytest.skip(f"no golden file for this {compiler}: run python -m tests.ptx.report")
    gone = {key.split("/")[0] for key in known} - {case.id for case in cases}
    assert not gone, "run python -m tests.ptx.report"


def test_the_table_is_that_of_the_golden_file():
    known: dict[str, dict] = {}
    for compiler in ("nvcc", "triton"):
        found = golden(next(case for case in LIBRARY if case.compiler == compiler))
        if not found:
            pytest.skip(f"no golden file for this {compiler}: run python -m tests.ptx.report")
        known |= found
    expected = report.table(known, LIBRARY)
    assert report.TABLE.read_text() == expected, "run python -m tests.ptx.report"


# Registers, shared bytes, threads -> blocks: worked out by hand from the limits of the guide.
OCCUPANCY = [
    (80, 32, 0, 128, 16, "warps"),
    (80, 32, 0, 32, 32, "blocks"),
    (90, 255, 0, 128, 2, "registers"),  # 8192 per warp: 8 warps
    (90, 168, 0, 128, 3, "registers"),  # 5376 per warp: 12 warps
    (80, 33, 0, 256, 6, "registers"),  # 1280 per warp: 51, of which 48 in four equal parts
    (90, 128, 56 * KB, 128, 4, "registers"),
    (90, 64, 57 * KB, 128, 3, "shared memory"),  # 58 KB with the reserved one
    (80, 64, 163 * KB, 128, 1, "shared memory"),
    (80, 64, 163 * KB + 1, 128, 0, "shared memory"),
    (90, 64, 227 * KB, 128, 1, "shared memory"),
    (100, 64, 57 * KB, 128, 3, "shared memory"),
]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limit"), OCCUPANCY, ids=str
)
def test_blocks_per_multiprocessor(arch, registers, shared, threads, blocks, limit):
    assert blocks_per_multiprocessor(arch, registers, shared, threads) == (blocks, limit)


GOOD = Resources(
    name="kernel",
    arch=90,
    registers=100,
    stack_bytes=0,
    shared_bytes=64 * KB,
    threads=128,
    blocks_per_sm=3,
    limited_by="shared memory",
    instructions=1000,
    counts={"HGMMA": 8, "TMA load": 4},
    hot={"HGMMA": 8},
    matrix_flops=1000,
    accesses={16: 9, 4: 4},
)
BEFORE = {"registers": 100, "instructions": 1000, "blocks_per_sm": 3}

# A rule, and what a kernel that breaks it looks like.
BROKEN = [
    (gates.fits, {"shared_bytes": 227 * KB + 1, "blocks_per_sm": 0}, "bytes of shared memory"),
    (gates.fits, {"blocks_per_sm": 0, "limited_by": "registers"}, "no block fits"),
    (gates.does_not_spill, {"hot": {"spills": 2}}, "2 spills"),
    (gates.does_not_spill, {"stack_bytes": 24}, "24 bytes of stack"),
    (gates.no_warnings, {"warnings": ("ptxas info : (C7510) serialized",)}, "C7510"),
    (gates.uses_tensor_cores, {"counts": {"HMMA": 8}}, "no HGMMA"),
    (gates.uses_tensor_cores, {"counts": {"FFMA": 8}, "arch": 80}, "no HMMA"),
    (gates.uses_tensor_cores, {"counts": {"HMMA": 8}, "arch": 100}, "no UTCMMA"),
    (gates.copies_asynchronously, {"counts": {"LDG": 8}}, "but 8 LDG"),
    (gates.wide_accesses, {"accesses": {16: 1, 4: 8}}, "16 of 48 bytes"),
    (lambda r: gates.no_redundant_matrix_work(r, 500), {}, "2.00 times"),
    (lambda r: gates.has_not_drifted(r, BEFORE), {"registers": 111}, "registers: 111, were 100"),
    (lambda r: gates.has_not_drifted(r, BEFORE), {"instructions": 1101}, "instructions: 1101"),
    (lambda r: gates.has_not_drifted(r, BEFORE), {"blocks_per_sm": 2}, "blocks per"),
]


@pytest.mark.parametrize(("rule", "change", "words"), BROKEN, ids=[words for *_, words in BROKEN])
def test_broken_rules_are_named(rule, change, words):
    (found,) = rule(dataclasses.replace(GOOD, **change))
    assert words in found


def test_a_good_kernel_breaks_no_rule():
    rules = [*gates.ALWAYS, gates.uses_tensor_cores, gates.copies_asynchronously]
    rules += [lambda r: gates.wide_accesses(r, 0.9), lambda r: gates.has_not_drifted(r, BEFORE)]
    rules += [lambda r: gates.no_redundant_matrix_work(r, 1000)]
    assert [found for rule in rules for found in rule(GOOD)] == []


def test_a_row_of_the_table_says_what_its_kernel_is_compiled_for():
    entry = report.entry(GOOD)
    cases = [
        Case("op-768", 90, "triton", list, inputs="(4096, 768) bfloat16"),
        Case("op-small", 90, "triton", list),
    ]
    golden = {f"{name}-sm_90/kernel": entry for name in ("op-768", "op-small", "of-the-corpus")}
    lines = report.table(golden, cases).splitlines()[-4:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][1] == "compiled for" and set(map(len, rows)) == {9}
    assert [row[1] for row in rows[2:]] == ["(4096, 768) bfloat16", "op-small"]
    assert rows[2][2:5] == ["sm_90", "128", "100"]


def test_differences_from_the_golden_file_are_readable():
    before = report.entry(dataclasses.replace(GOOD, registers=90))
    assert report.differences(GOOD, before) == ["registers: 100, golden file: 90"]
    assert report.differences(GOOD, report.entry(GOOD)) == []


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_products_without_tensor_cores_are_seen(arch):
    a = torch.empty(256, 256, device="meta")
    with compile_only(arch) as records:
        matmul.matmul(a, a, precision="ieee")
    (record,) = records
    assert gates.uses_tensor_cores(record)
    products = 64 * 64 * 32 / 128
    assert record.hot["FFMA"] >= products / (2 if arch == 100 else 1)  # sm_100 does two at a time
    assert record.matrix_flops == 0


@pytest.mark.planted_bug
def test_what_ptxas_says_of_wgmma_is_a_violation():
    """Triton's own log is gone by then, so that ptxas is asked again."""
    a = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
    found = []
    with intercepted(90, found.append):
        matmul.matmul(a, a)
    (compiled,) = found
    assert of_triton(compiled, 90).warnings == ()
    ptx = re.sub(r"wgmma\.wait_group\.sync\.aligned \d+;", "", compiled.ptx)
    assert ptx != compiled.ptx
    kernel = SimpleNamespace(
        asm={**compiled.kernel.asm, "ptx": ptx}, metadata=compiled.kernel.metadata
    )
    record = of_triton(dataclasses.replace(compiled, kernel=kernel), 90)
    (violation,) = gates.no_warnings(record)
    assert "C7517" in violation and "warpgroup.wait is injected" in violation


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(x_ptr + offs)
        x_ptr += BLOCK
    tl.store(y_ptr + offs, total)


def test_spills_are_seen():
    x, y = torch.empty(2, 65536, device="meta"), torch.empty(65536, device="meta")
    with compile_only(90) as records:
        # 512 sums in each of 128 threads, which have 255 registers.
        _spilling_kernel[(1,)](x, y, 2, BLOCK=65536)
    assert records[0].counts["spills"] > 0 and gates.does_not_spill(records[0])


def test_meta_and_cpu_tensors_give_the_same_kernels():
    found = []
    for device in ("meta", "cpu"):
        with compile_only(90) as records:
            a = torch.empty(128, 128, dtype=torch.bfloat16, device=device)
            matmul.matmul(a, a)
        found.append(records)
    assert found[0] == found[1] and len(found[0]) == 1


def test_nothing_is_launched():
    a = torch.ones(64, 64)
    with compile_only(80):
        c = matmul.matmul(a, a)
        assert not torch.equal(c, a @ a)


@pytest.mark.parametrize("name", ["HGMMA", "QGMMA", "HMMA"])
def test_classes_of_instructions(name):
    ops = [sass.Op(0, name, ("64x32x16", "F32") if "G" in name else ("16816", "F32"), "")]
    assert sum(sass.count(ops).values()) == 1
    per_warpgroup, per_warp = 2 * 64 * 32 * 16, 2 * 16 * 8 * 16
    expected = 2 * per_warpgroup if "G" in name else 8 * per_warp
    assert sass.matrix_flops(ops, 256) == expected


def test_widths_of_accesses():
    kinds = [("E", "128"), ("E",), ("E", "U8"), ("E", "64", "CONSTANT"), ("E", "U16")]
    ops = [sass.Op(0, "LDG", modifiers, "") for modifiers in kinds]
    assert sass.access_bytes(ops) == {16: 1, 4: 1, 1: 1, 8: 1, 2: 1}


def test_the_hot_loop_is_the_largest_of_the_innermost():
    def op(address: int, target: int | None = None) -> sass.Op:
        return sass.Op(address, "BRA" if target is not None else "FFMA", (), f"{target or 0:#x}")

    outer_around_small = [op(0), op(16), op(32), op(48, 16), op(64, 0)]
    large = [op(address) for address in range(80, 160, 16)] + [op(160, 80), op(176, 176)]
    loop = sass.hot_loop(tuple(outer_around_small + large))
    assert [loop[0].address, loop[-1].address] == [80, 160]


def test_the_hot_loop_is_the_one_with_the_matrix_products():
    ops = [sass.Op(address, "FFMA", (), "") for address in range(0, 320, 16)]
    ops[18] = sass.Op(288, "BRA", (), "0x20")  # 32 to 288, around a longer loop without products
    ops[2] = sass.Op(32, "HMMA", ("16816", "F32"), "")
    ops[16] = sass.Op(256, "BRA", (), "0x40")
    loop = sass.hot_loop(tuple(ops))
    assert [loop[0].address, loop[-1].address] == [32, 288]
