"""The sine task on several processes, each with its share of the windows.

    torchrun --standalone --nproc-per-node 2 examples/sine_ddp.py

DistributedDataParallel averages the gradients, so that the losses are those of one process on all
windows. It runs on CPUs, with gloo; the processes share the cores, so that it is no faster here.
"""

import argparse
import os

import torch
import torch.distributed.nn  # before the group is there: its functions' default arguments keep it
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rnnfast
from rnnfast.sine import RNNModel, data


def train(epochs, seed):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(seed)
    model = DistributedDataParallel(RNNModel(rnnfast.RNN).double())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, targets = data("position")
    if len(inputs) % world:
        raise SystemExit(f"{len(inputs)} windows cannot be shared equally by {world} processes")
    inputs, targets = inputs.chunk(world)[rank], targets.chunk(world)[rank]
    for epoch in range(1, epochs + 1):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach()
        distributed.all_reduce(whole, distributed.ReduceOp.SUM)
        if rank == 0 and epoch % 10 == 0:
            print(f"epoch {epoch:4}  loss {whole.item() / world:.6f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(max(torch.get_num_threads() // int(os.environ["WORLD_SIZE"]), 1))
    distributed.init_process_group("gloo")
    train(options.epochs, options.seed)
    # The model is gone, so that nothing keeps the group: its threads end here, not while the
    # interpreter does, where one that still has a tensor to free would abort the process.
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
