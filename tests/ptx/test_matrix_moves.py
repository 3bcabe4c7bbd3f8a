"""ldmatrix, stmatrix and movmatrix against the elements that the PTX ISA gives to each lane."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.matrix_kernels import PUBLISH, names, pack, run

NOWHERE = 0xFFFFFFF1  # the address of lanes whose address does not count
ROWS = 64  # of 16 bytes, of shared memory
SHARED = np.random.default_rng(0).integers(0, 2**16, (ROWS, 8)).astype(np.uint16)


def addresses(count: int, warps: int) -> np.ndarray:
    """Lane 8 * matrix + row has the address of a row: any, but all different."""
    chosen = np.random.default_rng(count).permutation(ROWS)[: 8 * count * warps]
    out = np.full((32 * warps, 1), NOWHERE, np.uint32)
    for warp in range(warps):
        for lane in range(8 * count):
            out[32 * warp + lane] = 16 * chosen[8 * count * warp + lane]
    return out


def matrices(where: np.ndarray, count: int) -> np.ndarray:
    """The matrices (warps, count, 8, 8) that lie at the addresses."""
    lanes = where.reshape(-1, 32)[:, : 8 * count] // 16
    return SHARED[lanes].reshape(-1, count, 8, 8)


def held(matrix: np.ndarray, lane: int, *, transposed: bool) -> tuple[int, int]:
    """The two elements in the register of a lane."""
    row, column = lane // 4, 2 * (lane % 4)
    if transposed:
        return matrix[column, row], matrix[column + 1, row]
    return matrix[row, column], matrix[row, column + 1]


def registers(all_matrices: np.ndarray, *, transposed: bool) -> np.ndarray:
    """What the registers (threads, count) hold of matrices (warps, count, 8, 8)."""
    warps, count = all_matrices.shape[:2]
    out = np.empty((32 * warps, count, 2), np.uint16)
    for warp in range(warps):
        for i in range(count):
            for lane in range(32):
                pair = held(all_matrices[warp, i], lane, transposed=transposed)
                out[32 * warp + lane, i] = pair
    return pack(out.reshape(32 * warps, 2 * count))


def move(opcode: str, count: int, transposed: bool, space: str = "shared") -> str:
    return f"{opcode}.sync.aligned.m8n8.x{count}{'.trans' * transposed}.{space}.b16"


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    where = addresses(count, 2)
    body = f"{move('ldmatrix', count, transposed)} {names('d', count)}, [%a0];"
    out = run(body, {"a": where}, {"d": count}, threads=64, shared=SHARED.view(np.uint8).ravel())
    expected = registers(matrices(where, count), transposed=transposed)
    np.testing.assert_array_equal(out["d"], expected)


def test_ldmatrix_of_one_warp_with_an_offset() -> None:
    """The other warp keeps its registers; the address has an offset and a generic space name."""
    where = addresses(4, 2)
    body = f"""
    {"".join(f"mov.b32 %d{i}, 7;" for i in range(4))}
    setp.ge.u32 %p0, %thread, 32;
    add.u32 %a0, %a0, -16;
    @%p0 {move("ldmatrix", 4, False, "shared::cta")} {names("d", 4)}, [%a0+16];
    """
    out = run(body, {"a": where}, {"d": 4}, threads=64, shared=SHARED.view(np.uint8).ravel())
    expected = registers(matrices(where, 4), transposed=False)
    assert (out["d"][:32] == 7).all()
    np.testing.assert_array_equal(out["d"][32:], expected[32:])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, transposed: bool) -> None:
    """The rows arrive where the lanes say, and nothing else changes."""
    where = addresses(count, 2)
    content = np.random.default_rng(9).integers(0, 2**16, (2, count, 8, 8)).astype(np.uint16)
    loads = "".join(f"ld.shared.b32 %d{i}, [%slot+{256 * i}];\n" for i in range(4))
    body = f"""
    {move("stmatrix", count, transposed)} [%a0], {names("c", count)};
    bar.sync 0;
    {loads}
    """
    inputs = {"a": where, "c": registers(content, transposed=transposed)}
    out = run(body, inputs, {"d": 4}, threads=64, shared=SHARED.view(np.uint8).ravel())
    expected = SHARED.copy()
    for warp in range(2):
        for lane in range(8 * count):
            row = where[32 * warp + lane, 0] // 16
            expected[row] = content[warp, lane // 8, lane % 8]
    np.testing.assert_array_equal(out["d"].T.reshape(-1), expected.view(np.uint32).reshape(-1))


def test_movmatrix() -> None:
    content = np.random.default_rng(3).integers(0, 2**16, (2, 1, 8, 8)).astype(np.uint16)
    body = "movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;"
    inputs = {"a": registers(content, transposed=False)}
    out = run(body, inputs, {"d": 1}, threads=64)
    np.testing.assert_array_equal(out["d"], registers(content, transposed=True))


def refused(body: str, inputs: dict[str, np.ndarray], **options) -> PtxError:
    options = {"threads": 64, "shared": SHARED.view(np.uint8).ravel(), **options}
    with pytest.raises(PtxError) as error:
        run(body, inputs, {"d": 4}, **options)
    return error.value


LOAD = f"{move('ldmatrix', 4, False)} {names('d', 4)}, [%a0];"
STORE = f"{move('stmatrix', 4, False)} [%a0], {{%a0, %a0, %a0, %a0}};"


@pytest.mark.parametrize("body", [LOAD, STORE], ids=["ldmatrix", "stmatrix"])
@pytest.mark.parametrize(
    ("address", "kind"), [(8, "alignment"), (16 * ROWS, "bounds"), (NOWHERE - 1, "bounds")]
)
def test_bad_addresses(body: str, address: int, kind: str) -> None:
    where = addresses(4, 2)
    where[40] = address
    error = refused(body, {"a": where})
    assert error.kind == kind
    assert "matrix" in str(error)


def test_rows_that_nothing_has_written() -> None:
    where = addresses(4, 2)
    where[5] = 16 * ROWS
    assert refused(LOAD, {"a": where}, shared_bytes=16 * ROWS + 16).kind == "uninitialised"


@pytest.mark.parametrize("synchronised", [True, False])
def test_a_load_after_another_warps_store(synchronised: bool) -> None:
    """Both warps fill shared memory; each reads the rows of both."""
    where = addresses(4, 2)
    if not synchronised:
        assert refused(LOAD, {"a": where}, publish="").kind == "race"
        return
    image = SHARED.view(np.uint8).ravel()
    out = run(LOAD, {"a": where}, {"d": 4}, threads=64, shared=image, publish=PUBLISH)
    np.testing.assert_array_equal(out["d"], registers(matrices(where, 4), transposed=False))


@pytest.mark.planted_bug
def test_a_store_that_races_with_a_load() -> None:
    """A warp overwrites rows that the other one has read, with no barrier between."""
    where = addresses(4, 2)
    swapped = np.roll(where, 32, axis=0)
    body = f"{LOAD}\n{STORE.replace('[%a0]', '[%b0]')}"
    inputs = {"a": where, "b": swapped}
    assert refused(body, inputs).kind == "race"
    body = body.replace("\n", "\nbar.sync 0;\n")
    image = SHARED.view(np.uint8).ravel()
    out = run(body, inputs, {"d": 4}, threads=64, shared=image)
    np.testing.assert_array_equal(out["d"], registers(matrices(where, 4), transposed=False))


@pytest.mark.planted_bug
def test_two_rows_at_one_address() -> None:
    where = addresses(4, 2)
    where[3] = where[20]
    assert refused(STORE.replace("{%a0", "{%thread"), {"a": where}).kind == "race"
    body = STORE.replace("{%a0, %a0, %a0, %a0}", "{%word, %word, %word, %word}")
    body = f"mov.u32 %word, 5;\n{body}\nbar.sync 0;\nld.shared.b32 %d0, [%a0];"
    out = run(body, {"a": where}, {"d": 1}, threads=64, shared=SHARED.view(np.uint8).ravel())
    assert (out["d"] == 5).all()


@pytest.mark.planted_bug
@pytest.mark.parametrize("body", [LOAD, STORE, "movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;"])
def test_a_part_of_a_warp_is_refused(body: str) -> None:
    where = addresses(4, 2)
    guarded = f"setp.lt.u32 %p0, %thread, 48;\n@%p0 {body}"
    assert refused(guarded, {"a": where}).kind == "warp"


@pytest.mark.parametrize(
    "body",
    [
        LOAD.replace("x4", "x2"),
        STORE.replace("x4", "x3"),
        LOAD.replace(".shared", ".global"),
        LOAD.replace("b16", "b8"),
    ],
)
def test_what_is_not_known_raises(body: str) -> None:
    assert refused(body, {"a": addresses(4, 2)}).kind in ("unsupported", "syntax")
