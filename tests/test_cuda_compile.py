"""Every CUDA kernel compiled by nvcc alone, on any machine that has it: one that spills, or takes
more registers than a block may, fails here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "csrc" / "cuda"
FILES = sorted(path.stem for path in KERNELS.glob("*.cu"))
REGISTERS = 65536  # of a multiprocessor, and so of a block
#: Bytes that a thread may spill. All of it that the disassembly of the 16-bit kernels shows is before
#: the first product: addresses, while the matrix is loaded. On sm_100 that is most in the backward.
SPILLED = {"sm_80": 72, "sm_90a": 40, "sm_100": 264}

nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
if nvcc is None:
    if os.environ.get("RNNFAST_REQUIRE_NVCC", "0") not in ("", "0"):
        raise RuntimeError("RNNFAST_REQUIRE_NVCC is set and there is no nvcc")
    pytest.skip("nvcc is not installed", allow_module_level=True)

USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangled(names):
    run = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return run.stdout.replace("rnnfast::cuda::", "").splitlines()


@pytest.mark.parametrize("target", SPILLED)
@pytest.mark.parametrize("file", FILES)
def test_kernels_fit_and_do_not_spill(tmp_path, file, target):
    run = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin",
         str(KERNELS / f"{file}.cu"), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = list(USAGE.finditer(run.stderr))
    source = KERNELS / ("time_loop_16bit.cuh" if "16" in file else f"{file}.cu")
    variants = source.read_text().count("    variant<")
    assert len(kernels) == 2 * variants  # a forward and a backward
    for kernel, name in zip(kernels, demangled([k["name"] for k in kernels]), strict=True):
        threads = threads_of(name)
        registers = -(-int(kernel["registers"]) // 8) * 8  # they are given in eights
        assert registers * threads <= REGISTERS, name
        assert int(kernel["stack"]) <= SPILLED[target], name
        assert int(kernel["stores"]) <= SPILLED[target], name
        assert "smem" not in kernel["rest"], name  # all of it is dynamic, and in SharedLayout


def threads_of(name):
    """Of a block, from the kernel's template arguments (products.cuh)."""
    product, arguments = re.search(r"(By\w+)<(?:\w+), ([\d, ]+)>", name).groups()
    n = [int(x) for x in arguments.split(",")]
    warps, splits = (n[0], n[2]) if product == "ByTensorCores" else (n[2], n[3])
    return 32 * warps * splits
