"""How many missing synchronisations the emulator finds in kernels that are right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which there is for Linux only")

from tests.ptx import nvcc  # noqa: E402
from tests.ptx.corpus_cases import CORPUS_FOLDER  # noqa: E402
from tests.ptx.emulator.types import from_bf16, to_bf16  # noqa: E402
from tests.ptx.kernels.attention import attention_fwd  # noqa: E402
from tests.ptx.mutations import MUTATIONS, Score, mutants, only_entry, score  # noqa: E402
from tests.ptx.nvcc import CudaKernels, Tiled  # noqa: E402
from tests.ptx.test_triton_launch import softmax_attention  # noqa: E402
from tests.ptx.triton_launch import emulated  # noqa: E402

needs_nvcc = pytest.mark.skipif(nvcc.WHY_NOT is not None, reason=str(nvcc.WHY_NOT))

# Mutants found, of those made, as measured. What is not found is redundant: waits for nothing, and
# barriers beside others; or it is not proven so. Another version of a compiler makes other PTX.
COMPILERS = {"triton": "3.6.0", "cuda": "13.0"}
FLOORS = {
    "cuda flash sm_80": (4, 5),
    "cuda wgmma sm_90a": (13, 19),
    "triton attention sm_80-pointers": (12, 17),
    "triton attention sm_90-pointers": (25, 31),
    "triton attention sm_90-tma": (32, 73),
}
LIMITS = {"seed": 3, "steps_limit": 2_000_000}  # a mutant may never end


def check(name: str, result: Score) -> None:
    print(f"\n{name}\n{result}")
    found, made = FLOORS[name]
    assert result.made == made, f"{name}: other mutations than those measured\n{result}"
    assert result.found >= found, f"{name}: {result.found} found, were {found}\n{result}"


def of_version(compiler: str) -> None:
    version = triton.__version__ if compiler == "triton" else nvcc.version()
    if version != COMPILERS[compiler]:
        pytest.skip(f"measured with {compiler} {COMPILERS[compiler]}, here is {version}")


def attention_run(arch: int, descriptors: bool):
    """PTX of attention forward, and a function that runs other PTX in its place."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 256, 64).bfloat16() for _ in range(3))
    exact, _ = softmax_attention(q.double(), k.double(), v.double(), True)

    def run(ptx: str | None) -> tuple[bool, str]:
        with emulated(arch, **LIMITS, edit=lambda name, own: ptx or own) as launches:
            out, _ = attention_fwd(q, k, v, causal=True, descriptors=descriptors)
        wrong = (out.double() - exact).norm() / exact.norm()
        return bool(wrong < 6e-3), launches[0].ptx

    return run(None)[1], lambda ptx: run(ptx)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "descriptors"),
    [(80, False), (90, False), (90, True)],
    ids=["sm_80-pointers", "sm_90-pointers", "sm_90-tma"],
)
def test_triton_attention(arch, descriptors, request):
    of_version("triton")
    name = f"triton attention {request.node.callspec.id}"
    check(name, score(*attention_run(arch, descriptors)))


@needs_nvcc
def test_cuda_flash_attention():
    of_version("cuda")
    N, D = 200, 64
    kernels = CudaKernels(CORPUS_FOLDER / "flash_attention.cu", "80")
    kernel = "flash_fwd_kernel<64, true>"
    random = np.random.default_rng(1)
    q, k, v = (to_bf16(random.standard_normal((1, N, D)).astype(np.float32)) for _ in range(3))
    exact, _ = softmax_attention(
        *(torch.from_numpy(from_bf16(x)).double() for x in (q, k, v)), True
    )

    def run(ptx: str) -> bool:
        out, lse = np.full((1, N, D), 0x7FC0, np.uint16), np.zeros((1, N), np.float32)
        scale_log2 = 1 / np.sqrt(D) / np.log(2)
        arguments = [q, k, v, out, lse, N, float(scale_log2)]
        shared = 5 * 64 * D * 2
        mutant = kernels.with_ptx(ptx)
        mutant.launch(kernel, (-(-N // 64), 1), 128, arguments, dynamic_shared=shared, **LIMITS)
        wrong = (torch.from_numpy(from_bf16(out)).double() - exact).norm() / exact.norm()
        return bool(wrong < 6e-3)

    check("cuda flash sm_80", score(only_entry(kernels.ptx, kernels.mangled(kernel)), run))


@needs_nvcc
def test_cuda_warp_specialised_wgmma():
    of_version("cuda")
    N = 256
    kernels = CudaKernels(CORPUS_FOLDER / "qk_wgmma.cu", "90a")
    random = np.random.default_rng(1)
    q, k = (to_bf16(random.standard_normal((N, 64)).astype(np.float32)) for _ in range(2))
    exact = (from_bf16(q).astype(np.float64) @ from_bf16(k).T)[:64]

    def run(ptx: str) -> bool:
        s = np.full((N, N), np.nan, np.float32)
        arguments = [Tiled(q, (64, 64)), Tiled(k, (64, 64)), s, N]
        kernels.with_ptx(ptx).launch(
            "qk_kernel", 1, 256, arguments, dynamic_shared=3 * 8192 + 64, **LIMITS
        )
        return bool(np.linalg.norm(s[:64] - exact) / np.linalg.norm(exact) < 1e-6)

    check("cuda wgmma sm_90a", score(kernels.ptx, run))


SNIPPET = """
bar.sync 0;
bar.sync 1, 128;
cp.async.wait_group 1;
cp.async.bulk.wait_group.read 0;
wgmma.wait_group.sync.aligned 0;
wgmma.fence.sync.aligned;
wgmma.commit_group.sync.aligned;
fence.proxy.async.shared::cta;
fence.mbarrier_init.release.cluster;
{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
@!complete bra.uni waitLoop;
}
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 8192;
"""


def test_each_mutation_changes_its_instruction_and_nothing_else():
    found = list(mutants(SNIPPET))
    assert {name for name, _ in found} == set(MUTATIONS)
    assert len(found) == len(MUTATIONS) + 1  # there are two barriers
    texts = dict(found)
    assert "cp.async.wait_group 2;" in texts["cp.async.wait_group"]
    assert "wgmma.wait_group.sync.aligned 1;" in texts["wgmma.wait_group"]
    waiting = texts["mbarrier wait"]
    assert "mbarrier.try_wait" in waiting and "bra.uni" not in waiting and "waitLoop:" in waiting
    for _, text in found:
        lines = zip(SNIPPET.splitlines(), text.splitlines(), strict=True)
        changed = [before for before, after in lines if before != after]
        assert len(changed) == 1


def test_only_the_named_kernel_is_left():
    ptx = "".join(f".visible .entry {name}(\n)\n{{\nret;\n}}\n" for name in ("ab", "a", "b"))
    assert re.findall(r"\.entry (\w+)", only_entry(ptx, "a")) == ["a"]


def test_a_kernel_that_is_wrong_already_has_no_score():
    with pytest.raises(ValueError, match="before anything was changed"):
        score("", lambda ptx: False)
