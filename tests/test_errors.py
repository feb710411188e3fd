"""Bad calls raise what nn.RNN raises: the same exception type, and the same words or the shapes,
dtypes or devices that did not fit."""

import re

import numpy as np
import pytest
import torch
from conftest import require_extension
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast


def packed(device=None):
    batch_sizes = torch.tensor([2, 2, 1, 1], device="cpu")  # whatever the default device is
    return PackedSequence(torch.randn(6, 3, device=device), batch_sizes)


# name: (constructor arguments, arguments of the call)
CASES = {
    "rank 1": ({}, lambda: (torch.randn(3),)),
    "rank 4": ({}, lambda: (torch.randn(1, 4, 2, 3),)),
    "features": ({}, lambda: (torch.randn(4, 2, 7),)),
    "features, unbatched": ({}, lambda: (torch.randn(4, 7),)),
    "dtype": ({}, lambda: (torch.randn(4, 2, 3, dtype=torch.float64),)),
    "integer input": ({}, lambda: (torch.ones(4, 2, 3, dtype=torch.long),)),
    "empty sequence": ({}, lambda: (torch.randn(0, 2, 3),)),
    "empty sequence, batch first": (dict(batch_first=True), lambda: (torch.randn(2, 0, 3),)),
    "hx rank": ({}, lambda: (torch.randn(4, 2, 3), torch.randn(2, 5))),
    "hx rank, unbatched": ({}, lambda: (torch.randn(4, 3), torch.randn(1, 1, 5))),
    "hx batch": ({}, lambda: (torch.randn(4, 2, 3), torch.randn(1, 3, 5))),
    "hx features": ({}, lambda: (torch.randn(4, 2, 3), torch.randn(1, 2, 6))),
    "hx layers": (dict(num_layers=2), lambda: (torch.randn(4, 2, 3), torch.randn(1, 2, 5))),
    "hx dtype": ({}, lambda: (torch.randn(4, 2, 3), torch.randn(1, 2, 5).double())),
    "hx dtype, packed": ({}, lambda: (packed(), torch.randn(1, 2, 5).double())),
    "hx batch, packed": ({}, lambda: (packed(), torch.randn(1, 3, 5))),
    "features, packed": (dict(input_size=4), lambda: (packed(),)),
    "dtype, packed": (dict(dtype=torch.float64), lambda: (packed(),)),
    "not a tensor": ({}, lambda: ([[1.0]],)),
    "none": ({}, lambda: (None,)),
    "rows missing, packed": (
        {},
        lambda: (PackedSequence(torch.randn(3, 3), torch.tensor([2, 2], device="cpu")),),
    ),
    "input on meta": ({}, lambda: (torch.randn(4, 2, 3, device="meta"),)),
    "input on meta, packed": ({}, lambda: (packed("meta"), torch.randn(1, 2, 5))),
    "hx on meta": ({}, lambda: (torch.randn(4, 2, 3), torch.randn(1, 2, 5, device="meta"))),
    "hx on meta, packed": ({}, lambda: (packed(), torch.randn(1, 2, 5, device="meta"))),
    "weights on meta": (dict(device="meta"), lambda: (torch.randn(4, 2, 3),)),
}
# nn.RNN's words come from whichever ATen function fails first: ours name the tensor.
OWN_WORDS = {
    "hx dtype": "expected hx of dtype",
    "hx dtype, packed": "expected hx of dtype",
    "rows missing, packed": "expected packed input of 4 rows",
    "input on meta": "on meta",
    "input on meta, packed": "on meta",
    "hx on meta": "expected hx on .* like the input, got meta",
    "hx on meta, packed": "expected hx on .* like the input, got meta",
    "weights on meta": "expected w_ih on .* like the input, got meta",
}


def failures(call):
    """What the same call of either class raises: nn.RNN's, ours."""
    raised = []
    for rnn in (nn.RNN, rnnfast.RNN):
        with pytest.raises(Exception) as error:  # noqa: PT011 - the type is what is compared
            call(rnn)
        raised.append(error.value)
    return raised


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_raise_what_nn_rnn_raises(any_backend, case):
    kwargs, make = CASES[case]
    kwargs = dict(input_size=3, hidden_size=5) | kwargs
    args = make()
    theirs, ours = failures(lambda rnn: rnn(**kwargs)(*args))
    assert type(ours) is type(theirs), (ours, theirs)
    if case not in OWN_WORDS or any_backend == "torch":
        assert str(ours) == str(theirs)
    else:
        assert re.search(OWN_WORDS[case], str(ours))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(device="meta"), None], ids=str)
def test_a_parameter_that_does_not_fit_raises_what_nn_rnn_raises(any_backend, name, change):
    def call(rnn):
        module = rnn(3, 5)
        weight = getattr(module, name).detach()
        setattr(module, name, None if change is None else nn.Parameter(weight.to(**change)))
        module(torch.randn(4, 2, 3))

    theirs, ours = failures(call)
    assert type(ours) is type(theirs), (ours, theirs)
    if change is None or isinstance(theirs, ValueError) or any_backend == "torch":
        assert str(ours) == str(theirs)
    else:
        operand = name.replace("weight", "w").replace("bias", "b").removesuffix("_l0")
        assert f"expected {operand} o" in str(ours)


