"""What gpu_check.py times, and how: the grid against cuDNN, other packages, one step's latency.

Contenders, inputs and the way of timing are those of benchmarks/: CUDA events, blocks of calls in
turn, medians; inference, or a training step that leaves all parameters' gradients. Rows are written
as they come, a JSON object a line, so that a time limit costs only what it cuts off.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("float32 ieee", "float32 tf32", "bfloat16")
WORKS = ("inference", "training")

# B, T, I, H. The sine task first; then the corners of H 16..256, B 1..512, T 10..1000, where cuDNN
# runs a persistent kernel on dense inputs.
SMALL = [
    (190, 10, 1, 16), (64, 100, 64, 64), (1, 1000, 16, 16), (64, 100, 128, 128), (1, 100, 64, 256),
    (512, 100, 64, 64), (64, 100, 256, 256), (512, 10, 16, 16), (64, 1000, 64, 64),
    (512, 100, 128, 128), (1, 1000, 128, 128), (32, 100, 192, 192), (512, 10, 256, 256),
    (16, 1000, 32, 32),
]  # fmt: skip
LARGE = [(B, T, H, H) for H in (512, 768, 1024, 2048) for B in (1, 16, 128) for T in (128, 1024)]
LARGE_PACKED = [s for s in LARGE if s[:2] in ((16, 128), (16, 1024), (128, 128))]
DRY = [(3, 4, 1, 16), (2, 4, 20, 20)]  # packed, the shortest has a quarter of the steps
RIVALS = [(16, 1024, H, H) for H in (512, 64, 256, 768, 128)]  # of FlashRNN's paper
DRY_RIVALS = [(2, 4, 20, 20)]


@dataclass(frozen=True)
class Cell:
    """One figure of the grid: a layer's shape, its numbers, and the work that is timed."""

    B: int
    T: int
    I: int
    H: int
    packed: bool
    precision: str
    work: str

    @property
    def dtype(self) -> str:
        """Name of the torch dtype."""
        return self.precision.split()[0]


def cells_of(shapes: list[tuple[int, int, int, int]], packed: bool) -> list[Cell]:
    """A cell for every shape, precision and work."""
    every = itertools.product(shapes, PRECISIONS, WORKS)
    return [Cell(*shape, packed, precision, work) for shape, precision, work in every]


def grid_cells(dry_run: bool) -> list[Cell]:
    """The whole grid, the cheap cells first: the time limit cuts off the end."""
    if dry_run:
        return cells_of(DRY, False) + cells_of(DRY, True)
    cells = cells_of(SMALL + LARGE, False) + cells_of(SMALL + LARGE_PACKED, True)
    return sorted(cells, key=lambda c: c.B * c.T * c.H * (c.I + c.H))


@contextmanager
def products_in(name: str) -> Iterator[None]:
    """TF32 allowed or forbidden for cuBLAS and cuDNN alike."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    rnn: Any = torch.backends.cudnn.rnn
    before = matmul.fp32_precision, rnn.fp32_precision
    matmul.fp32_precision = rnn.fp32_precision = "ieee" if "ieee" in name else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, rnn.fp32_precision = before


# --------------------------------------------------------------------------------------- the grid


def problems(cells: list[Cell], device: str) -> Iterator[tuple[Cell, Any]]:
    """Each cell and its benchmarks.cases.Problem; neighbours of one shape share the random draw."""
    from benchmarks.cases import Case, Problem

    for _, same in itertools.groupby(cells, lambda c: (c.B, c.T, c.I, c.H, c.packed)):
        shared = None
        for cell in same:
            if shared is None:
                case = Case(cell.work, cell.B, cell.T, cell.I, cell.H, packed=cell.packed)
                shared = Problem(case, device)
            problem = shared.cast(cell.dtype)
            problem.case = replace(problem.case, work=cell.work)
            yield cell, problem


def time_cell(
    cell: Cell, problem: Any, contenders: dict[str, Any], write: Callable[[dict[str, Any]], None]
) -> None:
    """Time the contenders that can run a cell; why one cannot is written instead of its times."""
    import torch

    from benchmarks.contenders import Unsupported
    from benchmarks.measure import interleave

    def said(contender: str, what: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}" if what == "error" else str(error)
        write(asdict(cell) | {"contender": contender, what: " ".join(message.split())[:300]})

    entries, theirs = {}, None
    with products_in(cell.precision), torch.set_grad_enabled(cell.work == "training"):
        for name, prepare in contenders.items():
            ours = name == "nn.RNN" or name.startswith("rnnfast")
            try:
                entry = prepare(problem, 1)
                with entry.around():
                    value = entry.call()
                    entry.finish(value)
                    if problem.device == "cuda":
                        torch.cuda.synchronize()
                if name == "nn.RNN":
                    theirs = {what: x.double() for what, x in entry.results(value).items()}
                elif ours and theirs is not None:
                    compare(cell, entry.results(value), theirs)
                entries[name] = entry
            except Unsupported as why:
                said(name, "refused", why)
            except Exception as error:  # recorded, and the step fails; a peer may fail as it likes
                said(name, "error" if ours else "refused", error)
        try:
            found = interleave(entries, seconds=0.03, least=3)
            sine = (cell.B, cell.T, cell.I, cell.H, cell.packed) == (*SMALL[0], False)
            found_host = host_times(entries) if sine and problem.device == "cuda" else {}
        except Exception as error:
            said(" or ".join(entries), "error", error)
            return
    for name, samples in found.items():
        times = [1e6 * s for s in samples.seconds]
        row = asdict(cell) | {"contender": name, "median_us": statistics.median(times),
                              "min_us": min(times), "max_us": max(times),
                              "repeats": len(times)}  # fmt: skip
        write(row | ({"host_us": found_host[name]} if name in found_host else {}))


def compare(cell: Cell, results: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise where a kernel computes something else than nn.RNN, before it is timed.

    Rounding errors of two float32 results add up like a random walk (benchmarks.measure.bound).
    Rounder numbers are only to be alike: a unit or a row that is wrong is off by about its size.
    """
    from benchmarks.measure import error

    found = error(results, theirs)
    rms, largest = 0.1, 0.25
    if cell.precision == "float32 ieee":
        rms = 8 * 2.0**-23 * ((cell.H + cell.I) * cell.T) ** 0.5
        largest = 10 * rms
    if not (found.rms <= rms and found.max <= largest):
        raise ArithmeticError(f"off by {found.rms:.1e} (rms), {found.max:.1e} of nn.RNN's result")


