"""Peak memory of a training step: no more than nn.RNN's."""

from statistics import median

import pytest
import torch
from helpers import pack, pair
from torch.profiler import ProfilerActivity, profile

B, T = 32, 60

# name: (features, constructor arguments)
CASES = {
    "plain": (128, {}),
    "as many weights as 16 bits take whole": (B * T // 8, {}),
    "more than those": (B * T // 8 + 1, {}),
    "two layers, bidirectional": (128, dict(num_layers=2, bidirectional=True)),
    "packed": (128, {}),
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_holds_no_more_than_nn_rnn(one_thread, case, dtype):
    size, kwargs = CASES[case]
    theirs, ours = pair(size, size, dtype=dtype, **kwargs)
    x = torch.randn(T, B, size, dtype=dtype)
    if case == "packed":
        x = pack([x[: T - b, b] for b in range(B)])

    def data(output):
        return output.data if case == "packed" else output

    def peak(module):
        grad = torch.ones_like(data(module(x)[0]))

        def step():
            module.zero_grad()
            data(module(x)[0]).backward(grad)

        step()
        return median(peak_bytes(step) for _ in range(5))

    limit = peak(theirs)
    assert limit > data(x).nbytes  # the output's size: something was seen
    assert peak(ours) <= limit
