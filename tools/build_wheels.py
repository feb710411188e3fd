"""Builds and checks the wheels to hand out: one for each minor version and build of torch.

    python tools/build_wheels.py                      all of them, into dist/
    python tools/build_wheels.py --only pt213cu130    one: the full CUDA build, compiled, linked,
                                                      its symbols resolved against that torch

No GPU is needed. Each wheel is built in a new virtual environment with its torch, and checked:

- its file name and metadata say which torch it is for; it has no shared object but the extension,
  which leaves torch's and CUDA's libraries to torch's packages, and has device code if it should;
- pip installs it beside its torch; every symbol resolves; a layer on the CPU equals nn.RNN;
- the wheels built before it say, beside its torch, in one sentence that they are for another, and
  compute by the fallback.

A table is printed last, and the exit status is 0 only if every wheel passed. Logs are in OUT/logs.

Where torch's builds come from is pip's configuration (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). CUDA
wheels need a CUDA toolkit of their torch's major version (CUDA_HOME), and TORCH_CUDA_ARCH_LIST may
name other GPUs than setup.py's default. An environment with a CUDA build of torch takes 5 GB; it
is deleted before the next one is made, unless --environments names a folder to keep them in.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
#: Versions of torch, and the CUDA of the registry's build, whose version has no local part there
#: (those of the others are "2.13.0+cpu").
TORCH = {
    "2.11.0": "cu130",
    "2.12.1": "cu130",
    "2.13.0": "cu130",
    "2.14.1": "cu130",
    "2.15.0": "cu132",
}

#: All that an extension may ask the loader for: the system's libraries and what torch loads.
OBJECTS = ["rnnfast/_C.abi3.so", "rnnfast/_direct_calls.abi3.so"]
SYSTEM = {"libc", "libm", "libpthread", "libdl", "libgcc_s", "libstdc++"}
TORCH_LIBRARIES = {"libc10", "libtorch", "libtorch_cpu", "libtorch_python"}
CUDA_LIBRARIES = {"libc10_cuda", "libtorch_cuda", "libcudart"}

USE = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rnnfast
    torch.manual_seed(0)
    theirs, ours = torch.nn.RNN(5, 9, 2), rnnfast.RNN(5, 9, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 5)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
print(json.dumps({
    "torch": torch.__version__,
    "error": rnnfast.backends.extension_error,
    "runs": rnnfast.backends.chosen(x),
    "warnings": [str(w.message) for w in caught if w.category is rnnfast.FallbackWarning],
}))
"""


class Failed(Exception):
    """A wheel that cannot be built or does not hold what it promises; says why."""


@dataclass
class Target:
    """A wheel to build, and what became of it."""

    torch: str  #: version, without local part
    build: str  #: "cpu", or "cu" and the digits of the CUDA version
    wheel: Path | None = None
    facts: dict[str, str] = field(default_factory=dict)
    result: str = "not built"

    @property
    def minor(self) -> str:
        """Of torch: "2.13"."""
        return ".".join(self.torch.split(".")[:2])

    @property
    def name(self) -> str:
        """Local part of the wheel's version."""
        return f"pt{self.minor.replace('.', '')}{self.build}"

    @property
    def requirement(self) -> str:
        """What pip is asked for; ``===`` excludes builds that have a local part."""
        cpu = self.build == "cpu"
        return f"torch=={self.torch}+cpu" if cpu else f"torch==={self.torch}"