def host_times(entries: dict[str, Any]) -> dict[str, float]:
    """Median microseconds until a call returns to the host, the device's queue being empty."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(100):
        for name, entry in entries.items():
            with entry.around():
                torch.cuda.synchronize()
                start = time.perf_counter()
                entry.call()
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


Pass = tuple[list[Cell], Callable[[Cell], dict[str, Any]]]  # cells, and the contenders of each


def time_all(file: Path, device: str, passes: list[Pass], skip: int) -> bool:
    """Time the cells of one pass after the other into a file; return whether nothing failed."""
    import torch

    todo = [(cell, contenders(cell)) for cells, contenders in passes for cell in cells]
    n = skip
    with file.open("a" if skip else "w") as rows:

        def write(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            if "error" in row:
                print(row, flush=True)

        try:
            for cell, problem in problems([cell for cell, _ in todo[skip:]], device):
                if n % 20 == 0:
                    print(f"{n} of {len(todo)}", flush=True)
                time_cell(cell, problem, todo[n][1], write)
                if device == "cuda":
                    torch.cuda.synchronize()  # once a kernel has failed, it raises for good
                n += 1
        except Exception as error:  # that, or there was no memory for the problem
            if device != "cuda":
                raise
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            write(asdict(todo[n][0]) | {"contender": "the device", "error": message})
            start_anew(n + 1)
    failures = sum('"error": ' in line for line in file.read_text().splitlines())
    print(f"{len(todo)} cells, {failures} failures")
    return not failures


def start_anew(n: int) -> None:
    """Go on with the n-th cell in a new process, as a kernel's fault ends all use of the device in
    this one; and without the CUDA kernels, so that it does not end at every cell.
    """
    sys.stdout.flush()
    anew = [sys.executable, *sys.argv, "--without-cuda", "--skip", str(n)]
    os.execv(sys.executable, anew)


def warm(cell: Cell) -> None:
    """Compile a cell's Triton kernels into the cache on disk, in a process of its own."""
    from benchmarks.contenders import Unsupported, forced

    small = replace(cell, B=2, T=4)
    for _, problem in problems([small], "cuda"):
        with products_in(cell.precision), suppress(Unsupported):
            forced("triton")(problem, 1).call()


def grid(folder: Path, dry_run: bool, with_cuda: bool, skip: int) -> bool:
    """Time nn.RNN and our kernels over the grid from a cell on, to grid.jsonl."""
    from benchmarks.contenders import forced, nn_rnn

    cells = grid_cells(dry_run)
    if not dry_run and not skip:
        jobs = {replace(c, B=2, T=4) for c in cells if c.H <= 256 and c.work == "training"}
        with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
            pool.map_async(warm, jobs, chunksize=1).wait(40)
    theirs, triton = {"nn.RNN": nn_rnn}, {"rnnfast triton": forced("triton")}
    cuda = {"rnnfast cuda": forced("cuda")} if with_cuda else {}
    # Once Triton has been chosen every call of the ops enters Python, which these would show.
    # Without CUDA too, so that cells keep their numbers where start_anew goes on.
    host_bound = [c for c in cells if c.T <= 10]
    passes: list[Pass] = [
        (host_bound, lambda cell: theirs | cuda),
        (cells, lambda cell: theirs | triton | ({} if cell in host_bound else cuda)),
    ]
    return time_all(folder / "grid.jsonl", "cpu" if dry_run else "cuda", passes, skip)


