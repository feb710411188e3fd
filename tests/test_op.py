"""torch.ops.rnnfast.*: the compiled kernels below the modules."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
import torch
from helpers import assert_same, environment
from torch import library

import rnnfast

pytestmark = pytest.mark.usefixtures("compiled")
f64 = torch.float64
TANH_TABLE = Path(__file__).parents[1] / "tools/tanh_table.py"


def layer(T, B, I, H, dtype=f64, requires_grad=False):
    """Arguments of rnn_layer up to the biases; weights as nn.RNN draws them, since larger ones make
    the recurrence amplify rounding."""
    bound = H**-0.5
    x, h = torch.randn(T, B, I, dtype=dtype), torch.randn(B, H, dtype=dtype)
    weights = [torch.empty(s, dtype=dtype) for s in ((H, I), (H, H), (H,), (H,))]
    weights = [w.uniform_(-bound, bound) for w in weights]
    return [t.requires_grad_(requires_grad) for t in (x, h, *weights)]


SAMPLES = {
    "dense": lambda: (*layer(4, 3, 2, 5, requires_grad=True), None, "tanh", False),
    "reverse relu": lambda: (*layer(4, 3, 2, 5, requires_grad=True), None, "relu", True),
    "no state, no bias": lambda: _without(layer(4, 3, 2, 5, requires_grad=True)),
    "packed": lambda: _packed(layer(1, 6, 2, 5, requires_grad=True), [3, 2, 1], False),
    "packed reverse": lambda: _packed(layer(1, 6, 2, 5, requires_grad=True), [3, 2, 1], True),
    "batch first": lambda: _transposed(layer(3, 4, 2, 5, requires_grad=True)),
    "empty batch": lambda: (*layer(4, 0, 2, 5, requires_grad=True), None, "tanh", False),
    "one step": lambda: (*layer(1, 3, 2, 5, requires_grad=True), None, "tanh", False),
    "bfloat16": lambda: (*layer(4, 3, 2, 5, torch.bfloat16), None, "tanh", False),
}


def _without(args):
    x, _, w_ih, w_hh, _, _ = args
    return x, None, w_ih, w_hh, None, None, None, "tanh", False


def _transposed(args):
    x, _, *weights = args
    return x.detach().transpose(0, 1).requires_grad_(), None, *weights, None, "relu", False


def _packed(args, sizes, reverse):
    x, h, *weights = args
    return (
        x.detach()[0].requires_grad_(),
        h.detach()[: sizes[0]].requires_grad_(),
        *weights,
        torch.tensor(sizes),
        "tanh",
        reverse,
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    args = SAMPLES[sample]()
    library.opcheck(torch.ops.rnnfast.rnn_layer.default, args)
    x, h, w_ih, w_hh, _, _, sizes, nonlinearity, reverse = args
    with torch.no_grad():
        out, h_n = torch.ops.rnnfast.rnn_layer(*args)
    mask = [True, h is not None, True, True, True]
    grads = (torch.ones_like(out), torch.ones_like(h_n))
    if sizes is not None:  # double backward reads batch_sizes, which no trace of it can do
        x, h, w_ih, w_hh = (t.detach() for t in (x, h, w_ih, w_hh))
    library.opcheck(
        torch.ops.rnnfast.rnn_layer_backward.default,
        (*grads, x, h, w_ih, w_hh, out, sizes, nonlinearity, reverse, mask),
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_of_both_directions(sample):
    x, h, *weights, sizes, nonlinearity, _ = SAMPLES[sample]()
    weights = [w for w in weights if w is not None]
    if h is not None:
        h = torch.stack([h.detach(), -h.detach()]).requires_grad_(h.requires_grad)
    other = [w.detach().flip(0).requires_grad_(w.requires_grad) for w in weights]
    args = (x, h, [*weights, *other], sizes, nonlinearity)
    library.opcheck(torch.ops.rnnfast.rnn_bidirectional_layer.default, args)


@pytest.mark.parametrize("sample", SAMPLES)
def test_both_directions_are_those_of_the_one_op(sample):
    """The same numbers, whatever lies between the rows that a direction writes and reads back."""
    x, h, *weights, sizes, nonlinearity, _ = SAMPLES[sample]()
    count = sum(w is not None for w in weights)
    leaves = [t for t in (x, h, *weights[:count]) if t is not None and t.requires_grad]
    results = []
    for ops in ("both", "each"):
        if ops == "both":
            state = None if h is None else torch.stack([h, h])
            out, h_n = torch.ops.rnnfast.rnn_bidirectional_layer(
                x, state, weights[:count] * 2, sizes, nonlinearity
            )
        else:
            each = [
                torch.ops.rnnfast.rnn_layer(x, h, *weights, sizes, nonlinearity, reverse)
                for reverse in (False, True)
            ]
            out, h_n = torch.cat([o for o, _ in each], -1), torch.stack([s for _, s in each])
        assert out.is_contiguous()
        grads = []
        if leaves:
            grads = torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)
        results.append([out, h_n, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)  # sums of two in another order
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: the fake kernel's checks
def test_both_directions_need_one_hidden_size(device):
    with torch.device(device):
        x, h, *weights = layer(4, 3, 2, 5)
        other = layer(4, 3, 2, 6)[2:]
    op = torch.ops.rnnfast.rnn_bidirectional_layer
    with pytest.raises(RuntimeError, match=r"w_hh of one size.*\[5, 5\].*\[6, 6\]"):
        op(x, None, [*weights, *other], None, "tanh")
    with pytest.raises(RuntimeError, match=r"4 weights, or 8 with biases.*got 6"):
        op(x, None, [*weights, *weights[:2]], None, "tanh")
    with pytest.raises(RuntimeError, match=r"hx of 3 dimensions, the first 2.*\[3, 5\]"):
        op(x, h, weights * 2, None, "tanh")


def test_no_op_is_left_unchecked():
    """Those above; here the rest but two that are made of ATen's ops when they are called."""
    ops = torch.ops.rnnfast
    x, h, *weights = layer(4, 3, 2, 5, requires_grad=True)
    library.opcheck(ops.rnn.default, (x, h.detach()[None], weights))
    library.opcheck(ops.rnn_cell.default, (x[0].detach(), h, *weights))
    library.opcheck(ops._tanh.default, (torch.randn(7),))
    checked = {"rnn", "rnn_cell", "rnn_layer", "rnn_layer_backward", "_tanh"}
    checked.add("rnn_bidirectional_layer")
    checked |= {"_rnn_layer_backward_reference", "_rnn_layer_double_backward"}
    using_up = "_rnn_layer_backward_"  # in no trace; tested below
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rnnfast::")}
    schemas = [torch._C._get_schema(name, "") for name in names]
    # The others only raise, or tell what the CUDA kernels can run.
    computing = {s.name for s in schemas if any(str(r.type) == "Tensor" for r in s.returns)}
    assert computing == {f"rnnfast::{name}" for name in (*checked, using_up)}
    for schema in schemas:
        aliased = [x.name for x in (*schema.arguments, *schema.returns) if x.alias_info]
        may = ["grad_out", "grad_h_n", "out", "d_w_ih", "d_w_hh", "d_b"]
        if schema.name != f"rnnfast::{using_up}":
            may = []
        assert aliased == may, schema


