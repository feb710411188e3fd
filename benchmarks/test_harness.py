"""The instrument checked before it measures: what is recorded, what is reported; no times."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import random

import pytest
import torch
from torch import nn

from . import bars, measure, random_calls, report
from .cases import Case, Problem, cases
from .contenders import CONTENDERS, Entry, flashrnn_elman, modules


class Clock:
    """perf_counter and sleep of a made-up machine, on which each contender takes a known time."""

    def __init__(self):
        self.now, self.calls = 100.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def contender(self, name, seconds):
        def call():
            self.now += seconds
            self.calls.append(name)

        return Entry(call, lambda value: {})


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_blocks_alternate_and_record_each_contender(clock):
    entries = {"tiny": clock.contender("tiny", 1e-4), "long": clock.contender("long", 0.2)}
    samples = measure.interleave(entries, seconds=0.1, least=3)
    assert samples["tiny"].calls == 50  # 5 ms of them
    assert samples["long"].calls == 1
    assert samples["tiny"].seconds == pytest.approx([1e-4] * 3)
    assert samples["long"].seconds == pytest.approx([0.2] * 3)
    blocks = [
        name
        for name, before in zip(clock.calls, ["", *clock.calls], strict=False)
        if name != before
    ]
    assert blocks == ["tiny", "long"] * 4  # a warm-up, three rounds


def test_rounds_follow_the_time_to_spend(clock):
    entries = {name: clock.contender(name, 0.01) for name in "ab"}
    samples = measure.interleave(entries, seconds=0.2, least=3, most=41)
    assert len(samples["a"].seconds) == len(samples["b"].seconds) == 18  # 0.2 / (0.01 + 0.001)
    assert len(measure.interleave(entries, seconds=9, least=3, most=41)["a"].seconds) == 41


def test_a_busy_machine_ends_the_rounds(clock):
    entry = clock.contender("busy", 0.01)
    entry.around = lambda: contextlib.nullcontext(clock.sleep(0.1))
    assert len(measure.interleave({"busy": entry}, seconds=0.2, least=3)["busy"].seconds) == 5


def test_a_device_that_runs_behind_is_waited_for(clock):
    entry = Entry(lambda: "value", lambda value: {}, finish=lambda value: clock.sleep(0.3))
    assert measure.block(entry, 3) == pytest.approx(0.1)


def test_cuda_events_time_the_stream(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 12.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    entry = Entry(lambda: log.append("call"), lambda value: {}, events=True)
    assert measure.block(entry, 2) == pytest.approx(6e-3)
    assert log == ["record", "call", "call", "record", "synchronize"]


recorded = measure.Tape()


@pytest.mark.benchmark(timer=recorded)
def test_tape_replays_the_samples(benchmark, monkeypatch):
    kept = []  # not among the results
    monkeypatch.setattr(benchmark, "_add_stats", kept.append)
    monkeypatch.setattr(benchmark, "disabled", False)
    recorded.replay(benchmark, [0.25, 0.5, 1.0])
    assert kept[0].stats.data == pytest.approx([0.25, 0.5, 1.0])
    assert benchmark.stats["median"] == pytest.approx(0.5)


def test_peak_counts_what_is_held_at_once():
    events = [(1, 100), (2, 50), (1, -100), (9, -7), (1, 30), (3, 60), (2, -50)]
    assert measure._peak(events) == 150
    assert measure._peak([*events, (4, 40), (5, 30)]) == 160


def test_peak_memory_of_a_step_is_what_it_does_not_leave():
    leaves = torch.zeros(1000)

    def step():
        scratch = torch.empty(5000)
        scratch = scratch[:1]  # released only with its storage
        out = torch.empty(1000)
        del scratch
        torch.empty(2000)
        return (out,)

    entry = Entry(step, lambda value: {}, live=list)
    assert measure.peak_bytes(entry, "cpu") == 4 * 5000
    assert measure._bytes([leaves, leaves[:3]]) == 4 * 1000


def test_peak_memory_on_a_gpu_leaves_out_what_was_there(monkeypatch):
    out, grad = torch.zeros(50), torch.zeros(25)  # the gradient of the step before is there too
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    entry = Entry(lambda: (out,), lambda value: {}, live=lambda value: [*value, grad])
    assert measure.peak_bytes(entry, "cuda") == 1700 - (1000 - 100) - (200 + 100)


def test_error_is_relative_and_of_the_worst_tensor():
    truth = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.ones(4).double()}
    results = {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(4)}
    assert measure.error(results, truth) == measure.Error(rms=0.1, max=0.125)
    for wrong in (
        {"a": truth["a"]},
        truth | {"a": truth["a"][:1]},
        truth | {"b": torch.full((4,), math.nan)},
    ):
        with pytest.raises(AssertionError):
            measure.error(wrong, truth)


def test_bound_sees_a_lost_digit_and_a_missing_bias():
    case = Case("inference", 4, 20, 8, 16)
    problem = Problem(case, "cpu")
    exact = modules(problem.cast("float64"), nn.RNN, nn.RNNCell)
    truth = exact.results(exact.call())
    bound = measure.bound(case, measure.Error(0, 0))
    theirs = CONTENDERS["nn.RNN"].prepare(problem, 1)
    assert measure.error(theirs.results(theirs.call()), truth).rms < bound / 10
    half = {name: t.bfloat16() for name, t in truth.items()}
    assert measure.error(half, truth).rms > bound
    other = copy.copy(problem)
    other.module = copy.deepcopy(problem.module)
    nn.init.zeros_(other.module.bias_hh_l0)
    wrong = CONTENDERS["nn.RNN"].prepare(other, 1)
    assert measure.error(wrong.results(wrong.call()), truth).rms > 100 * bound


def test_flops():
    assert Case("inference", 3, 5, 7, 11).flops == 2 * 3 * 5 * 11 * (7 + 11)
    assert Case("training", 3, 5, 7, 11).flops == 2 * 3 * 5 * 11 * (2 * (7 + 11) + 11)
    both = Case("inference", 3, 5, 7, 11, num_layers=2, bidirectional=True)
    assert both.flops == 2 * (2 * 3 * 5 * 11 * (7 + 11) + 2 * 3 * 5 * 11 * (22 + 11))
    packed = Case("inference", 3, 8, 7, 11, packed=True)
    assert packed.lengths == [8, 5, 2]
    assert packed.flops == 2 * 15 * 11 * (7 + 11)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("full", [False, True])
def test_cases_have_names_of_their_own(full, device):
    names = [case.id for case in cases(full, device)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("work", ["inference", "training"])
def test_flashrnn_is_called_with_the_weights_of_nn_rnn(work):
    pytest.importorskip("flashrnn")
    problem = Problem(Case(work, 3, 5, 4, 16), "cpu")
    theirs = CONTENDERS["nn.RNN"].prepare(problem, 1)
    other = flashrnn_elman(problem, 1, backend="vanilla")
    expected, actual = (e.results(e.call()) for e in (theirs, other))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


# --------------------------------------------------------------------------------------- report


def record(case, contender, seconds, **info):
    info = {"contender": contender, "error_rms": 1e-7, "error_max": 2e-7} | info
    info = {"sgemm": [1e11, 1e11]} | info
    return {"stats": {"median": seconds}, "extra_info": dataclasses.asdict(case) | info}


def results(records, threads=1, flags=()):
    return {
        "machine_info": {
            "processor": "x86_64",
            "cpu": {"brand_raw": "A CPU", "hz_actual": [3_200_000_000, 0], "flags": list(flags)},
            "rnnfast": {
                "device": "cpu",
                "gpu": None,
                "threads": threads,
                "cpus": list(range(threads)),
                "cpu_capability": "AVX2",
                "python": "3.11.0",
                "versions": {"rnnfast": "1.0", "torch": "2.13.0"},
            },
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": records,
    }


@functools.cache
def made_up(threads=1):
    """Two public shapes and others: nn.RNN takes 4 and 9 times as long, JAX twice and half."""
    first, second = Case("inference", 32, 100, 32, 64), Case("inference", 1, 10, 1, 16)
    speed = {1: 1.0, 2: 1.6}[threads]
    train = Case("training", 64, 100, 128, 128)
    records = [
        record(first, "nn.RNN", 4e-3),
        record(first, "rnnfast", 1e-3),
        record(first, "JAX", 2e-3),
        record(second, "nn.RNN", 90e-6),
        record(second, "rnnfast", 10e-6),
        record(second, "JAX", 5e-6),
        record(train, "nn.RNN", 20e-3 / speed, peak_bytes=1000),
        record(train, "rnnfast", 10e-3 / speed, peak_bytes=400),
        record(Case("training", 190, 10, 1, 16, module="sine"), "nn.RNN", 3e-3),
        record(Case("training", 190, 10, 1, 16, module="sine"), "rnnfast", 2e-3),
        *(
            record(
                Case(work, B, 100, H, H, series="H sweep"), name, T * H * B, read_seconds=1e-6 * H
            )
            for work in ("inference", "training")
            for B in (1, 32)
            for H in (16, 64)
            for name, T in (("nn.RNN", 3e-6), ("rnnfast", 1e-6))
        ),
    ]
    return report.Run(results(records, threads))


def test_ratios_shares_and_means():
    run = made_up()
    group = run.grid("inference")[0]
    assert group.ratio("nn.RNN") == pytest.approx(4)
    assert group.best_peer == "JAX"
    assert group.ratio("JAX") == pytest.approx(2)
    assert run.share(group) == pytest.approx(2 * 32 * 100 * 64 * 96 / 1e-3 / 1e11)
    table = report.readme_table(run)
    line = next(x for x in table.splitlines() if "32, 100, 32, 64" in x)
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    assert cells[:5] == ["32, 100, 32, 64", "4.00 ms", "1.00 ms", "**4.00**", "JAX 2.00 ms"]
    assert cells[5:] == [""] * 4  # no training of this shape
    assert "**6.00**" in table  # the geometric mean of 4 and 9
    assert "1.00 times its speed" in table  # of 2 and 1/2
    assert "A CPU, AVX2, 1 thread" in table
    assert "commit 0123456789" in table


def test_best_peer_may_be_nn_rnn():
    group = made_up().grid("training")[0]
    assert group.best_peer == "nn.RNN"


def test_bars_judge():
    judged = [bar.judge(made_up(), None) for bar in bars.BARS]
    lines = {line[0]: line for line, _ in judged}
    short = {line[0]: cases for line, cases in judged}
    mean = "inference against nn.RNN, geometric mean"
    assert lines[mean][3:] == ["6 over 2 cases", "yes"]
    best = "inference against the best peer, every case"
    assert lines[best][3:] == ["0.5, worst of 2 cases", "**no**"]
    assert short[best] == {"1, 10, 1, 16": pytest.approx(0.5)}
    memory = "peak memory of a training step over nn.RNN's"
    assert lines[memory][3:] == ["0.4, worst of 1 case", "yes"]
    assert lines["an epoch of the sine task against nn.RNN's"][4] == "**no**"
    scaling = "two threads over one, B >= 32 and H >= 128"
    assert lines[scaling][3:] == ["not measured", ""]
    assert lines["bfloat16 over nn.RNN in bfloat16 (AVX512-BF16)"][3] == "not measured"
    two = {line[0]: line for line, _ in (bar.judge(made_up(2), made_up()) for bar in bars.BARS)}
    assert two[scaling][3:] == ["1.6, worst of 1 case", "**no**"]
    assert "Short of *an epoch" in report.bar_table([made_up()])


def test_a_miss_is_not_rounded_to_the_bar():
    bar = bars.Bar("", lambda run, one: {}, 1.75, 1.95)
    assert [bar.shown(x) for x in (1.746, 1.7499996, 1.75, 1.754)] == [
        "1.746", "1.7499996", "1.75", "1.75",
    ]  # fmt: skip
    most = bars.Bar("", lambda run, one: {}, 1.0, 0.5, at_most=True)
    assert [most.shown(x) for x in (0.9996, 1.0004)] == ["1", "1.0004"]


def test_step_latency_is_in_units_of_320_cycles():
    case = Case("inference", 1, 1000, 64, 64)
    run = report.Run(results([record(case, "rnnfast", 1000 * 640 / 3.2e9)]))
    assert bars._step_latency(run, None) == {case_label(case): pytest.approx(2)}


def case_label(case):
    return report.Group(case).shape


def test_readme_is_replaced_between_its_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    file = tmp_path / "results.json"
    case = Case("inference", *report.PUBLIC[0])
    records = [record(case, "nn.RNN", 2e-3), record(case, "rnnfast", 1e-3)]
    file.write_text(json.dumps(results(records)))
    report.main([str(file), "--readme", str(readme), "--plots", str(tmp_path / "plots")])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n|")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "**2.00**" in text
    assert "### Bars" in capsys.readouterr().out
    assert (tmp_path / "plots" / "speedup-1-threads.png").stat().st_size > 0
    with pytest.raises(ValueError, match="markers"):
        report.replace_measured("no markers", "table")


def test_plots_of_the_sweeps(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    names = [file.name for file in plots.draw(made_up(), tmp_path)]
    assert names == ["speedup-1-threads.png", "hidden-size-1-threads.png"]


def test_summary_lists_all_contenders():
    case = Case("training", 2, 3, 4, 5)
    records = [record(case, "nn.RNN", 3e-3), record(case, "rnnfast", 1e-3, peak_bytes=2**20)]
    text = report.summary(records)
    assert "3.00" in text
    assert "1.00 MiB" in text
    assert "sgemm: 100.0 GFLOP/s" in text


def test_random_calls_are_of_all_kinds_and_never_long():
    rng = random.Random(0)
    drawn = [random_calls.draw(rng, "float32") for _ in range(300)]
    assert max(case.flops for case in drawn) <= random_calls.MOST_FLOPS
    assert all(min(case.lengths) >= 1 for case in drawn)
    for kind in ("work", "nonlinearity", "num_layers", "bidirectional", "packed"):
        assert len({getattr(case, kind) for case in drawn}) == 2
    assert {case.H == case.I for case in drawn} == {False, True}
    assert {case.T for case in drawn} > {1, 2, 3}
    times_as_fast, theirs, ours = random_calls.ratio(Case("training", 2, 3, 4, 5), 1, 0.01)
    assert times_as_fast == theirs / ours > 0
