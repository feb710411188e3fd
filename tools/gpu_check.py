"""Everything that needs a GPU, in one command: build, tests, sanitizers, times against cuDNN.

    python tools/gpu_check.py FOLDER            on a machine with an NVIDIA GPU; within 8 minutes
    python tools/gpu_check.py FOLDER --dry-run  every step on the CPU, kernels interpreted or
                                                emulated, tiny sizes; about two minutes

Both of our GPU backends are checked: the kernels in CUDA C++, which the build needs nvcc for (else
it says so, fails, and the rest goes on with Triton's alone), and Triton's. compute-sanitizer, where
it is found, watches every variant of the CUDA kernels. The grid (gpu_timing.py) times one layer,
tanh: inference and a training step, dense and packed, float32 with TF32 forbidden and allowed for
both sides, and bfloat16; then flashrnn and JAX where they are installed, and one step beside bare
barriers (barriers.cu).

FOLDER receives ``results.json`` (machine, versions, commit, steps, one row per cell and contender),
``grid.png``, ``sine_*.png`` and a log of each step; short tables are printed last (gpu_report.py),
with the rows that GPU_WINS of rnnfast/backends.py could get. ``gpu_wins.json`` has those of the
backends whose tests passed: with RNNFAST_GPU_WINS set to it, rnnfast takes them on this machine.

Each step has its own time limit (the grid's is kept free for it); what it cuts off is reported as
cut off, and a step that cannot be taken is skipped by name. The exit status is 0 only if every step
that was not skipped passed; the two after the grid, other packages and the rest of the tests
(pytest tests -m gpu), get what time is left, and are no failure for want of it. No network is
needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import gpu_timing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # rnnfast is built in place, and need not be installed
TOTAL_SECONDS = 460
NOT_REACHED, PASSED, CUT_OFF = "not reached", "passed", "cut off by its time limit"
# With TF32 a program owns 16 rows instead of one, and the interpreter has a tenth of the work.
INTERPRETED_SINE = (
    "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32';"
    "from rnnfast.sine import main; main(['--epochs', '1'])"
)
WINS = "gpu_wins.json"
WATCHED = "RNNFAST_CHECK_WATCHED"  # set for the variants under a sanitizer
GPU_TESTS = ("tests/test_cuda.py", "tests/test_gpu_kernels.py", "tests/test_triton.py")


@dataclass
class Step:
    """One step of the check, and how it ended."""

    name: str
    command: list[str]
    seconds: int
    variables: dict[str, str] = field(default_factory=dict)
    skip: str | None = None  # why it cannot be taken
    if_time: bool = False  # no failure where there was too little
    outcome: str = NOT_REACHED
    took: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the whole check fails by it."""
        late = self.outcome in (NOT_REACHED, CUT_OFF)
        return self.skip is None and self.outcome != PASSED and not (late and self.if_time)

    def run(self, folder: Path, limit: float) -> None:
        """Run it within its limit and what is left of the whole, its output to a log."""
        if self.skip is not None:
            self.outcome = f"skipped: {self.skip}"
            print(f"--- {self.name}: {self.outcome}", flush=True)
            return
        begin = time.monotonic()
        log = folder / f"{self.name.replace(' ', '_')}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        always = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "RNNFAST_REQUIRE_EXT": "1"}
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=os.environ | always | self.variables, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(min(self.seconds, limit))
                self.outcome = PASSED if code == 0 else f"failed (exit status {code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                self.outcome = CUT_OFF
        self.took = time.monotonic() - begin
        lines = log.read_text(errors="replace").strip().splitlines()
        print(f"--- {self.name}: {self.outcome}, {self.took:.0f} s", flush=True)
        for line in lines[-15 if self.outcome != PASSED else -3 :]:
            print(f"    {line[:160]}", flush=True)


def build_step() -> Step:
    """Build the extension in place, for the GPUs that are visible, whatever an image asks for.

    It need not succeed: without the CUDA kernels there is still Triton's.
    """
    variables = {"RNNFAST_REQUIRE_EXT": "0", "FORCE_CUDA": "", "TORCH_CUDA_ARCH_LIST": ""}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Step("build", command, 200, variables)


