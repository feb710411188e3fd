"""What setup.py does on machines that cannot build, and how it names what it builds."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    """A copy of what is needed to build."""
    if not (SOURCE / "setup.py").exists():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(SOURCE / name, tmp_path)
    for name in ("csrc", "rnnfast"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(SOURCE / name, tmp_path / name, ignore=ignored)
    return tmp_path


def build(source, **variables):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=source,
        env=os.environ | {"RNNFAST_REQUIRE_EXT": "0", "FORCE_CUDA": "0"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def built(source):
    (package,) = source.glob("build/lib*/rnnfast")
    return package


def test_a_missing_compiler_gives_one_sentence_and_a_working_install(source):
    run = build(source, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    assert len(said) == 1
    assert "no C++ compiler: /nonexistent/c++ was not found" in said[0]
    assert "installing without the kernels" in said[0]
    package = built(source)
    assert not list(package.glob("*.so"))
    record = json.loads((package / "_build.json").read_text())
    assert record["extension"] is False
    used = subprocess.run(
        [sys.executable, "-c", "import rnnfast, torch; rnnfast.RNN(3, 5)(torch.ones(4, 2, 3))"],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("FallbackWarning") == 1
    assert "no C++ compiler" in used.stderr


def test_clang_is_refused_in_one_sentence(source):
    compiler = source / "c++"
    compiler.write_text("#!/bin/sh\necho clang version 14.0.6\n")
    compiler.chmod(0o755)
    run = build(source, CXX=str(compiler))
    assert run.returncode == 0, run.stderr
    (said,) = (line for line in run.stderr.splitlines() if line.startswith("rnnfast:"))
    assert f"{compiler} is clang" in said


def test_a_required_extension_that_cannot_be_built_is_an_error(source):
    run = build(source, CXX="/nonexistent/c++", CC="/nonexistent/cc", RNNFAST_REQUIRE_EXT="1")
    assert run.returncode != 0


def test_a_missing_torch_gives_one_sentence_and_a_working_install(source):
    (source / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    run = build(source, PYTHONPATH=str(source))
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    assert len(said) == 1
    assert "install torch first" in said[0]
    assert list(built(source).glob("modules.py"))
    assert build(source, PYTHONPATH=str(source), RNNFAST_REQUIRE_EXT="1").returncode != 0


def test_a_source_distribution_has_all_that_is_compiled(source):
    """Without torch, as in an isolated build, setup.py names no source."""
    (source / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=source, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(source), "RNNFAST_REQUIRE_EXT": "0"},
    )  # fmt: skip
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {name.partition("/")[2] for name in files.getnames()}
    for folder in ("csrc", "rnnfast"):
        paths = (p for p in (source / folder).rglob("*") if p.is_file())
        assert {str(p.relative_to(source)) for p in paths} <= found


# ------------------------------------------------------------------------- CUDA, and wheels' names
# Compiling takes minutes (tools/build_wheels.py does that); what is decided before takes seconds.

CUDA_TORCH = """
import os, torch, torch.utils.cpp_extension as build
torch.__version__, torch.version.cuda = torch.torch_version.TorchVersion("2.13.1+cu130"), "13.0"
build.CUDA_HOME = os.environ.get("CUDA_HOME")
gpus = [tuple(map(int, gpu.split("."))) for gpu in os.environ.get("GPUS", "").split()]
torch.cuda.is_available = lambda: bool(gpus)
torch.cuda.device_count = lambda: len(gpus)
def capability(n):
    if gpus[n] == (0, 0):
        raise RuntimeError("CUDA error: all devices are busy")
    return gpus[n]
