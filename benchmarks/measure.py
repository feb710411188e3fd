"""How it is measured: pinned threads, interleaved blocks, errors, memory, the machine's limits.

All contenders of a group are timed in one run, in turn: a block of calls of the first, a block of
the second, and so on, then the first again. Whatever else happens on the machine, and its changing
clock frequency, falls on all alike. A block is as many calls as last 5 ms, at least one; a sample
is a block's time over its calls; what is reported is the median of the samples. Before a block the
threads of the one before get a moment to fall asleep, and short calls run once untimed. Garbage
collection is off.

pytest-benchmark times one test after the other. To keep its tables, groups and files, a group's run
takes place when its first test is met, and each test then replays its contender's samples: the
``timer`` of the tests is a clock that only the replay moves, by one sample a round.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .contenders import Entry

BLOCK = 5e-3  # seconds that a block lasts at least
SETTLE = 1e-3  # seconds between blocks
LONG = 50e-3  # a call this long needs no untimed call before it


# ------------------------------------------------------------------------------------- threads


def cores() -> list[int]:
    """One logical CPU of each core that this process may use."""
    first: dict[tuple[str, ...], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology/"
        try:
            names = ("physical_package_id", "core_id")
            core = tuple(Path(topology, name).read_text().strip() for name in names)
        except OSError:
            core = (str(cpu),)
        first.setdefault(core, cpu)
    return list(first.values())


def pin(threads: int) -> list[int]:
    """Bind the process to as many cores as threads, and torch to as many threads.

    To be called before JAX starts, whose thread pool follows the affinity. Libraries that were
    loaded before may own threads already, so every thread of the process is bound.
    """
    cpus = cores()[:threads]
    if len(cpus) < threads:
        raise ValueError(f"{threads} threads need as many cores; there are {len(cpus)}")
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
    torch.set_num_threads(threads)
    return cpus


# ------------------------------------------------------------------------------------- timing


@dataclass
class Samples:
    """One contender's times: seconds a call, one for each block of ``calls`` calls."""

    calls: int
    seconds: list[float] = field(default_factory=list)


def block(entry: Entry, calls: int) -> float:
    """Seconds that a call takes, over a block of calls."""
    value = None
    if entry.events:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore
        begin.record()
        for _ in range(calls):
            entry.call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        value = entry.call()
    entry.finish(value)
    return (time.perf_counter() - start) / calls


def warm_up(entry: Entry, at_least: float = 20e-3) -> float:
    """Run until caches, pools and allocators have settled; return a call's shortest time.

    A long call has settled with the one that was checked before.
    """
    shortest, spent, calls = math.inf, 0.0, 0
    while calls < 1 or (spent < at_least and calls < 1000):
        seconds = block(entry, 1)
        shortest, spent, calls = min(shortest, seconds), spent + seconds, calls + 1
    return shortest


def interleave(
    entries: dict[str, Entry], seconds: float, least: int, most: int = 41
) -> dict[str, Samples]:
    """Time all entries in alternating blocks.

    Args:
        entries: the contenders by name.
        seconds: to spend on each contender, about. A machine that turns out to be much slower than
            in the warm-up (it is busy) ends the rounds at three times that.
        least: rounds of blocks at least, however long they last; ``most``: at most.
    """
    samples, wake, lasts = {}, {}, 0.0
    for name, entry in entries.items():
        with entry.around():
            once = warm_up(entry)
        samples[name] = Samples(calls=max(1, math.ceil(BLOCK / once)))
        wake[name] = once < LONG
        lasts += max(BLOCK, once) + SETTLE
    seconds *= len(entries)
    rounds = min(most, max(least, round(seconds / lasts)))
    latest = time.perf_counter() + 3 * seconds
    gc.collect()
    gc.disable()
    try:
        for n in range(rounds):
            if n >= least and time.perf_counter() > latest:
                break
            for name, entry in entries.items():
                with entry.around():
                    time.sleep(SETTLE)
                    if wake[name]:
                        block(entry, 1)
                    samples[name].seconds.append(block(entry, samples[name].calls))
    finally:
        gc.enable()
    return samples


