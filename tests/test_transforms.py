"""torch.func over the modules: vmap over inputs and parameters, composed with grad, and jacobians.

The truth of a vmapped call is the loop over its members, in float64: they differ in the order of
sums at most.
"""

import copy
import warnings

import pytest
import torch
from helpers import assert_same, pair, ramp
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import rnnfast

f64 = torch.float64
N, T, B, I, H = 3, 4, 2, 3, 5
KINDS = ["dense", "batch_first", "unbatched", "packed"]
SIZES = torch.tensor([B, B, 1, 1])  # of the packed batch


def make(kind, nonlinearity="tanh", **config):
    config = dict(num_layers=2, bidirectional=True, dtype=f64) | config
    _, ours = pair(I, H, nonlinearity=nonlinearity, batch_first=kind == "batch_first", **config)
    shape = {
        "dense": (T, B, I),
        "batch_first": (B, T, I),
        "unbatched": (T, I),
        "packed": (int(SIZES.sum()), I),
    }[kind]
    states = len(ours.all_weights)
    hx_shape = (states, H) if kind == "unbatched" else (states, B, H)
    return ours, torch.randn(N, *shape, dtype=f64), torch.randn(N, *hx_shape, dtype=f64)


def call(module, kind, x, hx=None, parameters=None):
    """Output data and final state of one member."""
    if kind == "packed":
        x = PackedSequence(x, SIZES)
    args = (x,) if hx is None else (x, hx)
    out, h_n = module(*args) if parameters is None else functional_call(module, parameters, args)
    return (out.data if kind == "packed" else out), h_n


def loss(*args):
    return sum((y * ramp(y)).sum() for y in call(*args))


def same(actual, expected, what=""):
    """Tuples, dictionaries and tensors, equal to rounding."""
    if isinstance(expected, dict):
        for name in expected:
            same(actual[name], expected[name], name)
    elif isinstance(expected, tuple):
        for a, b in zip(actual, expected, strict=True):
            same(a, b, what)
    else:
        assert_same(actual, expected, 2 * T, 2 * H + I + N * T * B, what)


def stacked(results):
    """A list of results (tensors, tuples, dictionaries) as one result of stacked tensors."""
    if isinstance(results[0], dict):
        return {name: stacked([r[name] for r in results]) for name in results[0]}
    if isinstance(results[0], tuple):
        return tuple(stacked(list(column)) for column in zip(*results, strict=True))
    return torch.stack(results)


@pytest.fixture(autouse=True)
def no_slow_fallback():
    """A missing batching rule is a warning of functorch's; here it is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["none", "shared", "own", "own state only"])
def test_vmap_over_inputs(backend, kind, state):
    ours, x, hx = make(kind)
    if state == "none":
        actual = vmap(lambda x: call(ours, kind, x))(x)
        expected = stacked([call(ours, kind, x[n]) for n in range(N)])
    elif state == "shared":
        actual = vmap(lambda x: call(ours, kind, x, hx[0]))(x)
        expected = stacked([call(ours, kind, x[n], hx[0]) for n in range(N)])
    elif state == "own":
        actual = vmap(lambda x, hx: call(ours, kind, x, hx))(x, hx)
        expected = stacked([call(ours, kind, x[n], hx[n]) for n in range(N)])
    else:
        actual = vmap(lambda hx: call(ours, kind, x[0], hx))(hx)
        expected = stacked([call(ours, kind, x[0], hx[n]) for n in range(N)])
    same(actual, expected)


class Batches(TorchDispatchMode):
    """The batch sizes of the calls of the op."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.rnnfast.rnn_layer.default:
            self.seen.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def test_vmap_is_one_call_of_a_larger_batch_and_an_ensemble_one_call_per_member(compiled):
    ours, x, _ = make("dense", num_layers=1, bidirectional=False)
    with Batches() as batches:
        vmap(lambda x: ours(x))(x)
    assert batches.seen == [N * B]
    models, parameters = ensemble("dense", num_layers=1, bidirectional=False)
    with Batches() as batches:
        vmap(lambda p, x: call(models[0], "dense", x, None, p))(parameters, x)
    assert batches.seen == [B] * N


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_vmap_over_any_dimension(backend, dim):
    ours, x, _ = make("dense")
    expected = stacked([ours(member)[0] for member in x])
    moved = x.movedim(0, dim)
    same(vmap(lambda x: ours(x)[0], in_dims=dim)(moved), expected)
    out = vmap(lambda x: ours(x)[0], in_dims=dim, out_dims=2)(moved)
    same(out.movedim(2, 0), expected)


