"""What gpu_check.py's rows say: ratios, tables, a plot, and the rows that GPU_WINS could get."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from gpu_timing import PRECISIONS, WORKS, Cell

if TYPE_CHECKING:  # it is imported where its extension has been built
    from rnnfast.backends import Win

BASELINE = "nn.RNN"
BACKENDS = ("cuda", "triton")
#: The steps that show a backend's results to be right, and others that may show them to be wrong.
TESTED_BY = {"cuda": ("cuda tests", "every variant"), "triton": ("triton tests",)}
WATCHED_BY = {
    "cuda": ("contract tests", "sine cuda", "memcheck", "racecheck", "synccheck"),
    "triton": ("contract tests", "sine triton"),
}
#: PyTorch's flags as they are: TF32 for cuDNN alone.
DEFAULT = "float32 default"
#: Where cuDNN has a persistent kernel for dense inputs, and where it launches every step.
CLASSES = {"H <= 256": range(1, 257), "H >= 512": range(512, 1 << 20)}
Ratios = dict[tuple[str, Cell], float]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line, the last of which may have been cut off."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row is about."""
    return Cell(*(row[field.name] for field in fields(Cell)))


def by_default(cell: Cell) -> Cell:
    """An ``ieee`` cell under PyTorch's default flags, which leave TF32 to cuDNN alone."""
    return replace(cell, precision=DEFAULT)


def with_defaults(cells: list[Cell]) -> list[Cell]:
    """These cells and those that the ratios add: float32's under PyTorch's default flags."""
    return cells + [by_default(cell) for cell in cells if cell.precision == "float32 ieee"]


def ratios(rows: list[dict[str, Any]]) -> Ratios:
    """How many times as fast as nn.RNN, by contender and cell."""
    measured = [row for row in rows if "median_us" in row]
    times = {(row["contender"], cell_of(row)): row["median_us"] for row in measured}
    found = {}
    for (contender, cell), time in times.items():
        beside = [(cell, cell)]
        if cell.precision == "float32 ieee":
            beside.append((by_default(cell), replace(cell, precision="float32 tf32")))
        for ours, theirs in beside:
            if contender != BASELINE and (BASELINE, theirs) in times:
                found[contender, ours] = times[BASELINE, theirs] / time
    return found


@dataclass(frozen=True)
class Suggestion:
    """A row for GPU_WINS, and the ratios behind it."""

    win: Win
    least: float
    geomean: float


def suggestions(
    found: Ratios, expected: list[Cell], capability: tuple[int, int]
) -> list[Suggestion]:
    """Rows for GPU_WINS, the best first.

    A row covers neighbouring hidden sizes of one class at which every expected cell of the
    precision and layout was measured, and is at least as fast as nn.RNN: each batch and length,
    inference and training. A row cannot tell these apart.
    """
    from rnnfast.backends import Win

    rows = []
    cells = with_defaults(expected)
    precisions = dict.fromkeys(cell.precision for cell in cells)
    for backend, precision, packed, sizes in itertools.product(
        BACKENDS, precisions, (False, True), CLASSES.values()
    ):
        by_size: dict[int, list[float]] = {}
        for cell in cells:
            if (cell.precision, cell.packed) == (precision, packed) and cell.H in sizes:
                ratio = found.get((f"rnnfast {backend}", cell), 0.0)
                by_size.setdefault(cell.H, []).append(ratio)
        won = [(H, min(by_size[H]) >= 1) for H in sorted(by_size)]
        for all_won, run in itertools.groupby(won, lambda size: size[1]):
            if all_won:
                covered = [H for H, _ in run]
                values = [r for H in covered for r in by_size[H]]
                win = Win(backend, capability, precision, (covered[0], covered[-1]), packed)
                rows.append(Suggestion(win, min(values), geometric_mean(values)))
    return sorted(rows, key=lambda row: -row.geomean)


def wins(results: dict[str, Any], suggested: list[Suggestion]) -> dict[str, Any]:
    """What RNNFAST_GPU_WINS reads: the rows of backends that were right wherever they ran."""
    ended = results["steps"]
    wrong = {row["contender"] for row in results["rows"] if "error" in row}
    right = {
        backend
        for backend, steps in TESTED_BY.items()
        if all(ended.get(step) == "passed" for step in steps)
        and not any(ended.get(step, "").startswith("failed") for step in WATCHED_BY[backend])
        and not wrong & {f"rnnfast {backend}", "the device"}
    }
    about = ("gpu", "torch", "cudnn", "rnnfast", "commit")
    rows = [asdict(row.win) for row in suggested if row.win.backend in right]
    return {key: results[key] for key in about} | {"wins": rows}


# ------------------------------------------------------------------------------------------ tables


def summary(found: Ratios, expected: list[Cell]) -> Any:
    """A row for each contender, class, layout and precision: geomean and least ratio."""
    from rich.table import Table

    table = Table("contender", "class", "numbers", "cells", title="times as fast as nn.RNN")
    for work in WORKS:
        table.add_column(f"{work}: geomean")
        table.add_column("least")
    table.add_column("least at B T I H")
    contenders = dict.fromkeys(contender for contender, _ in found)
    expected = with_defaults(expected)
    for contender, (name, sizes), packed, precision in itertools.product(
        contenders, CLASSES.items(), (False, True), (*PRECISIONS, DEFAULT)
    ):
        cells = [c for c in expected if (c.packed, c.precision) == (packed, precision)]
        cells = [c for c in cells if c.H in sizes]
        part = {c: found[contender, c] for c in cells if (contender, c) in found}
        if not part:
            continue
        figures = []
        for work in WORKS:
            values = [ratio for c, ratio in part.items() if c.work == work]
            mean_and_least = [geometric_mean(values), min(values)] if values else []
            figures += [f"{x:.2f}" for x in mean_and_least] or ["", ""]
        worst = min(part, key=lambda c: part[c])
        table.add_row(contender, f"{name} {'packed' if packed else 'dense'}", precision,
                      f"{len(part)} of {len(cells)}", *figures,
                      f"{worst.B} {worst.T} {worst.I} {worst.H} {worst.work}")  # fmt: skip
    return table


