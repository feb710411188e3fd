"""nn.RNN beside rnnfast.RNN: one layer, tanh, float32, on the CPU.

    pytest benchmarks/                                         compare, in under a minute
    pytest benchmarks/ --benchmark-json=results.json           save, for python benchmarks/report.py

Threads are torch's: set OMP_NUM_THREADS. A group is one shape and one kind of work; a contender's
time is the median over its rounds.
"""

import pytest
import torch
from torch import nn

import rnnfast

CONTENDERS = {"nn.RNN": nn.RNN, "rnnfast.RNN": rnnfast.RNN}

# B, T, I, H
SHAPES = [
    (190, 10, 1, 16),  # the sine task
    (1, 10, 1, 16),
    (32, 100, 32, 64),
    (7, 50, 20, 50),
    (64, 100, 128, 128),
    (1, 1000, 64, 64),
    (64, 100, 256, 256),
    (16, 200, 512, 512),
    (64, 50, 1024, 1024),
]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("work", ["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rnn(benchmark, shape, work, contender):
    B, T, I, H = shape
    torch.manual_seed(0)
    rnn = CONTENDERS[contender](I, H)
    x = torch.randn(T, B, I)
    hx = torch.zeros(1, B, H)
    grad = torch.randn(T, B, H)

    def inference():
        with torch.no_grad():
            rnn(x, hx)

    def training():
        rnn(x, hx)[0].backward(grad)

    benchmark.group = f"{shape} {work}"
    benchmark.extra_info |= {"shape": shape, "work": work, "contender": contender}
    run = inference if work == "inference" else training
    for _ in range(3):
        run()
    benchmark._min_rounds, benchmark._max_time = 5, 0.4
    benchmark(run)
