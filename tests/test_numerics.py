"""The numbers: outputs and gradients against nn.RNN and against the float64 reference."""

import itertools

import pytest
import torch
from conftest import require_extension
from helpers import assert_as_accurate, assert_same, compare, pack, pair, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import backends

f64 = torch.float64


STRUCTURES = {
    "plain": {},
    "relu": dict(nonlinearity="relu"),
    "no bias": dict(bias=False),
    "bidirectional": dict(bidirectional=True),
    "three layers": dict(num_layers=3),
    "all": dict(num_layers=2, bidirectional=True, bias=False, nonlinearity="relu"),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_structures(backend, structure, batch_first, with_state, dtype):
    kwargs = STRUCTURES[structure] | dict(batch_first=batch_first, dtype=dtype)
    theirs, ours = pair(3, 20, **kwargs)
    x = torch.randn(4, 7, 3, dtype=dtype, requires_grad=True)
    states = len(ours.all_weights)
    batch = 4 if batch_first else 7
    hx = torch.randn(states, batch, 20, dtype=dtype, requires_grad=True) if with_state else None
    compare(theirs, ours, x, hx)


# B, T, I, H: every block of the register tiling, with and without remainders; both projections;
# few rows, whose weights are not packed, and many; a single step of either; small and large weight
# gradients, and either of the two alone.
SIZES = [
    (1, 1, 1, 1),
    (1, 3, 2, 5),
    (2, 4, 1, 16),
    (3, 5, 4, 17),
    (5, 2, 9, 31),
    (7, 3, 8, 33),
    (13, 4, 5, 64),
    (6, 3, 300, 40),
    (9, 30, 300, 3),
    (9, 30, 150, 1),
    (3, 9, 1100, 70),
    (9, 2, 7, 100),
    (1, 140, 3, 70),
    (2, 70, 3, 37),
    (3, 50, 4, 130),
    (4, 40, 2, 20),
    (5, 30, 9, 31),
    (6, 25, 300, 40),
    (3, 30, 300, 40),
    (7, 30, 8, 33),
    (8, 20, 3, 48),
    (9, 20, 7, 100),
    (11, 13, 6, 9),
    (23, 7, 2, 65),
    (34, 5, 40, 128),
    (20, 4, 300, 50),
    (100, 3, 2, 20),
    (50, 2, 3, 200),
    (190, 10, 1, 16),
    (50, 1, 5, 130),
    (33, 4, 6, 600),
]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_against_nn_rnn(backend, size, nonlinearity):
    B, T, I, H = size
    if (why := backends.BACKENDS[backend](torch.empty(0, dtype=f64), H)) is not None:
        pytest.skip(why)  # GPU kernels hold only so many units
    theirs, ours = pair(I, H, nonlinearity=nonlinearity, bidirectional=True, dtype=f64)
    x = torch.randn(T, B, I, dtype=f64, requires_grad=True)
    hx = torch.randn(2, B, H, dtype=f64, requires_grad=True)
    compare(theirs, ours, x, hx)


@pytest.mark.parametrize("H", [1, 3])
def test_many_features_onto_few_units_batch_first(backend, H):
    theirs, ours = pair(300, H, batch_first=True, bidirectional=True, dtype=f64)
    x = torch.randn(30, 9, 300, dtype=f64, requires_grad=True)
    compare(theirs, ours, x, torch.randn(2, 30, H, dtype=f64, requires_grad=True))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(
    "size", [(8, 30, 4, 32), (3, 100, 10, 20), (1, 200, 8, 64), (32, 20, 64, 200)], ids=str
)
def test_float32_is_as_accurate_as_nn_rnn(backend, size, nonlinearity):
    check_accuracy(size, nonlinearity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_of_many_megabytes(compiled, dtype):
    """Which are new memory in every call, asked for in large pages.

    A step's numbers are off by one eps or two (root mean square) in either result: 8 are granted.
    """
    theirs, ours = (rnn.to(dtype) for rnn in pair(70, 100))
    x = torch.randn(1100, 120, 70, dtype=dtype, requires_grad=True)
    expected, actual = run(theirs, x), run(ours, x)
    assert expected[0].nbytes > 4 << 20
    for a, b in ((actual[0], expected[0]), (actual[2]["input"], expected[2]["input"])):
        error = (a.double() - b.double()).norm(dim=(1, 2)) / b.double().norm(dim=(1, 2))
        assert error.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("size", [(16, 20, 256, 256), (1, 20, 256, 256), (8, 10, 40, 512)], ids=str)
def test_long_sums_are_as_accurate_as_nn_rnn(compiled, size, nonlinearity):
    check_accuracy(size, nonlinearity)


def check_accuracy(size, nonlinearity):
    B, T, I, H = size
    theirs, ours = pair(I, H, nonlinearity=nonlinearity)
    exact = nn.RNN(I, H, nonlinearity=nonlinearity, dtype=f64)
    exact.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    x = torch.randn(T, B, I, requires_grad=True)
    hx = torch.randn(1, B, H, requires_grad=True)
    wide = [y.detach().double().requires_grad_() for y in (x, hx)]
    out, h_n, grads = run(exact, *wide)
    reference, actual = run(theirs, x, hx), run(ours, x, hx)
    assert_as_accurate(actual[0], reference[0], out, "out")
    assert_as_accurate(actual[1], reference[1], h_n, "h_n")
    for name in grads:
        assert_as_accurate(actual[2][name], reference[2][name], grads[name], name)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 6, 2, 4], [9, 8, 7, 7, 2, 1, 1], [2] * 40])
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_sequences(backend, lengths, enforce_sorted, with_state, structure):
    if enforce_sorted:
        lengths = sorted(lengths, reverse=True)
    theirs, ours = pair(3, 20, dtype=f64, **STRUCTURES[structure])
    sequences = [torch.randn(n, 3, dtype=f64, requires_grad=True) for n in lengths]
    hx = None
    if with_state:
        hx = torch.randn(len(ours.all_weights), len(lengths), 20, dtype=f64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        for s in sequences:
            s.grad = None
        packed = pack(sequences, enforce_sorted=enforce_sorted)
        results.append([*run(module, packed, hx), [s.grad for s in sequences]])
    expected, actual = results
    terms = sum(lengths) + 23
    assert_same(actual[0], expected[0], max(lengths), terms, "out")
    assert_same(actual[1], expected[1], max(lengths), terms, "h_n")
    for name in expected[2]:
        if name != "input":
            assert_same(actual[2][name], expected[2][name], max(lengths), terms, name)
    for a, b in zip(actual[3], expected[3], strict=True):
        assert_same(a, b, max(lengths), terms, "sequence")


@pytest.mark.parametrize("hidden_size", [33, 150])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_packed_sequences_of_many_rows(backend, hidden_size, nonlinearity):
    theirs, ours = pair(3, hidden_size, nonlinearity=nonlinearity, bidirectional=True, dtype=f64)
    lengths = [1, 9, 30, 17, 17, 2, 25, 8, 30, 14]
    x = pack([torch.randn(n, 3, dtype=f64) for n in lengths], enforce_sorted=False)
    hx = torch.randn(2, len(lengths), hidden_size, dtype=f64, requires_grad=True)
    compare(theirs, ours, x, hx)
    compare(theirs, ours, x, None)


def test_packed_state_of_every_length_is_that_of_the_sequence_alone(backend):
    ours = rnnfast.RNN(3, 20, 2, bidirectional=True, dtype=f64)
    sequences = [torch.randn(n, 3, dtype=f64) for n in (4, 1, 7, 4)]
    _, h_n = ours(pack(sequences, enforce_sorted=False))
    for b, sequence in enumerate(sequences):
        assert_same(h_n[:, b], ours(sequence)[1], 7, 23, str(b))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_unbatched(backend, batch_first, with_state):
    theirs, ours = pair(3, 5, 2, bidirectional=True, batch_first=batch_first, dtype=f64)
    x = torch.randn(7, 3, dtype=f64, requires_grad=True)
    hx = torch.randn(4, 5, dtype=f64, requires_grad=True) if with_state else None
    compare(theirs, ours, x, hx)
    assert ours(x)[0].shape == (7, 10)
    assert ours(x)[1].shape == (4, 5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(backend, batch_first):
    theirs, ours = pair(3, 5, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)
    hx = torch.randn(4, 0, 5, requires_grad=True)
    for args in ((x,), (x, hx)):
        expected, actual = theirs(*args), ours(*args)
        assert [y.shape for y in actual] == [y.shape for y in expected]
    actual[0].sum().backward()
    assert x.grad.shape == x.shape
    assert torch.count_nonzero(ours.weight_hh_l0.grad) == 0


def layouts(T, B, I, dtype=f64):
    """The same kind of input under different strides."""
    yield "transposed", torch.randn(B, T, I, dtype=dtype).transpose(0, 1)
    yield "features first", torch.randn(I, T, B, dtype=dtype).permute(1, 2, 0)
    yield "every other step", torch.randn(2 * T, B, I, dtype=dtype)[::2]
    yield "every other row", torch.randn(T, 2 * B, I, dtype=dtype)[:, ::2]
    yield "every other feature", torch.randn(T, B, 2 * I, dtype=dtype)[..., ::2]
    yield "one row for all", torch.randn(T, 1, I, dtype=dtype).expand(T, B, I)
    yield "one step for all", torch.randn(1, B, I, dtype=dtype).expand(T, B, I)
    yield "one number for all", torch.randn(1, 1, 1, dtype=dtype).expand(T, B, I)
    yield "offset", torch.randn(T * B * I + 1, dtype=dtype)[1:].view(T, B, I)


@pytest.mark.parametrize(("B", "input_size"), [(9, 3), (9, 300), (3, 1100)])  # the last: not fused
def test_strides(backend, B, input_size):
    T = 6
    theirs, ours = pair(input_size, 20, bidirectional=True, dtype=f64)
    for name, x in layouts(T, B, input_size):
        x.requires_grad_()
        assert_same(ours(x)[0], theirs(x)[0], T, input_size, name)
        grads = [torch.autograd.grad(m(x)[0].square().sum(), x)[0] for m in (ours, theirs)]
        assert_same(*grads, T, input_size, name)
    x = torch.randn(T, B, input_size, dtype=f64)
    for name, hx in layouts(2, B, 20):
        assert_same(ours(x, hx)[0], theirs(x, hx)[0], T, input_size, f"hx {name}")
    for name, g in layouts(T, B, 40):  # gradients arrive in any layout
        grads = [torch.autograd.grad(m(x)[0], m.weight_hh_l0, g)[0] for m in (ours, theirs)]
        assert_same(*grads, T, T * B + 20, f"gradient {name}")


def test_outputs_have_the_strides_of_nn_rnn(backend):
    for batch_first in (False, True):
        theirs, ours = pair(3, 5, batch_first=batch_first)
        x = torch.randn(4, 7, 3)
        assert [y.stride() for y in ours(x)] == [y.stride() for y in theirs(x)]


@pytest.mark.parametrize("loss", ["out", "h_n", "both"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_through_either_output(backend, loss, structure):
    theirs, ours = pair(3, 5, dtype=f64, **STRUCTURES[structure])
    x = torch.randn(4, 7, 3, dtype=f64, requires_grad=True)
    hx = torch.randn(len(ours.all_weights), 7, 5, dtype=f64, requires_grad=True)
    compare(theirs, ours, x, hx, loss)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("frozen", ["", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "bias"])
def test_any_subset_may_be_frozen(backend, needed, frozen):
    x_needed, h_needed, weights_needed = needed
    theirs, ours = pair(3, 5, 2, dtype=f64)
    for module in (theirs, ours):
        for name, p in module.named_parameters():
            frozen_now = not weights_needed or (frozen and name.startswith(frozen))
            p.requires_grad_(not frozen_now)
    if not any([x_needed, h_needed, weights_needed]):
        assert not ours(torch.randn(4, 2, 3, dtype=f64))[0].requires_grad
        return
    x = torch.randn(4, 2, 3, dtype=f64, requires_grad=x_needed)
    hx = torch.randn(2, 2, 5, dtype=f64, requires_grad=h_needed)
    compare(theirs, ours, x, hx)


def test_backward_computes_only_what_is_asked_for(compiled):
    w = [torch.randn(s, dtype=f64) for s in ((5, 3), (5, 5))]
    x, h = torch.randn(4, 2, 3, dtype=f64), torch.randn(2, 5, dtype=f64)
    out, _ = torch.ops.rnnfast.rnn_layer(x, h, *w, None, None, None, "tanh", False)
    for mask in itertools.product([False, True], repeat=5):
        grads = torch.ops.rnnfast.rnn_layer_backward(
            torch.ones_like(out), None, x, h, *w, out, None, "tanh", False, list(mask)
        )
        assert tuple(g is not None for g in grads) == mask


def test_backward_keeps_inputs_weights_and_outputs_alone(compiled):
    """Nothing of a step but its state."""
    ours, x = rnnfast.RNN(3, 5), torch.randn(7, 2, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out, _ = ours(x)
    w_ih, w_hh = ours.weight_ih_l0, ours.weight_hh_l0
    assert sorted(kept) == sorted(t.shape for t in (x, w_ih, w_hh, out))


def test_gradients_accumulate(backend):
    ours = rnnfast.RNN(3, 5, dtype=f64)
    x = torch.randn(4, 2, 3, dtype=f64)
    ours(x)[0].square().sum().backward()
    once = [p.grad.clone() for p in ours.parameters()]
    ours(x)[0].square().sum().backward()
    for p, g in zip(ours.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)
    assert ours.bias_ih_l0.grad.data_ptr() != ours.bias_hh_l0.grad.data_ptr()


def test_no_grad_and_inference_mode(backend):
    ours = rnnfast.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    expected = ours(x)[0]
    with torch.no_grad():
        out = ours(x)[0]
        assert not out.requires_grad
        assert torch.equal(out, expected)
    with torch.inference_mode():
        out = ours(x)[0]
        assert out.is_inference()
        assert torch.equal(out, expected)


def test_modified_output_is_noticed_by_backward(backend):
    ours, x = rnnfast.RNN(3, 5), torch.randn(4, 2, 3)
    expected = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0)
    out, _ = ours(x)
    loss = out.sum()
    with torch.no_grad():
        out.zero_()
    if backend == "reference":  # its output is a copy of what it saved
        assert torch.equal(*torch.autograd.grad(loss, ours.weight_hh_l0), *expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [None, [3, 3, 1]])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradcheck(backend, nonlinearity, reverse, batch_sizes, with_state):
    torch.manual_seed(3)
    B, T, I, H = 3, 3, 2, 3
    shape = (T, B, I) if batch_sizes is None else (sum(batch_sizes), I)
    sizes = None if batch_sizes is None else torch.tensor(batch_sizes, device="cpu")
    tensors = [torch.randn(s, dtype=f64) for s in (shape, (H, I), (H, H), (H,), (H,), (B, H))]
    tensors = [t.requires_grad_() for t in tensors[: 6 if with_state else 5]]

    def layer(x, w_ih, w_hh, b_ih, b_hh, h=None):
        run = (
            rnnfast.reference.rnn_layer if backend == "reference" else (torch.ops.rnnfast.rnn_layer)
        )
        return run(x, h, w_ih, w_hh, b_ih, b_hh, sizes, nonlinearity, reverse)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


def test_module_gradgradcheck_and_forward_mode(backend):
    ours = rnnfast.RNN(2, 3, 2, bidirectional=True, dtype=f64)
    x = torch.randn(3, 2, 2, dtype=f64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(lambda x: ours(x)[0], (x,), (x,))


@pytest.mark.parametrize("forced", ["auto", "reference"])
def test_jvp_is_that_of_nn_rnn(forced):
    theirs, ours = pair(3, 5, 2, bidirectional=True, dtype=f64)
    x, v = torch.randn(2, 4, 2, 3, dtype=f64)
    with rnnfast.backend(forced):
        actual = torch.func.jvp(lambda x: ours(x), (x,), (v,))
    expected = torch.func.jvp(lambda x: theirs(x), (x,), (v,))
    for a, b in zip(actual, expected, strict=True):
        for y, z in zip(a, b, strict=True):
            assert_same(y, z, 4, 8)
    weights = dict(ours.named_parameters())
    tangents = {k: torch.randn_like(w) for k, w in weights.items()}
    with rnnfast.backend(forced):
        a = torch.func.jvp(
            lambda w: torch.func.functional_call(ours, w, (x,))[0], (weights,), (tangents,)
        )
    b = torch.func.jvp(
        lambda w: torch.func.functional_call(theirs, w, (x,))[0], (weights,), (tangents,)
    )
    assert_same(a[1], b[1], 4, 8)


def test_functorch_grad_and_third_derivatives(backend):
    ours = rnnfast.RNN(2, 3, dtype=f64)
    x = torch.randn(3, 1, 2, dtype=f64)

    def f(x):
        return ours(x)[0].square().sum()

    by_func = torch.func.grad(f)(x)
    y = x.clone().requires_grad_()
    (by_tape,) = torch.autograd.grad(f(y), y, create_graph=True)
    assert_same(by_func, by_tape, 3, 5)
    (second,) = torch.autograd.grad(by_tape.square().sum(), y, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), y)
    with rnnfast.backend("reference"):
        (g,) = torch.autograd.grad(f(y), y, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), y, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), y)
    # Each derivative goes over the 3 steps there and back where the one before went once, and the
    # product rule doubles the 2 + 3 terms of a sum.
    assert_same(third, g, 3 * 2**3, 5 * 2**3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_the_masks_of_nn_rnn(backend, batch_first, bidirectional):
    theirs, ours = pair(
        3, 20, 3, dropout=0.4, batch_first=batch_first, bidirectional=bidirectional, dtype=f64
    )
    x = torch.randn(4, 7, 3, dtype=f64)
    lengths = [7, 5, 5, 2] if batch_first else [4, 3, 3, 2, 2, 1, 1]
    packed = pack_padded_sequence(x, lengths, batch_first)
    for y in (x, packed):
        torch.manual_seed(11)
        expected = theirs(y)
        torch.manual_seed(11)
        actual = ours(y)
        assert_same(actual[0].data, expected[0].data, 7, 40)
        assert_same(actual[1], expected[1], 7, 40)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])
    everything = rnnfast.RNN(3, 5, 2, dropout=1.0)
    zeros = torch.zeros(4, 2, 5)
    second = rnnfast.RNN(5, 5)
    second.load_state_dict(
        {k.replace("l1", "l0"): v for k, v in everything.state_dict().items() if "l1" in k}
    )
    assert torch.equal(everything(torch.randn(4, 2, 3))[0], second(zeros)[0])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(backend, nonlinearity, bad):
    ours = rnnfast.RNN(3, 37, 2, nonlinearity, bidirectional=True)
    clean = torch.randn(5, 15, 3)
    x = clean.clone()
    x[2, 4] = bad
    x.requires_grad_()
    expected, actual = ours(clean), ours(x)
    others = [b for b in range(15) if b != 4]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    actual[0].sum().backward()
    assert torch.isfinite(x.grad[:, others]).all()
    theirs = nn.RNN(3, 37, 2, nonlinearity, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        out = theirs(x)[0]
    assert torch.equal(actual[0].isnan(), out.isnan())


def test_an_infinite_gradient_of_a_stopped_unit_is_stopped(backend):
    """ReLU's derivative is no factor: nn.RNN's backward puts zero where the unit was off."""
    theirs, ours = pair(3, 7, nonlinearity="relu")
    x = torch.randn(4, 2, 3)
    gradients = []
    for module in (ours, theirs):
        module.zero_grad()
        out, _ = module(x)
        assert 0 < (out == 0).sum() < out.numel()
        out.backward(torch.where(out == 0, torch.inf, 1.0))
        gradients.append([p.grad for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert b.isfinite().all()
        assert_same(a, b, 4, 3 + 7 + 8)


@st.composite
def calls(draw):
    """A configuration of nn.RNN and an input that it takes."""
    layers, bidirectional = draw(st.integers(1, 3)), draw(st.booleans())
    config = dict(
        input_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 70)),
        num_layers=layers,
        bidirectional=bidirectional,
        nonlinearity=draw(st.sampled_from(["tanh", "relu"])),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
    )
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=30))
    return (
        config,
        lengths,
        draw(st.sampled_from(["dense", "packed", "unbatched"])),
        draw(st.booleans()),
        draw(st.sampled_from([1, 2])),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=60, deadline=None)
