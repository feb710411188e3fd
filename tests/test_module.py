"""The module's contract: constructor, parameters, life cycle, hooks. Each test is a row of it."""

import copy
import io
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_same, pack, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import triton_layer

CONFIGURATIONS = [
    dict(args=(3, 5)),
    dict(args=(3, 5, 2, "relu", False, True, 0.25, True)),
    dict(args=(3, 5), kwargs=dict(num_layers=3, bidirectional=True)),
    dict(args=(1, 1), kwargs=dict(bias=False, nonlinearity="relu", dtype=torch.float64)),
]


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_constructor_gives_bit_identical_parameters_and_attributes(config):
    theirs, ours = pair(*config["args"], **config.get("kwargs", {}))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for name in (*nn.RNN.__constants__, "nonlinearity", "training"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.proj_size == 0
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNBase)
    assert len(ours.all_weights) == len(theirs.all_weights)
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    ours.flatten_parameters()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3,), {}),
        ((3, 5), dict(nonlinearity="gelu")),
        ((3, 5, 1, "sigmoid"), {}),
        ((3, 5), dict(dropout=1.5)),
        ((3, 5), dict(dropout=-0.1)),
        ((3, 5), dict(dropout=True)),
        ((3, 0), {}),
        ((3, -1), {}),
        ((0, 5), {}),
        ((3, 2.5), {}),
        ((3, 5), dict(num_layers=0)),
        ((3, 5), dict(bias=1)),
        ((3, 5), dict(batch_first="yes")),
        ((3, 5), dict(proj_size=2)),
        ((3, 5), dict(unknown=1)),
        ((3, 5, 1, "tanh", True, False, 0.0, False, 0, "cpu", torch.float32, 7), {}),
    ],
)
def test_bad_constructor_arguments_raise_what_nn_rnn_raises(args, kwargs):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - the type is what is compared
        nn.RNN(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        rnnfast.RNN(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


def test_a_subclass_initialises_by_its_nonlinearity():
    def of(base):
        class Own(base):
            def reset_parameters(self):
                bound = nn.init.calculate_gain(self.nonlinearity) / self.hidden_size
                for p in self.parameters():
                    nn.init.uniform_(p, -bound, bound)

        torch.manual_seed(3)
        return Own(3, 5, nonlinearity="relu")

    for ours, theirs in zip(of(rnnfast.RNN).parameters(), of(nn.RNN).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_with_one_layer_warns():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        rnnfast.RNN(3, 5, dropout=0.5)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_state_dict_both_ways(config):
    args, kwargs = config["args"], config.get("kwargs", {})
    theirs, ours = nn.RNN(*args, **kwargs), rnnfast.RNN(*args, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fresh = nn.RNN(*args, **kwargs)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(fresh.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def _same(a, b, x):
    assert torch.equal(a(x)[0], b(x)[0])


def test_life_cycle(backend):
    ours = rnnfast.RNN(3, 5, 2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    _same(pickle.loads(pickle.dumps(ours)), ours, x)
    twin = copy.deepcopy(ours)
    _same(twin, ours, x)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert not torch.equal(twin(x)[0], ours(x)[0])
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    _same(torch.load(file, weights_only=False), ours, x)
    double = copy.deepcopy(ours).double()
    assert double(x.double())[0].dtype == torch.float64
    assert_same(double(x.double())[0].float(), ours(x)[0], 4, 8)
    assert copy.deepcopy(ours).to(torch.float64).weight_ih_l0.dtype == torch.float64
    ours.share_memory()
    assert ours.weight_hh_l0.is_shared()
    _same(ours, ours, x)
    replica = ours._replicate_for_data_parallel()
    assert replica._flat_weights is not ours._flat_weights
    for name, p in ours.named_parameters():
        setattr(replica, name, p)
    _same(replica, ours, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_sixteen_bit_modules(backend, dtype, nonlinearity):
    """Sums are float32, so against float64 truth on the same 16-bit numbers the outputs are off by
    one rounding to storage, and one of the state where it is carried as stored; nn.RNN, which
    rounds several times a step, is off by no less."""
    theirs, ours = pair(5, 40, 2, nonlinearity, bidirectional=True)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    truth_of = rnnfast.RNN(5, 40, 2, nonlinearity, bidirectional=True).double()
    truth_of.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    x = torch.randn(12, 3, 5).to(dtype).requires_grad_()
    out, h_n = ours(x)
    assert out.dtype == h_n.dtype == dtype
    (out.float().sum() + h_n.float().sum()).backward()
    assert x.grad.dtype == ours.weight_hh_l1.grad.dtype == dtype
    with rnnfast.backend("reference"):
        truth = truth_of(x.detach().double())[0]
    eps = torch.finfo(dtype).eps
    # The first layer's outputs are rounded to storage too (eps/2 each), the second's once more.
    assert (out.double() - truth).abs().max() <= 2 * eps * truth.abs().max()
    assert (out.double() - truth).norm() <= 1.01 * (theirs(x)[0].double() - truth).norm()
    wide = copy.deepcopy(ours).float()
    y = x.detach().float().requires_grad_()
    out, h_n = wide(y)
    (out.sum() + h_n.sum()).backward()
    for name, p in ours.named_parameters():
        exact = dict(wide.named_parameters())[name].grad
        # every layer's gradient is rounded to storage once, and so are the factors it is made of
        assert (p.grad.float() - exact).abs().max() <= 8 * eps * exact.abs().max(), name


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
def test_long_sixteen_bit_inputs_are_those_of_the_reference(compiled, kind, with_state):
    """More rows than the kernel widens at a time. Both sum in float32 the same 16-bit numbers, so
    they differ by float32's rounding and, rarely, by one rounding to storage; by the roundings of
    the state too where it is carried as stored."""
    ours = rnnfast.RNN(5, 30, bidirectional=True).bfloat16()
    lengths = [70, 3, 70, 41, 1, 69, 12] * 5
    if kind == "packed":
        x = pack([torch.randn(n, 5).bfloat16() for n in lengths], enforce_sorted=False)
        data = x.data.requires_grad_()
        x = x._replace(data=data)
    else:
        x = data = torch.randn(70, 35, 5).bfloat16().requires_grad_()
    hx = torch.randn(2, 35, 30).bfloat16().requires_grad_() if with_state else None
    results = []
    for name in ("cpu", "reference"):
        ours.zero_grad()
        data.grad = None
        if hx is not None:
            hx.grad = None
        with rnnfast.backend(name):
            out, h_n = ours(x) if hx is None else ours(x, hx)
        out = out.data if kind == "packed" else out
        ((out.float() * torch.cos(out.float())).sum() + h_n.float().square().sum()).backward()
        results.append([out, h_n, data.grad, *([hx.grad] if with_state else [])])
        results[-1] += [p.grad for p in ours.parameters()]
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).abs().max() <= 2 * eps * b.float().abs().max()


def test_meta_device_and_to_empty(backend):
    meta = rnnfast.RNN(3, 5, 2, bidirectional=True, batch_first=True, device="meta")
    out, h_n = meta(torch.empty(2, 7, 3, device="meta"))
    assert out.device.type == "meta"
    assert out.shape == (2, 7, 10)
    assert h_n.shape == (4, 2, 5)
    real = meta.to_empty(device=torch.get_default_device())
    real.load_state_dict(nn.RNN(3, 5, 2, bidirectional=True, batch_first=True).state_dict())
    assert torch.isfinite(real(torch.randn(2, 7, 3))[0]).all()


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def test_parametrized_weights_are_the_ones_used(backend):
    theirs, ours = pair(3, 5)
    x = torch.randn(4, 2, 3)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh_l0", Halved())
        parametrizations.weight_norm(module, "weight_ih_l0")
    assert_same(ours(x)[0], theirs(x)[0], 4, 8)
    with torch.no_grad():
        for module in (theirs, ours):
            module.parametrizations.weight_hh_l0.original.mul_(3)
            module.parametrizations.weight_ih_l0.original0.mul_(2)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    assert_same(ours(x)[0], theirs(x)[0], 4, 8)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_same(a.grad, b.grad, 4, 16, name)


def test_old_style_weight_norm(backend):
    theirs, ours = pair(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs, ours = (
            nn.utils.weight_norm(theirs, "weight_hh_l0"),
            nn.utils.weight_norm(ours, "weight_hh_l0"),
        )
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        theirs.weight_hh_l0_g.mul_(2)
        ours.weight_hh_l0_g.mul_(2)
    assert_same(ours(x)[0], theirs(x)[0], 4, 8)


def test_replaced_parameter_is_used(backend):
    theirs, ours = pair(3, 5)
    new = torch.randn(5, 5)
    theirs.weight_hh_l0, ours.weight_hh_l0 = nn.Parameter(new), nn.Parameter(new.clone())
    x = torch.randn(4, 2, 3)
    assert_same(ours(x)[0], theirs(x)[0], 4, 8)


def test_functional_call_uses_the_given_parameters(backend):
    _, ours = pair(3, 5)
    x = torch.randn(4, 2, 3)
    doubled = {k: 2 * v for k, v in ours.state_dict().items()}
    by_call = torch.func.functional_call(ours, doubled, (x,))[0]
    before = ours(x)[0]
    ours.load_state_dict(doubled)
    assert torch.equal(by_call, ours(x)[0])
    assert not torch.equal(by_call, before)


def test_weights_shared_between_modules(backend):
    a, b = rnnfast.RNN(3, 5), rnnfast.RNN(3, 5)
    b.weight_ih_l0, b.weight_hh_l0 = a.weight_ih_l0, a.weight_hh_l0
    b.bias_ih_l0, b.bias_hh_l0 = a.bias_ih_l0, a.bias_hh_l0
    x = torch.randn(4, 2, 3)
    assert torch.equal(a(x)[0], b(x)[0])
    a(x)[0].sum().backward()
    once = a.weight_hh_l0.grad.clone()
    b(x)[0].sum().backward()
    assert torch.equal(b.weight_hh_l0.grad, 2 * once)


def test_hooks(backend):
    seen = []
    ours = rnnfast.RNN(3, 5)
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, out: seen.append("forward"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    ours.weight_hh_l0.register_hook(lambda g: seen.append("parameter"))
    x = torch.randn(4, 2, 3, requires_grad=True)
    ours(x)[0].sum().backward()
    assert seen[:2] == ["pre", "forward"]
    assert sorted(seen[2:]) == ["backward", "parameter"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float64])
def test_autocast_gives_the_dtypes_of_nn_rnn(backend, dtype, module_dtype):
    theirs, ours = pair(3, 5, 2, dtype=module_dtype)
    x = torch.randn(4, 2, 3, dtype=module_dtype)
    hx = torch.randn(2, 2, 5, dtype=module_dtype)
    for state in ((), (hx,)):
        with torch.autocast("cpu", dtype):
            expected, actual = theirs(x, *state), ours(x, *state)
            loss = actual[0].float().sum()
            loss.backward()  # under autocast, as careless code does
        assert [y.dtype for y in actual] == [y.dtype for y in expected]
        # Inputs and weights are rounded alike. nn.RNN rounds two products, their sum and the state
        # of 4 steps in 2 layers, rnnfast the state: 40 roundings of values of about one, each with
        # a standard deviation of eps / sqrt(12). Four of those of their sum.
        allowed = 4 * torch.finfo(dtype).eps * (40 / 12) ** 0.5
        assert (actual[0].double() - expected[0].double()).abs().max() < allowed
        assert ours.weight_hh_l0.grad.dtype == module_dtype
    cell, reference = rnnfast.RNNCell(3, 5), nn.RNNCell(3, 5)
    with torch.autocast("cpu", dtype):
        assert cell(x[0].float()).dtype == reference(x[0].float()).dtype


def test_many_threads_give_what_one_gives(backend):
    if backend == "triton" and triton_layer.INTERPRETED:
        pytest.skip("Triton's interpreter is one for the whole process, not for each thread")
    ours = rnnfast.RNN(7, 33, 2, bidirectional=True)
    inputs = [torch.randn(9, b, 7) for b in range(1, 9)]
    expected = [ours(x)[0] for x in inputs]
    results = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            results[i] = ours(inputs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------ RNNCell


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_cell(backend, nonlinearity, bias, batched, with_state):
    torch.manual_seed(0)
    theirs = nn.RNNCell(3, 5, bias, nonlinearity, dtype=torch.float64)
    torch.manual_seed(0)
    ours = rnnfast.RNNCell(3, 5, bias, nonlinearity, dtype=torch.float64)
    assert isinstance(ours, nn.RNNCell)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    results = []
    for cell in (ours, theirs):
        torch.manual_seed(1)
        shape = (4,) if batched else ()
        xs = torch.randn(6, *shape, 3, dtype=torch.float64, requires_grad=True)
        h = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True) if with_state else None
        state = h
        for x in xs:
            state = cell(x, state)
        state.square().sum().backward()
        results.append([state, xs.grad, h.grad if with_state else None])
        results[-1] += [p.grad for p in cell.parameters()]
    for a, b in zip(*results, strict=True):
        assert_same(a, b, 6, 8)


@pytest.mark.parametrize(
    ("x", "h"),
    [
        ((2, 4), (2, 5)),
        ((2, 3), (3, 5)),
        ((2, 3), (2, 6)),
        ((2, 2, 3), None),
        ((2, 3), (1, 2, 5)),
        ((2, 3), (5,)),
        ((5, 3), (5,)),
        ((3,), (2, 5)),
        ((3,), (1, 5)),
        ((4,), None),
    ],
)
def test_cell_errors(backend, x, h):
    args = [torch.randn(x)] + ([torch.randn(h)] if h else [])
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        nn.RNNCell(3, 5)(*args)
    with pytest.raises(type(theirs.value)) as ours:
        rnnfast.RNNCell(3, 5)(*args)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0)])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_cell_may_have_no_inputs_or_no_units(backend, sizes, nonlinearity):
    theirs, ours = (c(*sizes, nonlinearity=nonlinearity) for c in (nn.RNNCell, rnnfast.RNNCell))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, sizes[0])
    for h in (None, torch.randn(2, sizes[1])):
        assert_same(ours(x, h), theirs(x, h), 1, 5)


def test_cell_with_a_parametrized_weight_and_a_parameter_of_ones_own(backend):
    theirs, ours = nn.RNNCell(3, 5), rnnfast.RNNCell(3, 5)
    ours.load_state_dict(theirs.state_dict())
    for cell in (theirs, ours):
        parametrize.register_parametrization(cell, "weight_hh", Halved())
        cell.own = nn.Parameter(torch.ones(1))
    x, h = torch.randn(4, 3), torch.randn(4, 5)
    assert_same(ours(x, h), theirs(x, h), 1, 8)


def test_packed_output_is_a_packed_sequence_of_the_same_order(backend):
    ours = rnnfast.RNN(3, 5)
    packed = pack([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    out, _ = ours(packed)
    assert isinstance(out, PackedSequence)
    assert torch.equal(out.batch_sizes, packed.batch_sizes)
    assert torch.equal(out.sorted_indices, packed.sorted_indices)
    assert torch.equal(out.unsorted_indices, packed.unsorted_indices)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_trace_takes_any_batch_and_on_the_kernels_any_length(
    backend, layers, bidirectional, batch_first
):
    _, ours = pair(3, 5, layers, bidirectional=bidirectional, batch_first=batch_first)
    trace = torch.jit.trace(ours, (torch.randn(4, 2, 3),))
    for shape in ((4, 5, 3), (7, 1, 3)) if backend == "cpu" else ():
        x = torch.randn(shape)
        for a, b in zip(trace(x), ours(x), strict=True):
            assert torch.equal(a, b)
    x = torch.randn((5, 2, 3) if batch_first else (4, 5, 3))
    assert torch.equal(trace(x)[0], ours(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    "module", [rnnfast.RNN(3, 5), rnnfast.RNNCell(3, 5)], ids=["RNN", "RNNCell"]
)
def test_torchscript_is_refused_when_compiled_not_later(module):
    with pytest.raises((ValueError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(module)


def test_the_package_says_that_it_is_typed():
    assert Path(rnnfast.__file__).with_name("py.typed").exists()
