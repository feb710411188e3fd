"""What tools/gpu_check.py makes of rows put together by hand; times need a GPU."""

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import rnnfast

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tools():
    if not (TOOLS / "gpu_check.py").exists():
        pytest.skip("needs the source tree")
    sys.path.insert(0, str(TOOLS))
    try:
        import gpu_check
        import gpu_report
        import gpu_timing
    finally:
        sys.path.remove(str(TOOLS))
    return gpu_check, gpu_timing, gpu_report


def rows_of(cells, times):
    """A row a cell and contender; times, in us, are numbers or functions of the cell."""
    return [
        asdict(c) | {"contender": who, "median_us": time(c) if callable(time) else time}
        for c in cells
        for who, time in times.items()
    ]


def test_ratios_compare_with_nn_rnn_in_the_same_cell(tools):
    _, timing, report = tools
    cells = [c for c in timing.cells_of([(2, 4, 3, 16)], False) if c.precision != "float32 ieee"]
    rows = rows_of(cells[:1], {"nn.RNN": 30.0, "rnnfast cuda": 10.0})
    rows += rows_of(cells[1:2], {"rnnfast cuda": 10.0})  # no baseline
    refused = asdict(cells[2]) | {"contender": "rnnfast triton", "refused": "too large"}
    rows += [*rows_of(cells[2:3], {"nn.RNN": 30.0}), refused]
    assert report.ratios(rows) == {("rnnfast cuda", cells[0]): 3.0}


def suggested(tools, cells, **ours):
    """The rows that are suggested."""
    _, _, report = tools
    times = {"nn.RNN": 10.0} | {f"rnnfast {name}": time for name, time in ours.items()}
    found = report.ratios(rows_of(cells, times))
    return [row.win for row in report.suggestions(found, cells, (9, 0))]


def test_a_win_needs_every_cell_of_its_class(tools):
    _, timing, _ = tools
    Win = rnnfast.backends.Win
    sizes = (16, 64, 256, 512, 1024)
    cells = [*timing.cells_of([(B, 4, 1, H) for B in (1, 8) for H in sizes], False)]
    everything = {
        Win("cuda", (9, 0), precision, sizes, packed=False)
        for precision in (*timing.PRECISIONS, "float32 default")
        for sizes in ((16, 256), (512, 1024))
    }
    assert set(suggested(tools, cells, cuda=5.0)) == everything
    assert not suggested(tools, cells, cuda=10.1)
    # One cell lost: a batch, with TF32, in training. It costs TF32 that hidden size.
    lost = replace(cells[0], B=8, H=64, precision="float32 tf32", work="training")
    rows = set(suggested(tools, cells, cuda=lambda c: 10.1 if c == lost else 5.0))
    tf32 = [row.hidden_sizes for row in rows if row.precision == "float32 tf32"]
    assert sorted(tf32) == [(16, 16), (256, 256), (512, 1024)]
    assert {row for row in everything if row.precision != "float32 tf32"} < rows


def test_under_default_flags_ours_in_float32_is_beside_cudnns_tf32(tools):
    _, timing, report = tools
    cells = timing.cells_of([(2, 4, 3, 16)], False)
    theirs = {"float32 ieee": 20.0, "float32 tf32": 8.0, "bfloat16": 20.0}
    rows = rows_of(cells, {"nn.RNN": lambda c: theirs[c.precision], "rnnfast cuda": 10.0})
    found = report.ratios(rows)
    for cell in cells:
        if cell.precision == "float32 ieee":
            assert found["rnnfast cuda", cell] == 2.0
            assert found["rnnfast cuda", report.by_default(cell)] == 0.8
    won = {row.win.precision for row in report.suggestions(found, cells, (9, 0))}
    assert won == {"float32 ieee", "bfloat16"}


