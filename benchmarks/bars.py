"""What the product must reach, as data: bars to hold and aims beyond them.

A bar looks at one number for each of some cases, and asks it of every case or of their geometric
mean. Absolute times are stated as multiples of a peer's time or of the machine's limits in the same
run, so that they mean the same on another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean

from .cases import Case
from .report import NN, OURS, Group, Run

Values = Callable[[Run, Run | None], dict[str, float]]


@dataclass(frozen=True)
class Bar:
    """One line of the list.

    Attributes:
        figure: what is measured.
        values: the numbers, by case, from a run and the run on one thread.
        bar: what must be reached, and ``aim``: what is hoped for.
        mean: asked of the geometric mean instead of every case.
        at_most: the number must not exceed the bar, instead of reaching it.
    """

    figure: str
    values: Values
    bar: float
    aim: float
    mean: bool = False
    at_most: bool = False

    def judge(self, run: Run, one: Run | None) -> tuple[list[str], dict[str, float]]:
        """The line, as figure, bar, aim, measured and holds; and the cases that fall short."""
        line = [self.figure, f"{'<=' if self.at_most else '>='} {self.bar:.3g}", f"{self.aim:.3g}"]
        values = self.values(run, one)
        if not values:
            return [*line, "not measured", ""], {}
        cases = "1 case" if len(values) == 1 else f"{len(values)} cases"
        if self.mean:
            mean = geometric_mean(values.values())
            return [*line, f"{self.shown(mean)} over {cases}", self._word(mean)], {}
        worst = (max if self.at_most else min)(values.values())
        short = {case: v for case, v in values.items() if not self._holds(v)}
        return [*line, f"{self.shown(worst)}, worst of {cases}", self._word(worst)], short

    def shown(self, value: float) -> str:
        """Three digits, or as many more as it takes not to round a miss to the bar."""
        digits = (f"{value:.{n}g}" for n in range(3, 18))
        return next(x for x in digits if self._holds(float(x)) == self._holds(value))

    def _holds(self, value: float) -> bool:
        return value <= self.bar if self.at_most else value >= self.bar

    def _word(self, value: float) -> str:
        return "yes" if self._holds(value) else "**no**"


def _both(g: Group) -> bool:
    return {NN, OURS} <= g.by.keys()


def _against_nn(work: str) -> Values:
    return lambda run, one: {g.shape: g.ratio(NN) for g in run.grid(work) if _both(g)}


def _against_best(work: str) -> Values:
    return lambda run, one: {g.shape: g.ratio(g.best_peer) for g in run.grid(work) if _both(g)}


def _share(work: str) -> Values:
    return lambda run, one: {
        g.shape: run.share(g)
        for g in run.grid(work)
        if OURS in g.by and g.case.B >= 32 and g.case.H >= 64
    }


def _one(run: Run, work: str, shape: tuple[int, int, int, int], *names: str) -> list[Group]:
    return [
        g for g in run.grid(work) if g.case == Case(work, *shape) and g.by.keys() >= {OURS, *names}
    ]


def _against(peer: str, work: str) -> Values:
    shape = (1, 10, 1, 16)
    return lambda run, one: {
        g.shape: 1 / g.ratio(peer) for g in _one(run, work, shape, peer)
    }  # fmt: skip


def _step_latency(run: Run, one: Run | None) -> dict[str, float]:
    # A 64 x 64 matrix-vector product and a tanh: about 320 cycles, of the clock that the OS states.
    cpu = run.machine["cpu"]
    hz = (cpu.get("hz_actual") or cpu.get("hz_advertised") or [0])[0]
    found = _one(run, "inference", (1, 1000, 64, 64)) if hz else []
    return {g.shape: g.by[OURS].seconds / g.case.T * hz / 320 for g in found}


def _module(module: str) -> Values:
    return lambda run, one: {
        f"{g.case.work} {g.shape}": g.ratio(NN)
        for g in run.groups
        if g.case.module == module and _both(g)
    }


def _memory(run: Run, one: Run | None) -> dict[str, float]:
    return {
        g.shape: ours / theirs if theirs else float(ours > 0)
        for g in run.groups
        if _both(g)
        and (ours := g.by[OURS].peak_bytes) is not None
        and (theirs := g.by[NN].peak_bytes) is not None
    }


def _scaling(run: Run, one: Run | None) -> dict[str, float]:
    if one is None or run.threads != 2:
        return {}
    before = {g.case: g.by[OURS].seconds for g in one.groups if OURS in g.by}
    return {
        f"{work} {g.shape}": before[g.case] / g.by[OURS].seconds
        for work in ("inference", "training")
        for g in run.grid(work)
        if g.case in before and OURS in g.by and g.case.B >= 32 and g.case.H >= 128
    }


def _bfloat16(other: str) -> Values:
    def values(run: Run, one: Run | None) -> dict[str, float]:
        if "avx512_bf16" not in run.machine["cpu"].get("flags", []):
            return {}
        return {
            f"{g.case.work} {g.shape}": g.ratio(other)
            for g in run.groups
            if g.case.dtype == "bfloat16" and g.by.keys() >= {OURS, other}
        }

    return values


BARS = [
    Bar("inference against nn.RNN, every case", _against_nn("inference"), 0.97, 1.0),
    Bar("training against nn.RNN, every case", _against_nn("training"), 0.97, 1.0),
    Bar("inference against nn.RNN, geometric mean", _against_nn("inference"), 3.2, 4.5, mean=True),
    Bar("training against nn.RNN, geometric mean", _against_nn("training"), 4.0, 6.0, mean=True),
    Bar("inference against the best peer, every case", _against_best("inference"), 0.93, 1.0),
    Bar("training against the best peer, every case", _against_best("training"), 0.93, 1.0),
    Bar("the same, geometric mean, inference", _against_best("inference"), 1.3, 1.6, mean=True),
    Bar("the same, geometric mean, training", _against_best("training"), 1.35, 1.6, mean=True),
    Bar("inference, share of sgemm, B >= 32 and H >= 64", _share("inference"), 0.85, 0.95),
    Bar("training, share of sgemm, B >= 32 and H >= 64", _share("training"), 0.80, 0.95),
    Bar("a step of 1, 1000, 64, 64 over 320 cycles", _step_latency, 2.0, 1.3, at_most=True),
    Bar(
        "a call, 1, 10, 1, 16 inference, over ONNX Runtime's (20 us to its 11)",
        _against("ONNX Runtime", "inference"), 20 / 11, 12 / 11, at_most=True,
    ),
    Bar(
        "the same, forward and backward, over JAX's (70 us to its 58)",
        _against("JAX", "training"), 70 / 58, 55 / 58, at_most=True,
    ),
    Bar("an epoch of the sine task against nn.RNN's", _module("sine"), 1.8, 2.2),
    Bar("RNNCell in a loop of 100 steps against nn.RNNCell", _module("RNNCell"), 1.0, 1.5),
    Bar("peak memory of a training step over nn.RNN's", _memory, 1.0, 0.5, at_most=True),
    Bar("two threads over one, B >= 32 and H >= 128", _scaling, 1.75, 1.95),
    Bar("bfloat16 over rnnfast in float32 (AVX512-BF16)", _bfloat16("rnnfast float32"), 1.0, 1.7),
    Bar("bfloat16 over nn.RNN in bfloat16 (AVX512-BF16)", _bfloat16(NN), 1.0, 1.7),
]  # fmt: skip
