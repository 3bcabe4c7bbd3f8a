"""Small kernels in PTX for the tests of the emulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.emulator import Module

_TEXT = """
.version 8.4
.target sm_90a
.address_size 64
{variables}
.visible .entry kernel({parameters})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<32>;
    .reg .f32 %f<16>;
    .reg .f64 %fd<8>;
    .reg .b32 %t, %b, %g, %n;
    {pointers}
    mov.u32 %t, %tid.x;
    mov.u32 %b, %ctaid.x;
    mov.u32 %n, %ntid.x;
    mad.lo.u32 %g, %b, %n, %t;
{prologue}
{body}
    ret;
}}
"""


def run(
    body: str,
    threads: int = 32,
    grid: int | Sequence[int] = 1,
    *,
    variables: str = "",
    seed: int | None = None,
    checks: bool = True,
    steps_limit: int = 200_000,
    dynamic_shared: int = 0,
    **buffers: np.ndarray | int,
) -> dict[str, np.ndarray]:
    """Run statements as a kernel and return its buffers.

    A buffer is an array, or the bytes of one that nothing has written. The kernel finds the address
    of buffer x in %x, and in %own_x that of its thread's 32-bit word, in the grid; in %t its
    thread, in %b its block, in %n the size of a block, in %g its thread in the grid.
    """
    names = list(buffers)
    text = _TEXT.format(
        variables=variables,
        parameters=", ".join(f".param .u64 parameter_{name}" for name in names),
        pointers="\n    ".join(f".reg .b64 %{name}, %own_{name};" for name in names),
        prologue="\n".join(
            f"    ld.param.u64 %{name}, [parameter_{name}];\n"
            f"    mad.wide.u32 %own_{name}, %g, 4, %{name};"
            for name in names
        ),
        body=body,
    )
    module = Module(text)
    memory = {
        name: module.allocate(value, name) if isinstance(value, int) else module.upload(value, name)
        for name, value in buffers.items()
    }
    module.launch(
        "kernel",
        (grid,) if isinstance(grid, int) else grid,
        threads,
        list(memory.values()),
        seed=seed,
        checks=checks,
        steps_limit=steps_limit,
        dynamic_shared=dynamic_shared,
    )
    return {
        name: module.download(memory[name]).view(
            np.uint32 if isinstance(value, int) else value.dtype
        )
        for name, value in buffers.items()
    }


def zeros(count: int) -> np.ndarray:
    """32-bit words."""
    return np.zeros(count, np.uint32)
