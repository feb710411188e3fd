"""Everything that needs a GPU, in one command: build, tests, the sine task, times against cuDNN.

    python tools/gpu_check.py FOLDER            on a machine with an NVIDIA GPU; within 8 minutes
    python tools/gpu_check.py FOLDER --dry-run  every step on the CPU, kernels interpreted, tiny

FOLDER receives ``results.json`` (machine, versions, commit, one row per shape, dtype, contender and
figure), ``grid.png``, ``sine.png`` and a log of each step; a short table is printed last. Each step
has its own time limit, and what it cuts off is reported as cut off. The exit status is 0 only if
every step passed. No network is needed.

The grid times one layer, tanh: inference and a training step, dense and packed, by CUDA events, the
contenders taking turns; and the host's time for one call of the sine task's size. float32 is timed
with TF32 forbidden and allowed for both sides.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 460


@dataclass(frozen=True)
class Shape:
    """One layer's call: sequences, steps, features, units."""

    B: int
    T: int
    I: int
    H: int
    packed: bool


# The sine task first; then the corners of H 16..256, B 1..512, T 10..1000.
GRID = [
    (190, 10, 1, 16), (64, 100, 64, 64), (1, 1000, 16, 16), (64, 100, 128, 128), (1, 100, 64, 256),
    (512, 100, 64, 64), (64, 100, 256, 256), (512, 10, 16, 16), (64, 1000, 64, 64),
    (512, 100, 128, 128), (1, 1000, 128, 128), (32, 100, 192, 192), (512, 10, 256, 256),
    (16, 1000, 32, 32),
]  # fmt: skip
DRY_GRID = [(3, 2, 1, 16), (2, 2, 20, 20)]
# With TF32 a program owns 16 rows instead of one, and the interpreter has a tenth of the work.
INTERPRETED_SINE = (
    "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32';"
    "from rnnfast.sine import main; main(['--epochs', '1'])"
)
PRECISIONS = ("float32 ieee", "float32 tf32", "bfloat16")


@dataclass
class Step:
    """One step of the check, and how it ended."""

    name: str
    command: list[str]
    seconds: int
    variables: dict[str, str]
    outcome: str = "not run"
    took: float = 0.0

    def run(self, folder: Path, limit: float) -> None:
        """Run it within its limit and what is left of the whole, its output to a log."""
        begin = time.monotonic()
        log = folder / f"{self.name.replace(' ', '_')}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | self.variables
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(min(self.seconds, limit))
                self.outcome = "passed" if code == 0 else f"failed (exit status {code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                self.outcome = "cut off by its time limit"
        self.took = time.monotonic() - begin
        lines = log.read_text(errors="replace").strip().splitlines()
        print(f"--- {self.name}: {self.outcome}, {self.took:.0f} s", flush=True)
        for line in lines[-15 if self.outcome != "passed" else -3 :]:
            print(f"    {line[:160]}", flush=True)


def steps(folder: Path, dry_run: bool) -> list[Step]:
    """What is to be done, in order."""
    python = sys.executable
    forced = {"RNNFAST_BACKEND": "triton", "PYTHONUNBUFFERED": "1", "RNNFAST_REQUIRE_EXT": "1"}
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    me = [python, str(Path(__file__).resolve()), str(folder)]
    build = Step("build", [python, "setup.py", "build_ext", "--inplace"], 150,
                 {"RNNFAST_REQUIRE_EXT": "1"})  # fmt: skip
    if dry_run:
        forced |= {"TRITON_INTERPRET": "1"}
        plain = {k: v for k, v in forced.items() if k != "RNNFAST_BACKEND"}
        return [
            build,
            Step("kernel tests", [*pytest, "tests/test_triton.py", "-k", "every"], 120, plain),
            Step("contract tests", [*pytest, "tests", "-k", "triton and outputs_have"], 120, plain),
            Step("sine", [python, "-c", INTERPRETED_SINE], 120, forced),
            Step("grid", [*me, "--grid", "--dry-run"], 120, plain),
        ]  # fmt: skip
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if _has("xdist") else []
    plain = {k: v for k, v in forced.items() if k != "RNNFAST_BACKEND"}
    return [
        build,
        Step("kernel tests", [*pytest, *workers, "-m", "gpu", "tests/test_triton.py"], 110, plain),
        Step("sine", [python, "-m", "rnnfast.sine", "--device", "cuda", "--plot",
                      str(folder / "sine.png")], 45, forced),
        Step("grid", [*me, "--grid"], 150, plain),
        # Last, since they compile the most kernels and may be cut off.
        Step("contract tests", [*pytest, *workers, "-m", "gpu", "tests", "--ignore",
                                "tests/test_triton.py"], 150, plain),
    ]  # fmt: skip


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# -------------------------------------------------------------------------------------- the grid