torch.cuda.get_device_capability = capability
"""
CPU_TORCH = """
import torch
torch.__version__, torch.version.cuda = torch.torch_version.TorchVersion("2.13.1+cpu"), None
"""


def machine(source, torch_build, kernels=True, nvcc=True):
    """Pretend: a build of torch, kernel sources, a CUDA toolkit. Returns the variables for it."""
    (source / "sitecustomize.py").write_text(torch_build)
    shutil.rmtree(source / "csrc/cuda", ignore_errors=True)
    if kernels:
        (source / "csrc/cuda").mkdir()
        (source / "csrc/cuda/kernel.cu").write_text("")
    if nvcc:
        (source / "toolkit/bin").mkdir(parents=True)
        (source / "toolkit/bin/nvcc").write_text("")
    return {"PYTHONPATH": str(source), "CUDA_HOME": str(source / "toolkit")}


def metadata(source, **variables):
    """The version, and what is required of torch."""
    unset = ("FORCE_CUDA", "RNNFAST_WHEEL", "RNNFAST_REQUIRE_EXT", "TORCH_CUDA_ARCH_LIST")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"],
        cwd=source,
        env={k: v for k, v in os.environ.items() if k not in unset} | variables,
        check=True,
        capture_output=True,
    )
    info = source / "rnnfast.egg-info"
    said = email.message_from_string((info / "PKG-INFO").read_text())
    (torch_,) = (r for r in said.get_all("Requires-Dist") if r.startswith("torch"))
    return said["Version"], torch_


@pytest.mark.parametrize(
    ("torch_build", "variables", "version", "requires"),
    [
        (CPU_TORCH, {}, "", "torch>=2.11"),
        (CPU_TORCH, {"RNNFAST_WHEEL": "1"}, "+pt213cpu", "torch==2.13.*"),
        (CPU_TORCH, {"FORCE_CUDA": "1"}, "", "torch>=2.11"),
        (CUDA_TORCH, {}, "", "torch>=2.11"),
        (CUDA_TORCH, {"RNNFAST_WHEEL": "1"}, "+pt213cpu", "torch==2.13.*"),
        (CUDA_TORCH, {"RNNFAST_WHEEL": "1", "GPUS": "9.0"}, "+pt213cu130", "torch==2.13.*"),
        (
            CUDA_TORCH,
            {"RNNFAST_WHEEL": "1", "GPUS": "9.0", "FORCE_CUDA": "0"},
            "+pt213cpu",
            "torch==2.13.*",
        ),
        (CUDA_TORCH, {"FORCE_CUDA": "1"}, "+pt213cu130", "torch==2.13.*"),
    ],
)
def test_a_wheel_to_hand_out_says_which_torch_it_is_for(
    source, torch_build, variables, version, requires
):
    pretended = machine(source, torch_build)
    found, torch_ = metadata(source, **pretended, **variables)
    assert re.fullmatch(r"\d+\.\d+\.\d+" + re.escape(version), found)
    assert torch_ == requires


@pytest.mark.parametrize(
    ("torch_build", "kernels", "nvcc", "reason", "required"),
    [
        (CPU_TORCH, True, True, "torch 2.13.1+cpu is not a CUDA build", "RNNFAST_REQUIRE_EXT"),
        (CUDA_TORCH, True, False, "there is no nvcc; set CUDA_HOME", "RNNFAST_REQUIRE_EXT"),
        (CUDA_TORCH, False, True, "there are no kernels in csrc/cuda", "RNNFAST_WHEEL"),
    ],
)
def test_cuda_forced_where_it_cannot_be_built(source, torch_build, kernels, nvcc, reason, required):
    no_compiler = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}  # which saves the minutes
    variables = machine(source, torch_build, kernels, nvcc) | no_compiler | {"FORCE_CUDA": "1"}
    run = build(source, **variables)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    assert reason in said[0]
    assert "building the CPU extension alone" in said[0]
    assert "the C++ extension could not be compiled" in said[1]  # it did go on to that
    assert len(said) == 2
    run = build(source, **variables, **{required: "1"})
    assert run.returncode != 0
    assert reason in run.stderr.splitlines()[-1]


COMPILER = """#!/bin/sh
# Writes empty files, and leaves questions to the real one.
case "$*" in *" -o "*) ;; *) exec {answers} ;; esac
echo "$@" >> {log}
while [ $# -gt 0 ]; do
  case "$1" in -o | -MF) shift; : > "$1" ;; esac
  shift
done
"""


@pytest.mark.parametrize(
    ("release", "gpus", "asked", "compiled_for"),
    [
        ("13.0", "9.0", {}, "9.0a"),
        ("13.0", "9.0 8.6 7.5 8.0", {}, "8.0;9.0a"),
        ("13.0", "12.0 10.3", {}, "10.0+PTX"),
        ("13.0", "8.6", {"TORCH_CUDA_ARCH_LIST": "8.9"}, "8.9"),
        ("13.0", "8.6", {"RNNFAST_WHEEL": "1"}, "8.0;9.0a;10.0+PTX"),
        ("13.0", "8.6", {"FORCE_CUDA": "1"}, "8.0;9.0a;10.0+PTX"),
        ("13.0", "7.5", {}, None),
        ("13.0", "0.0", {}, None),
        ("12.4", "9.0", {}, None),
    ],
)
def test_with_a_gpu_the_cuda_kernels_are_built_or_left_out(
    source, release, gpus, asked, compiled_for
):
    """For the GPUs that are seen, in a wheel for all. A toolkit that this torch cannot use, or a
    GPU that they cannot run on, costs the CUDA kernels, not the CPU's."""
    log = source / "compiled"
    variables = machine(source, CUDA_TORCH) | {"GPUS": gpus, "FORCE_CUDA": ""}
    variables |= {"RNNFAST_WHEEL": "", "TORCH_CUDA_ARCH_LIST": ""} | asked
    answers = {
        "c++": 'g++ "$@"',
        "cc": 'gcc "$@"',
        "toolkit/bin/nvcc": f'echo "nvcc: release {release}, V{release}.1"',
    }
    for path, answer in answers.items():
        (source / path).write_text(COMPILER.format(answers=answer, log=log))
        (source / path).chmod(0o755)
    variables |= {"CXX": str(source / "c++"), "CC": str(source / "cc")}
    run = build(source, **variables)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    package = built(source)
    record = json.loads((package / "_build.json").read_text())
    assert record["extension"], run.stderr
    assert {p.name for p in package.glob("*.so")} == {"_C.abi3.so", "_direct_calls.abi3.so"}
    assert record["cuda"] == ("13.0" if compiled_for else None)
    assert record["cuda_arch_list"] == compiled_for
    log = log.read_text()
    (link,) = [line for line in log.splitlines() if "/_C.abi3.so" in line and " -shared " in line]
    assert ("kernel.o" in link) == ("-lc10_cuda" in link) == (compiled_for is not None)
    if compiled_for:
        assert said == []
        codes = set(re.findall(r"code=sm_(\w+)", log))
        assert codes == set(compiled_for.replace(".", "").removesuffix("+PTX").split(";"))
    elif release == "13.0":
        assert said == []
        why = {"7.5": "the GPU's compute capability is below 8.0", "0.0": "all devices are busy"}
        assert why[gpus] in record["why_not_cuda"]
    else:
        assert len(said) == 1
        assert "the CUDA kernels are left out: they could not be compiled" in said[0]
        assert "building the CPU extension alone" in said[0]
        assert "could not be compiled" in record["why_not_cuda"]
        assert build(source, **variables, RNNFAST_REQUIRE_EXT="1").returncode != 0
