"""Peak memory of a training step: no more than nn.RNN's."""

from statistics import median

import pytest
import torch
from helpers import pack, pair
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import ProfilerActivity, profile

import rnnfast

B = 32
TWO = {"num_layers": 2}
BOTH = {"bidirectional": True}

# name: (steps, features of the input and of the state, constructor arguments)
CASES = {
    "plain": (60, 128, 128, {}),
    "few features": (10, 1, 16, {}),
    "odd sizes": (28, 28, 100, {}),
    "as many weights as 16 bits take whole": (60, B * 60 // 8, B * 60 // 8, {}),
    "more than those": (60, B * 60 // 8 + 1, B * 60 // 8 + 1, {}),
    "two layers, bidirectional": (60, 128, 128, TWO | BOTH),
    "packed": (60, 128, 128, {}),
}
DEEP = {  # the outputs of a layer and their gradient are nobody's but its node's
    "many rows": (60, 64, 64, TWO),
    "few rows": (16, 256, 256, TWO),
    "few rows, bidirectional": (16, 256, 256, TWO | BOTH),
    "wide input": (60, 300, 100, TWO),
    "three layers": (16, 128, 128, {"num_layers": 3}),
}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peak_bytes(call):
    """Most bytes that torch's allocator had handed out at once, beyond those from before.

    The profiler reports the allocations of the calling thread, which must be the only one, and now
    and then misses one: ask for several times.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def compare(modules, x):
    def data(output):
        return output.data if isinstance(output, PackedSequence) else output

    def peak(module):
        grad = torch.ones_like(data(module(x)[0]))

        def step():
            module.zero_grad()
            data(x).grad = None
            data(module(x)[0]).backward(grad)

        step()
        return median(peak_bytes(step) for _ in range(5))

    limit, ours = (peak(module) for module in modules)
    output_bytes = data(x)[..., :1].numel() * modules[0].hidden_size * data(x).itemsize
    assert limit > output_bytes  # something was seen
    assert ours <= limit


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_holds_no_more_than_nn_rnn(one_thread, case, dtype):
    T, I, H, kwargs = CASES[case]
    modules = pair(I, H, dtype=dtype, **kwargs)
    x = torch.randn(T, B, I, dtype=dtype)
    if case == "packed":
        x = pack([x[: T - b, b] for b in range(B)])
    compare(modules, x)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_nor_do_a_few_steps_in_products_of_bfloat16(compiled, one_thread, steps):
    """Sums are in float32 there, weights and rows packed in pairs: as little as the rows need."""
    if not torch.ops.rnnfast._cpu_bfloat16_products():
        pytest.skip("no products of bfloat16 here")
    compare(pair(64, 64, dtype=torch.bfloat16), torch.randn(steps, B, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("size", [16, 64, 256])
def test_nor_does_one_of_a_cell_in_a_loop(compiled, one_thread, rows, size):
    """nn.RNNCell's graph holds new gradients of the weights beside those that it adds up."""
    x, grad = torch.randn(20, rows, size), torch.ones(20, rows, size)
    peaks = []
    for make in (torch.nn.RNNCell, rnnfast.RNNCell):
        cell = make(size, size)

        def step(cell=cell):
            cell.zero_grad()
            h, states = torch.zeros(rows, size), []
            for x_t in x:
                h = cell(x_t, h)
                states.append(h)
            torch.stack(states).backward(grad)

        step()
        peaks.append(median(peak_bytes(step) for _ in range(5)))
    limit, ours = peaks
    assert limit > 4 * rows * size * len(x)  # something was seen
    assert ours <= limit


@pytest.mark.parametrize("case", DEEP)
@pytest.mark.parametrize("needs_input_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_does_one_of_stacked_layers(one_thread, case, needs_input_grad, dtype):
    T, I, H, kwargs = DEEP[case]
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=needs_input_grad)
    compare(pair(I, H, dtype=dtype, **kwargs), x)