def run(log: Path, command: list[str | Path], cwd: Path, **variables: str) -> str:
    """Run a command, with its output into the log; returns what it printed last."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n")
        file.flush()
        begin = file.tell()
        code = subprocess.run(
            command, cwd=cwd, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, check=False,
        ).returncode  # fmt: skip
    lines = [line.strip() for line in log.read_bytes()[begin:].decode().splitlines()]
    if code:
        ours = [line for line in lines if line.startswith("rnnfast:")]
        errors = [line for line in lines if re.search(r"\berror: ", line, re.IGNORECASE)]
        raise Failed((ours or errors or lines or [f"exit status {code}"])[0])
    return lines[-1] if lines else ""


# -------------------------------------------------------------------------------- build and check


def environment(target: Target, folder: Path, log: Path) -> Path:
    """Make a virtual environment with the target's torch; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(log, [sys.executable, "-m", "venv", folder], ROOT)
        needs = [target.requirement, "setuptools>=77", "ninja", "numpy"]
        run(log, [python, "-m", "pip", "install", "-q", *needs], ROOT)
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    version, cuda = run(log, [python, "-c", code], folder).split()
    found = "cpu" if cuda == "None" else "cu" + "".join(cuda.split(".")[:2])
    if not version.startswith(target.torch) or found != target.build:
        raise Failed(f"{target.requirement} is torch {version}, CUDA {cuda}")
    return python


def build(target: Target, python: Path, work: Path, out: Path, log: Path) -> Path:
    """Build the wheel from a copy of the source, where no earlier build left anything."""
    source, built = work / "source", work / "wheel"
    left = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", ".*", "build", "*.egg-info")
    source.mkdir()
    for path in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / path, source)
    for path in ("csrc", "rnnfast"):
        shutil.copytree(ROOT / path, source / path, ignore=left)
    run(log, [python, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps",
              "-w", built, source],
        work, RNNFAST_WHEEL="1", FORCE_CUDA=str(int(target.build != "cpu")))  # fmt: skip
    (wheel,) = built.iterdir()
    return Path(shutil.move(wheel, out / wheel.name))


