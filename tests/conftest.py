import os
from contextlib import contextmanager, nullcontext

import cuda_emulation
import pytest
import torch

import rnnfast
from rnnfast import triton_layer

# The GPU's kernels run on CPU tensors where TRITON_INTERPRET=1 or RNNFAST_EMULATE_CUDA=1; else on a
# GPU, where the marker asks for it: pytest -m gpu.
EMULATED = os.environ.get("RNNFAST_EMULATE_CUDA", "0") not in ("", "0")
ON_CPU = {"cpu": True, "reference": True, "torch": True}
ON_CPU |= {"triton": triton_layer.INTERPRETED, "cuda": EMULATED}
TRITON, CUDA = (
    name if ON_CPU[name] else pytest.param(name, marks=pytest.mark.gpu)
    for name in ("triton", "cuda")
)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; runs with -m gpu alone")
    if EMULATED:
        cuda_emulation.install()


def pytest_collection_modifyitems(config, items):
    if "gpu" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def seed():
    """The same numbers whatever ran before, on every machine."""
    torch.manual_seed(0)


def require_extension():
    """Without the extension the kernel's half is skipped by name, or fails where
    RNNFAST_REQUIRE_EXT says that there must be one."""
    if rnnfast.backends.extension_error is not None:
        if os.environ.get("RNNFAST_REQUIRE_EXT", "0") not in ("", "0"):
            pytest.fail(rnnfast.backends.extension_error)
        pytest.skip(rnnfast.backends.extension_error)


@pytest.fixture
def gpu():
    """The device of tests that need one; they run only when asked for, so none is a failure."""
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for, and torch sees no GPU")
    return torch.device("cuda", 0)


def device_of(backend, request):
    """Where a backend's tensors are."""
    return torch.device("cpu") if ON_CPU[backend] else request.getfixturevalue("gpu")


def forced(request):
    if request.param not in ("reference", "torch"):
        require_extension()
    device = device_of(request.param, request)
    # No context where it would change nothing: it makes a call's every step one of Python's.
    there = nullcontext() if device.type == "cpu" else device
    with rnnfast.backend(request.param), there, without_cudnn(device):
        yield request.param


@contextmanager
def without_cudnn(device):
    """On a GPU nn.RNN is PyTorch's own there: cuDNN's multiplies by TF32, and has no second
    derivative and no products to be counted."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and device.type != "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@pytest.fixture(params=["cpu", "reference", CUDA, TRITON])
def backend(request):
    """Runs the test on each backend of this machine; on a GPU, tensors are made there."""
    yield from forced(request)


@pytest.fixture(params=["cpu", "reference", "torch", CUDA, TRITON])
def any_backend(request):
    """The same, and PyTorch's own RNN through our checks and layouts."""
    yield from forced(request)


@pytest.fixture
def compiled():
    """The compiled kernels alone."""
    require_extension()
    with rnnfast.backend("cpu"):
        yield
