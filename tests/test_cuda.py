"""What is the CUDA C++ kernels' own: their variants, how rows and units are shared out, limits.

On the CPU, emulated, under RNNFAST_EMULATE_CUDA=1; on a GPU with pytest -m gpu. The emulated device
has 20 multiprocessors, and clusters of up to 16 blocks.
"""

import pytest
import torch
from conftest import CUDA, ON_CPU, device_of
from helpers import bound, check_layer, check_tanh, float32_products, layer

import rnnfast

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
IEEE = ["block 32 row", "block 32", "block 64 row", "block 64", "block 128 row", "block 128",
        "block 192 row", "block 192", "cluster 512 row", "cluster 512", "grid 512 row", "grid 512",
        "grid 1024 row", "grid 1024", "grid 2048 row", "grid 2048"]  # fmt: skip
TF32 = ["block 64", "block 128", "block 192", "cluster 512", "grid 512", "grid 1024", "grid 2048"]
DOUBLE = ["block 32", "block 64", "block 128", "cluster 512", "grid 512"]
NARROW = ["block 32", "block 64", "block 128", "block 256", "cluster 512", "cluster 1024",
          "grid 512", "grid 1024", "grid 2048"]  # fmt: skip
VARIANTS = [
    (numbers, name)
    for numbers, names in (("f32", IEEE), ("tf32", TF32), ("f64", DOUBLE), ("bf16", NARROW),
                           ("f16", NARROW))
    for name in names
]  # fmt: skip
DTYPES = {"f32": f32, "tf32": f32, "f64": f64, "bf16": bf16, "f16": f16}


@pytest.fixture(params=[CUDA])
def device(request):
    """Where the kernels run: the CPU, emulated, or a GPU."""
    device = device_of("cuda", request)
    with rnnfast.backend("cuda"):
        yield device


def ops():
    return torch.ops.rnnfast_emulated if ON_CPU["cuda"] else torch.ops.rnnfast


@pytest.fixture
def use(device, numbers):
    """Forces a variant, and allows TF32 where the numbers are that."""

    def force(name):
        clusters = ON_CPU["cuda"] or torch.cuda.get_device_capability(device) >= (9, 0)
        if name.startswith("cluster") and not clusters:
            pytest.skip("clusters need compute capability 9.0")
        ops()._cuda_use_variant(name)

    precision = "tf32" if numbers == "tf32" else "ieee"
    with float32_products(precision, precision):
        yield force
    ops()._cuda_use_variant("")


def hidden_sizes(name):
    """One that fills a block, and one of several blocks, the last of them not full."""
    kind, largest = name.split()[:2]
    return {"block": [int(largest), int(largest) - 7], "cluster": [200], "grid": [70]}[kind]


@pytest.mark.parametrize(("numbers", "name"), VARIANTS)
def test_every_variant(device, use, numbers, name):
    use(name)
    dtype, eps = DTYPES[numbers], 2.0**-10 if numbers == "tf32" else None
    for H in hidden_sizes(name):
        check_layer(device, dtype, 4, 5, 3, H, eps=eps)
        check_layer(device, dtype, 3, 9, 20, H, reverse=True, eps=eps)
        for reverse in (False, True):
            lengths = [6, 4, 4, 3, 1]
            check_layer(device, dtype, 6, 5, 3, H, lengths=lengths, reverse=reverse, eps=eps)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [v for v in VARIANTS if v[0] in ("f32", "bf16") and v[1].split()[-1] in ("64", "512")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_more_rows_than_run_at_once(device, use, numbers, name, packed):
    """A group takes several tiles of rows a step."""
    use(name)
    H, B = 70 if "512" in name else 20, 200 if ON_CPU["cuda"] else 20000
    _, _, tiles, _ = ops()._cuda_plan(0, DTYPES[numbers], B, H, False)
    assert tiles > 1
    lengths = [3] * (B // 2) + [2] * (B // 4) + [1] * (B - B // 2 - B // 4) if packed else None
    check_layer(device, DTYPES[numbers], 3, B, 1, H, lengths=lengths)


@pytest.mark.parametrize("numbers", ["f32"])
def test_more_rows_than_a_grid_holds(device, use, numbers):
    """All blocks of a grid must be resident, so they take one set of rows after another."""
    use("grid 512")
    B = 2000 if ON_CPU["cuda"] else 20000
    _, _, tiles, groups = ops()._cuda_plan(0, f32, B, 512, False)
    assert tiles * groups * 4 < B
    check_layer(device, f32, 3, B, 1, 512)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        *((numbers, name) for numbers in ("f32", "bf16") for name in ("cluster 512", "grid 512")),
        ("bf16", "cluster 1024"),
        # The emulated device has too few multiprocessors for these.
        *(pytest.param(n, f"grid {H}", marks=pytest.mark.gpu)
          for n in ("f32", "tf32", "bf16", "f16") for H in (1024, 2048)),
    ],
)  # fmt: skip
def test_blocks_that_share_rows_at_full_width(device, use, numbers, name):
    use(name)
    eps, H = 2.0**-10 if numbers == "tf32" else None, int(name.split()[-1])
    if H == 2048 and DTYPES[numbers] == f32:  # 16 units a block, all at once
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        if blocks < 128:
            pytest.skip(f"a grid of 128 blocks does not fit {blocks} multiprocessors")
    check_layer(device, DTYPES[numbers], 2, 3, 2, H, eps=eps)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_optional_arguments_and_any_strides(device, dtype):
    """No hx, no bias, gradients of one output alone; batch-first input and expanded gradients."""
    T, B, I, H = 4, 5, 3, 20
    tensors, _ = layer(device, dtype, T, B, I, H)
    x, hx, w_ih, w_hh, b_ih, b_hh = (t.detach() for t in tensors)
    batch_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    odd_features = torch.stack([x, -x], -1)[..., 0]
    w_t = w_hh.t().contiguous().t()
    for args in (
        (x, None, w_ih, w_hh, None, None),
        (batch_first, hx, w_ih, w_t, b_ih, None),
        (odd_features, hx, w_ih, w_hh, None, b_hh),
    ):
        results = []
        for run, cast in (
            (torch.ops.rnnfast.rnn_layer, torch.Tensor.detach),
            (rnnfast.reference.rnn_layer, torch.Tensor.double),
        ):
            leaves = [a if a is None else cast(a).requires_grad_() for a in args]
            out, h_n = run(*leaves, None, "tanh", True)
            given = [t for t in leaves if t is not None]
            grads = torch.autograd.grad(out[..., :1].sum(), given, retain_graph=True)
            results.append([out, h_n, *grads, *torch.autograd.grad(h_n.sum(), given)])
        for a, b in zip(*results, strict=True):
            rows = T * B if a.shape in (w_ih.shape, w_hh.shape, b_ih.shape) else 0
            error = (a.double() - b).abs().max() / b.abs().max()
            assert error <= bound(dtype, T, I + H, rows), f"{list(a.shape)}: off by {error:.2e}"


