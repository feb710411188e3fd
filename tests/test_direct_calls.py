"""_direct_calls: plain calls of the modules, past Python; and what it leaves to Python."""

import gc
import subprocess
import sys
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
from helpers import environment, pack
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import rnnfast
from rnnfast import backends, functional

T, B, I, H = 5, 3, 4, 6

pytestmark = pytest.mark.usefixtures("compiled")


class Subclass(torch.Tensor):
    pass


class SubclassedParameter(nn.Parameter):
    pass


class NoHash(str):
    def __hash__(self):
        raise ValueError("no hash")


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.fixture
def no_other_way(monkeypatch):
    """The ways that lead through Python are closed."""

    def closed(*arguments):
        raise AssertionError("the call was not direct")

    for name in ("rnn_op", "by_layers", "rnn_cell"):
        monkeypatch.setattr(functional, name, closed)


def direct(module, *arguments):
    from rnnfast import _direct_calls

    if isinstance(module, nn.RNNCell):
        return _direct_calls.rnn_cell(module, *arguments, *[None] * (2 - len(arguments)))
    return _direct_calls.rnn(module, *arguments, *[None] * (3 - len(arguments)))


def gradients(results, module, x):
    results = [results] if isinstance(results, torch.Tensor) else results
    leaves = [x, *module.parameters()]
    return torch.autograd.grad(sum(r.square().sum() for r in results), leaves)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", ["dense", "unbatched", "packed"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(nonlinearity="relu", bias=False),
        dict(num_layers=2, bidirectional=True),
        dict(num_layers=3, dropout=0.4),
        dict(batch_first=True, dtype=torch.float64),
        dict(dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_a_plain_call_is_direct_and_gives_what_the_op_gives(no_other_way, kwargs, kind, with_state):
    module = rnnfast.RNN(I, H, **kwargs)
    dtype, batch_first = module.weight_hh_l0.dtype, module.batch_first
    states, batch = module.num_layers * (1 + module.bidirectional), 1 if kind == "unbatched" else B
    dense = torch.randn((batch, T, I) if batch_first else (T, batch, I), dtype=dtype)
    hx = torch.randn(states, batch, H, dtype=dtype) if with_state else None
    if kind == "packed":
        rows = dense if batch_first else dense.transpose(0, 1)
        packed = pack([rows[b, : T - b] for b in range(B)])
        x, sizes = packed.data.requires_grad_(), packed.batch_sizes
        given, state = packed._replace(data=x), hx
    else:
        x, sizes = dense.requires_grad_(), None
        unbatched = kind == "unbatched"
        given = x.squeeze(0 if batch_first else 1) if unbatched else x
        state = hx.squeeze(1) if unbatched and with_state else hx
    torch.manual_seed(1)  # of dropout
    output, h_n = module(given, state)
    torch.manual_seed(1)
    expected = torch.ops.rnnfast.rnn(
        x, hx, list(module.parameters()), sizes, module.nonlinearity, module.bias,
        module.num_layers, module.dropout, module.bidirectional, batch_first,
    )  # fmt: skip
    found = output.data if kind == "packed" else output, h_n
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b.view_as(a))
    for a, b in zip(gradients(found, module, x), gradients(expected, module, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kwargs", [{}, dict(bias=False), dict(nonlinearity="relu")], ids=repr)
def test_a_plain_cell_is_direct_and_gives_what_the_op_gives(no_other_way, kwargs, with_state):
    cell = rnnfast.RNNCell(I, H, **kwargs)
    x = torch.randn(B, I, requires_grad=True)
    hx = torch.randn(B, H) if with_state else None
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    expected = torch.ops.rnnfast.rnn_cell(x, hx, *weights, cell.nonlinearity)
    found = cell(x, hx)
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found, cell, x), gradients(expected, cell, x), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_that_of_training_alone(no_other_way):
    module = rnnfast.RNN(I, H, 2, dropout=0.9).eval()
    x = torch.randn(T, B, I)
    assert torch.equal(module(x)[0], module(x)[0])
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])


def with_a_subclassed_parameter(module):
    name = module._flat_weights_names[0] if isinstance(module, nn.RNNBase) else "weight_ih"
    setattr(module, name, SubclassedParameter(getattr(module, name).detach()))


