"""The benchmarks: one test for each contender in each case; a group is a case.

    pytest benchmarks/                                              a quick look
    pytest benchmarks/ --full --threads 1 --benchmark-json=1.json   the grid, for benchmarks.report
    pytest benchmarks/ -k "training and 32x100x32x64"               some of it
    pytest benchmarks/ --benchmark-disable                          check the numbers, time nothing

Before it is timed, each contender's result is compared with float64 truth; one that disagrees with
nn.RNN fails. The error is saved beside the time, and so are the FLOPs of the case, the machine's
sgemm rate of the same minute, and the peak memory of a training step, measured after the timing.
"""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from .cases import Problem, cases
from .conftest import RECORDS
from .contenders import CONTENDERS, Unsupported, modules
from .measure import (
    Samples,
    Tape,
    bound,
    error,
    interleave,
    peak_bytes,
    read_seconds,
    sgemm_flops,
)  # fmt: skip

tape = Tape()


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    metafunc.parametrize(
        ("case", "contender"),
        [
            pytest.param(case, name, id=f"{case.id} {name}")
            for case in cases(option.full, option.device)
            for name, contender in CONTENDERS.items()
            if contender.takes(case, option.device)
        ],
    )


@dataclasses.dataclass
class Outcome:
    """What one contender's share of a group's run gave."""

    samples: Samples
    info: dict


@functools.lru_cache(maxsize=1)  # the tests of a group follow each other
def run(case, names, device, threads, full, timed):
    """Check, then time, the named contenders side by side: an outcome or an exception for each."""
    problem = Problem(case, device)
    exact = modules(problem.cast("float64"), nn.RNN, nn.RNNCell)
    truth = exact.results(exact.call())
    baseline = CONTENDERS["nn.RNN"].prepare(problem, threads)
    baseline_error = error(baseline.results(baseline.call()), truth)
    allowed = bound(case, baseline_error)

    outcomes, entries = {}, {}
    for name in names:
        try:
            entry = CONTENDERS[name].prepare(problem, threads)
            with entry.around():
                off = error(entry.results(entry.call()), truth)
            if off.rms > allowed:
                raise AssertionError(f"{name} is off by {off.rms:.1e}, more than {allowed:.1e}")
        except Exception as reason:  # its own test tells; the others go on
            outcomes[name] = reason
            continue
        entries[name] = entry
        outcomes[name] = Outcome(
            Samples(calls=1),
            dataclasses.asdict(case)
            | {"contender": name, "backend": entry.backend, "flops": case.flops}
            | {"error_rms": off.rms, "error_max": off.max},
        )
    if not timed:
        return outcomes

    seconds, least = (1.0, 7) if full and case.series == "grid" else (0.25, 3)
    sgemm = [sgemm_flops(device)]
    samples = interleave(entries, seconds, least)
    sgemm.append(sgemm_flops(device))
    for name, entry in entries.items():
        outcome = outcomes[name]
        outcome.samples = samples[name]
        outcome.info |= {"calls": samples[name].calls, "sgemm": sgemm}
        if case.B == 1 and case.module == "RNN":
            outcome.info["read_seconds"] = read_seconds(problem.module.weight_hh_l0, device)
        if entry.live is not None:
            outcome.info["peak_bytes"] = peak_bytes(entry, device)
    return outcomes


@pytest.mark.benchmark(timer=tape)
def test_rnn(request, benchmark, case, contender):
    option = request.config.option
    names = tuple(
        item.callspec.params["contender"]
        for item in request.session.items
        if item.function is request.function and item.callspec.params["case"] == case
    )
    timed = benchmark.enabled
    # Gradient mode is the caller's, set once: no contender pays for it in each call.
    with torch.set_grad_enabled(case.work == "training"):
        outcome = run(case, names, option.device, option.threads, option.full, timed)[contender]
    if isinstance(outcome, Unsupported):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    benchmark.group = case.id
    benchmark.extra_info |= outcome.info
    if not timed:
        benchmark(lambda: None)
        return
    tape.replay(benchmark, outcome.samples.seconds)
    stats = {"median": benchmark.stats["median"]}
    request.config.stash[RECORDS].append({"stats": stats, "extra_info": dict(outcome.info)})
