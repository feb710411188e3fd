"""Draws a run: speed-up per shape, time against H, time against T, with the machine's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .report import NN, OURS, Group, Run

WORKS = {"inference": "inference", "training": "training step"}
# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers for print.
STYLES: dict[str, dict[str, Any]] = {
    NN: {"color": "#666666", "marker": "s"},
    OURS: {"color": "#0072B2", "marker": "o"},
    "JAX": {"color": "#E69F00", "marker": "^"},
    "ONNX Runtime": {"color": "#009E73", "marker": "v"},
    "OpenVINO": {"color": "#CC79A7", "marker": "D"},
    "flashrnn": {"color": "#D55E00", "marker": "P"},
}
OTHER = {"color": "#56B4E9", "marker": "x"}


def draw(run: Run, folder: Path) -> Iterator[Path]:
    """Draw what the run has data for; yield the files."""
    suffix = run.about["device"] if run.about["gpu"] else f"{run.threads}-threads"
    plain = plt.rcParams | {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
    }
    with plt.rc_context(plain):
        for name, figure in (
            ("speedup", _speedup(run)),
            ("hidden-size", _sweep(run, "H sweep", "H", "hidden size H")),
            ("steps", _sweep(run, "T sweep", "T", "steps T")),
        ):
            if figure is not None:
                file = folder / f"{name}-{suffix}.png"
                figure.savefig(file, dpi=130)
                plt.close(figure)
                yield file


def _style(name: str) -> dict[str, Any]:
    return STYLES.get(name, OTHER)


def _names(groups: list[Group]) -> list[str]:
    return list(dict.fromkeys(name for g in groups for name in g.by))


# ------------------------------------------------------------------------------------- speed-up


def _speedup(run: Run) -> Any:
    by_work = {work: [g for g in run.grid(work) if {NN, OURS} <= g.by.keys()] for work in WORKS}
    shapes = list(dict.fromkeys(g.shape for groups in by_work.values() for g in groups))
    if not shapes:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.27 * len(shapes)), sharey=True, layout="constrained"
    )
    for axis, (work, title) in zip(axes, WORKS.items(), strict=True):
        groups = by_work[work]
        rows = [shapes.index(g.shape) for g in groups]
        ours = [g.ratio(NN) for g in groups]
        axis.barh(rows, [r - 1 for r in ours], left=1, height=0.62, color="#0072B2", alpha=0.3)
        axis.plot(ours, rows, "o", color="#0072B2", label=OURS, zorder=3)
        for name in _names(groups):
            if name.startswith(OURS) or name == NN:
                continue
            found = [
                (g.ratio(NN, name), row)
                for g, row in zip(groups, rows, strict=True)
                if name in g.by
            ]
            axis.plot(*zip(*found, strict=True), linestyle="", **_style(name), ms=5, label=name)
        axis.axvline(1, color="#666666", lw=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
        low, high = axis.get_xlim()
        axis.set_xticks([t for t in ticks if low <= t <= high])
        axis.minorticks_off()
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.set_title(f"{title}: geometric mean {geometric_mean(ours):.2f}" if ours else title)
        axis.set_xlabel("times as fast as nn.RNN")
        axis.margins(y=0.01)
    axes[0].set_yticks(range(len(shapes)), shapes)
    axes[0].set_title("B, T, I, H   ", loc="left", ha="right", fontsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(f"Speed-up over nn.RNN, float32\n{run.title()}", fontsize=11)
    handles = {
        label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


# --------------------------------------------------------------------------------------- sweeps


def _sweep(run: Run, series: str, letter: str, label: str) -> Any:
    swept = [g for g in run.groups if g.case.series == series]
    batches = sorted({g.case.B for g in swept})
    if not swept:
        return None
    figure, axes = plt.subplots(
        len(batches), 2, figsize=(11, 0.9 + 4 * len(batches)), squeeze=False, layout="constrained"
    )
    for line, B in zip(axes, batches, strict=True):
        for axis, (work, title) in zip(line, WORKS.items(), strict=True):
            groups = [g for g in swept if g.case.B == B and g.case.work == work]
            _lines(axis, run, groups, letter)
            case = groups[0].case
            fixed = f"T = {case.T}, I = H" if letter == "H" else f"I = H = {case.H}"
            axis.set_title(f"{title}, B = {B}, {fixed}")
            axis.set_xlabel(label)
            axis.set_ylabel("time of a call, ms")
    figure.suptitle(f"Time against {label}, float32\n{run.title()}", fontsize=11)
    handles = {
        label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _lines(axis: Axes, run: Run, groups: list[Group], letter: str) -> None:
    def x(g: Group) -> int:
        return int(getattr(g.case, letter))

    groups = sorted(groups, key=x)
    for name in _names(groups):
        found = [(x(g), g.by[name].seconds * 1e3) for g in groups if name in g.by]
        heavy: dict[str, Any] = {"lw": 2.2, "zorder": 3} if name == OURS else {"lw": 1.2}
        axis.plot(*zip(*found, strict=True), **_style(name), ms=4.5, label=name, **heavy)
    sgemm = [(x(g), g.case.flops / run.sgemm * 1e3) for g in groups]
    dashed: dict[str, Any] = {"ls": "--", "color": "black", "lw": 1}
    axis.plot(*zip(*sgemm, strict=True), **dashed, label="at the library's sgemm rate")
    # One sequence reads all of W_hh at every step, forward and again backward. Where W_hh fits in a
    # core's first-level cache the reading is not what limits.
    reads = [
        (x(g), g.case.T * m.read_seconds * (2 if g.case.work == "training" else 1) * 1e3)
        for g in groups
        if g.case.B == 1
        and g.case.H >= 128
        and (m := g.by.get(OURS)) is not None
        and m.read_seconds
    ]
    if reads:
        dotted = dashed | {"ls": ":", "lw": 1.4}
        axis.plot(*zip(*reads, strict=True), **dotted, label="reading W_hh at every step")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([x(g) for g in groups], [str(x(g)) for g in groups])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
