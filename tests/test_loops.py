"""Calls in a loop, each from the state of the one before: the graph adds up the weights' gradients.

They leave by the first call's edges alone, and have to be nn's whatever is done with the graph.
"""

import copy
import threading

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import triton_layer

T, B, I, H = 6, 2, 3, 5
f64 = torch.float64


class Loop:
    """A module, in nn's or our own class, and what each of its calls takes."""

    def __init__(self, package, kind, dtype=f64, **options):
        torch.manual_seed(0)
        self.cell = "cell" in kind
        layers = 2 if kind == "two layers" else 1
        options |= {"bias": "no biases" not in kind, "dtype": dtype}
        make = package.RNNCell if self.cell else package.RNN
        self.module = make(I, H, **({} if self.cell else {"num_layers": layers}), **options)
        n = 3 if kind == "several steps" else 1
        shape = (I,) if kind == "unbatched cell" else (B, I) if self.cell else (n, B, I)
        self.x = torch.randn(T, *shape).to(dtype).requires_grad_()
        state = (*shape[:-1], H) if self.cell else (layers, B, H)
        self.start = torch.randn(state).to(dtype).requires_grad_()

    def step(self, t, h, module=None):
        result = (module or self.module)(self.x[t], h)
        return result if self.cell else result[1]

    def states(self, h=None, steps=range(T)):
        h, states = self.start if h is None else h, []
        for t in steps:
            h = self.step(t, h)
            states.append(h)
        return states

    def loss(self):
        return torch.stack(self.states()).square().sum()


KINDS = ["cell", "cell, no biases", "unbatched cell", "one layer", "two layers", "several steps"]

# ---- what is done with a loop; returns what it saw


def _nothing(loop):
    loop.loss().backward()
    return []


def _the_last_state_counts(loop):
    loop.states()[-1].square().sum().backward()
    return []


def _gradients_are_there_already(loop):
    for _ in range(2):
        loop.loss().backward()
    return []


def _the_graph_is_kept(loop):
    loss = loop.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    return []


def _some_are_asked_for(loop):
    w = next(loop.module.parameters())
    states = loop.states()
    seen = torch.autograd.grad(states[-1].square().sum(), [w, states[2]])
    loop.loss().backward(inputs=[w])
    return seen


def _it_is_differentiated(loop):
    loss = loop.loss()
    (d,) = torch.autograd.grad(loss, loop.start, create_graph=True)
    (loss + d.square().sum()).backward()
    return []


def _it_branches(loop):
    states = loop.states()
    others = loop.states(states[2], [0, 1]), loop.states(states[2] * 2, [3])
    (states[-1].sum() + sum(h[-1].square().sum() for h in others)).backward()
    return []


def _another_module_takes_turns(loop):
    other, h = copy.deepcopy(loop.module), loop.start
    for t in range(T):
        h = loop.step(t, h, other if t % 2 else None)
    h.square().sum().backward()
    return [p.grad for p in other.parameters()]


def _a_weight_is_used_elsewhere(loop):
    (loop.loss() + sum(p.square().sum() for p in loop.module.parameters())).backward()
    return []


def _a_weight_is_frozen_midway(loop):
    states = loop.states(steps=[0, 1, 2])
    next(loop.module.parameters()).requires_grad_(False)
    loop.states(states[-1], [3, 4, 5])[-1].square().sum().backward()
    return []


def _weights_are_computed_once(loop):
    weights = {name: p * 2 for name, p in loop.module.named_parameters()}
    h = loop.start
    for t in range(T):
        h = loop.step(t, h, lambda *args: torch.func.functional_call(loop.module, weights, args))
    h.square().sum().backward()
    return []


def _weights_are_computed_at_each_step(loop):
    class Twice(nn.Module):
        def forward(self, w):
            return w * 2

    name = next(name for name, _ in loop.module.named_parameters() if "hh" in name)
    parametrize.register_parametrization(loop.module, name, Twice())
    loop.loss().backward()
    return []


def _it_is_detached_midway(loop):
    states = loop.states(steps=[0, 1, 2])
    later = loop.states(states[-1].detach(), [3, 4, 5])
    torch.stack([*states, *later]).square().sum().backward()
    return []


def _states_are_masked(loop):
    h, mask = loop.start, torch.tensor(([1.0, 0.0] * H)[:H], dtype=f64)
    for t in range(T):
        h = loop.step(t, h) * mask + h * (1 - mask)
    h.square().sum().backward()
    return []


def _a_hook_changes_a_states_gradient(loop):
    states = loop.states()
    states[2].register_hook(lambda grad: grad * 3)
    states[-1].square().sum().backward()
    return []


def _a_hook_changes_weights_gradients(loop):
    seen = {name: [] for name, _ in loop.module.named_parameters()}
    for name, p in loop.module.named_parameters():
        p.register_hook(lambda grad, name=name: seen[name].append(grad.clone()) or grad.mul_(3))
    loop.loss().backward()
    return [grad for (grad,) in seen.values()]  # once each


def _once(hook):
    calls = []

    def run(grad):
        calls.append(grad)
        return hook(grad) if len(calls) == 1 else None

    return run


def _a_hook_fails(loop):
    """What the calls after it had left behind is no part of the next backward."""
    states = loop.states()

    def fail(_):
        raise RuntimeError("no room")

    states[3].register_hook(_once(fail))
    with pytest.raises(RuntimeError, match="no room"):
        states[-1].sum().backward()
    states[3].square().sum().backward()
    return []


