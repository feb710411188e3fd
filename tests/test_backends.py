"""Which backend runs, how one is forced, and what a machine without the extension sees."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same, environment, pair
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast


def python(code, **variables):
    """Run code in a fresh interpreter that imports the same rnnfast; return the process."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_backend_is_an_error_that_lists_the_others():
    with (
        pytest.raises(RuntimeError, match=r"'nope'.*auto, cpu, cuda, triton, torch, reference"),
        rnnfast.backend("nope"),
    ):
        pass
    run = python("import rnnfast", RNNFAST_BACKEND="nope")
    assert run.returncode != 0
    assert "RNNFAST_BACKEND asks for the backend 'nope'" in run.stderr


def test_environment_variable_forces_a_backend():
    code = "import rnnfast, torch; print(rnnfast.backends.select(torch.ones(1)))"
    assert python(code, RNNFAST_BACKEND="reference").stdout.strip() == "reference"
    assert python(code, RNNFAST_BACKEND="torch").stdout.strip() == "torch"


def test_import_and_eager_calls_leave_the_compiler_alone():
    """Dynamo takes as long to import as torch."""
    code = "import sys, torch; before = set(sys.modules); import rnnfast;"
    code += "rnn = rnnfast.RNN(3, 5); rnn(torch.ones(4, 2, 3))[0].sum().backward();"
    code += "print({m for m in set(sys.modules) - before if 'dynamo' in m})"
    run = python(code)
    assert run.stdout.strip() == "set()", run


def test_a_file_of_gpu_wins_fills_the_table(tmp_path):
    file = tmp_path / "gpu_wins.json"
    row = {"backend": "cuda", "capability": [9, 0], "precision": "bfloat16",
           "hidden_sizes": [16, 256], "packed": True}  # fmt: skip
    file.write_text(json.dumps({"gpu": "a GPU", "wins": [row]}))
    code = "from rnnfast.backends import GPU_WINS, Win;"
    code += "assert GPU_WINS == (Win('cuda', (9, 0), 'bfloat16', (16, 256), True),), GPU_WINS"
    run = python(code, RNNFAST_GPU_WINS=str(file))
    assert run.returncode == 0, run.stderr
    changes = ({"backend": "cpu"}, {"backend": ["cuda"]}, {"capability": "9.0"},
               {"hidden_sizes": [16]}, {"hidden_sizes": ["a", "b"]})  # fmt: skip
    wrong = [json.dumps({"wins": [row | change]}) for change in changes]
    for text in ("", "{}", "[]", '{"wins": [{}]}', '{"wins": [3]}', '{"wins": 3}', *wrong):
        file.write_text(text)
        with pytest.raises(RuntimeError, match=r"gpu_wins\.json is no gpu_wins\.json of tools/"):
            rnnfast.backends._read_wins(str(file))
    run = python("import rnnfast", RNNFAST_GPU_WINS=str(tmp_path / "none.json"))
    assert "RuntimeError: RNNFAST_GPU_WINS=" in run.stderr
    assert "FileNotFoundError" in run.stderr


def test_context_manager_nests_and_restores():
    x = torch.ones(1)
    before = rnnfast.backends.select(x)
    with rnnfast.backend("reference"):
        assert rnnfast.backends.select(x) == "reference"
        with rnnfast.backend("torch"):
            assert rnnfast.backends.select(x) == "torch"
        with rnnfast.backend("auto"):
            assert rnnfast.backends.select(x) == rnnfast.backends.chosen(x)
        assert rnnfast.backends.select(x) == "reference"
    assert rnnfast.backends.select(x) == before
    with pytest.raises(KeyError), rnnfast.backend("reference"):
        raise KeyError
    assert rnnfast.backends.select(x) == before