@contextmanager
def precision(name: str) -> Iterator[Any]:
    """The dtype of a precision, with TF32 allowed or forbidden for cuBLAS and cuDNN alike."""
    import torch

    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = matmul.fp32_precision, rnn.fp32_precision
    matmul.fp32_precision = rnn.fp32_precision = "ieee" if "ieee" in name else "tf32"
    try:
        yield getattr(torch, name.split()[0])
    finally:
        matmul.fp32_precision, rnn.fp32_precision = before


def call_of(
    shape: Shape, dtype: Any, device: str, module_class: Any, training: bool
) -> Callable[[], None]:
    """A function that runs one inference or training step of a layer."""
    import torch
    from torch.nn.utils.rnn import pack_sequence

    torch.manual_seed(0)
    module = module_class(shape.I, shape.H).to(device, dtype)
    x: Any = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
    if shape.packed:
        lengths = [max(1, round(shape.T * (b + 1) / shape.B)) for b in reversed(range(shape.B))]
        x = pack_sequence([x[:n, b] for b, n in enumerate(lengths)])
    elif training:
        x.requires_grad_()

    def infer() -> None:
        with torch.no_grad():
            module(x)

    def train() -> None:
        module.zero_grad()
        out, _ = module(x)
        data = out.data if shape.packed else out
        data.backward(data.detach())

    return train if training else infer


def measure(
    calls: dict[str, Callable[[], None]], cuda: bool, seconds: float
) -> dict[str, list[float]]:
    """Microseconds of each contender's call, taking turns."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3 if cuda else 1):
            call()
    until = time.monotonic() + seconds
    while (len(next(iter(times.values()))) < 5 and cuda) or time.monotonic() < until:
        for name, call in calls.items():
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                call()
                call()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 500)
            else:
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e6)
        if not cuda:
            break
    return times


def host_times(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Microseconds until a call returns to the host, the device's queue being empty."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(200):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def forced(backend: str, call: Callable[[], None]) -> Callable[[], None]:
    """The call on one backend."""
    import rnnfast

    def run() -> None:
        with rnnfast.backend(backend):
            call()

    return run


def warm(job: tuple[str, Shape, bool]) -> None:
    """Compile a shape's kernels into Triton's cache on disk, in a process of its own."""
    import rnnfast

    name, shape, training = job
    small = Shape(2, 2, shape.I, shape.H, shape.packed)
    with precision(name) as dtype:
        forced("triton", call_of(small, dtype, "cuda", rnnfast.RNN, training))()


def grid(folder: Path, dry_run: bool, seconds: float) -> None:
    """Time every shape of the grid that the time allows, and write results.json."""
    import torch
    from torch import nn

    import rnnfast

    until = time.monotonic() + seconds
    device = "cpu" if dry_run else "cuda"
    shapes = [
        Shape(*s, packed) for s in (DRY_GRID if dry_run else GRID) for packed in (False, True)
    ]
    if not dry_run:
        jobs = [(p, s, True) for s in shapes for p in PRECISIONS]
        with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
            pool.map_async(warm, jobs, chunksize=1).wait(seconds / 2)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for name in PRECISIONS:
            for figure in ("inference", "training"):
                if time.monotonic() > until:
                    continue  # the report counts what is missing
                with precision(name) as dtype:
                    make = (shape, dtype, device)
                    train = figure == "training"
                    calls = {"nn.RNN": call_of(*make, nn.RNN, train)}
                    try:
                        calls["rnnfast triton"] = forced(
                            "triton", call_of(*make, rnnfast.RNN, train)
                        )
                        found = {figure: measure(calls, not dry_run, 0.15)}
                        if shape.T == 10 and shape.H == 16 and not dry_run:
                            found[f"host, {figure}"] = host_times(calls)
                    except RuntimeError as error:  # a shape that the kernel refuses, or a crash
                        rows.append(asdict(shape) | {"precision": name, "figure": figure,
                                                     "error": str(error)[:300]})  # fmt: skip
                        continue
                for what, times in found.items():
                    for contender, values in times.items():
                        rows.append(
                            asdict(shape)
                            | {"precision": name, "figure": what, "contender": contender,
                               "median_us": statistics.median(values), "min_us": min(values),
                               "max_us": max(values), "repeats": len(values)}
                        )  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    triton = importlib.import_module("triton")
    results = {
        "dry_run": dry_run,
        "gpu": None if dry_run else torch.cuda.get_device_name(),
        "machine": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "rnnfast": rnnfast.__version__,
        "commit": commit,
        "expected": len(shapes) * len(PRECISIONS) * 2,
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


# ------------------------------------------------------------------------------------- the report


def ratios(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    """How many times as fast as nn.RNN, by shape, precision and figure."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if "error" not in row:
            key = (*(row[k] for k in ("B", "T", "I", "H", "packed", "precision", "figure")),)
            times.setdefault(key, {})[row["contender"]] = row["median_us"]
    return {key: t["nn.RNN"] / t["rnnfast triton"] for key, t in times.items() if len(t) == 2}