def with_a_parametrization(module):
    parametrizations.weight_norm(module, "weight_hh" + "_l0" * isinstance(module, nn.RNNBase))


SPECIAL_MODULES = {
    "a parameter of a subclass": with_a_subclassed_parameter,
    "a parametrization": with_a_parametrization,
    "parameters that are none": lambda module: setattr(module, "_parameters", None),
    "parameters that are not in a plain dictionary": lambda module: setattr(
        module, "_parameters", OrderedDict(module._parameters)
    ),
    "an attribute that is missing": lambda module: module.__dict__.pop(
        "mode" if isinstance(module, nn.RNNBase) else "nonlinearity"
    ),
    "an unknown nonlinearity": lambda module: module.__dict__.update(mode="GRU", nonlinearity="x"),
}


@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.RNNCell])
@pytest.mark.parametrize("what", SPECIAL_MODULES)
def test_a_module_with_something_special_is_left_to_python(kind, what):
    module, x = kind(I, H), torch.randn(*[T] * (kind is rnnfast.RNN), B, I)
    assert direct(module, x) is not None
    SPECIAL_MODULES[what](module)
    assert direct(module, x) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", "1"), ("num_layers", 10**400), ("num_layers", 1.5), ("dropout", None),
     ("dropout", 10**400), ("bias", 1), ("_flat_weights_names", (*"abcd",)),
     ("training", None), ("bidirectional", 0), ("batch_first", "yes"), ("mode", None)],
)  # fmt: skip
def test_attributes_of_another_kind_are_left_to_python(name, value):
    module, x = rnnfast.RNN(I, H), torch.randn(T, B, I)
    object.__setattr__(module, name, value)
    assert direct(module, x) is None


def test_weights_that_are_not_the_registered_ones_are_left_to_python():
    module, x = rnnfast.RNN(I, H), torch.randn(T, B, I)
    module._parameters["weight_ih_l0"] = nn.Parameter(torch.zeros(H, I))
    assert direct(module, x) is None
    module(x)  # which looks them up
    assert direct(module, x) is not None
    module._flat_weights.append(module.weight_ih_l0)
    assert direct(module, x) is None
    module._flat_weights.pop()
    module._flat_weights_names[0] = NoHash("weight_ih_l0")
    assert direct(module, x) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.RNNCell])
def test_special_tensors_modes_and_traces_are_left_to_python(kind):
    module, x = kind(I, H), torch.randn(*[T] * (kind is rnnfast.RNN), B, I)
    hx = torch.zeros(*[1] * (kind is rnnfast.RNN), B, H)
    assert direct(module, x, hx) is not None
    for input, state in [
        (x.as_subclass(Subclass), hx),
        (x, hx.as_subclass(Subclass)),
        (x.to("meta"), hx.to("meta")),
        (x.int(), hx),
        (x.numpy(), hx),
        (None, hx),
        (x, hx.numpy()),
    ]:
        assert direct(module, input, state) is None
    for mode in (FunctionMode, DispatchMode):
        with mode():
            assert direct(module, x, hx) is None
    results = []
    torch.jit.trace(lambda x: (results.append(direct(module, x, hx)), x + 1)[1], x)
    assert results[0] is None