def test_forced_backend_that_cannot_run_says_why(compiled):
    x = torch.randn(4, 2, 3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: torch.complex64 is none of"):
        rnnfast.backends.select(x)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_other_dtypes_run_on_the_reference():
    theirs, ours = nn.RNN(3, 5).to(torch.complex64), rnnfast.RNN(3, 5).to(torch.complex64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.complex64)
    assert_same(ours(x)[0], theirs(x)[0], 4, 16)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
def test_torch_backend_is_nn_rnn_itself(nonlinearity, kind, with_state):
    theirs, ours = pair(3, 5, 2, nonlinearity, bidirectional=True, batch_first=kind == "dense")
    x = torch.randn(4, 2, 3)
    if kind == "packed":
        x = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3, 1)], enforce_sorted=False)
    args = (x, torch.randn(4, 4, 5)) if with_state else (x,)
    with rnnfast.backend("torch"):
        actual = ours(*args)
    expected = theirs(*args)
    assert torch.equal(actual[0].data, expected[0].data)
    assert torch.equal(actual[1], expected[1])
    cell, reference = rnnfast.RNNCell(3, 5), nn.RNNCell(3, 5)
    cell.load_state_dict(reference.state_dict())
    with rnnfast.backend("torch"):
        assert torch.equal(cell(torch.ones(2, 3)), reference(torch.ones(2, 3)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("allowed", "then", "grows"), [(1, 1, False), (3, 1, False), (3, 3, True)])
def test_no_more_threads_run_than_are_allowed(compiled, allowed, then, grows):
    code = f"""if True:
        import os, rnnfast, torch
        torch.set_num_threads({then})
        rnn, x = rnnfast.RNN(64, 256), torch.randn(50, 64, 64)
        before = len(os.listdir("/proc/self/task"))
        with rnnfast.backend("cpu"):
            rnn(x)[0].sum().backward()
        print(len(os.listdir("/proc/self/task")) > before)
    """
    run = python(code, OMP_NUM_THREADS=str(allowed))
    assert run.stdout.strip() == str(grows), run.stderr


@pytest.fixture
def copy_of_package(tmp_path):
    """The package's Python files alone, with no extension and no record of a build."""
    target = tmp_path / "rnnfast"
    shutil.copytree(
        Path(rnnfast.__file__).parent,
        target,
        ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"),
    )
    return target


USE = (
    "import rnnfast, torch; m = rnnfast.RNN(3, 5); x = torch.ones(4, 2, 3);"
    "m(x); m(x); m(x)[0].sum().backward(); print(rnnfast.backends.select(x))"
)


def fallback(target, code=USE, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | {"PYTHONPATH": str(target.parent)} | environment,
        cwd=target.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "the C++ extension is not built (torch was missing"),
        ({"extension": False, "error": "no compiler: g++"}, "not built: no compiler: g++"),
        ({"extension": True, "torch": "1.2.3"}, "built for torch 1.2.3 and this is torch"),
        ({"extension": True, "torch": str(torch.__version__)}, "missing from the package"),
        (
            {"extension": True, "torch": str(torch.__version__), "cuda": "9.1"},
            f"built for CUDA 9.1 and this torch {torch.__version__} has ",
        ),
        ("broken", "does not load"),
    ],
)
def test_without_the_extension_one_warning_says_why_and_pytorchs_own_runs(
    copy_of_package, record, reason
):
    if record == "broken":
        (copy_of_package / "_C.abi3.so").write_text("not a shared object")
        record = {"extension": True, "torch": str(torch.__version__)}
    if record is not None:
        (copy_of_package / "_build.json").write_text(json.dumps(record))
    run = fallback(copy_of_package)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "torch"
    assert run.stderr.count("FallbackWarning") == 1
    assert reason in run.stderr
    assert "pip install --no-build-isolation" in run.stderr


def test_an_extension_left_from_an_older_build_in_place_is_not_taken(copy_of_package):
    for name in ("_C.cpython-310-x86_64-linux-gnu.so", "_C.abi3.so", "_C.cpython-39.so"):
        (copy_of_package / name).write_text("not a shared object")
    record = {"extension": True, "torch": str(torch.__version__)}
    (copy_of_package / "_build.json").write_text(json.dumps(record))
    assert str(copy_of_package / "_C.abi3.so") in fallback(copy_of_package).stderr


def test_without_the_extension_the_warning_names_the_callers_line(copy_of_package):
    script = copy_of_package.parent / "script.py"
    uses = [
        "rnnfast.RNN(3, 5)(x)",
        "nn.Sequential(rnnfast.RNN(3, 5))(x)",
        "rnnfast.RNNCell(3, 5)(x[0])",
        "rnnfast.functional.rnn(x, None, w, bias=False)",
        "rnnfast.functional.rnn_cell(x[0], None, *w)",
        "checkpoint(rnnfast.RNN(3, 5), x, use_reentrant=False)",
    ]
    script.write_text(
        "import rnnfast, torch, warnings; from torch import nn\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "x, w = torch.ones(4, 2, 3), [torch.ones(5, 3), torch.ones(5, 5)]\n"
        + "\nrnnfast.backends._warned = False\n".join(uses)
    )
    run = subprocess.run(
        [sys.executable, script], env=environment(PYTHONPATH=str(copy_of_package.parent)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"^(.*):(\d+): FallbackWarning", run.stderr, re.MULTILINE)
    assert lines == [(str(script), str(4 + 2 * i)) for i in range(len(uses))]


def test_without_the_extension_the_reference_runs_what_pytorchs_own_does_worse(copy_of_package):
    code = """
import rnnfast, torch
x = torch.ones(4, 2, 3)
print(rnnfast.backends.select(x.bfloat16()), rnnfast.backends.select(x.half()))
rnn = rnnfast.RNN(3, 5)
many = torch.vmap(rnn)(torch.stack([x, x]))[0]
torch.testing.assert_close(many[1], rnn(x)[0])
torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,))
"""
    run = fallback(copy_of_package, code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["reference", "reference"]


def test_without_the_extension_importing_alone_is_silent(copy_of_package):
    run = fallback(copy_of_package, "import rnnfast")
    assert (run.returncode, run.stderr) == (0, "")


def test_without_the_extension_forcing_it_is_an_error_that_says_why(copy_of_package):
    run = fallback(copy_of_package, RNNFAST_BACKEND="cpu")
    assert run.returncode != 0
    assert "the forced backend 'cpu' cannot run: the C++ extension is not built" in run.stderr
    run = fallback(copy_of_package, RNNFAST_BACKEND="reference")
    assert (run.returncode, run.stderr) == (0, "")
