"""``torch.ops.rnnfast`` on a GPU by Triton: the large products around the time loop, its launches,
and the table of their configurations. The kernels are in :mod:`rnnfast.triton_kernels`.

Under ``TRITON_INTERPRET=1`` the same code runs on CPU tensors, in Triton's interpreter: that is how
it is tested on machines without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from . import dispatch

__all__ = [
    "Config",
    "configuration",
    "register",
    "rnn_layer",
    "rnn_layer_backward",
    "using",
    "why_not",
]

#: Whether Triton interprets kernels on the CPU instead of compiling them. Triton reads the variable
#: when it decorates a kernel, so it counts as it was when rnnfast was imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# ------------------------------------------------------------------------------ configurations


@dataclass(frozen=True)
class Config:
    """How a layer is laid out on the GPU; :mod:`rnnfast.triton_kernels` says what each means."""

    rows: int  #: of the batch, in a program
    tile: int  #: units, a power of two
    tiles: int  #: tile * tiles >= hidden_size
    warps: int
    dot: bool  #: tensor cores, W_hh in shared memory; else FMA, W_hh in registers

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of shared memory, at most: the matrix and the state as an operand."""
        units = self.tile * self.tiles
        if not self.dot:
            return 2 * 8 * units * self.warps  # partial sums of the warps
        return units * units * itemsize + self.rows * units * 2 * itemsize


# (largest H, tile, tiles, warps). A matrix in registers costs each thread tile^2 tiles^2 / (32
# warps) of its 255; one in shared memory must leave room for the state in a block's 227 KB (163 on
# compute capability 8.0). Chosen so that nothing spills (tests/test_triton_compile.py); only the
# last row of _FMA32 spills some loop invariants. No choice was measured on a GPU yet.
_FMA32 = ((16, 16, 1, 1), (32, 32, 1, 2), (64, 64, 1, 4), (128, 64, 2, 8), (192, 64, 3, 8),
          (224, 32, 7, 8))  # fmt: skip
_FMA64 = ((16, 16, 1, 1), (32, 32, 1, 4), (64, 64, 1, 4), (96, 32, 3, 8))
_DOT16 = ((16, 16, 1, 1), (32, 32, 1, 2), (64, 64, 1, 4), (128, 128, 1, 8), (192, 64, 3, 8),
          (256, 64, 4, 8))  # fmt: skip
_DOT32 = ((16, 16, 1, 1), (32, 32, 1, 2), (64, 64, 1, 4), (128, 128, 1, 8), (192, 64, 3, 8),
          (224, 32, 7, 8))  # fmt: skip

#: (dtype, whether by TF32) -> the rows above.
_TABLE = {
    (torch.float32, False): _FMA32,
    (torch.float32, True): _DOT32,
    (torch.float64, False): _FMA64,
    (torch.bfloat16, False): _DOT16,
    (torch.float16, False): _DOT16,
}
#: A tile of 32 rows instead of 16 once 16 would take more than two waves of an H100's 132
#: multiprocessors, and registers allow it.
_MANY_ROWS, _LARGEST_WITH_MANY = 2 * 16 * 132, 128

_override: Config | None = None


@contextmanager
def using(config: Config) -> Iterator[None]:
    """Use a configuration other than the table's, for layers that it fits, within a block."""
    global _override
    before, _override = _override, config
    try:
        yield
    finally:
        _override = before


def largest_hidden_size(dtype: torch.dtype, tf32: bool = False) -> int:
    """The largest H that the table has for a dtype, 0 if it has none."""
    rows = _TABLE.get((dtype, tf32 and dtype == torch.float32))
    return rows[-1][0] if rows else 0


