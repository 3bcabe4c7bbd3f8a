"""Build of `fastformer._C`: one plain shared library, free of Python's C API and torch's C++ ABI.

Torch is never imported here, only its stable headers are found on disk, so that pip's build
isolation needs no torch of its own. The metadata is in pyproject.toml. Environment:

FASTFORMER_CUDA        auto (default: CUDA kernels if nvcc is found), 1 (insist), 0 (leave them out)
FASTFORMER_CUDA_ARCHS  e.g. "80 90a"; default: the GPUs of this machine, else 90a
FASTFORMER_CPU_ISAS    e.g. "default avx512": the instruction sets to compile the CPU kernels for
                       ("default" is always one); default: all that a CPU of this kind may have
FASTFORMER_SKIP_EXT    1 installs the Python files alone
FASTFORMER_TORCH_DIR   the torch package to build against, where it is not found by itself
FASTFORMER_SANITIZE    e.g. "address,undefined": instrument the C++ code, for tests
CUDA_HOME, CXX, MAX_JOBS
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MIN_TORCH = (2, 11)

CPU_OPS = ["dropout", "embedding", "gemm", "layer_norm", "linear", "mlp", "linear_cross_entropy"]
CPU_OPS += ["attention_fwd", "attention_bwd", "adamw"]
BINDINGS = ["dropout", "attention", "layer_norm", "linear", "linear_cross_entropy", "mlp"]
BINDINGS += ["embedding", "adamw", "gemm", "memory", "attention_cuda", "attention_decode"]
CUDA_SOURCES = ["runtime", "dropout", "layer_norm", "attention_fwd", "attention_bwd"]
CUDA_SOURCES += ["attention_decode", "mlp"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}

CXX_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall"]
# g++ 12 warns without cause inside its own AVX-512 headers.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi", f"-I{CSRC}"]
CXX_FLAGS += [f"-ffile-prefix-map={ROOT}/="]  # error messages name csrc/..., not the build machine
NVCC_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", f"-I{CSRC}", "-Xcompiler"]
NVCC_FLAGS += ["-fPIC,-fvisibility=hidden,-Wall"]


# Python itself is not instrumented: it needs the compiler's libasan.so preloaded.
SANITIZE = os.environ.get("FASTFORMER_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
CXX_FLAGS += [*SANITIZE_FLAGS, "-g1", "-O1"] if SANITIZE else []
CXX_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))  # last, so that they win


def fail(sentence: str) -> SystemExit:
    return SystemExit(f"fastformer: {sentence}")


def torch_candidates() -> Iterator[Path]:
    """Folders that may hold torch. Under build isolation sys.path is masked, but sysconfig and
    VIRTUAL_ENV still name the environment that the package is being built for."""
    if os.environ.get("FASTFORMER_TORCH_DIR"):
        yield Path(os.environ["FASTFORMER_TORCH_DIR"])
        return
    spec = importlib.util.find_spec("torch")
    yield from map(Path, spec.submodule_search_locations or [] if spec else [])
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if os.environ.get("VIRTUAL_ENV"):
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folders.append(f"{os.environ['VIRTUAL_ENV']}/lib/{python}/site-packages")
    folders += [site.getusersitepackages(), *site.getsitepackages()]
    yield from (Path(folder) / "torch" for folder in folders)


def find_torch() -> Path:
    wanted = ".".join(map(str, MIN_TORCH))
    too_old = ""
    for torch in torch_candidates():
        if not (torch / "version.py").is_file():
            continue
        text = (torch / "version.py").read_text()
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
        if found and (int(found[2]), int(found[3])) >= MIN_TORCH:
            return torch
        too_old = f" (torch {found[1] if found else 'unknown'} in {torch.parent} is too old)"
    raise fail(
        f"no torch >= {wanted} found to build against{too_old}; install torch first and then this"
        " package, or set FASTFORMER_SKIP_EXT=1 to install without compiled kernels"
    )


def find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise fail(
            f"the C++ compiler {command[0]!r} was not found; install g++ or set CXX, or set"
            " FASTFORMER_SKIP_EXT=1 to install without compiled kernels"
        )
    return command


def find_nvcc() -> Path | None:
    mode = os.environ.get("FASTFORMER_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise fail(f"FASTFORMER_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for nvcc in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(nvcc):
            return Path(found)
    if mode == "1":
        raise fail(
            "FASTFORMER_CUDA=1 asks for CUDA kernels but nvcc was not found; set CUDA_HOME to a"
            " CUDA toolkit (a folder with bin/nvcc), or unset FASTFORMER_CUDA"
        )
    return None


def cudart_folder(nvcc: Path) -> Path:
    """The folder of this nvcc's static CUDA runtime; nvcc may be a wrapper far from its toolkit."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.M)
    toolkit = Path(top[1]).resolve() if top else nvcc.resolve().parent.parent
    for folder in [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]:
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise fail(
        f"{nvcc} has no libcudart_static.a in {toolkit}; install the CUDA runtime's development"
        " files, or set FASTFORMER_CUDA=0 to build without CUDA kernels"
    )