class Tape:
    """A clock for pytest-benchmark that stands still but for the samples played on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time: the sum of the samples played so far."""
        return self.now

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Feed samples to a benchmark fixture whose timer this clock is, one a round."""
        left = iter(seconds)

        def play() -> None:
            self.now += next(left)

        benchmark.pedantic(play, rounds=len(seconds))


# ------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Error:
    """Relative error of the worst of several tensors: root mean square, and maximum.

    Each is relative to the same of the truth: ``|a - t|_2 / |t|_2`` and ``max|a - t| / max|t|``.
    """

    rms: float
    max: float


def error(results: dict[str, Tensor], truth: dict[str, Tensor]) -> Error:
    """Error of results against float64 truth."""
    if results.keys() != truth.keys():
        raise AssertionError(f"computed {sorted(results)}, not {sorted(truth)}")
    rms = largest = 0.0
    for name, t in truth.items():
        a = results[name].to(t)
        if a.shape != t.shape:
            raise AssertionError(f"{name} has the shape {list(a.shape)}, not {list(t.shape)}")
        if not a.isfinite().all():
            raise AssertionError(f"{name} is not finite")
        rms = max(rms, ((a - t).norm() / t.norm()).item())
        largest = max(largest, ((a - t).abs().max() / t.abs().max()).item())
    return Error(rms, largest)


def bound(case: Case, baseline: Error) -> float:
    """The rms error beyond which a contender computes something else than nn.RNN.

    A float32 result is a sum of ``terms`` products, of a state that went through T such sums;
    rounding errors add like a random walk: ``eps sqrt(terms T)``, of which four standard deviations
    are granted. Narrower dtypes are compared with what nn.RNN itself loses. A ReLU whose argument
    is a rounding error from zero may be on or off; in the gradients each such unit is off by about
    its whole share, one in ``sqrt(rows H)``.
    """
    terms = case.H + max(case.layer_inputs)
    granted = 4 * torch.finfo(torch.float32).eps * math.sqrt(terms * case.T * case.num_layers)
    if case.nonlinearity == "relu" and case.work == "training":
        granted += 4 / math.sqrt(sum(case.lengths) * case.H)
    if case.dtype != "float32":
        granted = max(granted, 2 * baseline.rms)
    return granted


# ------------------------------------------------------------------------------------- memory


def peak_bytes(entry: Entry, device: str) -> int:
    """Most memory that a training step holds beyond its inputs and what it leaves.

    Everything that torch's allocator handed out and had not yet got back, counted at each
    allocation, from the start of a step; less the output, the last states and the gradients. On a
    CPU the profiler reports each allocation and release, but only those of the calling thread, so
    the step runs on one thread. What libraries keep for themselves (MKL's packed panels) does not
    pass through torch's allocator and is not seen, of either contender.
    """
    assert entry.live is not None
    with entry.around():
        if device == "cuda":
            entry.call()
            before = torch.cuda.memory_allocated() - _bytes(entry.live(()))  # the step frees these
            torch.cuda.reset_peak_memory_stats()
            left = _bytes(entry.live(entry.call()))
            return torch.cuda.max_memory_allocated() - before - left
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                value = entry.call()
        finally:
            torch.set_num_threads(threads)
    return _peak(_memory_events(profile)) - _bytes(entry.live(value))


def _bytes(tensors: list[Tensor]) -> int:
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _memory_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Address and size of each allocation, size negative for a release, in order."""
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore
    for node in nodes:  # grows while it is walked
        nodes.extend(node.children)
    allocations = [n for n in nodes if n.tag == torch._C._profiler._EventType.Allocation]
    allocations.sort(key=lambda n: n.start_time_ns)
    return [(n.extra_fields.ptr, n.extra_fields.alloc_size) for n in allocations]


def _peak(events: list[tuple[int, int]]) -> int:
    """Most bytes held at once of what the events allocate."""
    sizes: dict[int, int] = {}
    held = most = 0
    for address, size in events:
        if size > 0:
            sizes[address] = size
            held += size
            most = max(most, held)
        else:
            held -= sizes.pop(address, 0)  # 0: allocated before the first event
    return most


# ------------------------------------------------------------------------- the machine's limits


def _seconds(call: Callable[[], Any], device: str, times: int = 3) -> float:
    entry = Entry(call, lambda value: {}, events=device == "cuda")
    if device == "cuda":
        call()  # the first loads the library
    return statistics.median(block(entry, 1) for _ in range(times))


def sgemm_flops(device: str) -> float:
    """FLOP/s of one float32 2048-cube product."""
    n = 2048
    a, b, c = (torch.ones(n, n, device=device) for _ in range(3))
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=c), device, times=1)


def read_seconds(w: Tensor, device: str) -> float:
    """Seconds to read a matrix once from wherever it stays when it is read again and again."""
    again = 8
    expanded = w.detach().expand(again, *w.shape)
    return _seconds(expanded.sum, device, times=15) / again