def configuration(hidden_size: int, batch: int, dtype: torch.dtype, tf32: bool = False) -> Config:
    """The table's configuration for a layer, or the one of :func:`using`.

    Raises:
        RuntimeError: hidden_size is larger than one block can hold.
    """
    if _override is not None and _override.tile * _override.tiles >= hidden_size:
        return _override
    tf32 = tf32 and dtype == torch.float32
    dot = tf32 or dtype in (torch.bfloat16, torch.float16)
    many = dot and batch > _MANY_ROWS and hidden_size <= _LARGEST_WITH_MANY
    rows = (32 if many else 16) if dot else 1
    for largest, tile, tiles, warps in _TABLE[dtype, tf32]:
        if hidden_size <= largest:
            return Config(rows, tile, tiles, warps, dot)
    if INTERPRETED:  # an interpreter has no registers to run out of
        return Config(rows, 128, -(-hidden_size // 128), 8, dot)
    raise RuntimeError(
        f"rnnfast: the Triton kernel holds up to {largest_hidden_size(dtype, tf32)} units in "
        f"{dtype}, got a hidden_size of {hidden_size}"
    )


def why_not(input: Tensor, hidden_size: int | None = None) -> str | None:
    """Why the kernels cannot run a call, or None."""
    if input.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"{input.dtype} is none of float32, float64, bfloat16, float16."
    if input.device.type == "meta":  # the op's fake kernel
        return None
    if INTERPRETED:
        if input.device.type != "cpu":
            return f"the input is on {input.device}, and TRITON_INTERPRET=1 runs on the CPU."
    elif input.device.type == "cpu":
        return "the input is on the CPU, and TRITON_INTERPRET=1 is not set."
    elif input.device.type != "cuda":
        return f"the input is on {input.device}, not on a GPU."
    if _import_error() is not None:
        return _import_error()
    if INTERPRETED:
        return None
    return _why_not_on(input.get_device(), input.dtype, hidden_size, dispatch.tf32_allowed())


@dispatch.constant_in_a_graph
@cache
def _import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})."
    return None


@dispatch.constant_in_a_graph
@cache
def _why_not_on(device: int, dtype: torch.dtype, hidden_size: int | None, tf32: bool) -> str | None:
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return (
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, "
            "below 8.0."
        )
    if hidden_size is None:
        return None
    largest = largest_hidden_size(dtype, tf32)
    if hidden_size > largest:
        return f"a hidden_size of {hidden_size} is above {largest}, all that one block holds."
    needed = configuration(hidden_size, 1, dtype, tf32).shared_memory(dtype.itemsize)
    available = properties.shared_memory_per_block_optin
    if needed > available:
        return (
            f"a hidden_size of {hidden_size} in {dtype} needs {needed} bytes of shared memory, "
            f"and a block on {properties.name} has {available}."
        )
    return None


# ------------------------------------------------------------------------------------- the ops