def ensemble(kind, **config):
    models = [make(kind, **config)[0] for _ in range(N)]
    with torch.no_grad():
        for n, model in enumerate(models):
            for p in model.parameters():
                p.mul_(1 - 0.1 * n)
    return models, stack_module_state(models)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_input", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_vmap_over_parameters_is_an_ensemble(backend, kind, own_input, nonlinearity):
    models, parameters = ensemble(kind, nonlinearity=nonlinearity)
    base = copy.deepcopy(models[0]).to("meta")
    _, x, hx = make(kind)
    inputs = x if own_input else x[0]

    def member(parameters, x):
        return call(base, kind, x, hx[0], parameters)

    actual = vmap(member, in_dims=(0, 0 if own_input else None))(parameters, inputs)
    pick = range(N) if own_input else [0] * N
    expected = stacked([call(m, kind, x[n], hx[0]) for m, n in zip(models, pick, strict=True)])
    same(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_members_are_results_of_none(backend, kind, bidirectional):
    """As of torch's own operations, gradients included: zeros of what the members share."""
    ours, x, hx = make(kind, bidirectional=bidirectional)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    none = {name: p.expand(N, *p.shape)[:0] for name, p in parameters.items()}

    def member(x, hx, parameters):
        return call(ours, kind, x, hx, parameters)

    def gradients(x, hx, parameters):
        first = grad(lambda *args: call(ours, kind, *args)[0].sum(), argnums=(0, 1, 2))
        return first(x, hx, parameters)

    for function in (member, gradients):
        some = vmap(function, in_dims=(0, 0, None))(x, hx, parameters)
        for own, dims in ((parameters, (0, 0, None)), (none, (0, 0, 0))):
            actual = vmap(function, in_dims=dims)(x[:0], hx[:0], own)
            same(actual, tree_map(lambda y: y[:0], some))
    out, _ = vmap(member, in_dims=(0, 0, None))(x[:0], hx[:0], dict(ours.named_parameters()))
    out.sum().backward()
    assert torch.count_nonzero(ours.weight_hh_l0.grad) == 0


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_ensemble_trains_as_its_members_do(backend, kind):
    """One backward through the vmapped call, and vmap of grad, give each member's gradients."""
    models, parameters = ensemble(kind)
    _, x, hx = make(kind)
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}

    def member(parameters, x, hx):
        return loss(models[0], kind, x, hx, parameters)

    vmap(member)(parameters, x, hx).sum().backward()
    by_vmap_of_grad = vmap(grad(member))({k: p.detach() for k, p in parameters.items()}, x, hx)
    for n, model in enumerate(models):
        loss(model, kind, x[n], hx[n]).backward()
        for name, p in model.named_parameters():
            same(parameters[name].grad[n], p.grad, name)
            same(by_vmap_of_grad[name][n], p.grad, name)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(backend, kind):
    ours, x, hx = make(kind)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def sample(parameters, x, hx):
        return loss(ours, kind, x, hx, parameters)

    everything = grad(sample, argnums=(0, 1, 2))
    actual = vmap(everything, in_dims=(None, 0, 0))(parameters, x, hx)
    same(actual, stacked([everything(parameters, x[n], hx[n]) for n in range(N)]))
    inputs = grad(sample, argnums=(1, 2))  # no weight's gradient: the fold, backward too
    actual = vmap(inputs, in_dims=(None, 0, None))(parameters, x, hx[0])
    same(actual, stacked([inputs(parameters, x[n], hx[0]) for n in range(N)]))


def test_nested_vmap_of_an_ensemble_over_inputs(backend):
    models, parameters = ensemble("dense")
    _, x, _ = make("dense")

    def member(parameters, x):
        return loss(models[0], "dense", x, None, parameters)

    each = vmap(vmap(grad(member), in_dims=(None, 0)), in_dims=(0, None))
    actual = each(parameters, x)
    expected = stacked(
        [
            stacked([grad(member)({k: p[m] for k, p in parameters.items()}, y) for y in x])
            for m in range(N)
        ]
    )
    same(actual, expected)


