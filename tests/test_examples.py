"""The example programs run, and both contenders' losses are the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment
from rich.console import Console

import rnnfast.sine

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs examples/, the source tree")


def run(*command):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses(out):
    """The two columns of the table."""
    return [
        list(map(float, row)) for row in re.findall(r"^ *\d+ +(\d\.\d+) +(\d\.\d+)$", out, re.M)
    ]


# Adam divides by the gradients, which amplifies float64's last bit; a wrong kernel or a different
# dropout mask changes the second digit.
ALIKE = 1e-6


def test_character_language_model():
    out = run(EXAMPLES / "char_lm.py", "--epochs", 30, "--hidden", 32, "--dtype", "float64")
    curve = losses(out)
    assert len(curve) == 10
    assert curve[-1][0] < 0.7 * curve[0][0]
    assert all(abs(a - b) <= ALIKE for a, b in curve)
    assert float(re.search(r"difference of the losses: (\S+)", out)[1]) < ALIKE
    theirs, ours = re.split(r"--- sampled from \S+\n", out)[1:]
    assert theirs.strip() == ours.strip()
    assert theirs.startswith("Beautiful ")


def test_name_classifier():
    small = ("--epochs", 10, "--hidden", 16, "--words", 300)
    out = run(EXAMPLES / "names.py", *small, "--dtype", "float64")
    curve = losses(out)
    assert len(curve) == 10
    assert curve[-1][0] < curve[0][0]
    assert all(abs(a - b) <= ALIKE for a, b in curve)
    assert len(re.findall(r"\d+% right, held out", out)) == 2


def test_sine_under_torchrun_is_sine_in_one_process():
    out = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        EXAMPLES / "sine_ddp.py", "--epochs", 20,
    )  # fmt: skip
    shown = [float(x) for x in re.findall(r"loss (\S+)", out)]
    (_, ours) = rnnfast.sine.train("position", 20, 0, torch.float64, "cpu", Console(quiet=True))
    assert shown == pytest.approx([ours.losses[9], ours.losses[19]], abs=ALIKE)
