"""``python -m rnnfast``: what a bug report needs, in words and as JSON."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from helpers import environment

import rnnfast
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
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["extension_error"] is None) == bool(found["build"].get("extension"))
    for name, row in found["inputs"].items():
        assert row["runs"] in rnnfast.backends.BACKENDS, name
        assert row[row["runs"]] == "usable", name
        assert set(rnnfast.backends.BACKENDS) <= set(row), name


@pytest.mark.parametrize("forced", [None, "reference"])
def test_the_words_name_every_backend_that_cannot_run_and_why(forced):
    out = diagnose(**({"RNNFAST_BACKEND": forced} if forced else {}))
    found = diagnosis()
    for known in ("rnnfast", "torch", "platform", "cpu_capability"):
        assert str(found[known]) in out
    assert f"forced     {forced or 'nothing'}" in out
    assert ("no kernels built" in out) == (not found["build"].get("cuda"))
    for name, row in found["inputs"].items():
        assert f"{name:16} {row['runs']}" in out
        for backend in rnnfast.backends.BACKENDS:
            if row[backend] != "usable":
                assert f"not {backend}: {row[backend]}" in out