def rivals(folder: Path, dry_run: bool, with_cuda: bool, skip: int) -> bool:
    """Time other packages' fused loops beside ours, to rivals.jsonl. What fails there is theirs."""
    from benchmarks.contenders import flashrnn_elman, forced, jax_scan, nn_rnn

    contenders: dict[str, Any] = {"nn.RNN": nn_rnn}
    if with_cuda:
        contenders["rnnfast cuda"] = forced("cuda")
    # flashrnn's cuda_fused in its paper's bfloat16; JAX multiplies float32 by TF32 unless told.
    peer: dict[str, Any] = {
        "bfloat16": {"flashrnn": flashrnn_elman},
        "float32 tf32": {"JAX": jax_scan},
    }
    cells = cells_of(DRY_RIVALS if dry_run else RIVALS, False)
    cells = [c for c in cells if c.precision in peer]
    passes: list[Pass] = [(cells, lambda cell: contenders | peer[cell.precision])]
    return time_all(folder / "rivals.jsonl", "cpu" if dry_run else "cuda", passes, skip)


# ------------------------------------------------------------------------------- latency of a step


def latency(folder: Path, dry_run: bool, ops: Any) -> bool:
    """Nanoseconds of one step of the kernels whose blocks meet, and of bare barriers.

    B = 8, bfloat16, the projection within the kernel, the backward's gradients of the initial state
    alone: nothing but one launch runs, and two lengths T give the time of a step without it.
    """
    rows = []
    for H, kind in itertools.product((512,) if dry_run else (512, 1024), ("cluster", "grid")):
        name = f"{kind} {H}"
        ops._cuda_use_variant(name)
        try:
            rows.append(step_of(ops, name, H, dry_run))
        except RuntimeError as error:
            if "no CUDA kernel runs" not in str(error):
                raise
            rows.append({"variant": name, "refused": str(error).splitlines()[0]})  # no clusters
        finally:
            ops._cuda_use_variant("")
    results = {"steps": rows, "barriers": barriers(folder, dry_run)}
    (folder / "latency.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    return "error" not in results["barriers"]


def step_of(ops: Any, name: str, H: int, dry_run: bool) -> dict[str, Any]:
    """Time a step of one variant, forward and backward."""
    import torch

    import rnnfast
    from benchmarks.contenders import Entry
    from benchmarks.measure import interleave

    device, B, lengths = ("cpu", 2, (1, 3)) if dry_run else ("cuda", 8, (128, 1024))
    bf16 = torch.bfloat16
    medians = {}
    with rnnfast.backend("cuda"), torch.no_grad():
        for T in lengths:
            sizes = ((T, B, 8), (B, H), (H, 8), (H, H), (H,), (H,))
            x, hx, w_ih, w_hh, b_ih, b_hh = (
                torch.randn(s).mul(H**-0.5).to(device, bf16) for s in sizes
            )
            rnn, back = torch.ops.rnnfast.rnn_layer, torch.ops.rnnfast.rnn_layer_backward
            forward = (x, hx, w_ih, w_hh, b_ih, b_hh, None, "tanh", False)
            out, _ = rnn(*forward)
            mask = [False, True, False, False, False]
            backward = (out, None, x, hx, w_ih, w_hh, out, None, "tanh", False, mask)
            entries = {
                "forward": Entry(partial(rnn, *forward), dict, events=not dry_run),
                "backward": Entry(partial(back, *backward), dict, events=not dry_run),
            }
            for what, samples in interleave(entries, seconds=0.1, least=3).items():
                medians[what, T] = statistics.median(samples.seconds)
    short, long = lengths
    row = {"variant": name, "blocks": ops._cuda_plan(0, bf16, B, H, False)[1], "B": B, "H": H}
    for what in ("forward", "backward"):
        step = (medians[what, long] - medians[what, short]) / (long - short)
        row[f"{what}_ns"] = step * 1e9
    return row


def barriers(folder: Path, dry_run: bool) -> dict[str, Any]:
    """Compile barriers.cu and run it: what bare barriers cost, by the number of blocks."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return {"skipped": "there is no nvcc"}
    major, minor = (9, 0) if dry_run else torch.cuda.get_device_capability()
    target = folder / "barriers"
    build = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}",
             "-o", str(target), str(ROOT / "tools" / "barriers.cu")]  # fmt: skip
    try:
        subprocess.run(build, check=True, capture_output=True, text=True)
        if dry_run:
            return {"skipped": "a dry run compiles them only"}
        run = subprocess.run([str(target)], check=True, capture_output=True, text=True, timeout=20)
    except (subprocess.SubprocessError, OSError) as error:
        return {"error": f"{error} {getattr(error, 'stderr', '')}"[:500]}
    measured: dict[str, Any] = json.loads(run.stdout)
    return measured
