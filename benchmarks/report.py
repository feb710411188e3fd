"""Turns saved results into tables, the README's figures, a list of bars, and plots.

pytest benchmarks/ --full --threads 1 --benchmark-json=1.json
pytest benchmarks/ --full --threads 2 --benchmark-json=2.json
python -m benchmarks.report 1.json 2.json --readme README.md --plots plots/
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from .cases import PUBLIC, Case

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NN, OURS = "nn.RNN", "rnnfast"


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Measured:
    """One contender in one case: the median and what was recorded beside it."""

    seconds: float
    error_rms: float
    error_max: float
    peak_bytes: int | None = None
    read_seconds: float | None = None


@dataclass
class Group:
    """All contenders of one case."""

    case: Case
    by: dict[str, Measured] = field(default_factory=dict)
    sgemm: float = 0.0  # FLOP/s of the machine, just before and after

    def ratio(self, other: str, ours: str = OURS) -> float:
        """How many times as fast as another contender ours is."""
        return self.by[other].seconds / self.by[ours].seconds

    @property
    def best_peer(self) -> str:
        """The fastest of all that are not ours, nn.RNN among them."""
        peers = {name: m.seconds for name, m in self.by.items() if not name.startswith(OURS)}
        return min(peers, key=lambda name: peers[name])

    @property
    def shape(self) -> str:
        """``"B, T, I, H"`` and what is not the default."""
        c = self.case
        return ", ".join(map(str, (c.B, c.T, c.I, c.H))) + (f"; {c.variant}" if c.variant else "")


class Run:
    """One result file: groups of contenders on one machine with so many threads."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.machine = results["machine_info"]
        self.about = self.machine["rnnfast"]
        self.commit = results.get("commit_info", {})
        self.date = results.get("datetime", "")[:10]
        self.groups = groups(results["benchmarks"])
        self.sgemm_samples = sgemm_samples(results["benchmarks"])

    @property
    def threads(self) -> int:
        """Of every contender."""
        return int(self.about["threads"])

    @property
    def sgemm(self) -> float:
        """FLOP/s of the machine's own float32 2048-cube product: the median over the run."""
        return statistics.median(self.sgemm_samples)

    def share(self, group: Group, name: str = OURS) -> float:
        """Part of the machine's sgemm rate, measured around the group, that a contender reaches."""
        return group.case.flops / group.by[name].seconds / group.sgemm

    def grid(self, work: str) -> list[Group]:
        """The grid's float32 RNNs: every shape, one layer or two, tanh or ReLU, packed or not."""
        return [
            g
            for g in self.groups
            if g.case.work == work
            and (g.case.series, g.case.module, g.case.dtype) == ("grid", "RNN", "float32")
        ]

    def title(self) -> str:
        """The machine and the threads."""
        where = self.about["gpu"] or f"{self.cpu}, {self.about['cpu_capability']}"
        return f"{where}, {number_of(self.threads, 'thread')}"

    @property
    def cpu(self) -> str:
        """The processor's name, and its family and model, which the name may leave open."""
        cpu = self.machine["cpu"]
        name = str(cpu.get("brand_raw") or self.machine["processor"])
        if "family" not in cpu:
            return name
        return f"{name} (family {cpu['family']}, model {cpu['model']})"

    def caption(self) -> str:
        """Everything that the figures depend on, in a sentence."""
        versions = ", ".join(f"{name} {v}" for name, v in self.about["versions"].items())
        low, high = min(self.sgemm_samples), max(self.sgemm_samples)
        commit = self.commit.get("id", "unknown")[:10] + ("+" if self.commit.get("dirty") else "")
        cores = self.about["cpus"]
        named = f"core{'s' * (len(cores) > 1)} {', '.join(map(str, cores))}"
        return (
            f"{self.title()} ({named}); a 2048-cube float32 product runs at "
            f"{self.sgemm / 1e9:.0f} GFLOP/s here (single runs {low / 1e9:.0f} to "
            f"{high / 1e9:.0f}); {versions}, Python {self.about['python']}; commit {commit}, "
            f"{self.date}; medians of alternating blocks."
        )


