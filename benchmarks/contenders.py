"""Who is measured. A contender turns a problem into one call, ready to be timed.

Every contender gets nn.RNN's weights and does the same work as nn.RNN: it leaves the whole output
and the last states, or the gradients of all parameters. What can be done once before the first call
(compiling, packing constants, binding buffers) is done in ``prepare``, outside the timing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rnnfast

from .cases import Case, Problem


class Unsupported(Exception):
    """Why a contender takes no part in a case."""


@dataclass
class Entry:
    """A contender, ready to run one case.

    Attributes:
        call: does the work once, and returns what ``results`` and ``live`` take.
        results: names and values of what the work computed, as torch tensors.
        finish: waits for a call on devices that run behind the host.
        around: entered around a block of calls, outside its timing.
        events: the work is queued on torch's CUDA stream, so CUDA events time it.
        live: the tensors that a training step leaves; without it, its memory is not measured.
        backend: which implementation runs.
    """

    call: Callable[[], Any]
    results: Callable[[Any], dict[str, Tensor]]
    finish: Callable[[Any], object] = lambda value: None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    events: bool = False
    live: Callable[[Any], list[Tensor]] | None = None
    backend: str = ""


@dataclass(frozen=True)
class Contender:
    """A name, the cases it can do, and how it is prepared (``prepare`` raises Unsupported)."""

    name: str
    takes: Callable[[Case, str], bool]
    prepare: Callable[[Problem, int], Entry]


# ------------------------------------------------------------------------------- torch modules


def modules(
    problem: Problem,
    rnn: Callable[..., nn.Module],
    cell: Callable[..., nn.Module],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Entry:
    """An entry that calls modules of the given classes."""
    case = problem.case
    module = problem.build(rnn, cell)
    parameters = list(module.parameters())

    def gradients(value: Any) -> dict[str, Tensor]:
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    def live(value: Any) -> list[Tensor]:
        return [*value, *gradients(value).values()]

    events = problem.device == "cuda"
    if case.module == "sine":
        inputs, targets = problem.x, problem.target
        optimizer = torch.optim.Adam(parameters, lr=0.01)

        def epoch() -> None:
            loss = nn.functional.mse_loss(module(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()

        return Entry(epoch, gradients, around=around, events=events)

    if case.module == "RNNCell":
        steps, h0 = list(problem.x.unbind()), problem.hx[0]

        def forward() -> tuple[Tensor, Tensor]:
            h, states = h0, []
            for x in steps:
                h = module(x, h)
                states.append(h)
            return torch.stack(states), h

    else:
        x, hx = problem.input, problem.hx

        def forward() -> tuple[Tensor, Tensor]:
            out, h_n = module(x, hx)
            return (out.data if case.packed else out), h_n

    def training() -> tuple[Tensor, Tensor]:
        for p in parameters:
            p.grad = None
        out, h_n = forward()
        out.backward(problem.target)  # type: ignore[no-untyped-call]
        return out, h_n

    if case.work == "training":
        return Entry(training, gradients, around=around, events=events, live=live)
    return Entry(forward, lambda v: {"output": v[0], "h_n": v[1]}, around=around, events=events)


def nn_rnn(problem: Problem, threads: int) -> Entry:
    """PyTorch's own modules: the baseline (cuDNN on CUDA)."""
    return modules(problem, nn.RNN, nn.RNNCell)


def rnnfast_rnn(problem: Problem, threads: int) -> Entry:
    """What a user of rnnfast gets: the backend that its table chooses."""
    entry = modules(problem, rnnfast.RNN, rnnfast.RNNCell)
    entry.backend = rnnfast.backends.select(problem.x, problem.case.H, problem.case.packed)
    return entry


def rnnfast_float32(problem: Problem, threads: int) -> Entry:
    """rnnfast in float32, beside a narrower dtype."""
    return rnnfast_rnn(problem.cast("float32"), threads)


def forced(name: str) -> Callable[[Problem, int], Entry]:
    """Prepares rnnfast with one backend forced."""

    def prepare(problem: Problem, threads: int) -> Entry:
        entry = modules(problem, rnnfast.RNN, rnnfast.RNNCell, lambda: rnnfast.backend(name))
        entry.backend = name
        try:
            with entry.around():
                entry.call()
        except RuntimeError as error:
            if "the forced backend" in str(error):  # its own "cannot run", and why
                raise Unsupported(str(error)) from error
            raise
        return entry

    return prepare