def inspect(target: Target, wheel: Path) -> dict[str, str]:
    """Check the file itself; returns its size and what it needs of the system."""

    def hold(promise: bool, otherwise: str) -> None:
        if not promise:
            raise Failed(otherwise)

    cuda = target.build != "cpu"
    pattern = rf"rnnfast-[\d.]+\+{target.name}-cp310-abi3-\w+\.whl"
    hold(re.fullmatch(pattern, wheel.name) is not None, f"it is named {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        requires = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
        hold(f"torch=={target.minor}.*" in requires, f"it requires {requires}")
        record = json.loads(archive.read("rnnfast/_build.json"))
        objects = [name for name in files if re.search(r"\.so\b", name)]
        hold(sorted(objects) == OBJECTS, f"its shared objects are {objects}")
        libraries: list[Any] = [ELFFile(io.BytesIO(archive.read(name))) for name in OBJECTS]
    needed: set[str] = set()
    for library in libraries:
        tags = list(library.get_section_by_name(".dynamic").iter_tags())
        paths = [t.entry.d_tag for t in tags if t.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        hold(not paths, f"it has a search path of its own: {paths}")
        needed |= {t.needed.split(".so")[0] for t in tags if t.entry.d_tag == "DT_NEEDED"}
    known = SYSTEM | TORCH_LIBRARIES | (CUDA_LIBRARIES if cuda else set())
    strange = {n for n in needed - known if not n.startswith("ld-linux")}
    hold(not strange, f"it needs {sorted(strange)}")
    section = libraries[0].get_section_by_name  # of the one with the kernels
    # Linked statically, the runtime would be here: its functions defined, and nothing missing.
    launches = [s for s in section(".dynsym").iter_symbols()
                if s.name.startswith("cudaLaunch")]  # fmt: skip
    borrowed = bool(launches) and all(s["st_shndx"] == "SHN_UNDEF" for s in launches)
    hold(borrowed == ("libcudart" in needed) == cuda, "CUDA's runtime is not taken from torch")
    device_code = section(".nv_fatbin") is not None
    hold(device_code == cuda, f"device code is {'present' if device_code else 'missing'}")
    versions = [
        tuple(map(int, re.findall(r"\d+", version.name)))
        for library in libraries
        for _, every in library.get_section_by_name(".gnu.version_r").iter_versions()
        for version in every
        if version.name.startswith("GLIBC_")
    ]
    return {
        "size": f"{wheel.stat().st_size / 1e6:.2f} MB",
        "GPUs": record.get("cuda_arch_list") or "none",
        "glibc": ".".join(map(str, max(versions))),
    }


def use(python: Path, work: Path, log: Path, packages: Path | None = None) -> dict[str, Any]:
    """Import rnnfast, run a layer, compare it with nn.RNN; returns what happened."""
    # ctypes, by which torch loads libraries, binds all symbols at once; the variable says it again.
    variables = {"LD_BIND_NOW": "1", "PYTHONPATH": str(packages or "")}
    found: dict[str, Any] = json.loads(run(log, [python, "-c", USE], work, **variables))
    return found


def load(target: Target, wheel: Path, python: Path, work: Path, log: Path) -> None:
    """Install the wheel as a user would, and run it."""
    run(log, [python, "-m", "pip", "uninstall", "-q", "-y", "rnnfast"], work)
    # With no index, an error if the torch that is there is not the one that the wheel requires.
    run(log, [python, "-m", "pip", "install", "-q", "--no-index", wheel], work)
    found = use(python, work, log)
    if found["error"] or found["warnings"] or found["runs"] != "cpu":
        raise Failed(f"it does not run beside its torch: {found}")


def beside(other: Target, target: Target, python: Path, work: Path, log: Path) -> None:
    """Run another target's wheel beside this target's torch."""
    packages = work / other.name
    run(log, [python, "-m", "pip", "install", "-q", "--no-deps", "--target", packages,
              str(other.wheel)], work)  # fmt: skip
    found = use(python, work, log, packages)
    if other.minor == target.minor and other.build == "cpu":  # it needs nothing of CUDA
        expected, runs = "", "cpu"
    elif other.minor == target.minor:
        expected, runs = "the C++ extension was built for CUDA ", "torch"
    else:
        expected, runs = f"the C++ extension was built for torch {other.torch}", "torch"
    told = [expected in warning for warning in found["warnings"]] == [True] * bool(expected)
    if not told or bool(found["error"]) != bool(expected) or found["runs"] != runs:
        raise Failed(f"{other.name} beside this torch: {found}")


def make(target: Target, earlier: list[Target], out: Path, environments: Path | None) -> None:
    """Build and check one wheel, and try the earlier ones beside its torch."""
    begin = time.monotonic()
    log = out / "logs" / f"{target.name}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-") as folder:
        work = Path(folder)
        try:
            kept = environments / target.name if environments else work / "environment"
            python = environment(target, kept, log)
            wheel = build(target, python, work, out, log)
            target.facts = inspect(target, wheel)
            load(target, wheel, python, work, log)
            target.wheel = wheel
            for other in earlier:
                beside(other, target, python, work, log)
            target.result = "passed"
        except Failed as why:
            target.result = f"failed: {why}"
    target.facts["minutes"] = f"{(time.monotonic() - begin) / 60:.1f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # CUDA first: a CUDA wheel is then tried beside the CPU build of the same torch.
    every = [Target(torch, build) for torch, cuda in TORCH.items() for build in (cuda, "cpu")]
    targets = {target.name: target for target in every}
    parser.add_argument("--only", action="append", metavar="NAME", choices=targets,
                        help=f"of {', '.join(targets)}; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheels")
    parser.add_argument("--environments", type=Path, metavar="FOLDER",
                        help="keep the virtual environments there")  # fmt: skip
    options = parser.parse_args()
    out: Path = options.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    kept = options.environments.resolve() if options.environments else None
    asked = [t for name, t in targets.items() if not options.only or name in options.only]
    for i, target in enumerate(asked):
        make(target, [t for t in asked[:i] if t.wheel], out, kept)
        print(f"{target.name}: {target.result}", flush=True)

    columns = ("size", "GPUs", "glibc", "minutes")
    table = Table("wheel", *columns, "result")
    for target in asked:
        row = [target.facts.get(column, "") for column in columns]
        table.add_row(target.name, *row, target.result)
    Console(width=120, highlight=False).print(table)
    if any(target.result != "passed" for target in asked):
        sys.exit(1)


if __name__ == "__main__":
    main()
