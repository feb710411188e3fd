"""Calls drawn at random: is there any at which rnnfast is slower than ``nn.RNN``?

    python -m benchmarks.random_calls --threads 1 --seconds 120 [--dtype bfloat16] [--seed 1]

The grid of cases.py is chosen; these are not. Sizes are drawn evenly in their logarithms, as far as
a call stays below 4 GFLOP: most are small, many have a single step or sequence, few suit a vector's
width. Each is timed briefly, and the lowest ratios again, longer, before they are printed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time

import torch
from tabulate import tabulate  # type: ignore[import-untyped]

from .cases import Case, Problem
from .contenders import nn_rnn, rnnfast_rnn
from .measure import interleave, pin

MOST_FLOPS = 4e9
SHOWN = 12


def draw(rng: random.Random, dtype: str) -> Case:
    """A layer or two of any kind, and the work to do."""

    def size(most: int) -> int:
        return round(math.exp(rng.uniform(0, math.log(most))))

    while True:
        H = size(1536)
        case = Case(
            rng.choice(["inference", "training"]),
            B=size(512), T=size(1000), I=rng.choice([H, size(1024)]), H=H,
            nonlinearity=rng.choice(["tanh", "relu"]),
            num_layers=rng.choice([1, 1, 1, 2]),
            bidirectional=rng.random() < 0.25,
            packed=rng.random() < 0.25,
            dtype=dtype,
        )  # fmt: skip
        if case.packed and case.T < 4:  # the shortest has a quarter of the steps
            continue
        if case.flops <= MOST_FLOPS:
            return case


def ratio(case: Case, threads: int, seconds: float) -> tuple[float, float, float]:
    """How many times as fast as nn.RNN, and the seconds that either takes."""
    problem = Problem(case, "cpu")
    entries = {"nn.RNN": nn_rnn(problem, threads), "rnnfast": rnnfast_rnn(problem, threads)}
    with torch.set_grad_enabled(case.work == "training"):
        found = interleave(entries, seconds, least=3)
    theirs, ours = (statistics.median(samples.seconds) for samples in found.values())
    return theirs / ours, theirs, ours


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120, help="to draw for (default: 120)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pin(options.threads)
    rng = random.Random(options.seed)
    ratios: dict[Case, float] = {}
    until = time.monotonic() + options.seconds
    while not ratios or time.monotonic() < until:
        case = draw(rng, options.dtype)
        ratios[case], *_ = ratio(case, options.threads, 0.05)
    rows = []
    for case in sorted(ratios, key=ratios.__getitem__)[:SHOWN]:
        ratios[case], theirs, ours = ratio(case, options.threads, 0.5)
        rows.append((ratios[case], case.id, f"{1e6 * theirs:.0f} us", f"{1e6 * ours:.0f} us"))
    headers = ["times as fast", "B x T x I x H", "nn.RNN", "rnnfast"]
    print(tabulate(sorted(rows), headers, floatfmt=".2f"))
    slower = sum(r < 1 for r in ratios.values())
    mean = statistics.geometric_mean(ratios.values())
    print(f"{options.dtype}, {options.threads} thread{'s' * (options.threads > 1)}: {len(ratios)} "
          f"calls, {slower} of them slower than nn.RNN; geometric mean {mean:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
