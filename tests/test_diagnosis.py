"""``python -m rnnfast``: what a bug report needs, in words and as JSON."""

import json
import platform
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from helpers import environment
from torch._subclasses import FakeTensorMode

import rnnfast
from rnnfast import __main__ as diagnosing
from rnnfast import backends, dispatch, triton_layer
from rnnfast.__main__ import diagnosis


def diagnose(*args, **variables):
    return subprocess.run(
        [sys.executable, "-m", "rnnfast", *args],
        env=environment(**variables), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_json_says_all_that_decides_what_runs():
    found = json.loads(diagnose("--json"))
    assert found == json.loads(json.dumps(diagnosis())) | {"forced_backend": None}
    assert found["rnnfast"] == rnnfast.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (found["cpu_kernels"] is None) == (found["extension_error"] is not None)
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["extension_error"] is None) == bool(found["build"].get("extension"))
    assert found["taken"].keys() == backends.BACKENDS.keys()


def check(calls):
    """Every class accounts for every backend, and the classes of a kind of call for every size."""
    sizes = {}
    for call in calls:
        assert call["runs"] in call["usable"]
        assert sorted([*call["usable"], *call["why_not"]]) == sorted(backends.BACKENDS)
        kind = (call["device"], call["dtype"], call["transform"], call["packed"])
        sizes.setdefault(kind, []).extend(call["hidden_size"])
        with torch.device(call["device"]):
            probe = torch.empty(1, 1, 1, dtype=getattr(torch, call["dtype"]))
        if call["transform"] is None:
            for size in chain.from_iterable(call["hidden_size"]):
                chosen = backends.chosen(probe, size or 10**6, call["packed"])
                assert chosen == call["runs"], (kind, size)
    for kind, ranges in sizes.items():
        ends = [0, *chain.from_iterable(sorted(ranges, key=lambda r: r[0]))]
        assert ends.pop() is None
        assert all(b == a + 1 for a, b in zip(ends[::2], ends[1::2], strict=True)), kind
    assert sizes
    assert len(sizes) % (len(diagnosing._DTYPES) * 6) == 0


def test_every_backend_is_accounted_for_in_every_class_of_calls():
    calls = diagnosis()["calls"]
    check(calls)
    assert {c["device"] for c in calls} >= {"cpu"}
    forward_mode = [c for c in calls if c["transform"] == "jvp"]
    assert {c["runs"] for c in forward_mode} == {"reference"}


@pytest.mark.parametrize("forced", [None, "reference"])
def test_the_words_name_every_backend_that_cannot_run_and_why(forced):
    out = diagnose(**({"RNNFAST_BACKEND": forced} if forced else {}))
    found = diagnosis()
    for known in ("rnnfast", "torch", "platform", "cpu_capability"):
        assert str(found[known]) in out
    assert f"forced     {forced or 'nothing'}" in out
    assert ("no kernels built" in out) == (not found["build"].get("cuda"))
    for name, where in found["taken"].items():
        assert f"  {name:10} {where}" in out
    table = out[out.index("\ncall ") :]
    assert max(map(len, table.splitlines())) <= 100
    words = " ".join(table.split())  # without the breaks of lines
    for call in found["calls"]:
        for name, why in call["why_not"].items():
            assert " ".join(f"not {name}: {why}".split()) in words


@pytest.fixture
def h100s(monkeypatch):
    """A machine with two GPUs of one model, as far as the table asks, and no kernels in CUDA C++,
    which would ask the driver."""
    name = "NVIDIA H100"
    properties = SimpleNamespace(name=name, major=9, minor=0, shared_memory_per_block_optin=232448)
    for function, result in {
        "device_count": 2,
        "get_device_name": name,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda *args, result=result: result)
    monkeypatch.setattr(backends, "extension_error", None)
    monkeypatch.setattr(dispatch, "has_compiled_kernels", lambda key: False)
    monkeypatch.setattr(triton_layer, "INTERPRETED", False)
    monkeypatch.setattr(triton_layer, "_import_error", lambda: None)
    monkeypatch.setattr(diagnosing, "_LARGEST", 270)  # just above the largest of Triton's table
    triton_layer._why_not_on.__wrapped__.cache_clear()
    with FakeTensorMode():
        yield
    triton_layer._why_not_on.__wrapped__.cache_clear()


def test_on_a_gpu_the_sizes_are_those_of_the_kernels_and_of_the_measurements(h100s, monkeypatch):
    win = backends.Win("triton", (9, 0), "float32 default", (1, 64), packed=True)
    monkeypatch.setattr(backends, "GPU_WINS", (win,))
    found = diagnosis()
    (row,) = found["gpu_wins"]
    assert backends.Win(**row) == win
    calls = found["calls"]
    check(calls)
    assert {c["device"] for c in calls} == {"cpu", "cuda:0"}  # the second is like the first

    def classes(dtype, packed):
        kind = ("cuda:0", str(dtype).removeprefix("torch."), None, packed)
        return [
            (c["hidden_size"], c["runs"], "triton" in c["usable"])
            for c in calls
            if (c["device"], c["dtype"], c["transform"], c["packed"]) == kind
        ]

    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        largest = triton_layer.largest_hidden_size(dtype)
        expected = [([[1, largest]], "torch", True), ([[largest + 1, None]], "torch", False)]
        assert classes(dtype, False) == classes(dtype, True) == expected
    assert classes(torch.complex64, False) == [([[1, None]], "torch", False)]
    largest = triton_layer.largest_hidden_size(torch.float32)
    beyond = ([[largest + 1, None]], "torch", False)
    assert classes(torch.float32, False) == [([[1, largest]], "torch", True), beyond]
    assert classes(torch.float32, True) == [
        ([[1, 64]], "triton", True), ([[65, largest]], "torch", True), beyond,
    ]  # fmt: skip
    text = "\n".join(diagnosing._table(calls))
    assert f"  packed                    1 to 64              {'triton':10} torch" in text
    assert f"is above {largest}, all that one block holds" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_backend_more_shows_without_a_word_about_it(monkeypatch):
    def in_sixteens(input, hidden_size=None):
        return "it walks in sixteens." if hidden_size and hidden_size % 16 else None

    monkeypatch.setitem(backends.BACKENDS, "new", in_sixteens)
    monkeypatch.setattr(diagnosing, "_LARGEST", 64)
    calls = diagnosis()["calls"]
    check(calls)
    assert [[16, 16], [32, 32], [48, 48], [64, None]] in [c["hidden_size"] for c in calls]
    text = "\n".join(diagnosing._table(calls))
    assert "16, 32, 48, ..." in text
    assert "not new: it walks in sixteens." in text