def cuda_home() -> str | None:
    """The CUDA toolkit, where no variable names it: an nvcc on PATH may be a script, which torch,
    that takes the folder above its own, would not see through.
    """
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return None
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in (*homes, Path("/usr/local/cuda")):
        if all((home / file).exists() for file in ("bin/nvcc", "include/cuda_runtime_api.h")):
            return str(home)
    return None


def why_no_cuda_kernels() -> str | None:
    """Why the build left the CUDA kernels out; None if it has them."""
    try:
        record = json.loads((ROOT / "rnnfast" / "_build.json").read_text())
    except (OSError, ValueError):
        return "there is no build"
    return None if record.get("cuda") else f"{record.get('why_not_cuda', 'no reason recorded')}"


def dry_steps(folder: Path) -> list[Step]:
    """Every step's rehearsal, on the CPU."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    me = [python, str(Path(__file__).resolve()), str(folder), "--dry-run", "--step"]
    interpreted, emulated = {"TRITON_INTERPRET": "1"}, {"RNNFAST_EMULATE_CUDA": "1"}
    both = interpreted | emulated
    few = "not triton and (deterministic or infinity or block_of_lengths)"
    return [
        # The first of them also compiles the emulated kernels, where that was not done before.
        Step("cuda tests", [*pytest, "tests/test_gpu_kernels.py", "-k", few], 200, emulated),
        Step("every variant", [*me, "variants"], 60, emulated),
        Step("step latency", [*me, "latency"], 60, emulated),
        Step("grid", [*me, "grid"], 120, both),
        Step("triton tests", [*pytest, "tests/test_triton.py", "-k", "every"], 120, interpreted),
        Step("sine triton", [python, "-c", INTERPRETED_SINE], 120,
             interpreted | {"RNNFAST_BACKEND": "triton"}),
        Step("rivals", [*me, "rivals"], 60, both),  # each refused by name where it is not there
        Step("contract tests", [*pytest, "tests", "-k", "(triton or cuda) and outputs_have"], 120,
             both),
    ]  # fmt: skip


def gpu_steps(folder: Path, no_cuda: str | None) -> list[Step]:
    """What is to be done on a GPU once the extension is built: is it right, then how fast."""
    python = sys.executable
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if _has("xdist") else []
    one_thread = {"OMP_NUM_THREADS": "1"}  # each worker has a pool of its own
    if _has("pytest_timeout"):  # a kernel that never ends is named
        workers += ["--timeout", "40", "--timeout-method", "thread"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "-m", "gpu"]
    me = [python, str(Path(__file__).resolve()), str(folder), "--step"]
    rest = [word for file in GPU_TESTS for word in ("--ignore", file)]
    without = ["-k", "not cuda"] if no_cuda else []

    def sine(backend: str, skip: str | None) -> Step:
        plot = str(folder / f"sine_{backend}.png")
        command = [python, "-m", "rnnfast.sine", "--device", "cuda", "--plot", plot]
        return Step(f"sine {backend}", command, 30, {"RNNFAST_BACKEND": backend}, skip)

    return [
        Step("cuda tests", [*pytest, *GPU_TESTS[:2], "-k", "not triton"], 90, one_thread, no_cuda),
        Step("triton tests", [*pytest, *GPU_TESTS[1:], "-k", "triton"], 80, one_thread),
        Step("every variant", [*me, "variants"], 30, skip=no_cuda),
        Step("step latency", [*me, "latency"], 30, skip=no_cuda),
        sine("cuda", no_cuda),
        sine("triton", None),
        *(sanitizer_step(tool, [*me, "variants"], no_cuda)
          for tool in ("memcheck", "racecheck", "synccheck")),
        Step("grid", [*me, "grid"] + ["--without-cuda"] * bool(no_cuda), 160),
        rivals_step([*me, "rivals"] + ["--without-cuda"] * bool(no_cuda)),
        Step("contract tests", [*pytest, "tests", *rest, *without], 150, one_thread, if_time=True),
    ]  # fmt: skip


def sanitizer_step(tool: str, command: list[str], no_cuda: str | None) -> Step:
    """One of compute-sanitizer's tools on every variant; ATen's own kernels are not watched."""
    name = "compute-sanitizer"
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    found = shutil.which(name) or (str(usual) if usual.exists() else None)
    skip = no_cuda or (None if found else f"there is no {name}")
    # Libraries ask the driver for entry points that it lacks: no errors of ours.
    watch = [found or name, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no",
             "--kernel-name", "kns=time_loop"]  # fmt: skip
    # A tensor that is an allocation of its own has bounds that memcheck knows.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", WATCHED: "1"}
    return Step(tool, watch + command, 60, variables, skip)


def rivals_step(command: list[str]) -> Step:
    """Packages to be timed beside ours, if any of them is installed."""
    skip = None if _has("flashrnn") or _has("jax") else "neither flashrnn nor jax is installed"
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX would take most of the memory
    return Step("rivals", command, 60, share, skip, if_time=True)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ----------------------------------------------------------------- steps that this file runs itself


def cuda_ops(dry_run: bool) -> Any:
    """The namespace of the CUDA kernels' own ops; for a dry run they are put under CPU tensors."""
    import torch

    import rnnfast  # noqa: F401  # defines the ops

    if not dry_run:
        return torch.ops.rnnfast
    import cuda_emulation

    cuda_emulation.install()
    return torch.ops.rnnfast_emulated