BAD = {
    "rank": (lambda a: [a[0][0], *a[1:]], r"3 dimensions.*\[3, 2\]"),
    "empty sequence": (lambda a: [a[0][:0], *a[1:]], "sequence length to be larger than 0"),
    "w_ih": (lambda a: [a[0], a[1], a[2][:, :1], *a[3:]], r"w_ih.*\[5, 2\].*\[5, 1\]"),
    "w_hh": (lambda a: [*a[:3], a[3][:, :4], *a[4:]], r"w_hh.*\[5, 5\].*\[5, 4\]"),
    "b_ih": (lambda a: [*a[:4], a[4][:4], *a[5:]], r"b_ih.*\[5\].*\[4\]"),
    "b_hh": (lambda a: [*a[:5], a[5][None], *a[6:]], r"b_hh.*\[5\].*\[1, 5\]"),
    "hx": (lambda a: [a[0], a[1][:2], *a[2:]], r"hx.*\[3, 5\].*\[2, 5\]"),
    "dtype": (lambda a: [a[0], a[1].float(), *a[2:]], r"(?i)hx of dtype.*(double|float64)"),
    "device": (lambda a: [a[0], a[1].to("meta"), *a[2:]], "hx"),
    "nonlinearity": (lambda a: [*a[:7], "gelu", False], "unknown nonlinearity 'gelu'"),
    "increasing": (
        lambda a: [a[0][0], *a[1:6], torch.tensor([1, 2]), *a[7:]],
        "never increasing, got 2 at step 1",
    ),
    "rows": (
        lambda a: [a[0][0], *a[1:6], torch.tensor([3, 3]), *a[7:]],
        "6 rows.*got 3",
    ),
    "zero rows": (
        lambda a: [a[0][0], *a[1:6], torch.tensor([3, 0]), *a[7:]],
        "positive.*got 0 at step 1",
    ),
    "no steps": (
        lambda a: [a[0][0], *a[1:6], torch.tensor([], dtype=torch.long), *a[7:]],
        "sequence length to be larger than 0",
    ),
    "no features": (
        lambda a: [a[0][..., :0], a[1], a[2][:, :0], *a[3:]],
        "greater than zero, got 0 and 5",
    ),
    "dtype of batch_sizes": (
        lambda a: [a[0][0], *a[1:6], torch.tensor([2, 1], dtype=torch.int32), *a[7:]],
        r"batch_sizes to be .* int64 .*got \[2\] of (?i:.*int)",
    ),
    "rows beyond int64": (  # which sum up to 5
        lambda a: [a[0].flatten(0, 1)[:5], *a[1:6], 2**62 + torch.tensor([2, 1, 1, 1]), *a[7:]],
        "rnnfast: expected .*got",
    ),
    "packed hx": (
        lambda a: [a[0][0], a[1], *a[2:6], torch.tensor([2, 1]), *a[7:]],
        r"hx.*\[2, 5\].*\[3, 5\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["rnn_layer op", "reference"])
def test_bad_arguments_are_runtime_errors_that_name_both_shapes(case, name):
    change, message = BAD[case]
    args = change([*layer(4, 3, 2, 5), None, "tanh", False])
    run = rnnfast.reference.rnn_layer if name == "reference" else torch.ops.rnnfast.rnn_layer
    with pytest.raises(RuntimeError, match=message):
        run(*args)


def test_bad_gradients_are_errors():
    x, h, w_ih, w_hh, b_ih, b_hh = layer(4, 3, 2, 5)
    out, _ = torch.ops.rnnfast.rnn_layer(x, h, w_ih, w_hh, b_ih, b_hh, None, "tanh", False)
    rest = (None, "tanh", False, [True] * 5)
    backward = torch.ops.rnnfast.rnn_layer_backward
    with pytest.raises(RuntimeError, match=r"grad_out.*\[4, 3, 5\].*\[3, 3, 5\]"):
        backward(out[1:], None, x, h, w_ih, w_hh, out, *rest)
    with pytest.raises(RuntimeError, match=r"grad_h_n.*\[3, 5\].*\[2, 5\]"):
        backward(None, h[1:], x, h, w_ih, w_hh, out, *rest)
    with pytest.raises(RuntimeError, match=r"expected out of size"):
        backward(out, None, x, h, w_ih, w_hh, out[1:], *rest)


# Few rows and many, a single step, long sums, odd sizes (whose last product in bfloat16 is half a
# pair), panels of every width, rows that die.
SIXTEEN_BIT = [
    (1, 1, 1, 1, None),
    (5, 3, 3, 5, None),
    (1, 9, 7, 33, None),
    (1, 90, 31, 17, None),
    (20, 1, 40, 20, None),
    (3, 40, 5, 20, None),
    (6, 25, 31, 65, None),
    (4, 9, 9, 130, None),
    (3, 70, 300, 47, None),
    (20, 9, 300, 2, None),
    (3, 20, 200, 301, None),
    (40, 2, 600, 600, None),
    (6, 24, 5, 19, [6] * 3 + [5] * 7 + [2] * 10 + [1] * 4),
    # Rows that do not divide into tiles of 16 or pairs of them, and such columns and terms.
    (3, 17, 64, 96, None),
    (3, 35, 33, 50, None),
    (2, 66, 20, 113, None),
    (5, 50, 40, 70, [5] * 20 + [4] * 13 + [2] * 15 + [1] * 2),
    (12, 60, 40, 50, None),  # more rows than dz is kept of at a time
    (40, 35, 9, 21, None),  # so many that each thread has a part of the batch
    (30, 12, 20, 40, [30] * 5 + [29] * 3 + [10] * 4),
]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIXTEEN_BIT, ids=lambda size: "x".join(map(str, size[:4])))
@pytest.mark.parametrize("reverse", [False, True])
def test_sixteen_bits_are_close_to_float64(size, dtype, nonlinearity, reverse):
    *shape, lengths = size
    helpers.check_layer(
        "cpu", dtype, *shape, nonlinearity=nonlinearity, reverse=reverse, lengths=lengths
    )


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_sixteen_bits_of_any_strides_and_threads(dtype, threads, reverse, set_threads):
    """What one thread makes of adjacent rows, where each may be rounded to its other neighbour."""
    T, B, I, H = 25, 33, 20, 40
    x, h, *weights = layer(T, B, I, H, dtype)
    call = None, "tanh", reverse
    operands = x, h, *weights[:2]
    set_threads(1)
    out, h_n = torch.ops.rnnfast.rnn_layer(x, h, *weights, *call)
    grad_out, grad_h_n = torch.cos(out), torch.cos(h_n)
    given = grad_out, grad_h_n, *operands, out, *call
    expected = torch.ops.rnnfast.rnn_layer_backward(*given, [True] * 5)

    def same(a, b):
        assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps * b.abs().max()

    def apart(y):  # batch-first, as one half of wider rows
        return torch.cat([y, y], -1).transpose(0, 1).contiguous()[..., : y.size(-1)].transpose(0, 1)

    set_threads(threads)
    with torch.inference_mode():
        for y, truth in zip(
            torch.ops.rnnfast.rnn_layer(apart(x), h, *weights, *call), (out, h_n), strict=True
        ):
            same(y, truth)
    given = apart(grad_out), grad_h_n, apart(x), h, *weights[:2], apart(out), *call
    for wanted in itertools.product([False, True], repeat=5):
        grads = torch.ops.rnnfast.rnn_layer_backward(*given, list(wanted))
        for grad, truth, needed in zip(grads, expected, wanted, strict=True):
            if needed:
                same(grad, truth)
            else:
                assert grad is None


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [2, 7, 20, 35])
def test_a_nan_stays_in_its_sequence(B, dtype, nonlinearity):
    """Sequences lie beside each other, and blocks of rows may be cut anywhere."""
    x, h, *weights = layer(4, B, 21, 50, dtype)
    expected, _ = torch.ops.rnnfast.rnn_layer(x, h, *weights, None, nonlinearity, False)
    for sick in (0, B // 2, B - 1):
        with_nan = x.clone()
        with_nan[1, sick, 20] = torch.nan
        out, _ = torch.ops.rnnfast.rnn_layer(with_nan, h, *weights, None, nonlinearity, False)
        assert out[1:, sick].isnan().all()
        others = [b for b in range(B) if b != sick]
        assert torch.equal(out[:, others], expected[:, others])
        grads = torch.ones_like(out), None, x, h, *weights[:2]
        call = None, nonlinearity, False, [True, True, False, False, False]
        d_x, d_h, *_ = torch.ops.rnnfast.rnn_layer_backward(*grads, out, *call)
        d_x_expected, d_h_expected, *_ = torch.ops.rnnfast.rnn_layer_backward(
            *grads, expected, *call
        )
        assert torch.equal(d_x[:, others], d_x_expected[:, others])
        assert torch.equal(d_h[others], d_h_expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 4])
