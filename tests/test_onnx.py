"""torch.onnx.export writes the standard operator, and ONNX Runtime computes what eager does.

The bound is 1e-5: a quarter of what tolerance() of helpers.py allows two float32 implementations
for 3 layers of 7 steps and sums of 15 products. The outputs are about one.
"""

import io
import warnings
from collections import Counter

import pytest
import torch
from helpers import pack
from torch import nn

import rnnfast

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

B, T = torch.export.Dim("B"), torch.export.Dim("T")

# (constructor arguments, with an initial state, RNN nodes)
CONFIGURATIONS = {
    "plain": ({}, True, 1),
    "no state": (dict(batch_first=True), False, 1),
    "bidirectional": (dict(bidirectional=True), True, 1),
    "everything": (
        dict(num_layers=3, bidirectional=True, batch_first=True, nonlinearity="relu", dropout=0.5),
        True,
        3,
    ),
    "no bias": (dict(num_layers=2, bidirectional=True, bias=False), False, 2),
}


class Named(nn.Module):
    """A model around the RNN, so that it is exported as a part."""

    def __init__(self, **config):
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.rnn = rnnfast.RNN(3, 5, **config)

    def forward(self, x, hx=None):
        return self.rnn(self.embed(x), hx)


def inputs(config, with_state, batch, steps):
    size = (batch, steps) if config.get("batch_first") else (steps, batch)
    states = config.get("num_layers", 1) * (1 + config.get("bidirectional", False))
    state = (torch.randn(states, batch, 5),) if with_state else ()
    return (torch.randn(*size, 2), *state)


def dynamic(config, with_state):
    x = {0: B, 1: T} if config.get("batch_first") else {0: T, 1: B}
    return (x, {1: B}) if with_state else (x,)


def check(model, file, cases):
    """The file's outputs are the model's; return how often each operator occurs."""
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for args in cases:
        feed = {i.name: x.cpu().numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
        with torch.no_grad():
            expected = model(*args)
        for actual, y in zip(session.run(None, feed), expected, strict=True):
            assert actual.shape == y.shape
            assert abs(actual - y.cpu().numpy()).max() < 1e-5
    graph = onnx.load_from_string(file.getvalue()).graph
    assert {node.domain for node in graph.node} == {""}
    return Counter(node.op_type for node in graph.node)


def export(model, args, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        if options.get("dynamo", True):
            torch.onnx.export(model, args, dynamo=True, verbose=False, **options).save(file)
        else:
            torch.onnx.export(model, args, file, **options)
    return file


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_export_writes_one_rnn_node_per_layer(backend, name):
    config, with_state, nodes = CONFIGURATIONS[name]
    model = Named(**config).eval()
    args = inputs(config, with_state, 2, 4)
    file = export(model, args, dynamic_shapes=dynamic(config, with_state))
    operators = check(model, file, [args, inputs(config, with_state, 3, 7)])
    assert operators["RNN"] == nodes
    assert not set(operators) & {"Loop", "Scan", "Tanh", "Relu"}


@pytest.mark.parametrize("name", ["plain", "no state", "everything", "no bias"])
def test_a_program_exported_before_takes_the_translation_table(compiled, name):
    config, with_state, nodes = CONFIGURATIONS[name]
    model = Named(**config).eval()
    args = inputs(config, with_state, 2, 4)
    program = torch.export.export(model, args, dynamic_shapes=dynamic(config, with_state))
    table = rnnfast.onnx.translation_table()
    file = export(program, (), custom_translation_table=table)
    operators = check(model, file, [args, inputs(config, with_state, 3, 7)])
    assert operators["RNN"] == nodes


@pytest.mark.parametrize("name", ["everything", "no state"])
def test_the_older_exporter(backend, name):
    config, with_state, nodes = CONFIGURATIONS[name]
    model = Named(**config).eval()
    args = inputs(config, with_state, 1, 4)
    names = ["x", "hx"][: len(args)]
    axes = {"x": {0: "B", 1: "T"}, "hx": {1: "B"}}
    file = export(model, args, dynamo=False, input_names=names, dynamic_axes=axes)
    assert check(model, file, [args, inputs(config, with_state, 1, 7)])["RNN"] == nodes


def test_a_cell_is_plain_operators(backend):
    cell = rnnfast.RNNCell(3, 5).eval()
    args = (torch.randn(2, 3), torch.randn(2, 5))
    file = export(cell, args)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    feed = {i.name: x.cpu().numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
    (actual,) = session.run(None, feed)
    assert abs(actual - cell(*args).detach().cpu().numpy()).max() < 1e-5


def test_packed_input_is_an_error_that_says_what_to_do(backend):
    packed = pack([torch.randn(n, 3) for n in (4, 2)])

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnnfast.RNN(3, 5)

        def forward(self, data):
            return self.rnn(packed._replace(data=data))[0].data

    why = "export the model on padded input"
    with pytest.warns(UserWarning, match=why), pytest.raises(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(Packed(), (packed.data,), verbose=False)


def test_nn_rnn_is_unrolled_by_the_default_exporter():
    """The evidence for the README's table: a node per step and operation, and a fixed length."""
    model = nn.RNN(3, 5)
    graph = onnx.load_from_string(export(model, (torch.randn(4, 2, 3),)).getvalue()).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["RNN"] == 0
    assert operators["Tanh"] == 4
