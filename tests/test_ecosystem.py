"""Optimisers, mixed precision, and the tools that look into a model: they see what they expect."""

import copy

import pytest
import torch
from helpers import pair, ramp
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import rnnfast


def loss_of(module, *args):
    return sum((y * ramp(y)).sum() for y in module(*args))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, dict(momentum=0.9, foreach=True)),
        (torch.optim.Adam, dict(foreach=True)),
        (torch.optim.Adam, dict(fused=True)),
        (torch.optim.AdamW, dict(fused=True, amsgrad=True)),
    ],
    ids=["SGD foreach", "Adam foreach", "Adam fused", "AdamW fused"],
)
def test_optimizers_and_clipping(backend, optimizer, options):
    """Training goes the way of nn.RNN's, in float64: Adam divides by gradients, so a difference in
    the last bit (1e-16) is amplified, by no more than 1e6 in a few steps."""
    theirs, ours = pair(3, 5, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    for module in (theirs, ours):
        step = optimizer(module.parameters(), lr=1e-2, **options)

        def closure(module=module, step=step):
            step.zero_grad()
            loss = loss_of(module, x)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5, foreach=True)
            assert norm > 0.5
            return loss

        for _ in range(4):
            step.step(closure)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_bfloat16_model_trains(backend):
    """A whole model in bfloat16: gradients of its dtype, close to those of float32."""
    wide = nn.ModuleDict(dict(rnn=rnnfast.RNN(3, 16, 2), head=nn.Linear(16, 1)))
    narrow = copy.deepcopy(wide).bfloat16()
    x = torch.randn(6, 4, 3)
    for model in (wide, narrow):
        y = model["head"](model["rnn"](x.to(model["head"].weight.dtype))[0])
        y.float().square().mean().backward()
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert a.grad.dtype == torch.bfloat16
        # Parameters, inputs and what passes between modules are rounded: relative errors of eps
        # each, that add up over 2 layers of 6 steps.
        error = (a.grad.float() - b.grad).norm() / b.grad.norm()
        assert error < 12 * torch.finfo(torch.bfloat16).eps, name


def test_grad_scaler(backend):
    """Scaled gradients are unscaled, and a step with infinite ones is left out."""
    _, ours = pair(3, 5, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    x = torch.randn(6, 4, 3)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(ours, x)
    scaler.scale(loss).backward()
    scaled = ours.weight_hh_l0.grad.clone()
    scaler.unscale_(optimizer)
    assert torch.equal(ours.weight_hh_l0.grad, scaled / 2.0**10)
    before = ours.weight_hh_l0.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(ours.weight_hh_l0, before)
    optimizer.zero_grad()
    scaler.scale(loss_of(ours, x) * float("inf")).backward()
    before = ours.weight_hh_l0.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(ours.weight_hh_l0, before)
    assert scaler.get_scale() == 2.0**9


def test_deterministic_algorithms(backend):
    _, ours = pair(3, 33, 2, bidirectional=True)
    x = torch.randn(20, 16, 3, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            x.grad = None
            ours.zero_grad()
            loss_of(ours, x).backward()
            results.append([x.grad.clone(), *(p.grad.clone() for p in ours.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_profiler_shows_the_op_with_its_shapes(compiled):
    _, ours = pair(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss_of(ours, x).backward()
    events = {e.key: e for e in profiler.key_averages(group_by_input_shape=True)}
    forward = events["rnnfast::rnn_layer"]
    assert forward.count == 1
    assert forward.input_shapes[:6] == [[4, 2, 3], [], [5, 3], [5, 5], [5], [5]]
    backward = events["rnnfast::_rnn_layer_backward_"]  # the gradients are nobody else's
    assert backward.count == 1
    assert backward.input_shapes[:6] == [[4, 2, 5], [2, 5], [4, 2, 3], [], [5, 3], [5, 5]]
    assert "RnnLayerBackward" in events


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("state", [True, False])
def test_flop_counter_counts_what_nn_rnn_does(backend, direction, batch_first, state):
    theirs, ours = pair(
        3, 5, 2, bidirectional=direction == "bidirectional", batch_first=batch_first
    )
    x = torch.randn(4, 7, 3, requires_grad=True)
    states = 2 * (1 + theirs.bidirectional)
    hx = torch.randn(states, 4 if batch_first else 7, 5, requires_grad=True) if state else None
    counts = []
    for module in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            out, h_n = module(x, hx)
            forward = counter.get_total_flops()
            (out.sum() + h_n.sum()).backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 * 28 * sum(w.numel() for w in ours.parameters() if w.dim() == 2)


def test_flop_counter_counts_only_the_gradients_asked_for(compiled):
    _, ours = pair(3, 5)
    ours.weight_ih_l0.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        out, _ = ours(torch.randn(4, 7, 3))
        forward = counter.get_total_flops()
        out.sum().backward()
    recurrence, d_w_hh = 21 * 5 * 5, 28 * 5 * 5  # the first state's gradient is not asked for
    assert counter.get_total_flops() - forward == 2 * (recurrence + d_w_hh)


def test_meta_tensors_cost_nothing_and_count(compiled):
    """FLOPs of a model that does not fit, from its shapes."""
    with torch.device("meta"):
        ours, x = rnnfast.RNN(1024, 4096, 4), torch.empty(1000, 64, 1024)
    with FlopCounterMode(display=False) as counter:
        out, _ = ours(x)
    assert out.shape == (1000, 64, 4096)
    parameters = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    assert counter.get_total_flops() == 2 * 64_000 * parameters


def test_results_of_the_op_do_not_alias(compiled):
    """Writing into one output changes no other, and no input."""
    _, ours = pair(3, 5)
    with torch.no_grad():
        for x in (torch.randn(1, 2, 3), torch.randn(4, 2, 3)):
            before = x.clone()
            out, h_n = ours(x)
            kept = h_n.clone()
            out.zero_()
            assert torch.equal(h_n, kept)
            assert torch.equal(x, before)
