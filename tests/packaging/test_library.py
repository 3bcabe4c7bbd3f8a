"""The compiled library: its symbols, its variants, and what it says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastformer import _checkout, _library

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("default", "avx2", "avx512", "avx512bf16")

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# (rows, cols, p, seed, offset, site): whole vectors, tails of every kind, words above 32 bits.
MASKS = (
    (3, 1024, 0.1, 0, 0, 0),
    (5, 1003, 0.5, 2**63 - 1, 2**33 + 7, 4),
    (1, 5, 0.999, -1, -3, 5),
    (70, 8, 0.25, 12345678901234, 2**62, 2),
    (2, 4097, 1e-7, -(2**63), 2**32 - 1, 1),
    (200, 777, 0.1, 7, 8, 9),
    (0, 16, 0.5, 1, 2, 3),
)

DRAW = """
import sys, torch
from fastformer.ops import dropout  # defines the op
torch.set_num_threads(int(sys.argv[1]))
for rows, cols, p, seed, offset, site in eval(sys.argv[2]):
    rng = torch.tensor([seed, offset])
    mask = torch.ops.fastformer.dropout_mask.cpu(rows, cols, p, rng, site)
    sys.stdout.buffer.write(mask.numpy().tobytes())
"""


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox-4x32-10 after the paper, on uint64 arrays (4, ...) that hold 32-bit words."""
    low = np.uint64(0xFFFFFFFF)
    c = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        upper0, upper1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = np.stack(
            [upper1 ^ c[1] ^ np.uint64(k0), p1 & low, upper0 ^ c[3] ^ np.uint64(k1), p0 & low]
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def expected_mask(rows: int, cols: int, p: float, seed: int, offset: int, site: int) -> np.ndarray:
    key, stream = seed % 2**64, (offset + site) % 2**64
    row, col = np.indices((rows, cols))
    counter = np.stack(
        [col >> 3, row, np.full_like(row, stream % 2**32), np.full_like(row, stream >> 32)]
    )
    words = philox(counter, (key % 2**32, key >> 32))
    lane = col & 7
    word = np.take_along_axis(words, lane[None] >> 1, axis=0)[0].astype(np.int64)
    return ((word >> (16 * (lane & 1))) & 0xFFFF) >= min(65535, round(p * 65536))


def nm(*arguments: str | Path) -> list[str]:
    command = ["nm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def library() -> Path:
    assert _library.LOADED is not None, _library.WHY_NOT
    return _library.LOADED


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_numpy_philox_gives_the_published_answers(counter, key, words) -> None:
    assert philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0].tolist() == list(words)


def test_header_philox_gives_the_published_answers(tmp_path) -> None:
    cases = ""
    for counter, key, _ in KNOWN_ANSWERS:
        words = ", ".join(f"{word}u" for word in counter)
        cases += f"show(philox({key[0] | key[1] << 32}ull, {{{{{words}}}}}));\n"
    (tmp_path / "main.cpp").write_text(
        '#include "philox.h"\n#include <cstdio>\nusing namespace fastformer;\n'
        "void show(PhiloxWords x) {\n"
        '  std::printf("%u %u %u %u\\n", x.w[0], x.w[1], x.w[2], x.w[3]);\n}\n'
        f"int main() {{ {cases} }}\n"
    )
    compiler = os.environ.get("CXX", "g++")
    program = tmp_path / "main"
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", tmp_path / "main.cpp", "-o", program]
    subprocess.run(command, check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [" ".join(map(str, words)) for *_, words in KNOWN_ANSWERS]


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("isa", ISAS)
def test_masks_are_those_of_the_definition(run, library, isa, threads) -> None:
    result = subprocess.run(
        [sys.executable, "-c", DRAW, str(threads), repr(MASKS)],
        env=os.environ | {"FASTFORMER_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
    )
    if b"is not an instruction set that was compiled" in result.stderr and isa != "default":
        pytest.skip(f"this machine has no {isa}")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == b"".join(expected_mask(*case).tobytes() for case in MASKS)


def test_unknown_instruction_set_is_an_error_that_names_the_known(run, library) -> None:
    result = run(sys.executable, "-c", DRAW, "1", repr(MASKS), FASTFORMER_CPU_ISA="sse9")
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: ")
    assert "FASTFORMER_CPU_ISA=sse9 is not an instruction set" in result.stderr
    assert "default, or leave it unset" in result.stderr
    assert str(ROOT) not in result.stderr.splitlines()[-1]


def test_only_stable_symbols_are_needed(library) -> None:
    needed = [line.split()[-1] for line in nm("-D", "--undefined-only", library)]
    assert not [name for name in needed if name.startswith(("Py", "_Py"))]
    assert not [name for name in needed if name.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch"))]
    defined = [line.split()[-1] for line in nm("-D", "--defined-only", library)]
    assert not [name for name in defined if name.startswith("cuda")]


def test_libtorch_is_needed_by_name(library) -> None:
    command = ["readelf", "-d", str(library)]
    assert "[libtorch.so]" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_no_variant_leaks_a_function_to_another(built_checkout) -> None:
    objects = [
        path for isa in ISAS for path in built_checkout.glob(f"build/temp.*/cpu_*.cpp.{isa}.*.o")
    ]
    assert objects
    for path in objects:
        weak = [line for line in nm("-C", path) if line.split()[-2:-1] in (["W"], ["V"], ["u"])]
        assert not weak, f"{path.name}: {weak}"


@pytest.mark.slow
def test_stale_library_is_reported_once(run, built_checkout, make_venv) -> None:
    python = make_venv()
    look = (python, "-c", "import fastformer.ops")
    assert "rebuild with" not in run(*look, cwd=built_checkout).stderr
    header = built_checkout / "csrc/philox.h"
    text = header.read_text()
    header.write_text(text + "// edited\n")
    try:
        assert run(*look, cwd=built_checkout).stderr.count("rebuild with") == 1
    finally:
        header.write_text(text)


def test_library_may_be_loaded_before_the_schemas_exist(run, library) -> None:
    script = f"import torch; torch.ops.load_library({str(library)!r})\n" + DRAW
    result = run(sys.executable, "-c", script, "1", repr(MASKS[2:3]))
    assert result.returncode == 0, result.stderr


def test_build_info(library) -> None:
    info = _library.build_info()
    assert set(info) == {"version", "source", "cpu_isa", "cuda_runtime", "cuda_archs", "torch"}
    assert info["version"] == _checkout.version()
    assert info["source"] == _checkout.source_hash()
    assert info["cpu_isa"] in ISAS
    assert info["torch"] == ("cuda" if torch.version.cuda else "cpu")


def test_source_hash_sees_every_edit_and_rename(tmp_path) -> None:
    assert _checkout.source_hash(tmp_path) is None
    folder = tmp_path / "csrc"
    folder.mkdir()
    seen = set()
    for name, text in (("a.cpp", "1"), ("a.cpp", "2"), ("b.cu", "1"), ("notes.txt", "1")):
        (folder / name).write_text(text)
        seen.add(_checkout.source_hash(tmp_path))
    assert len(seen) == 3


def test_version_of_a_checkout_that_is_not_installed(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise _checkout.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_checkout.importlib.metadata, "version", missing)
    assert f'version = "{_checkout.version()}"' in (ROOT / "pyproject.toml").read_text()
