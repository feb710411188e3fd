"""The Triton kernels against float64: every dtype, precision, size class, layout and direction.

Interpreted with small sizes under TRITON_INTERPRET=1; at full sizes on a GPU with pytest -m gpu.
"""

import pytest
import torch
from conftest import TRITON
from helpers import assert_as_accurate, assert_same, tolerance
from torch import library, nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast
from rnnfast import triton_layer
from rnnfast.triton_layer import INTERPRETED, Config, configuration

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
on_gpu = pytest.mark.gpu


@pytest.fixture(params=[TRITON])
def device(request):
    """Where the kernels run: the CPU, interpreted, or a GPU."""
    device = torch.device("cpu") if INTERPRETED else request.getfixturevalue("gpu")
    torch.manual_seed(0)
    with rnnfast.backend("triton"):
        yield device


@pytest.fixture
def tf32():
    """TF32 allowed, in matrix products as in cuDNN's RNN."""
    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = matmul.fp32_precision, rnn.fp32_precision
    matmul.fp32_precision = rnn.fp32_precision = "tf32"
    yield
    matmul.fp32_precision, rnn.fp32_precision = before


def layer(device, dtype, T, B, I, H, lengths=None):
    """Arguments of the op up to batch_sizes, with weights as nn.RNN draws them."""
    batch_sizes = None
    x = torch.randn(T, B, I)
    if lengths is not None:
        packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)])
        x, batch_sizes = packed.data, packed.batch_sizes
    weights = [torch.empty(s).uniform_(-(H**-0.5), H**-0.5) for s in ((H, I), (H, H), (H,), (H,))]
    tensors = [x, torch.randn(B, H), *weights]
    return [t.to(device, dtype).requires_grad_() for t in tensors], batch_sizes