@pytest.mark.parametrize(
    ("ended", "wrong", "right"),
    [
        ({}, [], {"cuda", "triton"}),
        ({}, ["nn.RNN"], {"cuda", "triton"}),
        ({}, ["rnnfast triton"], {"cuda"}),
        ({}, ["the device"], set()),
        ({"contract tests": "not reached"}, [], {"cuda", "triton"}),
        ({"contract tests": "failed (exit status 1)"}, [], set()),
        ({"sine cuda": "failed (exit status 1)"}, [], {"triton"}),
        ({"racecheck": "skipped: there is no compute-sanitizer"}, [], {"cuda", "triton"}),
        ({"memcheck": "cut off by its time limit"}, [], {"cuda", "triton"}),
        ({"memcheck": "failed (exit status 1)"}, [], {"triton"}),
        ({"every variant": "cut off by its time limit"}, [], {"triton"}),
        ({"triton tests": "failed (exit status 1)"}, [], {"cuda"}),
    ],
)
def test_wins_are_those_of_backends_that_were_right(tools, tmp_path, ended, wrong, right):
    """In the tests as they ended, and in the grid. The file is what RNNFAST_GPU_WINS reads."""
    check, timing, report = tools
    cells = timing.cells_of([(1, 4, 1, 16), (1, 4, 1, 64)], True)
    times = {"nn.RNN": 10.0, "rnnfast cuda": 5.0, "rnnfast triton": 4.0}
    suggested = report.suggestions(report.ratios(rows_of(cells, times)), cells, (9, 0))
    steps = {step.name: "passed" for step in check.gpu_steps(tmp_path, None)} | ended
    known = (*report.TESTED_BY.values(), *report.WATCHED_BY.values())
    assert set(steps) >= set(itertools.chain(*known))
    rows = [{"contender": contender, "error": "ArithmeticError"} for contender in wrong]
    about = dict.fromkeys(("gpu", "torch", "cudnn", "rnnfast", "commit"))
    wins = report.wins(about | {"steps": steps, "rows": rows}, suggested)
    file = tmp_path / check.WINS
    file.write_text(json.dumps(wins))
    read = rnnfast.backends._read_wins(str(file))
    assert read == tuple(row.win for row in suggested if row.win.backend in right)
    assert {win.backend for win in read} == right
    assert all(win.hidden_sizes == (16, 64) for win in read)


def test_what_was_not_measured_wins_nothing(tools):
    _, timing, report = tools
    cells = timing.cells_of([(1, 4, 1, 512)], True)
    rows = rows_of(cells[:-1], {"nn.RNN": 10.0, "rnnfast triton": 1.0})
    found = report.suggestions(report.ratios(rows), cells, (9, 0))
    measured = {"float32 ieee", "float32 tf32", "float32 default"}  # bfloat16's training is missing
    assert {row.win.precision for row in found} == measured


def test_the_faster_backend_is_suggested_first(tools):
    _, timing, _ = tools
    cells = [c for c in timing.cells_of([(1, 4, 1, 16)], False) if c.dtype == "bfloat16"]
    assert [row.backend for row in suggested(tools, cells, cuda=5.0, triton=4.0)] == [
        "triton",
        "cuda",
    ]


def test_the_grid_has_the_shapes_that_the_bars_speak_of(tools):
    _, timing, report = tools
    cells = timing.grid_cells(dry_run=False)
    assert len(set(cells)) == len(cells)
    for H in (512, 768, 1024, 2048):
        for B in (1, 16, 128):
            for T in (128, 1024):
                for precision in ("float32 ieee", "float32 tf32", "bfloat16"):
                    for work in ("inference", "training"):
                        assert timing.Cell(B, T, H, H, False, precision, work) in cells
        assert any(c.packed and c.H == H for c in cells)
    assert all(any(c.H in sizes for sizes in report.CLASSES.values()) for c in cells)


def test_rows_survive_a_time_limit(tools, tmp_path):
    _, _, report = tools
    file = tmp_path / "grid.jsonl"
    assert report.read_rows(file) == []
    file.write_text(json.dumps({"B": 1}) + "\n" + '{"B": 2, "T"')
    assert report.read_rows(file) == [{"B": 1}]


