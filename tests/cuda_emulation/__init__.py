"""The CUDA kernels of csrc/cuda on a machine without a GPU: compiled for the CPU, a thread of a
kernel being a fiber (emulator.h), and put under the backend "cuda" for CPU tensors."""

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import library
from torch.utils.cpp_extension import include_paths, library_paths

from rnnfast import backends, dispatch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
_registrations = None  # with the ops, which live as long as it does


def build() -> Path:
    """Compile what changed, and link the library."""
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    paths = [HERE, KERNELS, *include_paths()]  # HERE stands in for the toolkit
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-w", "-DRNNFAST_EMULATED", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in paths),
    ]
    sources = sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cpp"), *HERE.glob("*.cpp")])
    headers = [*KERNELS.glob("*.*h"), *HERE.rglob("*.h"), KERNELS.parent / "op.h"]
    newest = max(header.stat().st_mtime for header in headers)

    def compile(source: Path) -> str:
        target = folder / f"{source.name}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            command = [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    target = folder / "rnnfast_emulated.so"
    libraries = [f"-L{path}" for path in library_paths()]
    link = ["-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run([*compiler, "-shared", *objects, *libraries, *link, "-o", target], check=True)
    return target


def install() -> None:
    """Build the kernels, and run CPU tensors on them where the backend "cuda" is forced."""
    torch.ops.load_library(build())
    ops = torch.ops.rnnfast_emulated

    @cache
    def why_not_of(dtype, hidden_size, tf32):
        return backends.why_not_cuda(ops._cuda_why_not, 0, dtype, hidden_size)

    def why_not(input, hidden_size=None):
        if backends.forward_ad._current_level >= 0:
            return "forward-mode derivatives are the reference's."
        return why_not_of(input.dtype, hidden_size or 1, dispatch.tf32_allowed())

    backends.BACKENDS["cuda"] = why_not
    global _registrations
    _registrations = library.Library("rnnfast", "IMPL")
    dispatch.choose_between(
        _registrations, "CPU", backends.runs("cuda"), ops.rnn_layer, ops.rnn_layer_backward
    )
