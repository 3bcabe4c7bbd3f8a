"""Branches: those to one of several labels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import PtxError
from tests.ptx.one_instruction import run

BODY = """
    mov.u32 d, 7;
    setp.ne.u32 %p, a, 9;
    TARGETS: .branchtargets FIRST, SECOND, {third};
    @%p brx.idx{uniform} a, TARGETS;
    bra END;
    SECOND: mov.u32 d, 20;
    bra END;
    FIRST: mov.u32 d, 10;
    bra END;
    THIRD: mov.u32 d, 30;
    END:
"""


def branch(indices: np.ndarray, uniform: str = "", third: str = "THIRD") -> np.ndarray:
    body = BODY.format(uniform=uniform, third=third)
    (found,) = run(body, registers=".reg .pred %p;", a=indices.astype(np.uint32), d=np.uint32)
    return found


def test_threads_of_a_warp_go_where_their_indices_say() -> None:
    indices = np.resize([2, 0, 1, 9, 1], 64)  # the guard holds 9 back
    wanted = np.array([10, 20, 30] + 6 * [0] + [7])[indices]
    assert (branch(indices) == wanted).all()


def test_warps_go_different_ways() -> None:
    assert (branch(np.repeat([2, 0, 1], 32), ".uni") == np.repeat([30, 10, 20], 32)).all()


def test_a_warp_that_parts_at_a_uniform_branch() -> None:
    with pytest.raises(PtxError, match="different ways in a warp") as error:
        branch(np.resize([2, 0], 64), ".uni")
    assert error.value.kind == "warp"


def test_an_index_beyond_the_last_label() -> None:
    with pytest.raises(PtxError, match="target 3 of 3") as error:
        branch(np.array([0, 3]))
    assert error.value.kind == "bounds"


def test_a_label_that_does_not_exist() -> None:
    with pytest.raises(PtxError, match="no label 'NOWHERE'") as error:
        branch(np.array([0]), third="NOWHERE")
    assert error.value.kind == "syntax"