def test_empty_batch(device):
    tensors, _ = layer(device, f32, 3, 0, 2, 5)
    out, h_n = torch.ops.rnnfast.rnn_layer(*tensors, None, "tanh", False)
    assert out.shape == (3, 0, 5)
    grads = torch.autograd.grad(out.sum() + h_n.sum(), tensors)
    assert all((g == 0).all() for g in grads)


def test_tanh_is_accurate(device):
    """2 ulp as the CPU kernel's; on a GPU exp is its fast one, with 2 ulp of its own."""
    check_tanh(device, 2 if ON_CPU["cuda"] else 4)


@pytest.mark.parametrize("numbers", ["f32"])
def test_what_it_cannot_run_is_said(device, use, numbers):
    why_not = rnnfast.backends.BACKENDS["cuda"]
    assert why_not(torch.empty(0, device=device), 512) is None
    assert "hidden_size" in why_not(torch.empty(0, device=device), 10**6)
    assert "complex64 is none of" in why_not(
        torch.empty(0, dtype=torch.complex64, device=device), 5
    )
    use("block 32")
    tensors, _ = layer(device, f32, 2, 1, 1, 33)
    with pytest.raises(RuntimeError, match="no CUDA kernel runs a hidden_size of 33"):
        torch.ops.rnnfast.rnn_layer(*tensors, None, "tanh", False)


@pytest.mark.parametrize(
    ("dtype", "batch", "hidden_size", "expected"),
    [
        (f32, 1, 16, ("block 32 row", 1, 1, 1)),
        (f32, 21, 33, ("block 64", 1, 1, 6)),
        (f32, 1, 193, ("cluster 512 row", 4, 1, 1)),
        (f32, 64, 512, ("cluster 512", 8, 8, 2)),
        (bf16, 8, 256, ("block 256", 1, 1, 1)),
        (bf16, 9, 257, ("cluster 512", 5, 1, 2)),
        (bf16, 1, 1024, ("cluster 1024", 16, 1, 1)),
        (f64, 5, 512, ("cluster 512", 16, 2, 1)),
    ],
    ids=str,
)
@pytest.mark.skipif(not ON_CPU["cuda"], reason="written for the emulated device")
def test_the_table(dtype, batch, hidden_size, expected):
    """On 20 multiprocessors: one block or, from the size on that it holds, a cluster; as many
    groups as run at once, the rows beyond these in further tiles."""
    for backward in (False, True):
        assert tuple(ops()._cuda_plan(0, dtype, batch, hidden_size, backward)) == expected


@pytest.mark.skipif(ON_CPU["cuda"], reason="emulated, it does run there")
def test_cpu_tensors_are_told_why_not():
    with (
        rnnfast.backend("cuda"),
        pytest.raises(RuntimeError, match=r"built without CUDA kernels|not on a CUDA device"),
    ):
        rnnfast.RNN(3, 5)(torch.ones(2, 1, 3))
