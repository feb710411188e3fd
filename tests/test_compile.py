"""torch.compile and torch.export: one graph, dynamic sizes, the numbers of eager."""

import types
import warnings
from operator import getitem

import pytest
import torch
from conftest import TRITON
from functorch.compile import make_boxed_func
from helpers import assert_same, pair, ramp
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, stack_module_state
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import rnnfast
from rnnfast import backends, dispatch, triton_layer

# Batch and length. Dynamo compiles anew for 0 and 1, and takes sizes that are equal in the first
# call (to each other, or to 3 and 5, the features) to be one.
SIZES = [(2, 6), (8, 6), (7, 9), (5, 3)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def train(call, module, *args):
    """Outputs of call(*args), and the gradients of an uneven loss of them."""
    module.zero_grad()
    args = [x.detach().clone().requires_grad_() for x in args]
    outputs = call(*args)
    sum((y * ramp(y)).sum() for y in outputs).backward()
    grads = [x.grad for x in args] + [p.grad.clone() for p in module.parameters()]
    return [y.detach() for y in outputs] + grads


def same(actual, expected, steps):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same(a, b, steps, 100, f"result {i}")


@pytest.mark.parametrize("backend", ["cpu", TRITON], indirect=True)
@pytest.mark.parametrize("with_state", [False, True])
def test_one_graph_for_all_sizes_forward_and_backward(backend, with_state):
    _, ours = pair(3, 5, 2, bidirectional=True, batch_first=True)
    graph = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, T in SIZES:
        args = (torch.randn(B, T, 3), *([torch.randn(4, B, 5)] if with_state else []))
        actual, expected = train(graph, ours, *args), train(ours, ours, *args)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert graphs() == 1


def test_marked_dimensions_stay_dynamic(compiled):
    _, ours = pair(3, 5)
    graph = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for B, T in SIZES:
        x = torch.randn(T, B, 3)
        torch._dynamo.mark_dynamic(x, 0)  # an error if the graph would depend on it
        torch._dynamo.mark_dynamic(x, 1)
        assert torch.equal(graph(x)[0], ours(x)[0])
    assert graphs() == 1


def test_the_reference_compiles_too():
    """Its loop is unrolled, so that only the batch is dynamic, and no length may depend on data."""
    _, ours = pair(3, 5, 2, bidirectional=True, batch_first=True)
    with rnnfast.backend("reference"):
        graph = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
        for B in (2, 3, 7):
            x = torch.randn(B, 4, 3)
            same(train(graph, ours, x), train(ours, ours, x), 8)
        assert graphs() == 1
        with pytest.raises(Exception, match="data-dependent"):
            graph(pack_sequence([torch.randn(n, 3) for n in (4, 2)]))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_in_one_graph(compiled, enforce_sorted, with_state):
    _, ours = pair(3, 5, 2, bidirectional=True)

    def call(packed, *state):
        return ours(packed, *state)

    graph = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([9, 8, 3, 2, 2, 2, 1], [4, 4, 4, 2], [9, 2]):
        lengths = lengths if enforce_sorted else lengths[::-1]
        data = [torch.randn(n, 3) for n in lengths]
        state = [torch.randn(4, len(lengths), 5)] if with_state else []
        results = []
        for run in (graph, call):
            ours.zero_grad()
            leaves = [x.clone().requires_grad_() for x in data]
            packed = pack_sequence(leaves, enforce_sorted=enforce_sorted)
            out, h_n = run(packed, *state)
            ((out.data * ramp(out.data)).sum() + (h_n * ramp(h_n)).sum()).backward()
            grads = [x.grad for x in leaves] + [p.grad for p in ours.parameters()]
            results.append([out.data.detach(), h_n.detach(), *grads])
        same(*results, 2 * max(lengths))
    assert graphs() == 1


def test_packed_state_of_the_wrong_size_is_an_error_when_compiled(compiled):
    ours = rnnfast.RNN(3, 5)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    graph = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"hx.*\[2, 5\].*\[3, 5\]"):
        graph(packed, torch.randn(1, 3, 5))


