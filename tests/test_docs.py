"""The documentation builds without a warning, and what its examples and docstrings show is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs docs/, the source tree")
PAGES = [
    "swap",
    "pytorch",
    "backends",
    "performance",
    "numerics",
    "building",
    "contributing",
    "api",
]


def sphinx(builder, target):
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", builder, DOCS, target],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_site_builds_without_warnings(tmp_path):
    sphinx("html", tmp_path)
    for page in ["index", *PAGES]:
        assert (tmp_path / f"{page}.html").exists(), page
    backends = (tmp_path / "backends.html").read_text()
    assert "runs on" in backends
    api = (tmp_path / "api.html").read_text()
    for name in ("RNN", "RNNCell", "swap", "restore", "patch", "functional.rnn", "backend"):
        assert f'id="rnnfast.{name}"' in api, name


@pytest.mark.usefixtures("compiled")
def test_examples_and_docstrings_run(tmp_path):
    sphinx("doctest", tmp_path)
    shown = (tmp_path / "output.txt").read_text()
    assert re.search(r"^ +0 failures in tests$", shown, re.MULTILINE)
    for page in ("index", "swap", "pytorch", "backends", "numerics", "api"):
        assert f"Document: {page}\n" in shown, page