def test_a_state_may_lie_in_the_input(dtype, T):
    """As a slice of it with fewer features, or with the rows of its first sequence."""
    x, _, *weights = layer(T, 20, 50, 40, dtype)
    same_rows = x[:, :1].expand(T, 20, 50)
    for inputs, h in ((x, x[0, :, :40]), (same_rows, x[0, :1, :40].expand(20, 40)),
                      (same_rows, x[0, :, :40])):  # fmt: skip
        call = None, "tanh", False
        actual, _ = torch.ops.rnnfast.rnn_layer(inputs, h, *weights, *call)
        apart, _ = torch.ops.rnnfast.rnn_layer(inputs.clone(), h.clone(), *weights, *call)
        assert torch.equal(actual, apart)


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 4])
def test_weights_of_any_stride(dtype, T):
    x, h, w_ih, w_hh, b_ih, b_hh = layer(T, 13, 9, 21, dtype)
    expected = torch.ops.rnnfast.rnn_layer(x, h, w_ih, w_hh, b_ih, b_hh, None, "tanh", False)
    strided = [
        w_ih.t().contiguous().t(),
        torch.stack([w_hh, w_hh], -1)[..., 0],
        torch.stack([b_ih, b_ih], -1)[..., 1],
        b_hh,
    ]
    actual = torch.ops.rnnfast.rnn_layer(x, h, *strided, None, "tanh", False)
    assert torch.equal(actual[0], expected[0])
    broadcast = torch.ops.rnnfast.rnn_layer(
        x, h, w_ih, w_hh, b_ih[:1].expand(21), None, None, "tanh", False
    )
    same = torch.ops.rnnfast.rnn_layer(
        x, h, w_ih, w_hh, b_ih[:1].expand(21).contiguous(), None, None, "tanh", False
    )
    assert torch.equal(broadcast[0], same[0])