def variants(ops: Any, dry_run: bool) -> bool:
    """Run every variant of the CUDA kernels on a small layer, forward and backward.

    Dense, and packed in reverse. On a GPU some take more rows than run at once, so that a group
    walks several tiles of them. A sanitizer gets the kernels alone: comparing the numbers, and the
    products of the backward, would be most of the work, and a grid that fills the device no longer
    fit, as the tools take registers. Where a block does not, either, its variant is named.
    """
    import torch
    from helpers import check_layer, run_layer
    from test_cuda import DTYPES, VARIANTS, hidden_sizes

    import rnnfast

    device = "cpu" if dry_run else "cuda"
    watched = WATCHED in os.environ
    run: Any = partial(run_layer, mask=[False, True, False, False, False])
    run = run if watched else check_layer
    taken = 0
    clusters = dry_run or torch.cuda.get_device_capability() >= (9, 0)
    many = [("f32", "grid 512"), ("bf16", "block 64"), ("bf16", "cluster 512")]
    with rnnfast.backend("cuda"):
        for numbers, name in VARIANTS:
            if name.startswith("cluster") and not clusters:
                continue
            ops._cuda_use_variant(name)
            tf32 = numbers == "tf32"
            with gpu_timing.products_in("float32 tf32" if tf32 else "float32 ieee"):
                H, dtype = hidden_sizes(name)[-1], DTYPES[numbers]
                eps = {"eps": 2.0**-10} if tf32 and not watched else {}
                try:
                    run(device, dtype, 3, 5, 3, H, **eps)
                    run(device, dtype, 3, 5, 20, H, lengths=[3, 2, 2, 1, 1], reverse=True, **eps)
                except RuntimeError as error:
                    if not (watched and "too many resources" in str(error)):
                        raise
                    print(f"{numbers} {name} is not watched: {error}".splitlines()[0], flush=True)
                    continue
                if (numbers, name) in many and not dry_run and not watched:
                    run(device, dtype, 2, 20000, 1, H, **eps)
            print(f"{numbers} {name}", flush=True)
            taken += 1
    if not dry_run:
        torch.cuda.synchronize()
    ops._cuda_use_variant("")
    print(f"{taken} of {len(VARIANTS)} variants")
    return taken > 0


def take(step: str, folder: Path, dry_run: bool, with_cuda: bool, skip: int) -> bool:
    """Run one of the steps of this file; return whether it passed."""
    sys.path.insert(1, str(ROOT / "tests"))  # helpers and the emulation
    ops = cuda_ops(dry_run) if with_cuda else None
    if step == "variants":
        return variants(ops, dry_run)
    if step == "latency":
        return gpu_timing.latency(folder, dry_run, ops)
    timed = gpu_timing.grid if step == "grid" else gpu_timing.rivals
    return timed(folder, dry_run, with_cuda, skip)