def times(title: str, rows: list[dict[str, Any]], figure: str) -> Any:
    """Microseconds of every contender, a row for each cell."""
    from rich.table import Table

    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    by_cell: dict[Cell, dict[str, str]] = {}
    for row in rows:
        other = "refused" if "refused" in row else "failed"
        said = f"{row[figure]:.0f}" if figure in row else other
        by_cell.setdefault(cell_of(row), {})[row["contender"]] = said
    table = Table("B T I H", "layout", "numbers", "work", *contenders, title=title)
    for c, cells in by_cell.items():
        layout = "packed" if c.packed else "dense"
        table.add_row(f"{c.B} {c.T} {c.I} {c.H}", layout, c.precision, c.work,
                      *(cells.get(name, "") for name in contenders))  # fmt: skip
    return table


def step_latency(latency: dict[str, Any]) -> Any:
    """A step of the kernels whose blocks meet, beside the bare barrier of as many blocks."""
    from rich.table import Table

    table = Table("variant", "B", "H", "blocks", "forward ns", "backward ns", "bare barrier ns",
                  title="one step, bfloat16")  # fmt: skip
    for row in latency["steps"]:
        if "refused" in row:
            table.add_row(row["variant"], *[""] * 3, row["refused"][:40])
            continue
        bare = latency["barriers"].get(row["variant"].split()[0], {})
        enough = [n for n in sorted(map(int, bare)) if n >= row["blocks"]]
        barrier = f"{bare[str(enough[0])]:.0f} ({enough[0]} blocks)" if enough else "not measured"
        table.add_row(row["variant"], str(row["B"]), str(row["H"]), str(row["blocks"]),
                      f"{row['forward_ns']:.0f}", f"{row['backward_ns']:.0f}",
                      barrier)  # fmt: skip
    return table


def report(
    results: dict[str, Any],
    expected: list[Cell],
    found: Ratios,
    suggested: list[Suggestion],
    picture: Path,
) -> None:
    """Print the short tables and the suggested rows, and draw the ratios."""
    from rich.console import Console

    console = Console(width=150, highlight=False)
    rows = results["rows"]
    if results["dry_run"]:
        console.print("A dry run: the times below, interpreted and emulated, mean nothing.")
    if found:
        console.print(summary(found, expected))
        plot(picture, found)
    host = [row for row in rows if "host_us" in row]
    if host:
        console.print(times("until the call returns to the host, us", host, "host_us"))
    if results["rivals"]:
        console.print(times("beside other packages, us", results["rivals"], "median_us"))
    if results["latency"]:
        console.print(step_latency(results["latency"]))
        for what in ("skipped", "error"):
            if what in results["latency"]["barriers"]:
                console.print(f"bare barriers: {what}: {results['latency']['barriers'][what]}")
    reached = len({cell_of(row) for row in rows})
    console.print(f"{reached} of {len(expected)} cells reached, on {results['gpu'] or 'the CPU'}, "
                  f"torch {results['torch']}, triton {results['triton']}")  # fmt: skip
    for what in ("refused", "error"):
        said = {(row["contender"], row[what]): row for row in rows if what in row}
        for contender, message in sorted(said)[:8]:
            console.print(f"  {what}: {contender}: {message}", markup=False)
    if suggested:
        console.print("GPU_WINS of rnnfast/backends.py could get, the faster first:")
    elif not results["dry_run"]:
        console.print("GPU_WINS gets no row: no backend is at least as fast on all of a class.")
    for row in suggested:
        ratio = f"  # least {row.least:.2f}, geomean {row.geomean:.2f}"
        console.print(f"    {row.win},{ratio}", markup=False)


def plot(file: Path, found: Ratios) -> None:
    """Bars of the ratios, a panel for each work and layout, a bar for each contender and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = list(dict.fromkeys((who, cell.precision) for who, cell in found))
    figure, axes = plt.subplots(2, 2, figsize=(22, 11), layout="constrained", sharey=True)
    for ax, (packed, work) in zip(axes.flat, itertools.product((False, True), WORKS), strict=True):
        shapes = sorted(
            {(c.H, c.B, c.T, c.I) for _, c in found if (c.packed, c.work) == (packed, work)}
        )
        for i, (who, numbers) in enumerate(bars):
            heights = [
                found.get((who, Cell(B, T, I, H, packed, numbers, work)), 0.0)
                for H, B, T, I in shapes
            ]
            at = [x + 0.85 * (i / len(bars) - 0.5) for x in range(len(shapes))]
            ax.bar(at, heights, 0.85 / len(bars), label=f"{who}, {numbers}")
        ax.axhline(1, color="black", lw=0.8)
        ax.set(title=f"{work}, {'packed' if packed else 'dense'}", ylabel="times as fast as nn.RNN")
        ax.set_xticks(range(len(shapes)), [f"{B} {T} {I} {H}" for H, B, T, I in shapes],
                      rotation=90)  # fmt: skip
        ax.set_xlabel("B T I H")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(bars))
    figure.savefig(file, dpi=100)
    plt.close(figure)