@pytest.mark.parametrize("kind", ["dense", "batch first", "packed", "dense, no state"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("I", "hidden_size"), [(7, 100), (700, 720)], ids=["our own sums", "the library's"]
)
def test_gradients_of_many_rows_are_summed_by_stretches(kind, reverse, I, hidden_size):
    """More rows than dz is kept of at a time (512 here, or fewer), against the reference."""
    T, B = 45, 60
    lengths = [45] * 20 + [44] + [30] * 29 + [9, 8, 7, 2] + [1] * 6 if kind == "packed" else None
    tensors, batch_sizes = helpers.layer("cpu", f64, T, B, I, hidden_size, lengths)
    x, h, w_ih, w_hh, _, _ = (t.detach() for t in tensors)
    if kind == "batch first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    rows = x.shape[:-1]
    out = torch.rand(*rows, hidden_size, dtype=f64).mul(2).sub(1)
    given = torch.randn_like(out), torch.randn(B, hidden_size, dtype=f64)
    state = None if "no state" in kind else h
    call = (*given, x, state, w_ih, w_hh, out, batch_sizes, "tanh", reverse)
    actual = torch.ops.rnnfast.rnn_layer_backward(*call, [True] * 5)
    expected = rnnfast.reference.rnn_layer_backward(*call)
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert_same(a, b, T, I + hidden_size + rows.numel())


USED_UP = {  # T, B, I, H, lengths
    "our own sums": (45, 60, 7, 100, None),
    "the library's": (3, 50, 700, 720, None),
    "steps of the library's": (3, 4, 9, 400, None),
    "such of one sequence": (2, 1, 9, 100, None),
    "one step": (1, 20, 9, 30, None),
    "few rows": (6, 2, 5, 40, None),
    "one sequence": (30, 1, 9, 30, None),
    "packed": (45, 60, 7, 50, [45] * 20 + [44] + [30] * 29 + [9, 8, 7, 2] + [1] * 6),
    "one packed step": (1, 20, 9, 30, [1] * 20),
    "one unit": (5, 6, 3, 1, None),
}
LIES = {  # how a gradient or an output may
    "by itself": torch.clone,
    "as a half of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "batch-first": lambda x: x.transpose(0, 1).clone().transpose(0, 1),
    "on one sequence": lambda x: x[:, :1].clone().expand_as(x) if x.dim() == 3 else x.clone(),
    "on one step": lambda x: x[:1].clone().expand_as(x),
    "on one number": lambda x: x.flatten()[0].clone().expand_as(x),
}


@pytest.mark.parametrize("dtype", [f64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("case", USED_UP)
def test_gradients_of_what_may_be_used_up(case, lies, reverse, dtype):
    """Those of copies that may not be; and what is not given stays."""
    T, B, I, H, lengths = USED_UP[case]
    tensors, batch_sizes = helpers.layer("cpu", dtype, T, B, I, H, lengths)
    x, h, w_ih, w_hh, _, _ = (t.detach() for t in tensors)
    out = torch.rand(*x.shape[:-1], H).mul(2).sub(1).to(dtype)
    grads = torch.randn(out.shape).to(dtype), torch.randn(B, H).to(dtype)
    grad_out, out = (LIES[lies](y) for y in (grads[0], out))
    call = batch_sizes, "tanh", reverse
    variants = [(h, [True] * 5, True)]
    if lies == "by itself":
        some = [False, True, True, False, False], [True, False, False, True, True]
        variants += itertools.product((h, None), some, (True, False))
    for state, mask, has_out in variants:
        operands = x, state, w_ih, w_hh
        given = grad_out if has_out else None, grads[1]
        expected = torch.ops.rnnfast.rnn_layer_backward(*given, *operands, out, *call, mask)
        for used in itertools.product([False, True], repeat=3):
            copies = [LIES[lies](grad_out) if has_out else None, grads[1].clone(), LIES[lies](out)]
            actual = torch.ops.rnnfast._rnn_layer_backward_(
                *copies[:2], *operands, copies[2], *call, mask, used, None, None, None
            )
            for a, b in zip(actual, expected, strict=True):
                assert (a is None) == (b is None)
                if b is not None and dtype == f64:
                    assert_same(a, b, T, I + H + x.shape[:-1].numel())
                elif b is not None:  # dz may be rounded before a product
                    error = (a.float() - b.float()).abs().max()
                    assert error <= 2 * torch.finfo(dtype).eps * b.float().abs().max()
            for copy, value, gone in zip(copies, (*given, out), used, strict=True):
                assert gone or copy is None or torch.equal(copy, value)


@pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("case", [*USED_UP, "many rows", "no rows"])
def test_gradients_that_are_added_to_sums(case, wanted, dtype):
    """Of the weights, each to its own, or some of them; the others are returned."""
    sizes = {"many rows": (60, 32, 3, 8, None), "no rows": (4, 0, 3, 8, None)} | USED_UP
    T, B, I, H, lengths = sizes[case]
    tensors, batch_sizes = helpers.layer("cpu", dtype, T, B, I, H, lengths)
    x, h, w_ih, w_hh, _, _ = (t.detach() for t in tensors)
    out = torch.rand(*x.shape[:-1], H).mul(2).sub(1).to(dtype)
    arguments = torch.randn(out.shape).to(dtype), torch.randn(B, H).to(dtype), x, h, w_ih, w_hh, out
    call = *arguments, batch_sizes, "tanh", False
    expected = torch.ops.rnnfast.rnn_layer_backward(*call, [True] * 5)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    begun = [
        torch.randn(g.shape).to(wide) if to_sum else None
        for g, to_sum in zip(expected[2:], wanted, strict=True)
    ]
    sums = [g if g is None else g.clone() for g in begun]
    backward = torch.ops.rnnfast._rnn_layer_backward_
    actual = backward(*call, [True] * 5, [False] * 3, *sums)
    rows = x.shape[:-1].numel()
    for name, a, e, before, total in zip(
        ("d_x", "d_h", "d_w_ih", "d_w_hh", "d_b"), actual, expected, [None] * 2 + begun,
        [None] * 2 + sums, strict=True,
    ):  # fmt: skip
        assert (a is None) == (before is not None), name
        if before is not None:
            a, e = total.to(wide), e.to(wide) + before
        if dtype.itemsize == 2 and e.numel():  # dz may be rounded before a product
            error = (a.float() - e.float()).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * e.float().abs().max(), name
        else:
            assert_same(a, e, T, I + H + rows, name)
    bad = [None if g is None else g[:-1] for g in begun]
    with pytest.raises(RuntimeError, match=r"expected d_w_.*contiguous, of size \[.*got"):
        backward(*call, [True] * 5, [False] * 3, *bad)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "size",
    [
        (45, 60, 5, 50, None),  # rows are shared out
        (60, 60, 5, 50, sorted([1, 60, 3, 60, 20] * 12, reverse=True)),
        (2, 70, 5, 300, None),  # panels are, the threads meeting after each step
        (3, 70, 5, 300, [70, 70, 4]),
        (1, 25, 400, 300, None),  # the products of a step are, over unpacked weights
    ],
    ids=["rows", "packed rows", "panels", "packed panels", "unpacked weights"],
)
def test_threads_change_results_by_rounding_alone(threads, reverse, size):
    """Rows or hidden units are shared out, or a gradient's terms; a row in a lower block, or those
    terms, may be summed in another order."""
    B, T, I, H, lengths = size
    x, h, *weights = layer(T, B, I, H, torch.float32)
    batch_sizes = None
    if lengths is not None:
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
        x = torch.randn(int(batch_sizes.sum()), I)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            out, h_n = torch.ops.rnnfast.rnn_layer(x, h, *weights, batch_sizes, "tanh", reverse)
            grads = torch.ops.rnnfast.rnn_layer_backward(
                torch.cos(out), h_n, x, h, *weights[:2], out, batch_sizes, "tanh", reverse,
                [True] * 5,
            )  # fmt: skip
            results.append((out, h_n, *grads))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_same(a, b, T, I + H + len(x))


@pytest.mark.parametrize("size", [(3, 70, 5, 300), (45, 60, 5, 50)])
def test_calls_from_many_threads_that_use_many_threads(size):
    """Each with its own meetings."""
    B, T, I, H = size
    args = layer(T, B, I, H, torch.float32)
    expected = torch.ops.rnnfast.rnn_layer(*args, None, "tanh", False)[0]
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(torch.ops.rnnfast.rnn_layer, *args, None, "tanh", False) for _ in range(12)
        ]
        for call in calls:
            assert_same(call.result()[0], expected, T, I + H)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_tanh_is_accurate_over_the_whole_range(dtype):
    """Within 2 ulp of the true value, 1 by AVX-512's table: against tanh in twice the precision for
    float32, and within 2 ulp plus the ulp of torch's own for float64."""
    exponents = torch.arange(-126, 8 if dtype == torch.float32 else 6, dtype=f64)
    x = torch.cat(
        [
            torch.linspace(-12, 12, 500_001, dtype=f64),
            (2**exponents * torch.rand(4000, 1, dtype=f64).add(1)).flatten(),
            torch.linspace(0.3124, 0.3126, 20_001, dtype=f64),  # where the two formulas meet
            # where the table's intervals meet
            (torch.arange(-3, 4, dtype=f64) * 2**-24 + 1)
            .outer((2 ** torch.arange(-4, 5, dtype=f64)).outer(torch.arange(4, 8) / 4).flatten())
            .flatten(),
        ]
    ).to(dtype)
    x = torch.cat([x, -x])
    y = torch.ops.rnnfast._tanh(x)
    truth = torch.tanh(x.double())
    magnitude = truth.to(dtype).abs()
    ulp = (torch.nextafter(magnitude, torch.tensor(2, dtype=dtype)) - magnitude).double()
    by_table = torch.ops.rnnfast._cpu_instruction_set() == "avx512"
    bound = 3 if dtype == f64 else 1 if by_table else 2
    assert ((y.double() - truth).abs() / ulp).max() <= bound
    assert (y.abs() <= 1).all()
    assert torch.equal(torch.ops.rnnfast._tanh(-x), -y)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_tanh_of_special_values_is_that_of_torch(dtype):
    tiny = torch.finfo(dtype).tiny
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), tiny, -tiny / 8, 1e30, -1e30]
    for padding in range(18):  # each value in each lane, whole vectors and parts
        x = torch.tensor([0.0] * padding + values, dtype=dtype)
        y, expected = torch.ops.rnnfast._tanh(x), torch.tanh(x)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert torch.equal(torch.signbit(y)[~y.isnan()], torch.signbit(x)[~x.isnan()])