# ---------------------------------------------------------------------------------------- the whole


def results_of(folder: Path, dry_run: bool, steps: list[Step]) -> dict[str, Any]:
    """Everything that was found, and what it was found with."""
    import torch
    import triton

    import rnnfast

    commit = os.environ.get("RNNFAST_COMMIT")  # of a copy without its history
    if shutil.which("git"):
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or commit
    latency = folder / "latency.json"
    return {
        "dry_run": dry_run,
        "gpu": None if dry_run else torch.cuda.get_device_name(),
        "capability": None if dry_run else torch.cuda.get_device_capability(),
        "machine": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if dry_run else torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "triton": triton.__version__,
        "rnnfast": rnnfast.__version__,
        "commit": commit,
        "steps": {step.name: step.outcome for step in steps},
        "latency": json.loads(latency.read_text()) if latency.exists() else None,
        "rivals": gpu_report.read_rows(folder / "rivals.jsonl"),
        "rows": gpu_report.read_rows(folder / "grid.jsonl"),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for JSON, plots and logs")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--step", choices=("variants", "latency", "grid", "rivals"),
                        help="one step alone; variants: for compute-sanitizer")  # fmt: skip
    parser.add_argument("--without-cuda", action="store_true", help="Triton's kernels alone")
    parser.add_argument("--skip", type=int, default=0, metavar="N",
                        help="leave out a grid's first N cells, and add to its file")  # fmt: skip
    options = parser.parse_args()
    folder, dry_run = options.folder.resolve(), options.dry_run
    folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        sys.exit(not take(options.step, folder, dry_run, not options.without_cuda, options.skip))

    needed = ("torch", "triton", "pytest", "hypothesis", "rich", "matplotlib")
    missing = [m for m in needed if not _has(m)]
    if missing:
        sys.exit(f"gpu_check needs {', '.join(missing)}")
    if not dry_run:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_check: torch sees no GPU; --dry-run rehearses every step on the CPU")
    os.environ.pop("RNNFAST_GPU_WINS", None)  # it may name the file that goes
    for name in ("results.json", "grid.jsonl", "rivals.jsonl", "latency.json", WINS):
        (folder / name).unlink(missing_ok=True)
    if not dry_run and (home := cuda_home()):
        os.environ["CUDA_HOME"] = home
    until = time.monotonic() + TOTAL_SECONDS
    build = build_step()
    build.run(folder, TOTAL_SECONDS)
    no_cuda = None if dry_run else why_no_cuda_kernels()
    if no_cuda is not None:
        build.outcome = f"failed: no CUDA kernels ({no_cuda}); going on with Triton's alone"
        print(f"--- build: {build.outcome}", flush=True)
    steps = dry_steps(folder) if dry_run else gpu_steps(folder, no_cuda)
    for n, step in enumerate(steps, 1):
        kept = sum(later.seconds for later in steps[n:] if later.name == "grid")
        left = until - time.monotonic() - (0 if dry_run else kept)
        if left > 5:
            step.run(folder, left)
        ended = {"steps": {s.name: s.outcome for s in (build, *steps)}}
        (folder / "results.json").write_text(json.dumps(ended) + "\n")  # should this be cut off
    done = [build, *steps]
    results = results_of(folder, dry_run, done)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    cells, found = gpu_timing.grid_cells(dry_run), gpu_report.ratios(results["rows"])
    suggested = [] if dry_run else gpu_report.suggestions(found, cells, results["capability"])
    gpu_report.report(results, cells, found, suggested, folder / "grid.png")
    wins = gpu_report.wins(results, suggested)
    (folder / WINS).write_text(json.dumps(wins, indent=1) + "\n")
    for step in done:
        print(f"{step.name:16} {step.outcome} ({step.took:.0f} s)")
    if wins["wins"]:
        print(f"To use these kernels on this machine: export RNNFAST_GPU_WINS={folder / WINS}")
    if any(step.failed for step in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
