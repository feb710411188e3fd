"""What the tests share: the pair of modules under comparison, and where tolerances come from."""

import copy
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


def assert_same(actual, expected, steps, terms, what="", scale=0.0):
    """Equal to the tolerance of their dtype, relative to the largest element or to `scale`."""
    if expected is None:
        assert actual is None, what
        return
    assert actual is not None, what
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    if expected.numel() == 0:
        return
    scale = max(expected.detach().abs().max().item(), scale, 1e-3)
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


def run(module, input, hx=None, loss="both", weigh=None):
    """A call's outputs, and the gradients of input, hx and parameters of an uneven loss of them."""
    weigh = weigh or ramp
    module.zero_grad()
    leaves = {"input": input, "hx": hx}
    for x in leaves.values():
        if isinstance(x, torch.Tensor):
            x.grad = None
    out, h_n = module(input) if hx is None else module(input, hx)
    data = out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out
    terms = {"out": [data], "h_n": [h_n], "both": [data, h_n]}[loss]
    sum((x * weigh(x)).sum() for x in terms).backward()
    grads = {name: x.grad for name, x in leaves.items() if isinstance(x, torch.Tensor)}
    grads |= {name: p.grad for name, p in module.named_parameters()}
    return data.detach(), h_n.detach(), grads


def ramp(x):
    """Weights between -1 and 1 that differ from element to element."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x)


def compare(theirs, ours, x, hx, loss="both"):
    """Same outputs and gradients from both modules, to the tolerance of the dtype."""
    expected, actual = (named(run(m, x, hx, loss)) for m in (theirs, ours))
    scales = sensitivities(theirs, x, hx, loss, expected)
    rows = x.data.shape[:-1].numel()
    steps = rows if x.data.dim() == 2 else max(x.shape[:2])
    steps *= ours.num_layers
    terms = ours.hidden_size * len(ours.all_weights) // ours.num_layers + ours.input_size
    for name in expected:
        summed = terms if name in ("out", "h_n") else terms + rows
        assert_same(actual[name], expected[name], steps, summed, name, scales.get(name, 0.0))


def named(result):
    out, h_n, grads = result
    return {"out": out, "h_n": h_n} | grads


def sensitivities(module, x, hx, loss, expected):
    """What a relative change of all inputs by eps changes in each result, over eps.

    A sum whose terms cancel (the gradient of the one weight of a hidden size of one) is smaller
    than its rounding errors' scale. Three random changes: that all miss it is most unlikely.
    """
    eps = torch.finfo(x.data.dtype).eps

    def changed(t):
        sign = torch.randint(0, 2, t.shape, generator=generator, device="cpu").to(t).mul(2).sub(1)
        return t.detach() * (1 + eps * sign)

    generator = torch.Generator("cpu").manual_seed(5)
    scales: dict[str, float] = {}
    for _ in range(3):
        other = copy.deepcopy(module)
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(changed(p))
        if isinstance(x, torch.Tensor):
            y = changed(x).requires_grad_(x.requires_grad)
        else:
            y = x._replace(data=changed(x.data))
        h = None if hx is None else changed(hx).requires_grad_(hx.requires_grad)
        result = named(run(other, y, h, loss, lambda t: changed(ramp(t))))
        for name, value in expected.items():
            if value is not None and value.numel():
                change = (result[name] - value).abs().max().item() / eps
                scales[name] = max(scales.get(name, 0.0), change)
    return scales
