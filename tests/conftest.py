import os

import pytest

import rnnfast


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Runs the test on each backend of this machine; without the extension the kernel's half is
    skipped by name, or fails where RNNFAST_REQUIRE_EXT says that there must be one."""
    if request.param == "cpu" and rnnfast.backends.extension_error is not None:
        if os.environ.get("RNNFAST_REQUIRE_EXT", "0") not in ("", "0"):
            pytest.fail(rnnfast.backends.extension_error)
        pytest.skip(rnnfast.backends.extension_error)
    with rnnfast.backend(request.param):
        yield request.param


@pytest.fixture
def compiled():
    """The compiled kernels alone."""
    if rnnfast.backends.extension_error is not None:
        if os.environ.get("RNNFAST_REQUIRE_EXT", "0") not in ("", "0"):
            pytest.fail(rnnfast.backends.extension_error)
        pytest.skip(rnnfast.backends.extension_error)
    with rnnfast.backend("cpu"):
        yield