def groups(records: Iterable[dict[str, Any]]) -> list[Group]:
    """Records of one file, by case, in their order."""
    found: dict[Case, Group] = {}
    for record in records:
        info = record["extra_info"]
        case = Case(**{name: info[name] for name in Case.__dataclass_fields__})
        group = found.setdefault(case, Group(case, sgemm=statistics.mean(info["sgemm"])))
        group.by[info["contender"]] = Measured(
            record["stats"]["median"],
            info["error_rms"],
            info["error_max"],
            info.get("peak_bytes"),
            info.get("read_seconds"),
        )
    return list(found.values())


def sgemm_samples(records: Iterable[dict[str, Any]]) -> list[float]:
    """Rates measured around each group."""
    return [rate for record in records for rate in record["extra_info"]["sgemm"]]


# ---------------------------------------------------------------------------------------- tables


def number_of(n: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    units = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
    size, unit = next((u for u in units if seconds >= u[0]), units[-1])
    value = seconds / size
    decimals = sum(value < bound for bound in (99.95, 9.995))
    return f"{value:.{decimals}f} {unit}"


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A Markdown table, numbers to the right."""
    align = ["left"] + ["right"] * (len(header) - 1)
    return str(tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True))


def summary(records: Iterable[dict[str, Any]]) -> str:
    """What the terminal shows at the end of a run: all contenders of all groups."""
    records = list(records)
    rate = statistics.median(sgemm_samples(records))
    rows: list[list[Any]] = []
    for group in groups(records):
        base = group.by.get(NN)
        for name, m in group.by.items():
            rows.append(
                [
                    group.case.id if not rows or rows[-1][-1] is not group else "",
                    name,
                    duration(m.seconds),
                    f"{base.seconds / m.seconds:.2f}" if base else "",
                    f"{group.case.flops / m.seconds / group.sgemm:.0%}",
                    f"{m.error_rms:.1e}",
                    f"{m.error_max:.1e}",
                    "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.2f} MiB",
                    group,
                ]
            )
    header = ["case", "contender", "median", "x nn.RNN", "of sgemm", "error rms", "max", "memory"]
    align = ["left", "left"] + ["right"] * 6
    table = tabulate(
        [row[:-1] for row in rows], header, "simple", colalign=align, disable_numparse=True
    )  # fmt: skip
    return f"{table}\n\nsgemm: {rate / 1e9:.1f} GFLOP/s, float32, 2048 cubed"


def readme_table(run: Run) -> str:
    """The public grid: nn.RNN, rnnfast, how many times as fast, and the best other peer."""
    header = ["B, T, I, H"]
    for work in ("inference", "training"):
        header += [f"{work}: nn.RNN", "rnnfast", "times as fast", "best peer"]
    rows: list[list[str]] = []
    ratios: dict[str, list[tuple[float, float]]] = {}
    for shape in PUBLIC:
        row = [", ".join(map(str, shape))]
        for work in ("inference", "training"):
            group = next((g for g in run.grid(work) if g.case == Case(work, *shape)), None)
            if group is None or not {NN, OURS} <= group.by.keys():
                row += [""] * 4
                continue
            best = group.best_peer
            ratios.setdefault(work, []).append((group.ratio(NN), group.ratio(best)))
            row += [
                duration(group.by[NN].seconds),
                duration(group.by[OURS].seconds),
                f"**{group.ratio(NN):.2f}**",
                f"{best} {duration(group.by[best].seconds)}" if best != NN else NN,
            ]
        rows.append(row)
    mean = ["geometric mean"]
    for work in ("inference", "training"):
        pairs = ratios.get(work)
        if pairs:
            of_nn, of_best = (geometric_mean(p) for p in zip(*pairs, strict=True))
            mean += ["", "", f"**{of_nn:.2f}**", f"{of_best:.2f} times its speed"]
        else:
            mean += [""] * 4
    return markdown([*rows, mean], header) + f"\n\n{run.caption()}"


def full_tables(run: Run) -> str:
    """Every case and contender: times, ratios, share of sgemm, memory; then the errors."""
    parts = [f"## {run.title()}", run.caption()]
    plain = ("RNN", "float32")
    kinds: list[tuple[str, Callable[[Case], bool]]] = [
        ("Inference", lambda c: (c.module, c.dtype, c.work) == (*plain, "inference")),
        ("Training step", lambda c: (c.module, c.dtype, c.work) == (*plain, "training")),
        ("RNNCell, the sine task, bfloat16", lambda c: (c.module, c.dtype) != plain),
    ]
    for title, chosen in kinds:
        found = [g for g in run.groups if chosen(g.case) and {NN, OURS} <= g.by.keys()]
        if not found:
            continue
        names = list(dict.fromkeys(name for g in found for name in g.by))
        parts += [f"### {title}", _times(run, found, names)]
        parts += [f"#### {title}: error against float64, rms (maximum)", _errors(found, names)]
        if any(g.case.nonlinearity == "relu" and g.case.work == "training" for g in found):
            parts.append(
                "A gradient of a ReLU RNN that is off by 1e-4 or more: a unit whose argument is a "
                "rounding error from zero is on in one result and off in the other."
            )
    return "\n\n".join(parts)


def _label(group: Group) -> str:
    plain = (group.case.module, group.case.dtype) == ("RNN", "float32")
    work = "" if plain else f"{group.case.work}: "
    return work + group.shape + ("" if group.case.series == "grid" else f" ({group.case.series})")


def _times(run: Run, found: list[Group], names: list[str]) -> str:
    header = ["B, T, I, H", *names, "x nn.RNN", "x best peer", "of sgemm", "memory / nn.RNN's"]
    rows = []
    for g in found:
        ours, theirs = g.by[OURS].peak_bytes, g.by[NN].peak_bytes
        rows.append(
            [
                _label(g),
                *(duration(g.by[name].seconds) if name in g.by else "" for name in names),
                f"**{g.ratio(NN):.2f}**",
                f"{g.ratio(g.best_peer):.2f} ({g.best_peer})",
                f"{run.share(g):.0%}",
                f"{ours / theirs:.2f}" if ours is not None and theirs else "",
            ]
        )
    grid = [g for work in ("inference", "training") for g in run.grid(work) if g in found]
    if grid:
        of_nn = geometric_mean(g.ratio(NN) for g in grid)
        of_best = geometric_mean(g.ratio(g.best_peer) for g in grid)
        mean = [f"**{of_nn:.2f}**", f"{of_best:.2f}"]
        rows.append(["geometric mean without the sweeps", *[""] * len(names), *mean, "", ""])
    return markdown(rows, header)


def _errors(found: list[Group], names: list[str]) -> str:
    rows = [
        [
            _label(g),
            *(
                f"{g.by[n].error_rms:.1e} ({g.by[n].error_max:.1e})" if n in g.by else ""
                for n in names
            ),
        ]
        for g in found
    ]
    return markdown(rows, ["B, T, I, H", *names])


def bar_table(runs: Sequence[Run]) -> str:
    """Bar, measured, holds, for each run, and under the table the cases that fall short."""
    from .bars import BARS

    one = next((r for r in runs if r.threads == 1), None)
    parts = []
    for run in runs:
        judged = [bar.judge(run, one) for bar in BARS]
        header = ["figure", "bar", "aim", "measured", "holds"]
        parts += [f"### Bars, {run.title()}", markdown([line for line, _ in judged], header)]
        parts += [
            f"Short of *{line[0]}, {line[1]}*: "
            + ", ".join(f"`{case}` {bar.shown(value)}" for case, value in short.items())
            for bar, (line, short) in zip(BARS, judged, strict=True)
            if short
        ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------- command line


def replace_measured(text: str, table: str) -> str:
    """The README with the part between its markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"no single pair of markers {BEGIN} ... {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", nargs="+", type=Path, help="saved by --benchmark-json")
    parser.add_argument("--readme", type=Path, help="put the public grid between its markers")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw into this folder")
    options = parser.parse_args(argv)
    runs = [Run(json.loads(file.read_text())) for file in options.results]
    runs.sort(key=lambda run: run.threads)

    print("\n\n".join([*map(full_tables, runs), bar_table(runs)]))
    if options.readme:
        text = options.readme.read_text()
        table = "\n\n".join(map(readme_table, runs))
        options.readme.write_text(replace_measured(text, table))
    if options.plots:
        from . import plots

        options.plots.mkdir(parents=True, exist_ok=True)
        for run in runs:
            for file in plots.draw(run, options.plots):
                print(f"\nwrote {file}")


if __name__ == "__main__":
    main()