class _Steps:
    """Where the rows of each step lie, on the host and, for packed rows, on the device."""

    def __init__(self, input: Tensor, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.reverse = reverse
        self.table: Tensor | None = None
        if batch_sizes is None:
            self.seq_len, self.batch = input.shape[:2]
            return
        self.seq_len, self.batch = batch_sizes.shape[0], int(batch_sizes[0])
        table = torch.stack([batch_sizes.cumsum(0) - batch_sizes, batch_sizes])
        if input.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "rnnfast: packed sequences cannot be captured in a CUDA graph: their "
                    "batch_sizes are on the CPU"
                )
            # From pinned memory the copy is queued and nobody waits for it; the allocator keeps
            # the memory until it is done.
            table = table.pin_memory().to(input.device, non_blocking=True)
        self.table = table  # int64 [2, T]: the first row of each step, and its number of rows

    def first(self, x: Tensor) -> Tensor:
        """The rows of step 0, ``[B, F]``."""
        return x[0] if self.table is None else x[: self.batch]

    def last(self, x: Tensor) -> Tensor:
        """The last row of each sequence, ``[B, F]``."""
        if self.table is None:
            return x[-1]
        first, sizes = self.table
        row = torch.arange(self.batch, device=x.device)
        length = torch.searchsorted(-sizes, -row)  # steps with more than `row` rows
        return x[first[length - 1] + row]

    def pairs(self, at: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``at``, and the rows of ``before`` that the forward visits one step earlier.

        Both flat, without those whose predecessor is the initial state.
        """
        early, late = (at, before) if self.reverse else (before, at)
        if self.table is None:
            early, late = early[:-1].flatten(0, 1), late[1:].flatten(0, 1)
        else:
            # A row b of step t > 0 has its partner in step t - 1, batch_sizes[t - 1] rows above.
            _, sizes = self.table
            rows = torch.arange(self.batch, late.shape[0], device=late.device)
            above = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=rows.shape[0])
            early, late = early[rows - above], late[self.batch :]
        return (early, late) if self.reverse else (late, early)


def _check_usable(input: Tensor, hidden_size: int) -> None:
    why = why_not(input, hidden_size)
    if why is not None:
        raise RuntimeError(f"rnnfast: the Triton kernel cannot run: {why}")


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def row_stride(hidden_size: int, config: Config) -> int:
    """Elements from row to row of the W_hh that the backward reads.

    Multiples of 16 where W_hh is in registers: for rows that begin anywhere, read a number at a
    time, Triton 3.6 spills up to 2.7 KB a thread. Up to 32 units there is no need of a copy.
    """
    aligned = hidden_size > 32 and not config.dot
    return -(-hidden_size // 16) * 16 if aligned else hidden_size


def _aligned(w_hh: Tensor, config: Config) -> Tensor:
    """The same numbers :func:`row_stride` apart; nothing reads those between."""
    H = w_hh.shape[0]
    stride = row_stride(H, config)
    return w_hh.contiguous() if stride == H else w_hh.new_empty(H, stride)[:, :H].copy_(w_hh)


def _plain(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their operands, whatever autocast is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _launch(kernel: str, batch: int, config: Config, *args: Any, **constants: Any) -> None:
    from . import triton_kernels

    run: Any = getattr(triton_kernels, kernel)[(-(-batch // config.rows),)]
    run(
        *args, **constants, INTERPRETED=INTERPRETED, ROWS=config.rows, TILE=config.tile,
        TILES=config.tiles, DOT=config.dot, num_warps=config.warps, num_stages=1,
        enable_fp_fusion=True,  # Triton 3.9 warns that it will no longer be the default
    )  # fmt: skip


def _constants(dtype: torch.dtype, nonlinearity: str, reverse: bool) -> dict[str, Any]:
    import triton.language as tl

    return {
        "RELU": nonlinearity == "relu",
        "REVERSE": reverse,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32",
    }


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of step, row and feature; a packed tensor has no stride of a step."""
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (0, *x.stride())  # type: ignore[return-value]


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.rnnfast.rnn_layer``; arguments and results as :func:`reference.rnn_layer`."""
    torch.ops.rnnfast._check_layer.default(
        input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity
    )
    _check_usable(input, w_hh.shape[0])
    hidden_size, input_size = w_ih.shape
    steps = _Steps(input, batch_sizes, reverse)
    out = input.new_empty((*input.shape[:-1], hidden_size))
    h_n = input.new_empty((steps.batch, hidden_size))
    if h_n.numel() == 0:
        return out, h_n
    config = configuration(hidden_size, steps.batch, input.dtype, dispatch.tf32_allowed())
    # Fused, the projection saves a launch and z's way through memory, and costs registers: a
    # column of W_ih for each feature and tile.
    fused = input_size * config.tiles <= 8
    x = input
    with _plain(input.device), _on(input.device):
        if not fused:
            x = _project(input, w_ih)
        _launch(
            "rnn_forward", steps.batch, config, x, w_ih.contiguous() if fused else None,
            _contiguous(b_ih), _contiguous(b_hh), _contiguous(hx), w_hh.contiguous(), out, h_n,
            steps.table, steps.seq_len, steps.batch, *_strides(x), H=hidden_size,
            I=input_size if fused else 0, **_constants(input.dtype, nonlinearity, reverse),
        )  # fmt: skip
    return out, h_n


def _project(input: Tensor, w_ih: Tensor) -> Tensor:
    """``x W_ih^T``, in float32 for 16-bit types: z is not rounded to storage before it is used."""
    x, w = _flat(input), w_ih.t()
    if input.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(x, w, out_dtype=torch.float32) if input.is_cuda else x.float() @ w.float()
    else:
        z = x @ w
    return z.view(*input.shape[:-1], w_ih.shape[0])


def rnn_layer_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    out: Tensor,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """``torch.ops.rnnfast.rnn_layer_backward``: as :func:`reference.rnn_layer_backward`, only the
    gradients that ``output_mask`` asks for.

    The products take ``dz`` in the dtype of the layer, as cuDNN's do.
    """
    torch.ops.rnnfast._check_layer.default(
        input, hx, w_ih, w_hh, None, None, batch_sizes, nonlinearity
    )
    torch.ops.rnnfast._check_layer_grads.default(grad_out, grad_h_n, input, w_hh, out, batch_sizes)
    _check_usable(input, w_hh.shape[0])
    need_x, need_h, need_w_ih, need_w_hh, need_b = output_mask
    steps = _Steps(input, batch_sizes, reverse)
    d_hx = input.new_empty(hx.shape) if need_h and hx is not None else None
    dz = out.new_empty(out.shape)
    if dz.numel() == 0:
        shapes = (input.shape, None, w_ih.shape, w_hh.shape, w_hh.shape[:1])
        d_x, _, d_w_ih, d_w_hh, d_b = (
            input.new_zeros(shape) if needed and shape is not None else None
            for needed, shape in zip(output_mask, shapes, strict=True)
        )
        return d_x, d_hx, d_w_ih, d_w_hh, d_b

    config = configuration(w_hh.shape[0], steps.batch, input.dtype, dispatch.tf32_allowed())
    d_x = d_w_ih = d_w_hh = d_b = None
    with _plain(input.device), _on(input.device):
        _launch(
            "rnn_backward", steps.batch, config, grad_out, _contiguous(grad_h_n),
            out.contiguous(), _aligned(w_hh, config), dz, d_hx, steps.table, steps.seq_len,
            steps.batch, *_strides(grad_out), row_stride(w_hh.shape[0], config), H=w_hh.shape[0],
            **_constants(input.dtype, nonlinearity, reverse),
        )  # fmt: skip
        rows = _flat(dz)
        if need_x:
            d_x = (rows @ w_ih).view(input.shape)
        if need_w_ih:
            d_w_ih = rows.t() @ _flat(input)
        if need_b:
            d_b = rows.sum(0)
        if need_w_hh:
            at, before = steps.pairs(dz, out)
            d_w_hh = at.t() @ before
            if hx is not None:
                begin = steps.last(dz) if reverse else steps.first(dz)
                d_w_hh = torch.addmm(d_w_hh, begin.t(), hx)
    return d_x, d_hx, d_w_ih, d_w_hh, d_b


# -------------------------------------------------------------------------------- registration


_ops: library.Library | None = None
_is_ours: dispatch.IsOurs | None = None
_shared_keys: set[str] = set()  # dispatch keys whose calls go through choose_between


def register(ops: library.Library, is_ours: dispatch.IsOurs) -> None:
    """Register the ops' kernels for CUDA, unless the extension has some.

    ``is_ours`` then says which calls are Triton's, once it takes any.
    """
    global _ops, _is_ours
    _ops, _is_ours = ops, is_ours
    if not dispatch.has_compiled_kernels("CUDA"):
        ops.impl("rnn_layer", rnn_layer, "CUDA")  # type: ignore[no-untyped-call]
        ops.impl("rnn_layer_backward", rnn_layer_backward, "CUDA")  # type: ignore[no-untyped-call]
    if INTERPRETED:
        take_calls()


def take_calls() -> None:
    """Where the extension has kernels, put Triton's beside them.

    Left until Triton is first chosen, since from then on every call of the ops enters Python.
    """
    key = "CPU" if INTERPRETED else "CUDA"
    if _ops is None or _is_ours is None or key in _shared_keys:
        return
    if dispatch.has_compiled_kernels(key):
        _shared_keys.add(key)
        dispatch.choose_between(_ops, key, _is_ours, rnn_layer, rnn_layer_backward)
