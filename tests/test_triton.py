"""What is the Triton kernels' own: their configurations, and the table of them.

Their results are checked in test_gpu_kernels.py.
"""

import pytest
import torch
from conftest import TRITON, device_of
from helpers import check_layer, check_tanh, float32_products

import rnnfast
from rnnfast import dispatch, triton_layer
from rnnfast.triton_layer import INTERPRETED, Config, configuration

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(params=[TRITON])
def device(request):
    """Where the kernels run: the CPU, interpreted, or a GPU."""
    device = device_of("triton", request)
    with rnnfast.backend("triton"):
        yield device


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_tile_of_32_rows(device, dtype):
    config = Config(rows=32, tile=32, tiles=2, warps=4, dot=True)
    with triton_layer.using(config):
        check_layer(device, dtype, 3, 37, 5, 50, eps=2.0**-10 if dtype == f32 else None)


def test_tanh_is_accurate(device):
    """2 ulp as the CPU kernel's; on a GPU exp is its fast one, with 2 ulp of its own."""
    with triton_layer.using(Config(1024 if INTERPRETED else 16, 16, 1, 4, dot=True)):
        check_tanh(device, 2 if INTERPRETED else 4, units=16)


def test_what_it_cannot_run_is_said(device):
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="hidden_size of 300 is above 256"):
            rnnfast.RNN(3, 300, device=device, dtype=bf16)(
                torch.ones(2, 1, 3, device=device, dtype=bf16)
            )
    with pytest.raises(RuntimeError, match="complex64 is none of"):
        rnnfast.backends.select(torch.ones(1, device=device, dtype=torch.complex64))


# --------------------------------------------------------------------------- without any device


@pytest.mark.parametrize("precision", triton_layer._TABLE, ids=str)
def test_every_hidden_size_has_a_configuration_that_holds_it(precision):
    dtype, tf32 = precision
    for H in range(1, triton_layer.largest_hidden_size(dtype, tf32) + 1):
        config = configuration(H, 1, dtype, tf32)
        assert config.tile * (config.tiles - 1) < H <= config.tile * config.tiles
        assert config.dot == (dtype in (bf16, f16) or tf32)
        if not config.dot:  # the matrix is in the registers of one block
            words = (config.tile * config.tiles) ** 2 * dtype.itemsize // 4
            assert words / (32 * config.warps) < 255
    assert triton_layer.largest_hidden_size(bf16) >= 256
    assert triton_layer.largest_hidden_size(f32) >= 224


def test_an_override_holds_within_its_block_and_where_it_fits():
    config = Config(rows=16, tile=64, tiles=1, warps=4, dot=True)
    with triton_layer.using(config):
        assert configuration(50, 1, bf16) == config
        assert configuration(65, 1, bf16) != config
    assert configuration(50, 1, bf16).rows == 16
    assert configuration(50, 10**5, bf16).rows == 32


@pytest.mark.parametrize(
    ("matmul", "rnn", "allowed"),
    [
        ("none", "tf32", False),
        ("tf32", "none", False),
        ("tf32", "ieee", False),
        ("tf32", "tf32", True),
    ],
)
def test_tf32_needs_both_flags(matmul, rnn, allowed):
    assert not dispatch.tf32_allowed()  # the defaults
    with float32_products(matmul, rnn):
        assert dispatch.tf32_allowed() == allowed


@pytest.mark.skipif(INTERPRETED, reason="interpreted, it does run there")
def test_cpu_tensors_are_told_why_not():
    with (
        rnnfast.backend("triton"),
        pytest.raises(RuntimeError, match="on the CPU, and TRITON_INTERPRET=1 is not set"),
    ):
        rnnfast.RNN(3, 5)(torch.ones(2, 1, 3))