@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.RNNCell])
def test_a_subclass_may_have_properties_for_attributes(kind):
    def always(name, value):
        return property(lambda self: value, lambda self, other: self.__dict__.update({name: other}))

    class Own(kind):
        nonlinearity = always("nonlinearity", "relu")
        mode = always("mode", "RNN_RELU")

    own, x = Own(I, H), torch.randn(*[T] * (kind is rnnfast.RNN), B, I)
    relu = kind(I, H, nonlinearity="relu")
    relu.load_state_dict(own.state_dict())
    for a, b in zip(own(x), relu(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_left_to_python_before_anything_is_done(grad_mode):
    module, x = rnnfast.RNN(I, H, 2, dropout=0.5), torch.randn(T, B, I)
    torch.manual_seed(1)
    expected = module(x)[0]
    weight = module._parameters["weight_hh_l1"]
    with rnnfast.backend("auto"), grad_mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(weight.detach(), torch.ones(H, H))
        module._parameters["weight_hh_l1"] = dual
        module._update_flat_weights()
        torch.manual_seed(1)
        out, tangent = forward_ad.unpack_dual(module(x)[0])
    torch.testing.assert_close(out, expected)  # the same dropout: no random number was drawn before
    assert tangent.any()


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_over_vmap_is_left_to_python(grad_mode):
    module, xs = rnnfast.RNN(I, H), torch.randn(2, T, B, I)
    with rnnfast.backend("auto"), grad_mode():
        many = torch.func.jvp(torch.vmap(lambda x: module(x)[0]), (xs,), (xs,))
        one = [torch.func.jvp(lambda x: module(x)[0], (x,), (x,)) for x in xs]
    for a, b in zip(many, zip(*one, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


# Casts that autocast keeps have their history even where nothing is recorded, for calls that are.
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_call_without_gradients_takes_none_from_the_next_under_autocast(bidirectional):
    module, x = rnnfast.RNN(I, H, bidirectional=bidirectional), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            module(x)
        module(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


class Recorded(torch.Tensor):
    """Holds a tensor, and notes which ops reach it."""

    seen: ClassVar[set] = set()

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(str(func))
        held = tree_map_only(cls, lambda x: x.held, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*held[0], **held[1]))


def test_a_subclass_sees_the_same_ops_without_gradients():
    module = rnnfast.RNN(I, H, 2, bidirectional=True, dropout=0.5)
    x, hx = Recorded(torch.randn(T, B, I)), Recorded(torch.zeros(4, B, H))
    seen = []
    for grad_mode in (torch.enable_grad, torch.no_grad):
        Recorded.seen = set()
        with grad_mode():
            module(x, hx)
        seen.append(Recorded.seen - {"aten.detach.default"})
    assert "rnnfast.rnn_bidirectional_layer.default" in seen[1]
    assert seen[1] <= seen[0]


def test_it_is_there_if_imported_under_a_mode():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    import rnnfast
from rnnfast import _direct_calls
assert rnnfast.backends.extension_error is None, rnnfast.backends.extension_error
assert _direct_calls.rnn(rnnfast.RNN(3, 5), torch.ones(4, 2, 3), None, None) is not None
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", backends._CPU_DTYPES)
def test_it_takes_every_dtype_of_the_table(dtype):
    assert direct(rnnfast.RNN(I, H, dtype=dtype), torch.ones(T, B, I, dtype=dtype)) is not None


def test_calls_of_anything_at_all_do_not_crash():
    from rnnfast import _direct_calls

    for call in (_direct_calls.rnn, _direct_calls.rnn_cell):
        for arguments in [(), (1,), (1, 2, 3), (1, 2, 3, 4), (object(),) * 3, (None,) * 4]:
            assert call(*arguments) is None


@pytest.mark.parametrize("kind", [rnnfast.RNN, rnnfast.RNNCell])
def test_an_error_of_pythons_comes_through_once(kind):
    class Stop(Exception):
        pass

    calls = []

    def refuse(x):
        calls.append(x)
        raise Stop

    module, x = kind(I, H), torch.randn(*[T] * (kind is rnnfast.RNN), B, I)
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x), pytest.raises(Stop):
        module(x)
    assert len(calls) == 1


def test_no_reference_is_lost_or_kept():
    module, cell = rnnfast.RNN(I, H), rnnfast.RNNCell(I, H, bias=False)
    x, hx = torch.randn(T, B, I), torch.zeros(1, B, H)
    held = [x, hx, module.__dict__, cell.__dict__, module._flat_weights, None, True, False]
    held += [*module.parameters(), *cell.parameters(), module.mode, module.num_layers]

    def call():
        module(x, hx)
        module(x)
        cell(x[0], hx[0])
        assert direct(module, x.int()) is None
        with pytest.raises(RuntimeError):
            module(x[..., 1:])

    call()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in held]
    for _ in range(50):
        call()
    gc.collect()
    for thing, references in zip(held, before, strict=True):
        assert abs(sys.getrefcount(thing) - references) < 25, type(thing)