def test_a_step_says_how_it_ended(tools, tmp_path):
    check, _, _ = tools

    def outcome(code, limit=600.0, **kwargs):
        step = check.Step("step", [sys.executable, "-c", code], 600, **kwargs)
        step.run(tmp_path, limit)
        return step.outcome

    assert outcome("pass") == "passed"
    assert outcome("raise SystemExit(3)") == "failed (exit status 3)"
    assert outcome("import time; time.sleep(3600)", limit=1.0) == "cut off by its time limit"
    assert outcome("pass", skip="there is no tool") == "skipped: there is no tool"


def test_only_want_of_time_is_forgiven_and_only_of_the_last_steps(tools, tmp_path):
    check, _, _ = tools
    for outcome, fails in ((check.NOT_REACHED, False), (check.CUT_OFF, False), ("failed", True)):
        for if_time in (False, True):
            step = check.Step("step", [], 1, if_time=if_time)
            step.outcome = outcome
            assert step.failed == (fails or not if_time)
    steps = check.gpu_steps(tmp_path, None)
    assert {step.name for step in steps if step.if_time} == {"rivals", "contract tests"}
    assert [step.if_time for step in steps] == sorted(step.if_time for step in steps)


def test_it_finds_the_package_that_is_not_installed(tools):
    """As in a fresh checkout that was only built in place."""
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import gpu_check; print(sys.path[0])"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(TOOLS.parent.resolve())


def test_a_wrong_unit_is_no_time(tools):
    _, timing, _ = tools
    theirs = {"output": torch.randn(50, 4, 64, dtype=torch.float64)}
    for cell in timing.cells_of([(4, 50, 64, 64)], False):
        eps = 2.0**-8 if cell.precision != "float32 ieee" else 2.0**-22
        right = theirs["output"] * (1 + eps * torch.randn(50, 4, 64))
        timing.compare(cell, {"output": right}, theirs)
        wrong = right.clone()
        wrong[..., 63] = 0
        with pytest.raises(ArithmeticError, match=r"of nn\.RNN's"):
            timing.compare(cell, {"output": wrong}, theirs)


def test_a_device_that_fails_for_good_costs_one_cell(tools, tmp_path, monkeypatch):
    _, timing, report = tools
    cells = timing.cells_of([(2, 4, 3, 16)], False)
    file, anew, faulty = tmp_path / "grid.jsonl", [], [cells[2]]

    def time_cell(cell, problem, contenders, write):
        assert contenders == cell.work
        if cell in faulty:
            monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
        else:
            write(asdict(cell) | {"contender": "nn.RNN", "median_us": 1.0})

    monkeypatch.setattr(timing, "time_cell", time_cell)
    monkeypatch.setattr(timing, "problems", lambda cells, device: ((c, None) for c in cells))
    monkeypatch.setattr(timing, "start_anew", anew.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    passes = [(cells[:2], lambda cell: cell.work), (cells[2:], lambda cell: cell.work)]
    assert not timing.time_all(file, "cuda", passes, 0)
    assert anew == [3]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not timing.time_all(file, "cuda", passes, anew[0])  # the fault is not forgotten
    rows = report.read_rows(file)
    assert [report.cell_of(row) for row in rows if "median_us" in row] == cells[:2] + cells[3:]
    assert [report.cell_of(row) for row in rows if "error" in row] == faulty


def test_the_toolkit_is_found_behind_a_script(tools, tmp_path, monkeypatch):
    check, _, _ = tools
    for file in ("toolkit/bin/nvcc", "toolkit/include/cuda_runtime_api.h", "bin/nvcc"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    assert check.cuda_home() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert check.cuda_home() != str(tmp_path)  # it has no headers
    monkeypatch.setenv("PATH", str(tmp_path / "toolkit" / "bin"))
    assert check.cuda_home() == str(tmp_path / "toolkit")


def test_without_cuda_kernels_their_steps_are_skipped_by_name(tools, tmp_path):
    check, _, _ = tools
    steps = check.gpu_steps(tmp_path, "there is no nvcc")
    skipped = {step.name for step in steps if step.skip == "there is no nvcc"}
    assert {"cuda tests", "memcheck", "racecheck", "synccheck", "step latency"} <= skipped
    taken = [step for step in steps if step.skip is None]
    assert {"triton tests", "grid", "contract tests"} <= {step.name for step in taken}