def outputs_and_gradients(tensors, batch_sizes, nonlinearity, reverse, weigh, run):
    out, h_n = run(*tensors, batch_sizes, nonlinearity, reverse)
    given = [w.to(y) for w, y in zip(weigh, (out, h_n), strict=True)]
    grads = torch.autograd.grad([out, h_n], tensors, given)
    names = ("out", "h_n", "input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return dict(zip(names, (out, h_n, *grads), strict=True))


def check(device, dtype, T, B, I, H, *, nonlinearity="tanh", reverse=False, lengths=None, eps=None):
    """Outputs and gradients against the reference in float64 on the same numbers.

    float32 and float64 are off by what helpers.tolerance says. A 16-bit result is rounded to
    storage once, and a gradient is a sum over rows of dz, each rounded once (eps/2 of it, like a
    random walk): within 2 eps of the largest element, or four standard deviations of that sum.
    """
    tensors, batch_sizes = layer(device, dtype, T, B, I, H, lengths)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    rows = tensors[0].shape[:-1].numel()
    shape = (*tensors[0].shape[:-1], H)
    weigh = [torch.randn(shape, device=device), torch.randn(B, H, device=device)]
    weigh = [w.to(dtype) for w in weigh]
    call = (batch_sizes, nonlinearity, reverse, weigh)
    actual = outputs_and_gradients(tensors, *call, torch.ops.rnnfast.rnn_layer)
    truth = outputs_and_gradients(exact, *call, rnnfast.reference.rnn_layer)
    wide = dtype in (f32, f64)
    eps = eps or torch.finfo(dtype).eps
    for name, value in truth.items():
        error = (actual[name].double() - value).abs().max() / value.abs().max()
        summed = 0 if name in ("out", "h_n", "input", "hx") else rows
        if wide:
            bound = tolerance(dtype, T, I + H + summed) * eps / torch.finfo(dtype).eps
        else:
            bound = 2 * eps + 4 * eps * (summed**0.5 / max(summed, 1)) * T**0.5
        assert error <= bound, f"{name}: off by {error:.2e}, bound {bound:.2e}"


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
SIZES = SIZES if INTERPRETED else SIZES + FULL


def skip_above(H, dtype, tf32=False):
    if triton_layer.largest_hidden_size(dtype, tf32) < H:
        pytest.skip(f"the kernel holds fewer units in {dtype}")


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(device, size, dtype):
    skip_above(size[-1], dtype)
    check(device, dtype, *size)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("lengths", [[6, 4, 4, 3, 1], [3], [5] * 4, [3] + [2] * 17])
def test_packed(device, dtype, nonlinearity, reverse, lengths):
    if INTERPRETED and dtype == f32:
        lengths = lengths[:5]  # a program for each row, interpreted one after the other
    for I, H in ((2, 20), (20, 70)):
        check(device, dtype, lengths[0], len(lengths), I, H, nonlinearity=nonlinearity,
              reverse=reverse, lengths=lengths)  # fmt: skip


def test_packed_longer_than_a_block_of_lengths(device):
    check(device, f32, 258, 2, 1, 5, lengths=[258, 1])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tf32(device, tf32, size):
    """Operands rounded to 11 bits: eps is 2^-10 then; interpreted, the same code in float32."""
    skip_above(size[-1], f32, tf32=True)
    check(device, f32, *size, eps=2.0**-10)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_tile_of_32_rows(device, dtype):
    config = Config(rows=32, tile=32, tiles=2, warps=4, dot=True)
    with triton_layer.using(config):
        check(device, dtype, 3, 37, 5, 50, eps=2.0**-10 if dtype == f32 else None)


def test_tanh_is_accurate(device):
    """The kernel's tanh through a layer that is nothing else: W_hh = 0, one weight of one.

    2 ulp as the CPU kernel's; on a GPU exp is its fast one, with 2 ulp of its own."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-38, 1, 2000)])
    x = torch.cat([x, torch.linspace(0.5624, 0.5626, 200)]).to(device)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
    x = torch.cat([x, special.to(device)])
    one, zero = torch.ones(16, 1, device=device), torch.zeros(16, 16, device=device)
    with triton_layer.using(Config(1024 if INTERPRETED else 16, 16, 1, 4, dot=True)):
        y = torch.ops.rnnfast.rnn_layer(
            x.view(1, -1, 1), None, one, zero, None, None, None, "tanh", False
        )[1][:, 0]
    truth = torch.tanh(x.double())
    ordinary, bound = truth.isfinite(), 2 if INTERPRETED else 4
    magnitude = truth.float().abs()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, 2)) - magnitude
    error = ((y.double() - truth).abs() / ulp.double())[ordinary]
    assert error.max() <= bound
    assert (y[ordinary].abs() <= 1).all()
    assert torch.equal(y.isnan(), x.isnan())


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


def test_deterministic(device):
    B = 3 if INTERPRETED else 300
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


def test_what_it_cannot_run_is_said(device):
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="hidden_size of 300 is above 256"):
            rnnfast.RNN(3, 300, device=device, dtype=bf16)(
                torch.ones(2, 1, 3, device=device, dtype=bf16)
            )
    with pytest.raises(RuntimeError, match="complex64 is none of"):
        rnnfast.backends.select(torch.ones(1, device=device, dtype=torch.complex64))


# --------------------------------------------------------------------------- without any device


@pytest.mark.parametrize("precision", triton_layer._TABLE, ids=str)
def test_every_hidden_size_has_a_configuration_that_holds_it(precision):
    dtype, tf32 = precision
    for H in range(1, triton_layer.largest_hidden_size(dtype, tf32) + 1):
        config = configuration(H, 1, dtype, tf32)
        assert config.tile * (config.tiles - 1) < H <= config.tile * config.tiles
        assert config.dot == (dtype in (bf16, f16) or tf32)
        if not config.dot:  # the matrix is in the registers of one block
            words = (config.tile * config.tiles) ** 2 * dtype.itemsize // 4
            assert words / (32 * config.warps) < 255
    assert triton_layer.largest_hidden_size(bf16) >= 256
    assert triton_layer.largest_hidden_size(f32) >= 224


def test_an_override_holds_within_its_block_and_where_it_fits():
    config = Config(rows=16, tile=64, tiles=1, warps=4, dot=True)
    with triton_layer.using(config):
        assert configuration(50, 1, bf16) == config
        assert configuration(65, 1, bf16) != config
    assert configuration(50, 1, bf16).rows == 16
    assert configuration(50, 10**5, bf16).rows == 32


@pytest.mark.parametrize(
    ("matmul", "rnn", "allowed"),
    [
        ("none", "tf32", False),
        ("tf32", "none", False),
        ("tf32", "ieee", False),
        ("tf32", "tf32", True),
    ],
)
def test_tf32_needs_both_flags(matmul, rnn, allowed):
    assert not triton_layer.tf32_allowed()  # the defaults
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = matmul
        torch.backends.cudnn.rnn.fp32_precision = rnn
        assert triton_layer.tf32_allowed() == allowed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
        torch.backends.cudnn.rnn.fp32_precision = before[1]


@pytest.mark.skipif(INTERPRETED, reason="interpreted, it does run there")
def test_cpu_tensors_are_told_why_not():
    with (
        rnnfast.backend("triton"),
        pytest.raises(RuntimeError, match="on the CPU, and TRITON_INTERPRET=1 is not set"),
    ):
        rnnfast.RNN(3, 5)(torch.ones(2, 1, 3))


def test_the_table_covers_what_was_measured_and_no_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    win = rnnfast.backends.TritonWin((9, 0), f32, 64, packed=True)
    x = torch.ones(1)
    assert win.covers(x, 64, True)
    assert not win.covers(x, 65, True)
    assert not win.covers(x, 64, False)
    assert not win.covers(x.double(), 64, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not win.covers(x, 64, True)


# ------------------------------------------------------------------------------ on a GPU alone


@on_gpu
def test_float32_is_as_accurate_as_cudnn(device):
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    try:
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
    finally:
        torch.backends.cudnn.rnn.fp32_precision = "none"


@on_gpu
def test_model_cuda_runs_on_what_the_table_says(gpu, monkeypatch):
    ours = rnnfast.RNN(3, 16).cuda()
    x = torch.randn(4, 2, 3, device=gpu)
    assert rnnfast.backends.select(x, 16) == ("triton" if rnnfast.backends.TRITON_WINS else "torch")
    expected = ours(x)[0]
    win = rnnfast.backends.TritonWin(torch.cuda.get_device_capability(gpu), f32, 64, packed=False)
    monkeypatch.setattr(rnnfast.backends, "TRITON_WINS", (win,))
    assert rnnfast.backends.select(x, 16) == "triton"
    assert rnnfast.backends.select(x, 65) == "torch"
    assert (ours(x)[0] - expected).abs().max() < 2.0**-8  # cuDNN's default is TF32


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_never_waits(device, packed):
    ours = rnnfast.RNN(3, 16, 2, bidirectional=True).to(device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    if packed:
        x = pack_sequence([x[:n, 0] for n in (4, 3, 1)])
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
    assert (actual - expected).abs().max() < 8 * torch.finfo(dtype).eps
    assert ours.weight_hh_l0.grad.dtype == f32
