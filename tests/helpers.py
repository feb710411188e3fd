"""What the tests share: the pair of modules under comparison, and where tolerances come from."""

import math
import os
from pathlib import Path

import torch
from torch import nn

import rnnfast


def environment(**variables):
    """Environment of a process that imports the rnnfast under test, wherever it is started."""
    package = str(Path(rnnfast.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | variables


def pair(*args, seed=0, **kwargs):
    """The same nn.RNN and rnnfast.RNN, initialised from one seed."""
    torch.manual_seed(seed)
    theirs = nn.RNN(*args, **kwargs)
    torch.manual_seed(seed)
    return theirs, rnnfast.RNN(*args, **kwargs)


def tolerance(dtype, steps, terms):
    """Bound on the relative difference of two correct results.

    Each pre-activation is a sum of `terms` products, whose rounding errors add like a random walk:
    eps * sqrt(terms), in either result. They pass from step to step with a factor of at most about
    one (the initial weights keep the recurrence from growing), so they add up over `steps`. Four
    standard deviations, for two results.
    """
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms) * max(steps, 1)


def assert_same(actual, expected, steps, terms, what=""):
    """Equal to the tolerance of their dtype, relative to the largest element."""
    if expected is None:
        assert actual is None, what
        return
    assert actual is not None, what
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    if expected.numel() == 0:
        return
    scale = max(expected.detach().abs().max().item(), 1e-3)
    error = (actual.detach() - expected.detach()).abs().max().item() / scale
    assert error <= tolerance(expected.dtype, steps, terms), f"{what}: off by {error:.2e}"


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_as_accurate(actual, theirs, truth, what=""):
    """float32 error against float64 truth at most 1.5 times that of nn.RNN on the same input.

    Root mean squares, as a maximum over few elements is luck. One rounding of the result itself
    (half an ulp) is granted: where nn.RNN happens to be exact, so little is not an error.
    """
    floor = 2.0**-24 * rms(truth)
    ours, reference = rms(actual.double() - truth), rms(theirs.double() - truth)
    assert ours <= 1.5 * reference + floor, f"{what}: error {ours:.3e}, nn.RNN's {reference:.3e}"


def run(module, input, hx=None, loss="both"):
    """A call's outputs, and the gradients of input, hx and parameters of an uneven loss of them."""
    module.zero_grad()
    leaves = {"input": input, "hx": hx}
    for x in leaves.values():
        if isinstance(x, torch.Tensor):
            x.grad = None
    out, h_n = module(input) if hx is None else module(input, hx)
    data = out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out
    terms = {"out": [data], "h_n": [h_n], "both": [data, h_n]}[loss]
    sum((x * ramp(x)).sum() for x in terms).backward()
    grads = {name: x.grad for name, x in leaves.items() if isinstance(x, torch.Tensor)}
    grads |= {name: p.grad for name, p in module.named_parameters()}
    return data.detach(), h_n.detach(), grads


def ramp(x):
    """Weights between -1 and 1 that differ from element to element."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x)