@pytest.mark.skipif(not TANH_TABLE.exists(), reason="needs tools/, the source tree")
def test_tanh_table_is_what_its_tool_writes():
    """Centers and c0 to the bit; the fitted coefficients, whose last digits are the linear algebra
    library's, to a tenth of an ulp of 1 in what they add within an interval."""
    spec = importlib.util.spec_from_file_location("tanh_table", TANH_TABLE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    header = (TANH_TABLE.parents[1] / "csrc/cpu/tanh_table.h").read_text()
    rows = re.findall(r"^ +\{(.*)\},$", header, re.MULTILINE)
    written = torch.tensor([[float(x.rstrip("f")) for x in row.split(", ")] for row in rows])
    computed = torch.from_numpy(tool.table())
    assert torch.equal(written[:2], computed[:2])
    half_width = computed[0].double().clamp(min=5 / 64) / 8
    powers = half_width ** torch.arange(1, tool.DEGREE + 1).unsqueeze(1)
    added = (written[2:].double() - computed[2:].double()) * powers
    assert (added.abs().sum(0) <= 2**-24 / 10 * computed[1].double().clamp(min=5 / 64)).all()


def test_every_float16_is_read_as_it_is():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    one, none = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    for some in every.split(1000):  # whole vectors and a part of one
        x = some.expand(2, -1).unsqueeze(-1)  # two steps: of a single one, other code takes care
        for sign in (1, -1):
            args = (x, None, sign * one, none, None, None, None, "relu", False)
            out, _ = torch.ops.rnnfast.rnn_layer(*args)
            expected = torch.relu(sign * some).unsqueeze(-1)
            torch.testing.assert_close(out[0], expected, rtol=0, atol=0, equal_nan=True)


CAPABILITIES = ["default", "avx2", "avx512"]


def test_the_instruction_set_is_the_one_asked_for():
    asked = "avx512" if "RNNFAST_EMULATE_AVX512" in os.environ else None
    asked = asked or os.environ.get("ATEN_CPU_CAPABILITY")
    names = {"AVX2": "avx2", "AVX512": "avx512"}
    here = names.get(torch.backends.cpu.get_cpu_capability(), "default")
    assert torch.ops.rnnfast._cpu_instruction_set() == (asked or here)
    products = torch.ops.rnnfast._cpu_bfloat16_products()
    if (asked or here) != "avx512":
        assert not products
    elif "RNNFAST_EMULATE_TILES" in os.environ:
        assert products == "amx"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_of_this_machine(capability):
    """The kernel tests again in a process of its own, as the choice is made when it starts."""
    names = {"NO AVX": 0, "DEFAULT": 0, "AVX2": 1, "AVX512": 2}
    here = names.get(torch.backends.cpu.get_cpu_capability(), 0)
    if os.environ.get("RNNFAST_TEST_CAPABILITY"):
        pytest.skip("already inside such a process")
    if CAPABILITIES.index(capability) > here:
        pytest.skip(f"this machine has no {capability}")
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         str(folder / "test_op.py"), str(folder / "test_numerics.py"),
         "-k", "not reference and not opcheck and not generated"],
        env=environment(ATEN_CPU_CAPABILITY=capability, RNNFAST_TEST_CAPABILITY="1"),
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
