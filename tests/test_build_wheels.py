"""What tools/build_wheels.py lets pass, on wheels put together by hand; building takes minutes."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import rnnfast

TOOL = Path(__file__).parent.parent / "tools/build_wheels.py"
MINOR = ".".join(torch.__version__.split(".")[:2])
NAME = f"pt{MINOR.replace('.', '')}cpu"


@pytest.fixture(scope="module")
def tool():
    if not TOOL.exists():
        pytest.skip("needs the source tree")
    spec = importlib.util.spec_from_file_location("build_wheels", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_wheels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tool, tmp_path):
    """A function that writes a wheel around the extension that is installed."""
    if rnnfast.backends.extension_error is not None or rnnfast.backends.build_record().get("cuda"):
        pytest.skip("needs the extension, built without CUDA kernels")

    def write(local=NAME, requires=f"torch=={MINOR}.*", extra=()):
        path = tmp_path / f"rnnfast-0.1.0+{local}-cp310-abi3-linux_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in tool.OBJECTS:
                archive.write(Path(rnnfast.__file__).parents[1] / name, name)
            archive.writestr("rnnfast/_build.json", json.dumps({"cuda_arch_list": None}))
            metadata = f"Metadata-Version: 2.4\nName: rnnfast\nRequires-Dist: {requires}\n"
            archive.writestr(f"rnnfast-0.1.0+{local}.dist-info/METADATA", metadata)
            for name in extra:
                archive.writestr(name, "")
        return path

    return write


def test_a_good_wheel(tool, wheel):
    facts = tool.inspect(tool.Target(f"{MINOR}.0", "cpu"), wheel())
    assert facts["GPUs"] == "none"
    assert facts["size"].endswith("MB")
    assert tuple(map(int, facts["glibc"].split("."))) >= (2, 2)


@pytest.mark.parametrize(
    ("build", "made", "why"),
    [
        ("cpu", dict(local="pt13cpu"), "it is named"),
        ("cpu", dict(requires="torch>=2.11"), "it requires"),
        ("cpu", dict(extra=["rnnfast/libcudart.so.13"]), "its shared objects are"),
        ("cpu", dict(extra=["torch/lib/libtorch.so"]), "its shared objects are"),
        ("cu130", dict(local=NAME.replace("cpu", "cu130")), "runtime is not taken from torch"),
    ],
)
def test_a_wheel_that_does_not_hold_its_promise(tool, wheel, build, made, why):
    with pytest.raises(tool.Failed, match=why):
        tool.inspect(tool.Target(f"{MINOR}.0", build), wheel(**made))


def test_a_failed_build_is_told_in_our_own_sentence(tool, tmp_path):
    code = (
        "print('error: 1'); print('  rnnfast: there is no nvcc.'); print('x'); raise SystemExit(1)"
    )
    with pytest.raises(tool.Failed, match=r"^rnnfast: there is no nvcc\.$"):
        tool.run(tmp_path / "log", [sys.executable, "-c", code], tmp_path)
    assert tool.run(tmp_path / "log", [sys.executable, "-c", "print(1); print(2)"], tmp_path) == "2"


def test_what_pip_is_asked_for(tool):
    targets = [tool.Target("2.13.0", build) for build in ("cpu", "cu130")]
    assert [t.name for t in targets] == ["pt213cpu", "pt213cu130"]
    assert [t.requirement for t in targets] == ["torch==2.13.0+cpu", "torch===2.13.0"]