def packing(rnn):
    def call(x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return rnn(packed)[0].data

    return call, torch.randn(3, 6, 3), torch.tensor([2, 6, 4])


@pytest.mark.skipif(
    torch.__version__.startswith("2.12."),
    reason="its Dynamo cannot read an attribute of a PackedSequence that a graph made",
)
def test_packing_inside_breaks_the_graph_only_there(compiled):
    """pack_padded_sequence is what Dynamo skips; nn.RNN is left out of the graphs, ours is not."""
    captured = []

    def keep(graph, _):
        captured.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    theirs, ours = pair(3, 5, batch_first=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        call, x, lengths = packing(theirs)
        expected = torch.compile(call, backend=keep)(x, lengths)
        assert not any("rnn" in name for graph in captured for name in graph)
    torch._dynamo.reset()
    counters.clear()
    captured.clear()
    call, *_ = packing(ours)
    assert_same(torch.compile(call, backend=keep)(x, lengths), expected, 6, 8)
    assert ["rnnfast.rnn_layer.default" in graph for graph in captured] == [True]
    (reason,) = counters["graph_break"]
    assert "pack_padded_sequence" in reason
    assert counters["graph_break"][reason] == 1


@pytest.mark.parametrize("rnn", [nn.RNN, rnnfast.RNN])
def test_packing_inside_is_refused_of_nn_rnn_and_of_ours_alike(compiled, rnn):
    call, x, lengths = packing(rnn(3, 5, batch_first=True))
    with (
        torch._dynamo.config.patch(allow_rnn=True),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"skipped(?s:.*)`pack_padded_sequence`"),
    ):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x, lengths)


class Model(nn.Module):
    """An RNN amid operators that Inductor fuses."""

    def __init__(self, rnn_class=rnnfast.RNN):
        super().__init__()
        self.rnn = rnn_class(3, 5, 2, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        out, h_n = self.rnn(torch.tanh(x) + 1)
        return self.head(out).sigmoid(), h_n


def test_inductor_gives_what_eager_gives(compiled):
    model = Model()
    graph = torch.compile(model, fullgraph=True, dynamic=True)
    for B, T in SIZES[:2]:
        x = torch.randn(B, T, 3)
        same(train(graph, model, x), train(model, model, x), 2 * T)
    assert graphs() == 1


def test_graphs_hold_the_two_ops_and_no_copies_but_of_a_bias_gradient(compiled):
    targets, copied = set(), []

    def keep(graph, _):
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        targets.update(str(n.target) for n in calls)
        copied.extend(n.meta["val"].shape for n in calls if "clone" in str(n.target))
        return make_boxed_func(graph.forward)

    ours = rnnfast.RNN(3, 5)
    graph = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    graph(torch.randn(4, 2, 3))[0].sum().backward()
    assert {"rnnfast.rnn_layer.default", "rnnfast.rnn_layer_backward.default"} < targets
    assert copied == [(5,)]
    others = {name for name in targets if not name.startswith("rnnfast")} - {str(getitem)}
    views = ("detach.default", "squeeze.dim", "unsqueeze.default", "view.default")
    assert others <= {f"aten.{name}" for name in (*views, "_unsafe_view.default", "clone.default")}


def test_what_decides_on_a_gpu_is_a_constant_of_a_graph(monkeypatch):
    """No trace can read the flags of TF32, nor ask C++ or the driver."""
    monkeypatch.setattr(backends, "why_not_cuda", lambda *_: torch._C._get_tracing_state())
    properties = types.SimpleNamespace(major=9, shared_memory_per_block_optin=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.ops.rnnfast, "_cuda_why_not", None, raising=False)

    def decides(x):
        triton_layer._import_error()
        call = (7, x.dtype, x.size(-1), dispatch.tf32_allowed())  # the answers are cached
        refused = backends._why_not_cuda_on(*call) or triton_layer._why_not_on(*call)
        return x if refused else x + 1

    graph = torch.compile(decides, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        assert torch.equal(graph(torch.ones(2, 5)), torch.full((2, 5), 2.0))


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_measured_on_a_gpu_decides_in_a_graph(monkeypatch, packed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(backends.BACKENDS, "cuda", lambda x, hidden_size: None)
    win = backends.Win("cuda", (9, 0), "float32 default", (1, 16), packed=packed)
    monkeypatch.setattr(backends, "GPU_WINS", (win,))

    def decides(x):
        if (backends._winner(x, 16, packed), backends._winner(x, 17, packed)) == ("cuda", None):
            return x + 1
        return x

    graph = torch.compile(decides, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        assert torch.equal(graph(torch.ones(2, 5)), torch.full((2, 5), 2.0))


def test_autocast_and_cell_in_a_graph(compiled):
    cell = rnnfast.RNNCell(3, 5)
    ours = rnnfast.RNN(3, 5)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x)[0], cell(x[0])

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3)
    for a, b in zip(graph(x), call(x), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_vmap_in_a_graph(compiled):
    ours = rnnfast.RNN(3, 5)
    call = torch.vmap(lambda x: ours(x)[0])
    x = torch.randn(6, 4, 2, 3)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON], indirect=True)
def test_transforms_over_the_parameters_in_a_graph(backend):
    """Their weights end with the transform, so that a graph may not leave them on the module."""
    models, x = [rnnfast.RNN(3, 5) for _ in range(3)], torch.randn(4, 2, 3)

    def output(parameters, x):
        return functional_call(models[0], parameters, (x,))[0]

    def loss(parameters, x):
        return output(parameters, x.unsqueeze(1)).square().sum()

    many, _ = stack_module_state(models)
    one = {name: p.detach() for name, p in models[0].named_parameters()}
    ensemble = torch.vmap(output, in_dims=(0, None))
    per_sample = torch.vmap(grad(loss), in_dims=(None, 1))
    for function, parameters in ((ensemble, many), (per_sample, one)):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(parameters, x), function(parameters, x))