# --------------------------------------------------------------------------------------- peers


def peer(package: str) -> Any:
    """Import a peer's package, or say that it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unsupported(f"{package} is not installed ({error})") from error


def weights(problem: Problem) -> list[list[list[Tensor]]]:
    """``w_ih, w_hh, b_ih, b_hh`` by layer and direction, detached."""
    directions = 2 if problem.case.bidirectional else 1
    flat = [[p.detach() for p in group] for group in problem.module.all_weights]  # type: ignore
    return [flat[i : i + directions] for i in range(0, len(flat), directions)]


def named_gradients(problem: Problem, flat: list[Tensor]) -> dict[str, Tensor]:
    """Gradients in the order of the parameters, by name."""
    return {name: g for (name, _), g in zip(problem.module.named_parameters(), flat, strict=True)}


def output_rows(problem: Problem, padded: Tensor) -> Tensor:
    """A peer's padded output as nn.RNN gives it."""
    return problem.pack(padded).data if problem.case.packed else padded


def jax_scan(problem: Problem, threads: int) -> Entry:
    """``lax.scan`` over the steps, the input projection hoisted out of it, under ``jit``.

    Training is the vjp of the same function in the same ``jit``. Padded steps of shorter sequences
    are masked, as JAX has no packed sequences. Threads follow the process's CPU affinity.
    """
    jax = peer("jax")
    jnp, lax = jax.numpy, jax.lax
    platform = jax.devices()[0].platform
    if platform != ("gpu" if problem.device == "cuda" else "cpu"):
        raise Unsupported(f"JAX runs on {platform} here")
    case = problem.case
    act = jnp.tanh if case.nonlinearity == "tanh" else jax.nn.relu

    def to_jax(t: Tensor) -> Any:
        return jnp.asarray(t.detach().cpu().numpy())

    def layer(w: list[Any], x: Any, h0: Any, alive: Any, reverse: bool) -> tuple[Any, Any]:
        w_ih, w_hh, b_ih, b_hh = w
        z = x @ w_ih.T + (b_ih + b_hh)

        def step(h: Any, zs: tuple[Any, Any]) -> tuple[Any, Any]:
            z_t, alive_t = zs
            new = act(z_t + h @ w_hh.T)
            if alive_t is None:
                return new, new
            return jnp.where(alive_t, new, h), jnp.where(alive_t, new, 0)

        h_n, out = lax.scan(step, h0, (z, alive), reverse=reverse)
        return out, h_n

    def forward(params: Any, x: Any, hx: Any, alive: Any) -> tuple[Any, Any]:
        states = iter(hx)
        last = []
        for directions in params:
            outs = []
            for reverse, w in enumerate(directions):
                out, h_n = layer(w, x, next(states), alive, bool(reverse))
                outs.append(out)
                last.append(h_n)
            x = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-1)
        return x, jnp.stack(last)

    def train(params: Any, x: Any, hx: Any, alive: Any, grad: Any) -> tuple[Any, Any]:
        out, vjp = jax.vjp(lambda p: forward(p, x, hx, alive)[0], params)
        return out, vjp(grad)[0]

    params = [[[to_jax(w) for w in ws] for ws in directions] for directions in weights(problem)]
    x, hx = to_jax(problem.x), list(to_jax(problem.hx))
    alive = None
    if case.packed:
        lengths = torch.tensor(case.lengths)
        alive = to_jax((torch.arange(case.T)[:, None] < lengths).unsqueeze(-1))

    def to_torch(array: Any) -> Tensor:
        return torch.tensor(jax.device_get(array))

    if case.work == "inference":
        call = functools.partial(jax.jit(forward), params, x, hx, alive)

        def results(value: Any) -> dict[str, Tensor]:
            out, h_n = map(to_torch, value)
            return {"output": output_rows(problem, out), "h_n": h_n}

    else:
        target = problem.target
        if case.packed:
            packed = problem.pack(problem.x)._replace(data=target)
            target = nn.utils.rnn.pad_packed_sequence(packed)[0]
        call = functools.partial(jax.jit(train), params, x, hx, alive, to_jax(target))

        def results(value: Any) -> dict[str, Tensor]:
            flat = [to_torch(g) for g in jax.tree.leaves(value[1])]
            return named_gradients(problem, flat)

    def finish(value: Any) -> None:  # a computation's results become ready together
        value[0].block_until_ready()

    def finished() -> Any:
        value = call()
        finish(value)
        return value

    return Entry(finished if problem.device == "cpu" else call, results, finish)


