"""The README's feature table: what it says of rnnfast and nn.RNN is found out here, row by row.

A probe gets a class and returns whether it has the feature; the same probe says yes of the one and
no of the other. The other columns are from those projects' own documentation.
"""

import io
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.profiler import ProfilerActivity, profile

import rnnfast

README = Path(__file__).parent.parent / "README.md"
pytestmark = [
    pytest.mark.skipif(not README.exists(), reason="needs README.md, the source tree"),
    pytest.mark.usefixtures("compiled"),
]


def drop_in(rnn):
    theirs = nn.RNN(3, 5, 2, "relu", bidirectional=True)
    rnn(3, 5, 2, "relu", bidirectional=True).load_state_dict(theirs.state_dict(), strict=True)
    return True


def one_kernel_for_all_steps(rnn):
    """45 steps more do not bring as many operations more, forward or backward."""
    module, counts = rnn(3, 5), []
    for steps in (5, 50):
        x = torch.randn(steps, 2, 3, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            module(x)[0].sum().backward()
        counts.append(sum(e.count for e in profiler.key_averages()))
    return counts[1] - counts[0] < 45


def packed_sequences(rnn):
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4)], enforce_sorted=False)
    return rnn(3, 5)(packed)[0].data.shape == (6, 5)


def second_derivatives(rnn):
    module = rnn(2, 3, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


def forward_mode(rnn):
    module, x = rnn(3, 5), torch.randn(4, 2, 3)
    with rnnfast.backend("auto"):
        _, tangent = jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    return bool(tangent.abs().sum() > 0)


def vmap_over_inputs_and_parameters(rnn):
    models = [rnn(3, 5) for _ in range(2)]
    parameters, _ = stack_module_state(models)
    x = torch.randn(4, 2, 3)
    y = vmap(lambda p, x: functional_call(models[0], p, (x,))[0], in_dims=(0, None))(parameters, x)
    return y.shape == vmap(lambda x: models[0](x)[0])(torch.stack([x, x])).shape


def one_graph_for_all_lengths(rnn):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(rnn(3, 5), fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (6, 9, 12):
        compiled(torch.randn(steps, 2, 3))
    return counters["stats"]["unique_graphs"] == 1


def export_with_dynamic_length(rnn):
    shapes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},)
    program = torch.export.export(rnn(3, 5), (torch.randn(6, 2, 3),), dynamic_shapes=shapes)
    return program.module()(torch.randn(9, 4, 3))[0].shape == (9, 4, 5)


def onnx_operator(rnn):
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(rnn(3, 5, 2).eval(), (torch.randn(6, 2, 3),), verbose=False).save(file)
    graph = onnx.load_from_string(file.getvalue()).graph
    return Counter(node.op_type for node in graph.node)["RNN"] == 2


def float32_state_in_float16(rnn):
    """The last state is off by its own rounding alone, after 100 steps."""
    module = rnn(3, 32).half()
    exact = nn.RNN(3, 32).double()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(100, 8, 3).half()
    with torch.no_grad():
        h_n, truth = module(x)[1].double(), exact(x.double())[1]
    half_ulp = torch.finfo(torch.float16).eps / 2
    return bool(((h_n - truth).abs() <= 1.01 * half_ulp * truth.abs().clamp(min=2**-10)).all())


PROBES = {
    "constructor and `state_dict` of `nn.RNN`": drop_in,
    "one kernel for all steps on the CPU": one_kernel_for_all_steps,
    "`PackedSequence`": packed_sequences,
    "second derivatives": second_derivatives,
    "`torch.func.jvp`": forward_mode,
    "`torch.vmap`, over inputs and over parameters": vmap_over_inputs_and_parameters,
    "`torch.compile`, one graph for all lengths": one_graph_for_all_lengths,
    "`torch.export` with dynamic length": export_with_dynamic_length,
    "`torch.onnx.export` as the operator `RNN`": onnx_operator,
    "float32 state in float16": float32_state_in_float16,
}


# What nn.RNN raises where it does not have a feature, in the words that docs/pytorch.md quotes; the
# other probes return False.
REFUSALS = {
    "`torch.vmap`, over inputs and over parameters": (
        RuntimeError,
        r"Batching rule not implemented for aten::rnn_tanh\.input",
    ),
    "`torch.compile`, one graph for all lengths": (
        torch._dynamo.exc.Unsupported,
        "Dynamo does not support RNN, GRU, or LSTM",
    ),
    "`torch.export` with dynamic length": (
        torch._dynamo.exc.UserError,
        "You marked T as dynamic but your code specialized it to be a constant",
    ),
}


def table():
    """Feature to cells: rnnfast, nn.RNN, and the others."""
    text = README.read_text() if README.exists() else ""
    block = re.search(r"<!-- features: begin -->\n(.*?)<!-- features: end -->", text, re.DOTALL)
    rows = block[1].strip().splitlines()[2:] if block else []
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_every_row_has_a_probe():
    assert set(table()) == set(PROBES)


@pytest.mark.parametrize("feature", PROBES)
@pytest.mark.parametrize(("column", "rnn"), [(0, rnnfast.RNN), (1, nn.RNN)], ids=["ours", "nn.RNN"])
def test_what_the_table_says(feature, column, rnn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters and of nn.RNN, about themselves
        if rnn is nn.RNN and feature in REFUSALS:
            kind, words = REFUSALS[feature]
            with pytest.raises(kind, match=words):
                PROBES[feature](rnn)
            has = False
        else:
            has = PROBES[feature](rnn)
    said = table()[feature][column]
    assert said.split()[0].rstrip(",:") == ("yes" if has else "no"), said