def test_gradient_of_the_gradient_under_vmap(backend):
    ours, x, _ = make("dense")
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def penalty(parameters, x):
        return grad(lambda x: loss(ours, "dense", x, None, parameters))(x).square().sum()

    actual = vmap(grad(penalty), in_dims=(None, 0))(parameters, x)
    same(actual, stacked([grad(penalty)(parameters, x[n]) for n in range(N)]))


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_outer_gradient_passes_an_inner_call_that_has_none(backend, batch_first):
    theirs, ours = pair(I, H, batch_first=batch_first, dtype=f64)
    x, weigh = torch.randn(B, T, I, dtype=f64), torch.randn(B, T, H, dtype=f64)
    gradients = []
    for module in (theirs, ours):

        def outer(parameters, module=module):
            def inner(v):
                return (functional_call(module, parameters, (x,))[0] * v).sum()

            return grad(inner)(weigh).sin().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        gradients.append(grad(outer)(parameters))
    same(*gradients[::-1])


def test_jacobians_are_those_of_nn_rnn(backend):
    theirs, ours = pair(I, H, 2, bidirectional=True, dtype=f64)
    x, hx = torch.randn(2, 1, I, dtype=f64), torch.randn(4, 1, H, dtype=f64)
    expected = torch.autograd.functional.jacobian(lambda x, hx: theirs(x, hx)[0], (x, hx))
    same(jacrev(lambda x, hx: ours(x, hx)[0], argnums=(0, 1))(x, hx), expected)
    # Forward mode has no kernel: forcing one is an error, the table takes the reference.
    with rnnfast.backend("reference" if backend == "reference" else "auto"):
        same(jacfwd(lambda x, hx: ours(x, hx)[0], argnums=(0, 1))(x, hx), expected)
    vectorized = torch.autograd.functional.jacobian(
        lambda x, hx: ours(x, hx)[0], (x, hx), vectorize=True
    )
    same(vectorized, expected)

    def of_weight(module):
        return lambda w: functional_call(module, {"weight_hh_l0": w}, (x, hx))[0].sum()

    w = ours.weight_hh_l0.detach()
    expected = torch.autograd.functional.hessian(of_weight(theirs), w)
    with rnnfast.backend("reference" if backend == "reference" else "auto"):
        same(hessian(of_weight(ours))(w), expected)
    same(jacrev(jacrev(of_weight(ours)))(w), expected)


def test_dropout_under_vmap_needs_a_choice_and_takes_it(backend):
    ours, x, _ = make("dense", dropout=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: ours(x)[0])(x)
    one = x[:1].expand_as(x)
    alike = vmap(lambda x: ours(x)[0], randomness="same")(one)
    same(alike[0], alike[1])
    differ = vmap(lambda x: ours(x)[0], randomness="different")(one)
    assert not torch.equal(differ[0], differ[1])


def test_nn_rnn_cannot_be_vmapped():
    """The evidence for the README's table."""
    theirs = nn.RNN(I, H)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::rnn_tanh"):
        vmap(lambda x: theirs(x)[0])(torch.randn(N, T, B, I))


def test_a_device_without_a_kernel_runs_vmap_on_the_reference():
    """PyTorch's own RNN has no batching rule there either."""
    with FakeTensorMode():
        x = torch.empty(T, B, I, device="cuda")
    seen = []
    vmap(lambda y: seen.append(rnnfast.backends.chosen(x)) or y)(torch.zeros(N))
    grad(lambda y: seen.append(rnnfast.backends.chosen(x)) or y)(torch.zeros(()))
    assert seen == ["reference", "torch"]
    assert rnnfast.backends.chosen(x) == "torch"


def test_cell_under_vmap_of_grad(backend):
    cell = rnnfast.RNNCell(I, H, dtype=f64)
    x, h = torch.randn(N, B, I, dtype=f64), torch.randn(B, H, dtype=f64)

    def member(x):
        return cell(x, h).square().sum()

    same(vmap(grad(member))(x), stacked([grad(member)(x[n]) for n in range(N)]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_checkpoint_gives_the_same_gradients(backend, use_reentrant, kind):
    ours, x, hx = make(kind, dropout=0.5)
    results = []
    for checkpointed in (False, True):
        ours.zero_grad()
        leaf = x[0].clone().requires_grad_()
        torch.manual_seed(7)
        args = (ours, kind, leaf, hx[0])
        y = checkpoint(call, *args, use_reentrant=use_reentrant) if checkpointed else call(*args)
        sum((part * ramp(part)).sum() for part in y).backward()
        results.append((leaf.grad, {k: p.grad.clone() for k, p in ours.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, expected in results[0][1].items():
        assert torch.equal(results[1][1][name], expected), name