def test_nn_rnn_cannot_be_compiled_as_one_graph():
    """The evidence for the README's table: refused; if allowed, unrolled, a graph per length."""
    theirs = nn.RNN(3, 5)
    graph = torch.compile(theirs, fullgraph=True, backend="aot_eager", dynamic=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN"):
        graph(torch.randn(4, 2, 3))
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        counters.clear()
        for B, T in SIZES:
            x = torch.randn(T, B, 3)
            assert_same(graph(x)[0], theirs(x)[0], T, 8)
        assert graphs() == len({T for _, T in SIZES})
        with pytest.raises(Exception, match="data-dependent"):
            graph(pack_sequence([torch.randn(n, 3) for n in (4, 2)]))


# ------------------------------------------------------------------------------------- export

DYNAMIC = ({0: torch.export.Dim("B"), 1: torch.export.Dim("T")},)


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # nn.RNNBase's own list of weights
def test_export_with_dynamic_shapes(compiled, tmp_path):
    model = Model().eval()
    program = torch.export.export(model, (torch.randn(2, 4, 3),), dynamic_shapes=DYNAMIC)
    assert any("rnnfast.rnn_layer" in str(node.target) for node in program.graph.nodes)
    file = tmp_path / "model.pt2"
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    lowered = program.run_decompositions().module()
    for B, T in SIZES:
        x = torch.randn(B, T, 3)
        for run in (program.module(), loaded, lowered):
            same(run(x), model(x), 2 * T)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_export_of_the_reference(tmp_path):
    model = Model().eval()
    with rnnfast.backend("reference"):
        batch = ({0: torch.export.Dim("B")},)
        program = torch.export.export(model, (torch.randn(2, 4, 3),), dynamic_shapes=batch)
    x = torch.randn(7, 4, 3)
    same(program.module()(x), model(x), 8)
    with torch.no_grad():
        file = str(tmp_path / "model.pt2")
        run = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        )
        same(run(x), model(x), 8)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_ahead_of_time_inductor_on_the_cpu(compiled, tmp_path):
    model = Model().eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 4, 3),), dynamic_shapes=DYNAMIC)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(package)
        for B, T in SIZES:
            x = torch.randn(B, T, 3)
            same(run(x), model(x), 2 * T)
