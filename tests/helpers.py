"""What the tests share: the pair of modules under comparison, and where tolerances come from."""

import copy
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

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


@contextmanager
def float32_products(matmul, rnn):
    """PyTorch's flags of what float32 products may be, cuBLAS' and cuDNN's RNN's."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag, value in zip(flags, (matmul, rnn), strict=True):
            flag.fp32_precision = value
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def check_tanh(device, ulps, units=1):
    """The kernel's tanh through a layer that is nothing else: W_hh = 0, weights of one."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-38, 1, 2000)])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
    x = torch.cat([x, torch.linspace(0.5624, 0.5626, 200), special]).to(device)
    one, zero = torch.ones(units, 1, device=device), torch.zeros(units, units, device=device)
    layer = (x.view(1, -1, 1), None, one, zero, None, None, None, "tanh", False)
    y = torch.ops.rnnfast.rnn_layer(*layer)[1][:, 0]
    truth = torch.tanh(x.double())
    ordinary = truth.isfinite()
    magnitude = truth.float().abs()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, 2)) - magnitude
    error = ((y.double() - truth).abs() / ulp.double())[ordinary]
    assert error.max() <= ulps
    assert (y[ordinary].abs() <= 1).all()
    assert torch.equal(y.isnan(), x.isnan())


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


def pack(sequences, enforce_sorted=True):
    """pack_sequence, which makes lengths on the default device and then wants them on the CPU."""
    lengths = [len(x) for x in sequences]
    return pack_padded_sequence(pad_sequence(sequences), lengths, enforce_sorted=enforce_sorted)


def ramp(x):
    """Weights between -1 and 1 that differ from element to element."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x)


def compare(theirs, ours, x, hx, loss="both"):
    """Same outputs and gradients from both modules, to the tolerance of the dtype."""
    expected, actual = (named(run(m, x, hx, loss)) for m in (theirs, ours))
    scales = sensitivities(theirs, x, hx, loss, expected)
    rows = x.data.shape[:-1].numel()
    if isinstance(x, torch.Tensor):
        steps = x.shape[1 if ours.batch_first and x.dim() == 3 else 0]
    else:
        steps = len(x.batch_sizes)
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


def layer(device, dtype, T, B, I, H, lengths=None):
    """Arguments of the op up to batch_sizes, with weights as nn.RNN draws them."""
    batch_sizes = None
    x = torch.randn(T, B, I)
    if lengths is not None:
        packed = pack([x[:n, b] for b, n in enumerate(lengths)])
        x, batch_sizes = packed.data, packed.batch_sizes
    weights = [torch.empty(s).uniform_(-(H**-0.5), H**-0.5) for s in ((H, I), (H, H), (H,), (H,))]
    tensors = [x, torch.randn(B, H), *weights]
    return [t.to(device, dtype).requires_grad_() for t in tensors], batch_sizes


def outputs_and_gradients(tensors, batch_sizes, nonlinearity, reverse, weigh, run):
    out, h_n = run(*tensors, batch_sizes, nonlinearity, reverse)
    given = [w.to(y) for w, y in zip(weigh, (out, h_n), strict=True)]
    grads = torch.autograd.grad([out, h_n], tensors, given)
    names = ("out", "h_n", "input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return dict(zip(names, (out, h_n, *grads), strict=True))


def bound(dtype, steps, terms, rows=0, eps=None):
    """Bound on a kernel's error against float64 on the same numbers, over the largest element.

    rows: those that a weight's gradient is summed over, 0 for other results. float32 and float64
    are off by what `tolerance` says. A 16-bit result is rounded to storage once, by eps/2 at most,
    and a gradient is a sum over rows of dz, each rounded once, like a random walk: three of its
    standard deviations, which are eps/2 of the sum's scale at most, make 2 eps.
    """
    eps = eps or torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        return tolerance(dtype, steps, terms + rows) * eps / torch.finfo(dtype).eps
    return 2 * eps


def run_layer(
    device, dtype, T, B, I, H, *, nonlinearity="tanh", reverse=False, lengths=None, mask=(True,) * 5
):
    """Outputs of the op on a layer and its gradients from them; its tensors, the gradients given,
    the rest of the call."""
    tensors, batch_sizes = layer(device, dtype, T, B, I, H, lengths)
    tensors = [t.detach() for t in tensors]
    call = (batch_sizes, nonlinearity, reverse)
    out, h_n = torch.ops.rnnfast.rnn_layer(*tensors, *call)
    given = [torch.randn(y.shape, device="cpu").to(y) for y in (out, h_n)]
    grads = torch.ops.rnnfast.rnn_layer_backward(*given, *tensors[:4], out, *call, list(mask))
    names = ("out", "h_n", "input", "hx", "w_ih", "w_hh", "b")
    return dict(zip(names, (out, h_n, *grads), strict=True)), tensors, given, call


def check_layer(device, dtype, T, B, I, H, *, eps=None, **kwargs):
    """The outputs against the reference in float64 on the same numbers, and the gradients against
    the reference's from the same outputs, since a unit of ReLU that rounding turns on or off has
    another gradient. Where a 16-bit state is carried as it is stored, its rounding of eps/2 comes
    back through W_hh, whose rows have a norm of 0.6: less than the eps that `bound` leaves beside
    the result's own rounding."""
    actual, tensors, given, call = run_layer(device, dtype, T, B, I, H, **kwargs)
    tensors, given = ([t.double() for t in group] for group in (tensors, given))
    x, hx, w_ih, w_hh, *_ = tensors
    out = actual["out"].double()
    backward = rnnfast.reference.rnn_layer_backward
    truth = (
        *rnnfast.reference.rnn_layer(*tensors, *call),
        *backward(*given, x, hx, w_ih, w_hh, out, *call),
    )
    # A sum over rows whose terms cancel is smaller than the scale of its rounding errors, which is
    # the sum's for terms of any sign. dz is the gradient of an input that goes in as it is.
    dz, *_ = backward(*given, out, hx, torch.eye(H).to(w_hh), w_hh, out, *call)
    rows = dz.shape[:-1].numel()
    factors = {"w_ih": rms(x), "w_hh": rms(out), "b": 1.0}
    for (name, value), expected in zip(actual.items(), truth, strict=True):
        assert value.dtype == dtype, name
        scale = max(expected.abs().max().item(), torch.finfo(dtype).smallest_normal)
        if summed := name in factors:
            scale = max(scale, rows**0.5 * rms(dz) * factors[name])
        error = (value.double() - expected).abs().max().item()
        allowed = bound(dtype, T, I + H, rows if summed else 0, eps) * scale
        assert error <= allowed, f"{name}: off by {error:.2e}, bound {allowed:.2e}"
