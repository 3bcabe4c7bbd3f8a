"""Texts of small sm_90a kernels for the tests of mbarriers and bulk copies.

A body finds the thread's number in %t, the address of the output in %out, and free registers
%p<8>, %r<32> and %x<16>; %p7, %r28 to %r31 and %x15 belong to the functions here.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.emulator import Module, PtxError


def module(body: str, *, parameters: str = "", shared: str = "") -> Module:
    """A module with the kernel "kernel", whose parameters are `out` and those given."""
    more = f", {parameters}" if parameters else ""
    return Module(f"""
.version 8.5
.target sm_90a
.address_size 64
{shared}
.visible .entry kernel(.param .u64 out{more})
{{
    .reg .pred %p<8>;
    .reg .b32 %t, %r<32>;
    .reg .b64 %out, %x<16>;
    mov.u32 %t, %tid.x;
    ld.param.u64 %out, [out];
{body}
    ret;
}}
""")


def wait(barrier: str, parity: int | str) -> str:
    """Wait for a phase of an mbarrier, as compilers do."""
    return f"""
{{
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p7, [{barrier}], {parity};
    @!%p7 bra.uni WAIT;
}}"""


def copy_out(variable: str, bytes: int, threads: int, start: int = 0) -> str:
    """Store bytes of a shared variable to the output."""
    text = f"""
    mov.u32 %r30, {variable};
    shl.b32 %r31, %t, 2;
    add.u32 %r30, %r30, %r31;
    cvt.u64.u32 %x15, %r31;
    add.u64 %x15, %out, %x15;"""
    for first in range(0, bytes, 4 * threads):
        text += f"""
    setp.lt.u32 %p7, %r31, {bytes - first};
    @%p7 ld.shared.b32 %r29, [%r30+{start + first}];
    @%p7 st.global.b32 [%x15+{first}], %r29;"""
    return text


def fill(variable: str, bytes: int, threads: int) -> str:
    """Store 0, 1, 2, ... to a shared variable, as 32-bit integers."""
    text = f"""
    mov.u32 %r30, {variable};
    shl.b32 %r31, %t, 2;
    add.u32 %r30, %r30, %r31;"""
    for first in range(0, bytes, 4 * threads):
        text += f"""
    setp.lt.u32 %p7, %r31, {bytes - first};
    add.u32 %r29, %t, {first // 4};
    @%p7 st.shared.b32 [%r30+{first}], %r29;"""
    return text


def run(
    kernel: Module,
    bytes: int,
    *arguments: object,
    threads: int = 64,
    seed: int | None = None,
    checks: bool = True,
) -> np.ndarray:
    """Launch a kernel on one block; return the output's bytes."""
    out = kernel.allocate(bytes, "out")
    kernel.launch("kernel", (1,), threads, [out, *arguments], seed=seed, checks=checks)
    return kernel.download(out)


def refuses(kind: str, kernel: Module, bytes: int, *arguments: object, **options: object) -> None:
    """Expect a kernel to fail with an error of one of the kinds, which are separated by |."""
    with pytest.raises(PtxError) as caught:
        run(kernel, bytes, *arguments, **options)
    assert caught.value.kind in kind.split("|"), str(caught.value)