@pytest.mark.parametrize("nonlinearity", ["nope", "RNN_TANH", None, ["tanh"]])
def test_an_unknown_nonlinearity_is_refused_by_the_constructor(nonlinearity):
    for args, kwargs in ((), dict(nonlinearity=nonlinearity)), ((1, nonlinearity), {}):
        theirs, ours = failures(lambda rnn: rnn(3, 5, *args, **kwargs))  # noqa: B023
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_an_unknown_mode_is_refused_by_the_call(any_backend, kind):
    def call(rnn):
        module = rnn(3, 5)
        module.mode = "GRU"
        module(packed() if kind == "packed" else torch.randn(4, 2, 3))

    theirs, ours = failures(call)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def raw(bias=True):
    return [torch.randn(s) for s in ((5, 3), (5, 5), (5,), (5,))[: 4 if bias else 2]]


def test_a_dropout_that_is_no_probability_is_refused_by_the_call(any_backend):
    def call(rnn):
        module = rnn(3, 5, 2)
        module.dropout = -0.5
        module(torch.randn(4, 2, 3))

    theirs, ours = failures(call)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.mark.parametrize("forced", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("name", "value"), [("bidirectional", "yes"), ("dropout", None), ("dropout", "a")]
)
def test_a_setting_of_another_kind_is_refused_by_the_call(forced, name, value):
    if forced == "cpu":
        require_extension()

    def call(rnn):
        module = rnn(3, 5, 2)
        setattr(module, name, value)
        module(torch.randn(4, 2, 3))

    with rnnfast.backend(forced):
        theirs, ours = failures(call)
    assert type(ours) is type(theirs) is TypeError
    if forced == "cpu":  # PyTorch's own words are its own
        assert name in str(ours)


def test_settings_from_numpy_do_not_hide_an_error(any_backend):
    ours = rnnfast.RNN(3, 5, np.int64(2))
    assert ours(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)
    with pytest.raises(RuntimeError, match="Expected 3, got 7"):
        ours(torch.randn(4, 2, 7))


def test_autocast_casts_before_anything_is_compared(any_backend):
    """As a cell's loop does, whose state is narrower than its input from the second step on."""
    x, weights = torch.randn(4, 2, 3), raw()
    cell = rnnfast.RNNCell(3, 5)
    with torch.autocast(x.device.type, torch.bfloat16):
        h = None
        for step in x:
            h = cell(step, h)
        assert h.dtype == torch.bfloat16
        narrow = x.bfloat16()
        assert rnnfast.functional.rnn(narrow, None, weights)[0].dtype == torch.bfloat16
        assert rnnfast.functional.rnn_cell(narrow[0], None, *weights).dtype == torch.bfloat16


def test_autocast_does_not_make_numbers_of_integers(any_backend):
    def call(rnn):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            rnn(3, 5)(torch.ones(4, 2, 3, dtype=torch.long))

    theirs, ours = failures(call)
    assert type(ours) is type(theirs)
    assert re.search("int64|Long", str(ours))


def test_functional_names_what_it_expected(any_backend):
    weights, x = raw(), torch.randn(4, 2, 3)
    run = rnnfast.functional.rnn
    with pytest.raises(RuntimeError, match=r"num_layers greater than zero, got 0$"):
        run(x, None, [], num_layers=0)
    for n in (0, 1, 3, 4, 7):
        with pytest.raises(RuntimeError, match=rf"expected 8 weights.*got {n}$"):
            run(x, None, [*weights, *weights][:n], num_layers=2)
    with pytest.raises(RuntimeError, match=r"expected 4 weights.*bidirectional=True.*got 2$"):
        run(x, None, raw(bias=False), bias=False, bidirectional=True)
    with pytest.raises(RuntimeError, match=r"hx of 3 dimensions, the first 1, got \[2, 2, 5\]"):
        run(x, torch.randn(2, 2, 5), weights)
    with pytest.raises(RuntimeError, match=r"w_ih of size \[5, 3\], got \[5, 4\]"):
        run(x, None, [torch.randn(5, 4), *weights[1:]])
    with pytest.raises(RuntimeError, match=r"w_ih of size \[5, 5\], got \[5, 3\]"):
        run(x, None, [*weights, *weights], num_layers=2)
    with pytest.raises(RuntimeError, match=r"input of 3 dimensions, got \[2, 3\]"):
        run(x[0], None, weights)
    with pytest.raises(RuntimeError, match=r"hx of size \[2, 5\], got \[3, 5\]"):
        run(x, torch.randn(1, 3, 5), weights)
    cell = rnnfast.functional.rnn_cell
    with pytest.raises(RuntimeError, match=r"input of 2 dimensions, got \[4, 2, 3\]"):
        cell(x, None, *weights)
    with pytest.raises(RuntimeError, match=r"hx of size \[2, 5\], got \[3, 5\]"):
        cell(x[0], torch.randn(3, 5), *weights)


@pytest.mark.parametrize("nonlinearity", ["nope", "TANH", None, ["tanh"]])
def test_functional_refuses_an_unknown_nonlinearity(any_backend, nonlinearity):
    weights, x = raw(), torch.randn(4, 2, 3)
    words = re.escape(f"unknown nonlinearity '{nonlinearity}', expected 'tanh' or 'relu'")
    with pytest.raises(RuntimeError, match=words):
        rnnfast.functional.rnn(x, None, weights, nonlinearity=nonlinearity)
    with pytest.raises(RuntimeError, match=words):
        rnnfast.functional.rnn_cell(x[0], None, *weights, nonlinearity=nonlinearity)