def _a_hook_walks_another_part(loop):
    """Within the backward, to a state at which that has left something."""
    states = loop.states()
    other = loop.step(0, states[2]).square().sum()
    states[2].register_hook(_once(lambda grad: grad + torch.autograd.grad(other, states[2])[0]))
    states[-1].square().sum().backward()
    return []


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no room")


def _a_walk_within_fails(loop):
    states, weights = loop.states(), list(loop.module.parameters())
    other = loop.step(0, _Fails.apply(states[2])).sum()

    def walk(_):
        with pytest.raises(RuntimeError, match="no room"):
            torch.autograd.grad(other, weights)

    states[2].register_hook(_once(walk))
    states[-1].square().sum().backward()
    return []


def _a_hook_of_what_is_saved_walks(loop):
    """A call's, while its node runs."""
    seen = []

    def unpack(tensor):
        if len(seen) == 1:
            other, h = seen.pop()
            seen.extend(torch.autograd.grad(other, h))
            seen.append(None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        h = loop.step(0, loop.start)
    seen.append((loop.step(1, h).square().sum(), h))
    thread = threading.Thread(target=loop.step(2, h).sum().backward, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return seen[:1]


def _it_is_computed_again(loop):
    for use_reentrant in (False, True):
        h = loop.start
        for t in range(T):
            h = checkpoint(loop.step, torch.tensor(t), h, use_reentrant=use_reentrant)
        h.square().sum().backward()
    return []


def _threads_walk_loops_of_their_own(loop):
    losses = [loop.loss() for _ in range(8)]
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return []


def _it_is_looked_at_for_anomalies(loop):
    with torch.autograd.detect_anomaly():
        loop.loss().backward()
    return []


CASES = {f.__name__[1:].replace("_", " "): f for f in (
    _nothing, _the_last_state_counts, _gradients_are_there_already, _the_graph_is_kept,
    _some_are_asked_for, _it_is_differentiated, _it_branches, _another_module_takes_turns,
    _a_weight_is_used_elsewhere, _a_weight_is_frozen_midway, _weights_are_computed_once,
    _weights_are_computed_at_each_step, _it_is_detached_midway, _states_are_masked,
    _a_hook_changes_a_states_gradient, _a_hook_changes_weights_gradients, _a_hook_fails,
    _a_hook_walks_another_part, _a_walk_within_fails, _a_hook_of_what_is_saved_walks,
    _it_is_computed_again, _threads_walk_loops_of_their_own, _it_is_looked_at_for_anomalies,
)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_nn(backend, case, kind):
    if "threads" in case and backend == "triton" and triton_layer.INTERPRETED:
        pytest.skip("Triton's interpreter is one for the whole process, not for each thread")
    results = []
    for package in (nn, rnnfast):
        loop = Loop(package, kind)
        seen = CASES[case](loop)
        leaves = loop.start, loop.x, *loop.module.parameters()
        results.append([*seen, *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected, 2 * 3 * T, I + H + T * B)


def test_a_hook_of_a_call_sees_its_own_gradients(compiled):
    """And so does whoever calls a node."""
    for watched in (0, 2, T - 1):
        loop = Loop(rnnfast, "cell")
        states, seen = loop.states(), []
        h = states[watched]
        weights = list(loop.module.parameters())
        h.retain_grad()
        h.grad_fn.register_hook(lambda grads, _, seen=seen: seen.extend(grads[2:]))
        states[-1].square().sum().backward()
        before = loop.start if watched == 0 else states[watched - 1]
        again = loop.step(watched, before.detach())
        own = torch.autograd.grad(again, weights, h.grad)
        for actual, expected in zip(seen, own, strict=True):
            assert_same(actual, expected, T, I + H + B)


def test_a_node_called_in_another_graphs_backward_returns_its_own(compiled):
    """The engine walks a graph, but not the one that the node is of."""
    loop = Loop(rnnfast, "cell")
    h = loop.states()[-1]
    weights = list(loop.module.parameters())
    own = torch.autograd.grad(h, weights, torch.ones_like(h), retain_graph=True)
    first = loop.step(T - 1, loop.states(steps=range(T - 1))[-1].detach())
    last = torch.autograd.grad(first, weights, torch.ones_like(h))
    seen = []

    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.extend(h.grad_fn(None, torch.ones_like(h))[2:])
            return grad

    Calls.apply(torch.ones(1, requires_grad=True)).backward()
    for actual, expected in zip(seen, last, strict=True):
        assert_same(actual, expected, T, I + H + B)
    h.backward(torch.ones_like(h))
    for p, expected in zip(weights, own, strict=True):
        assert_same(p.grad, expected, T, I + H + B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bits_are_in_float32(compiled, dtype):
    """A sum of ones in bfloat16 ends at 256, in float16 at 2048. 2400 is a number of both."""
    cell = rnnfast.RNNCell(2, 3, nonlinearity="relu", dtype=dtype)
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.fill_(0 if name == "weight_hh" else 1)
    x = torch.ones(1, 2, dtype=dtype)
    h, states = torch.zeros(1, 3, dtype=dtype), []
    for _ in range(2400):
        h = cell(x, h)
        states.append(h)
    torch.stack(states).sum().backward()
    for p in (cell.weight_ih, cell.bias_ih, cell.bias_hh):
        assert p.grad.dtype == dtype
        assert p.grad.eq(2400).all()
    assert cell.bias_ih.grad.data_ptr() != cell.bias_hh.grad.data_ptr()