@given(call=calls())
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_generated_calls(name, call):
    config, lengths, kind, with_state, every, seed = call
    if name == "cpu":
        require_extension()
    theirs, ours = pair(**config, seed=seed, dtype=f64)
    B, T, I = len(lengths), max(lengths), config["input_size"]
    states = len(ours.all_weights)
    hx_size = (
        (states, config["hidden_size"])
        if kind == "unbatched"
        else (states, B, config["hidden_size"])
    )
    hx = torch.randn(hx_size, dtype=f64, requires_grad=True) if with_state else None
    if kind == "packed":
        x = pack([torch.randn(n, I, dtype=f64) for n in lengths], enforce_sorted=False)
    elif kind == "unbatched":
        x = torch.randn(T, every * I, dtype=f64)[:, ::every].requires_grad_()
    else:
        size = (B, T) if config["batch_first"] else (T, B)
        x = torch.randn(*size, every * I, dtype=f64)[..., ::every].requires_grad_()
    with rnnfast.backend(name):
        compare(theirs, ours, x, hx)


@pytest.mark.parametrize("kind", ["dense", "batch_first", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("config", [{}, dict(bias=False, nonlinearity="relu"), dict(dropout=0.4)])
def test_functional_rnn_on_raw_weights(any_backend, kind, with_state, config):
    config = dict(num_layers=2, bidirectional=True) | config
    batch_first = kind == "batch_first"
    theirs = nn.RNN(3, 5, batch_first=batch_first, dtype=f64, **config)
    weights = [w for layer in theirs.all_weights for w in layer]
    if kind == "packed":
        x = pack([torch.randn(n, 3, dtype=f64) for n in (6, 4, 4, 1)])
        data, batch_sizes = x.data, x.batch_sizes
    else:
        x = data = torch.randn(4, 6, 3, dtype=f64)
        batch_sizes = None
    batch = 6 if kind == "dense" else 4
    hx = torch.randn(4, batch, 5, dtype=f64) if with_state else None
    # cuDNN has masks of its own.
    for training in (False, True) if "dropout" in config and data.is_cpu else (False,):
        torch.manual_seed(11)
        expected = theirs.train(training)(x, hx)
        torch.manual_seed(11)
        actual = rnnfast.functional.rnn(
            data, hx, weights, batch_sizes, training=training, batch_first=batch_first, **config
        )
        assert_same(actual[0], expected[0].data, 6, 18, "out")
        assert_same(actual[1], expected[1], 6, 18, "h_n")


@pytest.mark.parametrize("config", [{}, dict(bias=False, nonlinearity="relu")])
@pytest.mark.parametrize("with_state", [False, True])
def test_functional_rnn_cell_on_raw_weights(any_backend, config, with_state):
    theirs = nn.RNNCell(3, 5, dtype=f64, **config)
    x, hx = torch.randn(4, 3, dtype=f64), torch.randn(4, 5, dtype=f64) if with_state else None
    weights = [theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh]
    actual = rnnfast.functional.rnn_cell(x, hx, *weights, theirs.nonlinearity)
    assert_same(actual, theirs(x, hx), 1, 8)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [None, [4, 3, 3, 1]])
@pytest.mark.parametrize("with_state", [False, True])
def test_reference_derivatives_are_those_of_its_forward(nonlinearity, reverse, sizes, with_state):
    """The specification agrees with itself: its backward and double backward against autograd."""
    shape = (4, 4, 3) if sizes is None else (sum(sizes), 3)
    x = torch.randn(shape, dtype=f64, requires_grad=True)
    hx = torch.randn(4, 5, dtype=f64, requires_grad=True) if with_state else None
    w_ih, w_hh, b = (torch.randn(s, dtype=f64, requires_grad=True) for s in ((5, 3), (5, 5), (5,)))
    rest = (None if sizes is None else torch.tensor(sizes), nonlinearity, reverse)
    reference = rnnfast.reference
    out, h_n = reference.rnn_layer(x, hx, w_ih, w_hh, b, None, *rest)

    grads = [torch.randn_like(y).requires_grad_() for y in (out, h_n)]
    leaves = [t for t in (x, hx, w_ih, w_hh, b) if t is not None]
    expected = torch.autograd.grad((out, h_n), leaves, grads)
    saved = out.detach().requires_grad_()
    actual = reference.rnn_layer_backward(*grads, x, hx, w_ih, w_hh, saved, *rest)
    assert (actual[1] is None) == (hx is None)
    for a, b in zip([a for a in actual if a is not None], expected, strict=True):
        assert_same(a, b, 4, 40)

    inputs = [*grads, x, hx, w_ih, w_hh, saved]
    ggs = [None if a is None else torch.randn_like(a) for a in actual]
    expected = torch.autograd.grad(
        [a for a in actual if a is not None],
        [t for t in inputs if t is not None],
        [g for g in ggs if g is not None],
        allow_unused=True,
    )
    actual = reference.rnn_layer_double_backward(*ggs, *inputs, *rest)
    actual = [a for a, t in zip(actual, inputs, strict=True) if t is not None]
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b if b is not None else torch.zeros_like(a), 8, 40)
