"""Bad calls raise what nn.RNN raises: the same exception type, and the shapes in the message."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast


def packed():
    return pack_sequence([torch.randn(n, 3) for n in (4, 2)])


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
    "hx batch, packed": ({}, lambda: (packed(), torch.randn(1, 3, 5))),
    "features, packed": (dict(input_size=4), lambda: (packed(),)),
    "dtype, packed": (dict(dtype=torch.float64), lambda: (packed(),)),
    "not a tensor": ({}, lambda: ([[1.0]],)),
    "none": ({}, lambda: (None,)),
    "rows missing, packed": (
        {},
        lambda: (PackedSequence(torch.randn(3, 3), torch.tensor([2, 2])),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_raise_what_nn_rnn_raises(backend, case):
    kwargs, args = CASES[case]
    kwargs = dict(input_size=3, hidden_size=5) | kwargs
    args = args()
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - the type is what is compared
        nn.RNN(**kwargs)(*args)
    with pytest.raises(Exception) as ours:  # noqa: PT011
        rnnfast.RNN(**kwargs)(*args)
    assert type(ours.value) is type(theirs.value), (ours.value, theirs.value)
    if case not in ("hx dtype", "rows missing, packed"):  # ATen's own words there
        assert str(ours.value) == str(theirs.value)


def test_functional_names_what_it_expected(backend):
    weights = [torch.randn(5, 3), torch.randn(5, 5), torch.randn(5), torch.randn(5)]
    x = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match=r"expected 8 weights.*got 4"):
        rnnfast.functional.rnn(x, None, weights, num_layers=2)
    with pytest.raises(RuntimeError, match=r"hx of 3 dimensions, the first 1, got \[2, 2, 5\]"):
        rnnfast.functional.rnn(x, torch.randn(2, 2, 5), weights)
    with pytest.raises(RuntimeError, match=r"w_ih of size \[5, 3\], got \[5, 4\]"):
        rnnfast.functional.rnn(x, None, [torch.randn(5, 4), *weights[1:]])
