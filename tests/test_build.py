"""What setup.py does on machines that cannot build."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    """A copy of what is needed to build."""
    if not (SOURCE / "setup.py").exists():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, tmp_path)
    for name in ("csrc", "rnnfast"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(SOURCE / name, tmp_path / name, ignore=ignored)
    return tmp_path


def build(source, **variables):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=source,
        env=os.environ | {"RNNFAST_REQUIRE_EXT": "0"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def built(source):
    (package,) = source.glob("build/lib*/rnnfast")
    return package


def test_a_missing_compiler_gives_one_sentence_and_a_working_install(source):
    run = build(source, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    assert len(said) == 1
    assert "could not be compiled" in said[0]
    assert "pure-PyTorch fallback" in said[0]
    package = built(source)
    assert not list(package.glob("*.so"))
    record = json.loads((package / "_build.json").read_text())
    assert record["extension"] is False
    used = subprocess.run(
        [sys.executable, "-c", "import rnnfast, torch; rnnfast.RNN(3, 5)(torch.ones(4, 2, 3))"],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
    assert used.stderr.count("FallbackWarning") == 1
    assert "could not be compiled" in used.stderr


def test_a_required_extension_that_cannot_be_built_is_an_error(source):
    run = build(source, CXX="/nonexistent/c++", CC="/nonexistent/cc", RNNFAST_REQUIRE_EXT="1")
    assert run.returncode != 0


def test_a_missing_torch_gives_one_sentence_and_a_working_install(source):
    (source / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    run = build(source, PYTHONPATH=str(source))
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("rnnfast:")]
    assert len(said) == 1
    assert "install torch first" in said[0]
    assert list(built(source).glob("modules.py"))
    assert build(source, PYTHONPATH=str(source), RNNFAST_REQUIRE_EXT="1").returncode != 0