def onnx_model(problem: Problem) -> bytes:
    """The standard operator RNN, a node a layer; weights are constants.

    Inputs ``x`` and ``h0``, ``h1``, ... (one a layer); outputs ``y`` of ``[T, D, B, H]`` and
    ``h_n0``, ``h_n1``, ...
    """
    onnx = peer("onnx")
    helper, to_array = onnx.helper, onnx.numpy_helper.from_array
    case = problem.case
    T, B, H, D = case.T, case.B, case.H, 2 if case.bidirectional else 1

    def info(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes, constants, x, lengths = [], [], "x", ""
    if case.packed:
        lengths = "lengths"
        constants.append(to_array(torch.tensor(case.lengths, dtype=torch.int32).numpy(), lengths))
    for i, directions in enumerate(weights(problem)):
        w_ih, w_hh, b_ih, b_hh = (torch.stack(ws) for ws in zip(*directions, strict=True))
        arrays = {f"w{i}": w_ih, f"r{i}": w_hh, f"b{i}": torch.cat([b_ih, b_hh], dim=-1)}
        constants += [to_array(t.numpy(), name) for name, t in arrays.items()]
        if i:  # [T, D, B, H] -> [T, B, D * H]
            nodes.append(helper.make_node("Transpose", [x], [f"t{i}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t{i}", "rows"], [f"x{i}"]))
            x = f"x{i}"
        y = "y" if i == case.num_layers - 1 else f"y{i}"
        nodes.append(
            helper.make_node(
                "RNN",
                [x, *arrays, lengths, f"h{i}"],
                [y, f"h_n{i}"],
                hidden_size=H,
                direction="bidirectional" if D == 2 else "forward",
                activations=[case.nonlinearity.capitalize()] * D,
            )
        )
        x = y
    if case.num_layers > 1:
        constants.append(to_array(torch.tensor([T, B, D * H]).numpy(), "rows"))
    layers = range(case.num_layers)
    graph = helper.make_graph(
        nodes,
        "rnn",
        [info("x", T, B, case.I), *(info(f"h{i}", D, B, H) for i in layers)],
        [info("y", T, D, B, H), *(info(f"h_n{i}", D, B, H) for i in layers)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnx_inputs(problem: Problem) -> dict[str, Any]:
    """Arrays for the inputs of ``onnx_model``."""
    states = problem.hx.chunk(problem.case.num_layers)
    return {"x": problem.x.numpy()} | {
        f"h{i}": h.contiguous().numpy() for i, h in enumerate(states)
    }


def onnx_results(problem: Problem, arrays: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of ``onnx_model`` as nn.RNN gives them."""
    out = torch.tensor(arrays["y"]).transpose(1, 2).flatten(2)
    states = [torch.tensor(arrays[f"h_n{i}"]) for i in range(problem.case.num_layers)]
    return {"output": output_rows(problem, out), "h_n": torch.cat(states)}


def onnxruntime(problem: Problem, threads: int) -> Entry:
    """ONNX Runtime, inputs and outputs bound once: its least overhead.

    Its pool stops spinning when a call ends, so that it takes no time from who comes next.
    """
    ort = peer("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        onnx_model(problem), options, providers=["CPUExecutionProvider"]
    )  # fmt: skip
    binding = session.io_binding()
    for name, array in onnx_inputs(problem).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    outputs = {
        o.name: ort.OrtValue.ortvalue_from_shape_and_type(o.shape, torch.zeros(0).numpy().dtype)
        for o in session.get_outputs()
    }
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return Entry(
        lambda: session.run_with_iobinding(binding),
        lambda _: onnx_results(problem, {name: v.numpy() for name, v in outputs.items()}),
    )


def openvino(problem: Problem, threads: int) -> Entry:
    """OpenVINO on the same model, one stream, float32 (it would choose bfloat16 where it can)."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would fork
    ov = peer("openvino")
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # the process is pinned
    }
    compiled = core.compile_model(core.read_model(onnx_model(problem), b""), "CPU", settings)
    request = compiled.create_infer_request()
    inputs = onnx_inputs(problem)
    for name, array in inputs.items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))

    def results(_: Any) -> dict[str, Tensor]:
        names = [output.any_name for output in compiled.outputs]
        return onnx_results(problem, {name: request.get_tensor(name).data for name in names})

    return Entry(request.infer, results)


def flashrnn_elman(problem: Problem, threads: int, backend: str = "cuda_fused") -> Entry:
    """The flashrnn package's function "elman"; tanh, built by nvcc at its first call.

    Inputs and gradients lie batch-first, which is its own layout. It takes one bias, so the two of
    nn.RNN are added in the call.
    """
    function = peer("flashrnn").flashrnn
    case = problem.case
    B, T, H = case.B, case.T, case.H
    leaves = [w.clone().requires_grad_() for w in weights(problem)[0][0]]
    w_ih, w_hh, b_ih, b_hh = leaves
    x = problem.x.transpose(0, 1).contiguous()
    h0 = problem.hx.view(1, B, 1, 1, H)
    grad = problem.target.transpose(0, 1).contiguous()

    def forward() -> tuple[Tensor, Tensor]:
        wx = nn.functional.linear(x, w_ih).view(B, T, 1, 1, H)
        r, b = w_hh.view(1, 1, H, H), (b_ih + b_hh).view(1, 1, H)
        h, last = function(wx, r, b, h0, function="elman", backend=backend, dtype=case.dtype)
        return h[0].view(B, T, H), last[0].view(B, H)

    def training() -> tuple[Tensor, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out, h_n = forward()
        out.backward(grad)  # type: ignore[no-untyped-call]
        return out, h_n

    def results(value: Any) -> dict[str, Tensor]:
        if case.work == "training":
            return named_gradients(problem, [leaf.grad for leaf in leaves if leaf.grad is not None])
        return {"output": value[0].transpose(0, 1), "h_n": value[1].unsqueeze(0)}

    call = forward if case.work == "inference" else training
    try:
        call()
    except ValueError as error:  # sizes that its tiling cannot serve
        raise Unsupported(f"flashrnn: {error}") from error
    return Entry(call, results, events=problem.device == "cuda")


# --------------------------------------------------------------------------------- the registry


def _is_plain(case: Case) -> bool:
    return case.module == "RNN" and case.dtype == "float32"


def _cpu_inference(case: Case, device: str) -> bool:
    return _is_plain(case) and case.work == "inference" and device == "cpu"


def _flashrnn_takes(case: Case, device: str) -> bool:
    one_layer = case.num_layers == 1 and not case.bidirectional and not case.packed
    return device == "cuda" and case.module == "RNN" and one_layer and case.nonlinearity == "tanh"


def _forced_takes(name: str) -> Callable[[Case, str], bool]:
    """The reference where it is affordable; the kernels for GPUs on a GPU."""
    if name == "reference":
        return lambda case, device: (
            case.module == "RNN" and case.series == "grid" and case.T <= 50 and case.flops < 1e8
        )
    return lambda case, device: device == "cuda" and case.module == "RNN"


_ALWAYS = ("cpu", "torch")  # what "rnnfast" runs on the CPU, and nn.RNN again

CONTENDERS = {
    c.name: c
    for c in [
        Contender("nn.RNN", lambda case, device: True, nn_rnn),
        Contender("rnnfast", lambda case, device: True, rnnfast_rnn),
        Contender("rnnfast float32", lambda case, _: case.dtype == "bfloat16", rnnfast_float32),
        *(
            Contender(f"rnnfast {name}", _forced_takes(name), forced(name))
            for name in rnnfast.backends.BACKENDS
            if name not in _ALWAYS
        ),
        Contender("JAX", lambda case, device: _is_plain(case), jax_scan),
        Contender("ONNX Runtime", _cpu_inference, onnxruntime),
        Contender("OpenVINO", _cpu_inference, openvino),
        Contender("flashrnn", _flashrnn_takes, flashrnn_elman),
    ]
}
