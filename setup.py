"""Builds rnnfast. What is built, and under which environment variables:

  pip install --no-build-isolation .      the package and its C++ extension rnnfast._C, against the
                                          torch that is installed (an isolated build has none);
                                          with the CUDA kernels if that torch is a CUDA build, a GPU
                                          is visible and CUDA_HOME (or PATH) leads to nvcc
  FORCE_CUDA=1                            the CUDA kernels though no GPU is visible; FORCE_CUDA=0:
                                          never
  TORCH_CUDA_ARCH_LIST=LIST               the GPUs to compile for: if not set, those of
                                          8.0;9.0a;10.0+PTX whose generation is visible, or all of
                                          them with FORCE_CUDA=1 and in wheels
  RNNFAST_WHEEL=1                         a wheel to distribute: its version names torch and CUDA,
                                          such as 0.1.0+pt213cu130, and it requires that torch. So
                                          does FORCE_CUDA=1. A failed build is an error
  RNNFAST_REQUIRE_EXT=1                   a build without the extension is an error; otherwise a
                                          missing compiler or torch gives one sentence and a working
                                          install without kernels
  RNNFAST_SANITIZE=1                      AddressSanitizer and UBSan (see CONTRIBUTING.md); on a GPU
                                          a barrier between blocks ends the kernel if it waits long
  MAX_JOBS=N                              parallel compiler processes

Metadata and tool settings are in pyproject.toml, but for the dependencies.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
    )
except ImportError as error:
    torch = None
    no_torch = (
        f"torch could not be imported when rnnfast was built ({error}): install torch first, then "
        "pip install --no-build-isolation"
    )

BUILD_RECORD = "_build.json"  # beside the extension: what it was built for, or why it was not
# sm_80's code runs on 8.x, sm_100's on 10.x; 9.0a has what 9.0 may not use; PTX is for later ones.
CUDA_ARCH_LIST = "8.0;9.0a;10.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def reason_against_cuda() -> str | None:
    """Why the CUDA kernels are not built; None if they are."""
    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0 forbids it"
    if not any(Path("csrc/cuda").glob("*.cu")):
        return "there are no kernels in csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "there is no nvcc; set CUDA_HOME to a CUDA toolkit"
    if not flag("FORCE_CUDA") and not torch.cuda.is_available():
        return "no GPU is visible; FORCE_CUDA=1 builds without one"
    try:
        return None if arch_list() else "the GPU's compute capability is below 8.0"
    except RuntimeError as error:  # it is visible, and cannot be used
        return f"the GPU cannot be asked for its compute capability ({one_line(error)})"


def cxx_and_link_flags() -> tuple[list[str], list[str]]:
    cxx, link = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"], []
    # Where a loop lies in its cache lines is not left to what precedes it: up to 6 % of a call.
    cxx += ["-falign-functions=64"]
    if flag("RNNFAST_SANITIZE"):
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        # Variable tracking would take minutes for the time loops, whose functions are long.
        cxx += [*link, "-g1", "-fno-var-tracking", "-O1", "-fno-omit-frame-pointer"]
    return cxx, link


def extension(cuda: bool):
    folders = ["csrc", "csrc/cpu", *(["csrc/cuda"] if cuda else [])]
    sources = [source for folder in folders for source in Path(folder).glob("*.cpp")]
    cxx, link = cxx_and_link_flags()
    # Not linked against an OpenMP runtime: its symbols come from the one that torch carries, so
    # that there is a single thread pool.
    compile_args = {"cxx": [*cxx, "-fopenmp"]}
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list()
        sources += Path("csrc/cuda").glob("*.cu")
        compile_args["nvcc"] = ["-O3", "-Xcompiler=-fvisibility=hidden"]
        if flag("RNNFAST_SANITIZE"):
            compile_args["nvcc"] += ["-DRNNFAST_BOUNDED_BARRIERS"]
    return (CUDAExtension if cuda else CppExtension)(
        "rnnfast._C",
        sorted(map(str, sources)),
        depends=sorted(map(str, Path("csrc").rglob("*.*"))),  # a source distribution has them all
        extra_compile_args=compile_args,
        extra_link_args=link,
        py_limited_api=True,  # it uses nothing of Python: its ops register with torch
    )


def direct_calls():
    cxx, link = cxx_and_link_flags()
    return CppExtension(
        "rnnfast._direct_calls",
        ["csrc/python/direct_calls.cpp"],
        extra_compile_args={"cxx": cxx},
        extra_link_args=link,
        libraries=["torch_python"],  # for what it uses of Python, which is in the stable ABI
        py_limited_api=True,
    )


def arch_list() -> str:
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked or flag("FORCE_CUDA") or flag("RNNFAST_WHEEL"):
        return asked or CUDA_ARCH_LIST
    generations = {torch.cuda.get_device_capability(n)[0] for n in range(torch.cuda.device_count())}
    code = CUDA_ARCH_LIST.split(";")  # of generation 8, of 9, and of 10 and later
    needed = [code[min(n, 10) - 8] for n in sorted(generations) if n >= 8]
    return ";".join(dict.fromkeys(needed))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def build_ext_class(against_cuda: str | None, required: bool) -> type:
    class BuildOrFallBack(BuildExtension):
        """BuildExtension that records what it built, and survives a machine that cannot build."""

        def run(self) -> None:
            package = Path("." if self.inplace else self.build_lib) / "rnnfast"
            if flag("FORCE_CUDA") and against_cuda is not None:
                said = f"FORCE_CUDA=1, but the CUDA kernels cannot be built: {against_cuda}"
                if required:
                    raise SystemExit(f"rnnfast: {said}.")
                print(f"rnnfast: {said}; building the CPU extension alone.", file=sys.stderr)
            record = {
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "extension": True,
                "sanitized": flag("RNNFAST_SANITIZE"),
            }
            record |= self.build(against_cuda)
            package.mkdir(parents=True, exist_ok=True)
            (package / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n")

        def build(self, against_cuda: str | None) -> dict[str, object]:
            before = self.inplace, self.compiler  # which super().run() changes
            try:
                self.look_for_compiler()
                super().run()
            except (Exception, SystemExit) as error:
                if required:
                    raise
                if against_cuda is None:
                    why = f"they could not be compiled ({one_line(error)})"
                    said = f"the CUDA kernels are left out: {why}"
                    print(f"rnnfast: {said}; building the CPU extension alone.", file=sys.stderr)
                    self.inplace, self.compiler = before
                    vars(self.extensions[0]).update(vars(extension(cuda=False)))
                    return self.build(why)
                why = f"the C++ extension could not be compiled ({one_line(error)})"
                print(f"rnnfast: {why}; installing without the kernels.", file=sys.stderr)
                return {"extension": False, "error": why}
            if against_cuda is None:
                return {"cuda": torch.version.cuda, "cuda_arch_list": arch_list()}
            return {"cuda": None, "cuda_arch_list": None, "why_not_cuda": against_cuda}

        def build_extensions(self) -> None:
            # A Python that was linked with a search path of its own, as conda's, hands it on to
            # what it builds; where a wheel is installed, that folder may be anything.
            flags = (sysconfig.get_config_var("LDFLAGS") or "").split()
            own = {flag for flag in flags if flag.startswith("-Wl,-rpath")}
            for linker in ("linker_so", "linker_so_cxx"):
                command = getattr(self.compiler, linker, None) or []
                setattr(self.compiler, linker, [word for word in command if word not in own])
            super().build_extensions()

        @staticmethod
        def look_for_compiler() -> None:
            # Ninja's own error would not say that it is missing.
            compiler = shlex.split(get_cxx_compiler())[0]
            if shutil.which(compiler) is None:
                why = f"no C++ compiler: {compiler} was not found; install g++ or set CXX"
                raise RuntimeError(why)
            asked = subprocess.run([compiler, "--version"], capture_output=True, text=True)
            if "clang" in asked.stdout:  # it would load with an unresolved symbol, or a second pool
                why = f"{compiler} is clang, whose OpenMP torch does not carry; set CXX=g++"
                raise RuntimeError(why)

        def get_outputs(self) -> list[str]:
            package = Path(self.build_lib) / "rnnfast"
            built = [path for path in super().get_outputs() if Path(path).exists()]
            return [*built, str(package / BUILD_RECORD)]

    return BuildOrFallBack


def digits(version: str) -> str:
    return "".join(version.split(".")[:2])


options = {"bdist_wheel": {"py_limited_api": "cp310"}}
torch_requirement = "torch>=2.11"
if torch is None:
    if flag("RNNFAST_REQUIRE_EXT") or flag("RNNFAST_WHEEL"):
        raise SystemExit(f"rnnfast: {no_torch}")
    print(f"rnnfast: {no_torch}; installing without the kernels.", file=sys.stderr)
    extensions, commands = [], {}
else:
    against_cuda = reason_against_cuda()
    handed_out = flag("RNNFAST_WHEEL") or (flag("FORCE_CUDA") and against_cuda is None)
    required = flag("RNNFAST_REQUIRE_EXT") or handed_out
    extensions = [extension(cuda=against_cuda is None), direct_calls()]
    commands = {"build_ext": build_ext_class(against_cuda, required)}
    if handed_out:
        # Whoever gets the file must see from its name what it needs, and pip must hold them to it:
        # torch's C++ ABI changes with each minor version. An install from source stays 0.1.0 with
        # any torch: it was built for the torch beside it, may have fallen back to Python, which
        # runs with each, and is rebuilt in place (-e) after torch was changed.
        built_for = f"cu{digits(torch.version.cuda)}" if against_cuda is None else "cpu"
        options["egg_info"] = {"tag_build": f"+pt{digits(torch.__version__)}{built_for}"}
        torch_requirement = f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"
setup(
    ext_modules=extensions,
    cmdclass=commands,
    options=options,
    install_requires=[torch_requirement, "numpy"],  # torch warns where there is no numpy
)