def cuda_archs() -> list[str]:
    requested = re.split(r"[;,\s]+", os.environ.get("FASTFORMER_CUDA_ARCHS", "").strip(";, "))
    archs = [arch.replace(".", "") for arch in requested if arch]
    if bad := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise fail(f'FASTFORMER_CUDA_ARCHS must look like "80 90a", got {" ".join(bad)!r}')
    return archs or local_archs() or ["90a"]


def cpu_isas() -> list[str]:
    """The instruction sets to compile for."""
    requested = os.environ.get("FASTFORMER_CPU_ISAS", "").split() or [*ISA_FLAGS]
    if bad := [isa for isa in requested if isa not in ISA_FLAGS]:
        known = " ".join(ISA_FLAGS)
        raise fail(f'FASTFORMER_CPU_ISAS must be some of "{known}" here, got {" ".join(bad)!r}')
    return list(dict.fromkeys(("default", *requested)))


def local_archs() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    caps = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", listing)})
    return [f"{cap}a" if cap >= 90 else str(cap) for cap in caps]  # "a": wgmma, TMA, tcgen05


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, free // 2**31))  # 2 GiB for each compiler


@dataclass(frozen=True)
class Step:
    """One compiler run: `command` makes `output` from `source`."""

    source: Path
    output: Path
    command: list[str]


def compile_step(compiler: list[str], source: str, temp: Path, suffix: str = "") -> Step:
    """The object's name tells the command: those of one configuration never meet another's."""
    key = hashlib.sha256(repr(compiler).encode()).hexdigest()[:8]
    path, output = CSRC / source, temp / f"{source.replace('/', '_')}{suffix}.{key}.o"
    command = [*compiler, "-MMD", "-MF", f"{output}.d", "-c", str(path), "-o", str(output)]
    return Step(path, output, command)


def compiles(steps: Iterable[Step]) -> bool:
    """Whether all steps succeed, on their own."""
    return all(subprocess.run(step.command).returncode == 0 for step in steps)


