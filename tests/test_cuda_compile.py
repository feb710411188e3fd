"""Every CUDA kernel compiled by nvcc alone, on any machine that has it: one that spills more than
is listed here, or takes more registers than a block may, fails. Minutes of work, so only if
RNNFAST_REQUIRE_NVCC=1."""

import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "csrc" / "cuda"
FILES = sorted(path.stem for path in KERNELS.glob("*.cu"))
REGISTERS = 65536  # of a multiprocessor, and so of a block
#: Bytes that a thread may spill. Most are addresses while the matrix is loaded, before the first
#: step; the disassembly for sm_90a shows at most nine words, loop invariants, read back in a step.
SPILLED = {"sm_80": 192, "sm_90a": 168, "sm_100": 264}

if os.environ.get("RNNFAST_REQUIRE_NVCC", "0") in ("", "0"):
    pytest.skip("RNNFAST_REQUIRE_NVCC=1 asks for it", allow_module_level=True)
nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
if nvcc is None:
    raise RuntimeError("RNNFAST_REQUIRE_NVCC is set and there is no nvcc")

USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangled(names):
    run = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return run.stdout.replace("rnnfast::cuda::", "").splitlines()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(file, target) -> what ptxas says, as many at a time as there are cores."""
    folder = tmp_path_factory.mktemp("cubins")

    def compile(job):
        file, target = job
        source, cubin = KERNELS / f"{file}.cu", folder / f"{file}.{target}.cubin"
        return subprocess.run(
            [nvcc, "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin", source,
             "-o", cubin],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    jobs = list(itertools.product(FILES, SPILLED))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compile, jobs), strict=True))


@pytest.mark.parametrize("target", SPILLED)
@pytest.mark.parametrize("file", FILES)
def test_kernels_fit_and_do_not_spill(compiled, file, target):
    run = compiled[file, target]
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
