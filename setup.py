"""Builds rnnfast. What is built, and under which environment variables:

  pip install --no-build-isolation .      the package and its C++ extension rnnfast._C, against the
                                          torch that is installed (isolation would fetch another)
  RNNFAST_REQUIRE_EXT=1                   a build without the extension is an error; otherwise a
                                          missing compiler or torch gives one sentence and a working
                                          pure-PyTorch install
  RNNFAST_SANITIZE=1                      AddressSanitizer and UBSan (see CONTRIBUTING.md)
  MAX_JOBS=N                              parallel compiler processes

Metadata and tool settings are in pyproject.toml.
"""

import json
import os
import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    torch = None
    no_torch = (
        f"torch could not be imported when rnnfast was built ({error}): install torch first, then "
        "pip install --no-build-isolation"
    )

BUILD_RECORD = "_build.json"  # beside the extension: what it was built for, or why it was not


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def extensions() -> list:
    if torch is None:
        return []
    compile_args = ["-O3", "-g0", "-fopenmp", "-Wall", "-fvisibility=hidden"]
    # Not linked against an OpenMP runtime: its symbols come from the one that torch carries, so
    # that there is a single thread pool.
    link_args: list[str] = []
    if flag("RNNFAST_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        # Variable tracking would take minutes for the time loops, whose functions are long.
        debug = ["-g1", "-fno-var-tracking", "-O1", "-fno-omit-frame-pointer"]
        compile_args += [*sanitize, *debug]
        link_args += sanitize
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if "cuda" not in path.parts)
    return [
        CppExtension(
            "rnnfast._C",
            sources,
            extra_compile_args={"cxx": compile_args},
            extra_link_args=link_args,
            py_limited_api=True,  # it uses nothing of Python: its ops register with torch
        )
    ]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def build_ext_class() -> type:
    class BuildOrFallBack(BuildExtension):
        """BuildExtension that records what it built, and survives a machine that cannot build."""

        def run(self) -> None:
            record = {
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "extension": True,
                "sanitized": flag("RNNFAST_SANITIZE"),
            }
            inplace = self.inplace  # super().run() clears it meanwhile
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if flag("RNNFAST_REQUIRE_EXT"):
                    raise
                why = f"the C++ extension could not be compiled ({one_line(error)})"
                record |= {"extension": False, "error": why}
                print(f"rnnfast: {why}; installing the pure-PyTorch fallback.", file=sys.stderr)
            package = Path("." if inplace else self.build_lib) / "rnnfast"
            package.mkdir(parents=True, exist_ok=True)
            (package / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n")

        def get_outputs(self) -> list[str]:
            package = Path(self.build_lib) / "rnnfast"
            built = [path for path in super().get_outputs() if Path(path).exists()]
            return [*built, str(package / BUILD_RECORD)]

    return BuildOrFallBack


if torch is None:
    if flag("RNNFAST_REQUIRE_EXT"):
        raise SystemExit(f"rnnfast: {no_torch}")
    print(f"rnnfast: {no_torch}; installing the pure-PyTorch fallback.", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": build_ext_class()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