def report(folder: Path, done: list[Step]) -> None:
    """Print the short table, and draw the ratios."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False)
    try:
        results = json.loads((folder / "results.json").read_text())
    except OSError:
        results = None
    if results is not None:
        found = ratios(results["rows"])
        title = "times as fast as nn.RNN" + (
            " (dry run: interpreted, means nothing)" * results["dry_run"]
        )
        table = Table(
            "figure", "precision", "shapes", "geomean", "least", "least at B T I H", title=title
        )
        for packed in (False, True):
            for name in PRECISIONS:
                for figure in ("inference", "training", "host, inference", "host, training"):
                    part = {k: r for k, r in found.items() if k[4:] == (packed, name, figure)}
                    if part:
                        geomean = math.exp(statistics.fmean(map(math.log, part.values())))
                        worst = min(part, key=lambda k: part[k])
                        label = f"{figure}, {'packed' if packed else 'dense'}"
                        table.add_row(label, name, str(len(part)), f"{geomean:.2f}",
                                      f"{part[worst]:.2f}",
                                      " ".join(map(str, worst[:4])))  # fmt: skip
        console.print(table)
        errors = [row for row in results["rows"] if "error" in row]
        timed = sum(not key[6].startswith("host") for key in found)
        console.print(
            f"{timed} of {results['expected']} cells timed, {len(errors)} refused or failed, on "
            f"{results['gpu'] or 'the CPU'}, torch {results['torch']}, triton {results['triton']}"
        )
        for message in sorted({row["error"] for row in errors})[:5]:
            console.print(f"  {message}")
        plot(folder / "grid.png", found)
    for step in done:
        console.print(f"{step.name:16} {step.outcome} ({step.took:.0f} s)")


def plot(file: Path, found: dict[tuple[Any, ...], float]) -> None:
    """Bars of the ratios, a panel for each figure and layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(16, 9), layout="constrained", sharey=True)
    for ax, (what, packed) in zip(
        axes.flat,
        [("inference", False), ("training", False), ("inference", True), ("training", True)],
        strict=True,
    ):
        shapes = sorted({k[:4] for k in found if k[4] == packed and k[6] == what})
        for i, name in enumerate(PRECISIONS):
            heights = [found.get((*s, packed, name, what), 0.0) for s in shapes]
            ax.bar([x + 0.27 * (i - 1) for x in range(len(shapes))], heights, 0.27, label=name)
        ax.axhline(1, color="black", lw=0.8)
        ax.set(title=f"{what}, {'packed' if packed else 'dense'}", ylabel="times as fast as nn.RNN")
        ax.set_xticks(range(len(shapes)), [" ".join(map(str, s)) for s in shapes], rotation=60)
        ax.set_xlabel("B T I H")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for JSON, plots and logs")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--grid", action="store_true", help="the step that times, alone")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.grid:
        grid(folder, options.dry_run, 110)
        return

    missing = [
        m for m in ("torch", "triton", "pytest", "hypothesis", "rich", "matplotlib") if not _has(m)
    ]
    if missing:
        sys.exit(f"gpu_check needs {', '.join(missing)}")
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_check: torch sees no GPU; --dry-run rehearses every step on the CPU")
    (folder / "results.json").unlink(missing_ok=True)
    until = time.monotonic() + TOTAL_SECONDS
    done = steps(folder, options.dry_run)
    for step in done:
        if until - time.monotonic() > 5:
            step.run(folder, until - time.monotonic())
    report(folder, done)
    if any(step.outcome != "passed" for step in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
