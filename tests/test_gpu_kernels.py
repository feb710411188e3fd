"""The kernels for GPUs against float64: every dtype, precision, size class, layout and direction.

With small sizes on the CPU, Triton's interpreted under TRITON_INTERPRET=1 and those in CUDA C++
emulated under RNNFAST_EMULATE_CUDA=1; at full sizes on a GPU with pytest -m gpu.
"""

import pytest
import torch
from conftest import CUDA, ON_CPU, TRITON, device_of
from helpers import (
    assert_as_accurate,
    assert_same,
    check_layer,
    float32_products,
    layer,
    outputs_and_gradients,
)
from torch import library, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
on_gpu = pytest.mark.gpu


@pytest.fixture(params=[CUDA, TRITON])
def backend(request):
    """The kernels under test."""
    return request.param


@pytest.fixture
def device(backend, request):
    """Where they run: on the CPU, interpreted or emulated, or on a GPU."""
    device = device_of(backend, request)
    with rnnfast.backend(backend):
        yield device


@pytest.fixture
def tf32():
    """TF32 allowed, in matrix products as in cuDNN's RNN."""
    with float32_products("tf32", "tf32"):
        yield


# T, B, I, H: every row of the tables of configurations; the projection fused and not; on a GPU
# more rows than one wave of programs.
SIZES = [
    (3, 1, 1, 1), (3, 5, 3, 16), (2, 17, 1, 20), (2, 3, 9, 32), (2, 17, 8, 50), (2, 2, 70, 64),
    (3, 2, 4, 96), (2, 3, 5, 128), (2, 2, 3, 150), (2, 2, 64, 192), (2, 2, 1, 200), (2, 1, 4, 224),
    (2, 2, 2, 256),
]  # fmt: skip
FULL = [
    (10, 190, 1, 16), (1000, 64, 64, 64), (100, 512, 32, 64), (100, 64, 128, 128),
    (200, 1, 8, 16), (100, 5000, 4, 32), (50, 64, 256, 256), (50, 33, 200, 200),
    (30, 64, 64, 224), (1000, 1, 1, 100),
]  # fmt: skip
SIZES += [pytest.param(size, marks=on_gpu) for size in FULL]


def skip_unless_it_holds(backend, H, dtype, device):
    why = rnnfast.backends.BACKENDS[backend](torch.empty(0, dtype=dtype, device=device), H)
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend, device, size, dtype):
    skip_unless_it_holds(backend, size[-1], dtype, device)
    check_layer(device, dtype, *size)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("lengths", [[6, 4, 4, 3, 1], [3], [5] * 4, [3] + [2] * 17])
def test_packed(backend, device, dtype, nonlinearity, reverse, lengths):
    if backend == "triton" and ON_CPU[backend] and dtype == f32:
        lengths = lengths[:5]  # a program for each row, interpreted one after the other
    for I, H in ((2, 20), (20, 70)):
        check_layer(device, dtype, lengths[0], len(lengths), I, H, nonlinearity=nonlinearity,
                    reverse=reverse, lengths=lengths)  # fmt: skip


def test_packed_longer_than_a_block_of_lengths(device):
    check_layer(device, f32, 258, 2, 1, 5, lengths=[258, 1])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tf32(backend, device, tf32, size):
    """Operands rounded to 11 bits: eps is 2^-10 then; interpreted, the same code in float32."""
    skip_unless_it_holds(backend, size[-1], f32, device)
    check_layer(device, f32, *size, eps=2.0**-10)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_infinity_stays_in_its_row_and_unit(device, nonlinearity):
    """A state of infinity is an operand like any other, also beside masked units."""
    tensors, _ = layer(device, bf16, 3, 17, 2, 20)
    tensors = [t.detach() for t in tensors]
    tensors[0][1, 4] = torch.inf
    tensors[0][1, 5] = torch.nan
    out, _ = torch.ops.rnnfast.rnn_layer(*tensors, None, nonlinearity, False)
    truth, _ = rnnfast.reference.rnn_layer(*tensors, None, nonlinearity, False)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())


def test_deterministic(backend, device):
    B = 3 if ON_CPU[backend] else 300
    tensors, _ = layer(device, f32, 5, B, 3, 40)
    call = (None, "tanh", False, [torch.ones(5, B, 40), torch.ones(B, 40)])
    first, second = (
        outputs_and_gradients(tensors, *call, torch.ops.rnnfast.rnn_layer) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device, packed):
    tensors, sizes = layer(device, f32, 3, 2, 3, 5, [3, 2] if packed else None)
    library.opcheck(torch.ops.rnnfast.rnn_layer.default, (*tensors, sizes, "tanh", False))


def test_double_backward(device):
    """Through the op's own node: the second derivative is that of the reference."""
    tensors, _ = layer(device, f32, 3, 2, 2, 5)
    seconds = []
    for run in (torch.ops.rnnfast.rnn_layer, rnnfast.reference.rnn_layer):
        out, _ = run(*tensors, None, "tanh", False)
        (g,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), tensors))
    for a, b in zip(*seconds, strict=True):
        assert_same(a, b, 3, 20)