class BuildExt(build_ext):
    """Compiles each source with its own flags, through ninja where there is one, and links once."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # the same file for every Python

    def build_extension(self, ext: Extension) -> None:
        torch, cxx, nvcc = find_torch(), find_compiler(), find_nvcc()
        archs, isas = cuda_archs() if nvcc else [], cpu_isas()
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        if not self.compile(torch, cxx, nvcc, archs, isas, temp):
            # The rest does without, where nobody insists.
            kept = [arch for arch in archs if compiles(self.cuda_steps(nvcc, cxx, temp, [arch]))]
            if os.environ.get("FASTFORMER_CUDA") == "1":
                kept = archs
            kept_isas = [i for i in isas if compiles(self.cpu_kernel_steps(cxx, temp, [i]))]
            left_out = [f"sm_{arch}" for arch in archs if arch not in kept]
            left_out += [isa for isa in isas if isa not in kept_isas]
            if not left_out or "default" not in kept_isas:
                self.fail_to_compile(nvcc)
            print(
                f"fastformer: going on without kernels for {', '.join(left_out)}, which do not"
                " compile, see the compiler's messages above",
                flush=True,
            )
            archs, isas, nvcc = kept, kept_isas, nvcc if kept else None
            if not self.compile(torch, cxx, nvcc, archs, isas, temp):
                self.fail_to_compile(nvcc)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has it mapped keeps the old one
        shutil.copyfile(temp / "_C.so", target)

    def compile(
        self,
        torch: Path,
        cxx: list[str],
        nvcc: Path | None,
        archs: list[str],
        isas: list[str],
        temp: Path,
    ) -> bool:
        """Make _C.so in `temp`; return whether that succeeded."""
        # What takes longest first: the CUDA kernels, then the CPU kernels, then the bindings.
        steps = [*self.cuda_steps(nvcc, cxx, temp, archs)] if nvcc else []
        steps += self.cpu_kernel_steps(cxx, temp, isas)
        steps += self.binding_steps(cxx, torch, temp, archs, isas)
        link = [*cxx, *SANITIZE_FLAGS, "-shared", "-o", str(temp / "_C.so")]
        link += [str(step.output) for step in steps]
        if nvcc:
            # Our static runtime must not be interposed by torch's, or the other way round.
            link += [f"-L{cudart_folder(nvcc)}", "-lcudart_static", "-Wl,--exclude-libs,ALL"]
            link += ["-ldl", "-lrt", "-lpthread"]
        # libtorch.so must stay needed although no symbol is taken from it: in a CUDA build of torch
        # it is what brings in libtorch_cuda.so, where the weak symbol of bindings.cpp lives.
        link += [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        kind = f"CPU and CUDA ({' '.join(archs)}) kernels" if nvcc else "CPU kernels, no CUDA"
        print(f"fastformer: building {kind}", flush=True)
        run = run_ninja if find_ninja() else run_threads
        return run(steps, link, temp / "_C.so", temp)

    def fail_to_compile(self, nvcc: Path | None) -> NoReturn:
        without_cuda = "FASTFORMER_CUDA=0 leaves out the CUDA kernels, " if nvcc else ""
        raise fail(
            "compilation failed, see the compiler's messages above;"
            f" {without_cuda}FASTFORMER_SKIP_EXT=1 all compiled kernels"
        )

    def cpu_kernel_steps(self, cxx: list[str], temp: Path, isas: list[str]) -> Iterator[Step]:
        for op in CPU_OPS:
            for isa in isas:
                flags = [*CXX_FLAGS, f"-DFASTFORMER_ISA=isa_{isa}", *ISA_FLAGS[isa]]
                yield compile_step([*cxx, *flags], f"cpu/{op}.cpp", temp, f".{isa}")

    def binding_steps(
        self, cxx: list[str], torch: Path, temp: Path, archs: list[str], isas: list[str]
    ) -> Iterator[Step]:
        def step(source: str, flags: list[str]) -> Step:
            return compile_step([*cxx, *CXX_FLAGS, *flags], source, temp)

        yield step("cpu/select.cpp", [f"-DFASTFORMER_WITH_{isa.upper()}" for isa in isas])
        if archs:
            yield step("cuda/cublaslt.cpp", [])
        target = "0x{:02x}{:02x}000000000000".format(*MIN_TORCH)
        stable = [f"-DTORCH_TARGET_VERSION={target}", f"-isystem{torch / 'include'}"]
        stable += ["-DFASTFORMER_WITH_CUDA"] if archs else []
        for source in ["bindings.cpp", *(f"ops/{name}.cpp" for name in BINDINGS)]:
            yield step(source, stable)
        facts = {
            "VERSION": self.distribution.get_version(),
            "SOURCE": runpy.run_path(str(ROOT / "fastformer/_checkout.py"))["source_hash"](ROOT),
            "CUDA_ARCHS": " ".join(archs) or "none",
        }
        yield step("build_info.cpp", [f'-DFASTFORMER_{k}="{v}"' for k, v in facts.items()])

    def cuda_steps(
        self, nvcc: Path, cxx: list[str], temp: Path, archs: list[str]
    ) -> Iterator[Step]:
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        compiler = [str(nvcc), "-ccbin", cxx[-1], *NVCC_FLAGS, *gencode]
        for name in CUDA_SOURCES:
            yield compile_step(compiler, f"cuda/{name}.cu", temp)


def find_ninja() -> str | None:
    if found := shutil.which("ninja"):
        return found
    if importlib.util.find_spec("ninja") is None:
        return None
    import ninja

    return os.path.join(ninja.BIN_DIR, "ninja")


def run_ninja(steps: list[Step], link: list[str], library: Path, temp: Path) -> bool:
    def path(name: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    lines = ["ninja_required_version = 1.3"]
    for number, step in enumerate(steps):
        command = shlex.join(step.command).replace("$", "$$")
        lines += [f"rule compile{number}", f"  command = {command}", "  deps = gcc"]
        lines += [f"  depfile = {step.output}.d"]
        lines += [f"build {path(step.output)}: compile{number} {path(step.source)}"]
    objects = " ".join(path(step.output) for step in steps)
    lines += ["rule link", f"  command = {shlex.join(link).replace('$', '$$')}"]
    lines += [f"build {path(library)}: link {objects}", ""]
    (temp / "build.ninja").write_text("\n".join(lines))
    command = [str(find_ninja()), "-C", str(temp), f"-j{job_count()}"]
    return subprocess.run([*command, "--quiet"]).returncode == 0


def run_threads(steps: list[Step], link: list[str], library: Path, temp: Path) -> bool:
    with ThreadPoolExecutor(job_count()) as pool:
        codes = list(pool.map(lambda step: subprocess.run(step.command).returncode, steps))
    return not any(codes) and subprocess.run(link).returncode == 0


class Build(build):
    def run(self) -> None:
        # A wheel holds what the source holds now, not what an earlier build left behind.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


skip = os.environ.get("FASTFORMER_SKIP_EXT") == "1"
setup(
    ext_modules=[] if skip else [Extension("fastformer._C", [])],
    cmdclass={"build_ext": BuildExt, "build": Build, "bdist_wheel": BdistWheel},
    # kernels/ installs inside the package: a top-level `kernels` would shadow Hugging Face's.
    packages=[
        "fastformer",
        "fastformer.kernels",
        "fastformer.ops",
        "fastformer.train",
        "fastformer.train.data",
    ],
    package_dir={"fastformer": "fastformer", "fastformer.kernels": "kernels"},
)
