"""Data parallel training on two processes of this machine, over loopback."""

import os
from datetime import timedelta
from pathlib import Path

import cuda_emulation
import pytest
import torch
from conftest import ON_CPU
from helpers import assert_same, environment
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rnnfast

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="torch is built without gloo",
    ),
]
WORLD, STEPS = 2, 3


class Model(nn.Module):
    def __init__(self, rnn_class=rnnfast.RNN):
        super().__init__()
        self.rnn = rnn_class(3, 8, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(16, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def make(rnn_class=rnnfast.RNN):
    torch.manual_seed(0)
    return Model(rnn_class), torch.randn(6, 5, 3, dtype=torch.float64)


def whole(x):
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def train(model, x):
    """Three steps of SGD on the batch; the gradients of each and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        history += [whole(p.grad) for p in model.parameters()]
        optimizer.step()
    return history + [whole(p) for p in model.parameters()]


def shard(model):
    for module in (model.rnn, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))


def worker(rank, backend, folder):
    torch.set_num_threads(1)
    if backend == "cuda":  # a process of its own
        cuda_emulation.install()
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    with rnnfast.backend(backend):
        expected = train(*make(nn.RNN))

        model, x = make()
        share = x.chunk(WORLD)[rank]
        data_parallel = train(DistributedDataParallel(model), share)

        model, _ = make()
        shard(model)
        sharded = train(model, share)

        model, _ = make(nn.RNN)
        rnnfast.swap(model)
        swapped = train(DistributedDataParallel(model), share)

        model, _ = make(nn.RNN)
        rnnfast.swap(model)
        shard(model)
        swapped_and_sharded = train(model, share)

        model, _ = make(nn.RNN)  # the other way round, it is said
        shard(model)
        assert "subclass" in rnnfast.swap(model).unchanged["rnn"]
    for results in (data_parallel, sharded, swapped, swapped_and_sharded):
        for actual, wanted in zip(results, expected, strict=True):
            assert_same(actual, wanted, 2 * 5 * STEPS, 16 + 30)
    Path(folder, f"passed {rank}").touch()
    distributed.destroy_process_group()


def test_two_processes_train_as_one_does_on_the_whole_batch(backend, monkeypatch, tmp_path):
    """DistributedDataParallel, FSDP2 and a swapped model, against nn.RNN in one process."""
    if not ON_CPU[backend]:
        pytest.skip("the processes meet through gloo, with tensors on the CPU")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tests = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", tests + os.pathsep + environment()["PYTHONPATH"])
    multiprocessing.spawn(worker, (backend, str(tmp_path)), nprocs=WORLD)
    assert sorted(p.name for p in tmp_path.glob("passed *")) == ["passed 0", "passed 1"]