def test_every_subset_of_gradients(device):
    tensors, _ = layer(device, f32, 3, 2, 3, 5)
    x, hx, w_ih, w_hh, *_ = (t.detach() for t in tensors)
    out, h_n = torch.ops.rnnfast.rnn_layer(x, hx, w_ih, w_hh, None, None, None, "tanh", False)
    for n in range(32):
        mask = [bool(n >> i & 1) for i in range(5)]
        grads = torch.ops.rnnfast.rnn_layer_backward(
            None, torch.ones_like(h_n), x, hx, w_ih, w_hh, out, None, "tanh", False, mask
        )
        assert [g is not None for g in grads] == mask


def test_the_table_covers_what_was_measured_and_no_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    win = rnnfast.backends.Win("triton", (9, 0), "float32 default", (8, 64), packed=True)
    x = torch.ones(1)
    assert win.covers(x, 64, True)
    for ours, cudnns in (("ieee", "ieee"), ("tf32", "ieee"), ("tf32", "tf32")):
        with float32_products(ours, cudnns):
            assert not win.covers(x, 64, True)
    with monkeypatch.context() as under_autocast:
        under_autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        under_autocast.setattr(torch, "get_autocast_dtype", lambda device: bf16)
        cast = rnnfast.backends.Win("triton", (9, 0), "bfloat16", (8, 64), packed=True)
        assert not win.covers(x, 64, True)
        assert cast.covers(x, 64, True)
        assert not cast.covers(x.double(), 64, True)
    assert not cast.covers(x, 64, True)
    assert not win.covers(x, 65, True)
    assert not win.covers(x, 7, True)
    assert not win.covers(x, 64, False)
    assert not win.covers(x.double(), 64, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not win.covers(x, 64, True)


@on_gpu
def test_float32_is_as_accurate_as_cudnn(device):
    with float32_products("none", "ieee"):
        for T, B, I, H in ((30, 8, 4, 32), (200, 1, 8, 64), (20, 32, 64, 200)):
            theirs, exact = nn.RNN(I, H).to(device), nn.RNN(I, H, dtype=f64).to(device)
            ours = rnnfast.RNN(I, H).to(device)
            for module in (ours, exact):
                module.load_state_dict(theirs.state_dict())
            x = torch.randn(T, B, I, device=device)
            results = []
            for module in (ours, theirs, exact):
                module.zero_grad()
                out = module(x.to(module.weight_hh_l0.dtype))[0]
                out.square().sum().backward()
                results.append([out, *(p.grad for p in module.parameters())])
            for a, b, c in zip(*results, strict=True):
                assert_as_accurate(a, b, c)


@on_gpu
def test_model_cuda_runs_on_what_the_table_says(backend, gpu, monkeypatch):
    ours = rnnfast.RNN(3, 16).cuda()
    x = torch.randn(4, 2, 3, device=gpu)
    monkeypatch.setattr(rnnfast.backends, "GPU_WINS", ())
    assert rnnfast.backends.select(x, 16) == "torch"
    expected = ours(x)[0]
    capability = torch.cuda.get_device_capability(gpu)
    win = rnnfast.backends.Win(backend, capability, "float32 default", (1, 64), packed=False)
    monkeypatch.setattr(rnnfast.backends, "GPU_WINS", (win,))
    assert rnnfast.backends.select(x, 16) == backend
    assert rnnfast.backends.select(x, 65) == "torch"
    assert (ours(x)[0] - expected).abs().max() < 2.0**-8  # cuDNN's default is TF32


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_never_waits(device, packed):
    ours = rnnfast.RNN(3, 16, 2, bidirectional=True).to(device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    if packed:
        x = pack_sequence([x[:n, 0] for n in (4, 3, 1)])
        x = x._replace(data=x.data.detach().requires_grad_())  # a graph is walked only once
    ours(x)[1].sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x)[1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_cuda_graph(device):
    ours = rnnfast.RNN(3, 40, 2, bidirectional=True).to(device)
    static, fresh = torch.randn(2, 5, 4, 3, device=device)
    static = static.clone().requires_grad_()

    def step(x):
        ours.zero_grad(set_to_none=False)
        out, h_n = ours(x)
        (out.square().sum() + h_n.sum()).backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    captured = [out.clone(), *(p.grad.clone() for p in ours.parameters())]
    direct = [step(fresh.clone().requires_grad_()), *(p.grad for p in ours.parameters())]
    for a, b in zip(captured, direct, strict=True):
        assert_same(a, b, 5, 200)


@on_gpu
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_autocast(device, dtype):
    ours, theirs = rnnfast.RNN(3, 40).to(device), nn.RNN(3, 40).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 3, device=device)
    with torch.autocast("cuda", dtype):
        actual, expected = ours(x)[0], theirs(x)[0]
        actual.float().sum().backward()
    assert actual.dtype == expected.dtype == dtype
    # As in test_module.py: 5 steps of a layer, of which cuDNN rounds five times and ours once each.
    allowed = 4 * torch.finfo(dtype).eps * (5 * 6 / 12) ** 0.5
    assert (actual.double() - expected.double()).abs().max() < allowed
    assert ours.weight_hh_l0.grad.dtype == f32
