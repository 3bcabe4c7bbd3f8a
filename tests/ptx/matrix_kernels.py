"""Kernels around matrix instructions: registers and shared memory in, registers out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator import Module

# Makes ordinary stores to shared memory visible to all threads and to wgmma.
PUBLISH = "fence.proxy.async.shared::cta;\nbar.sync 0;"


def run(
    body: str,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, int],
    *,
    threads: int,
    shared: np.ndarray | None = None,
    shared_bytes: int = 0,
    publish: str = PUBLISH,
    target: str = "sm_90a",
    machine: Callable[[str], Module] = Module,
) -> dict[str, np.ndarray]:
    """Run `body` after loading `inputs`, and return the registers named by `outputs`.

    Input "a" (threads, n) is in %a0, %a1 ...; output "d" of n registers comes from %d0, %d1 ...,
    as uint32 (threads, n). `shared` are bytes that lie at the start of shared memory. %thread is
    the thread's number. `machine` makes a Module of PTX.
    """
    image = np.zeros(0, np.uint8) if shared is None else shared
    image = np.pad(image, (0, -len(image) % (4 * threads)))
    registers = {name: array.shape[1] for name, array in inputs.items()} | outputs
    text = _TEXT.format(
        target=target,
        shared_bytes=max(len(image), shared_bytes, 16),
        parameters=", ".join(f".param .u64 p{i}" for i in range(len(inputs) + len(outputs) + 1)),
        registers="\n".join(f".reg .b32 %{name}<{count}>;" for name, count in registers.items()),
        fill=_fill(len(image), threads),
        loads="\n".join(
            _transfer("ld", name, array.shape[1], 1 + i)
            for i, (name, array) in enumerate(inputs.items())
        ),
        publish=publish,
        body=body,
        stores="\n".join(
            _transfer("st", name, count, 1 + len(inputs) + i)
            for i, (name, count) in enumerate(outputs.items())
        ),
    )
    module = machine(text)
    arguments = [module.upload(image if len(image) else np.zeros(16, np.uint8), "image")]
    for name, array in inputs.items():
        arguments.append(module.upload(array.astype(np.uint32), name))
    results = [module.allocate(4 * threads * count, name) for name, count in outputs.items()]
    module.launch("kernel", (1,), threads, [*arguments, *results])
    return {
        name: module.download(buffer).view(np.uint32).reshape(threads, -1)
        for name, buffer in zip(outputs, results, strict=True)
    }


_TEXT = """
.version 8.4
.target {target}
.address_size 64
.shared .align 1024 .b8 smem[{shared_bytes}];
.visible .entry kernel({parameters})
{{
.reg .b32 %thread, %slot, %word, %other;
.reg .b64 %base, %offset, %desc<4>;
.reg .pred %p<4>;
{registers}
mov.u32 %thread, %tid.x;
{fill}
{loads}
{publish}
{body}
{stores}
ret;
}}
"""


def _fill(bytes: int, threads: int) -> str:
    lines = [
        "ld.param.u64 %base, [p0];",
        "mul.wide.u32 %offset, %thread, 4;",
        "add.s64 %base, %base, %offset;",
        "shl.b32 %slot, %thread, 2;",
    ]
    for at in range(0, bytes, 4 * threads):
        lines += [f"ld.global.b32 %word, [%base+{at}];", f"st.shared.b32 [%slot+{at}], %word;"]
    return "\n".join(lines)


def _transfer(opcode: str, name: str, count: int, parameter: int) -> str:
    lines = [
        f"ld.param.u64 %base, [p{parameter}];",
        f"mul.wide.u32 %offset, %thread, {4 * count};",
        "add.s64 %base, %base, %offset;",
    ]
    for i in range(count):
        register, memory = f"%{name}{i}", f"[%base+{4 * i}]"
        pair = (register, memory) if opcode == "ld" else (memory, register)
        lines.append(f"{opcode}.global.b32 {', '.join(pair)};")
    return "\n".join(lines)


def names(prefix: str, count: int) -> str:
    """A vector operand of registers."""
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


def pack(elements: np.ndarray) -> np.ndarray:
    """Elements (threads, n) as the registers (threads, n * bytes / 4) that hold them."""
    return np.ascontiguousarray(elements).view(np.uint32)
