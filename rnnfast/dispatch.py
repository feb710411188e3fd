"""PyTorch's dispatcher: which ops have compiled kernels, how two kernels share a dispatch key, and
what else decides a call before one of them runs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, library

__all__ = [
    "IsOurs",
    "choose_between",
    "constant_in_a_graph",
    "has_compiled_kernels",
    "one_direction_at_a_time",
    "precision",
    "tf32_allowed",
]

#: Of a call's input and hidden_size, and whether it is packed: whether some kernel is to run it.
IsOurs = Callable[[Tensor, int, bool], bool]
_Asked = TypeVar("_Asked", bound=Callable[..., Any])


def constant_in_a_graph(question: _Asked) -> _Asked:
    """Make the answer a constant in torch.compile's graphs, which cannot ask for it.

    In a function of its own, because Dynamo warns of each cached function that it meets. It gets
    the mark of torch.compiler.assume_constant_result, which would first import all of Dynamo, and
    that takes as long as ``import torch``.
    """

    @wraps(question)
    def ask(*arguments: Any) -> Any:
        return question(*arguments)

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return cast(_Asked, ask)


@constant_in_a_graph
def tf32_allowed() -> bool:
    """Whether float32 products may run in TF32: where both cuBLAS and cuDNN's RNN may.

    cuDNN's flag alone is on by default; a user who has not asked for TF32 in matrix products gets
    float32 here. See "TensorFloat-32" in the notes on CUDA of PyTorch's documentation.
    """
    matmul: str = torch.backends.cuda.matmul.fp32_precision
    rnn: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return matmul == rnn == "tf32"


@constant_in_a_graph
def precision(dtype: torch.dtype) -> str:
    """What a layer's products on a GPU are computed in, as tools/gpu_check.py's grid names it.

    A dtype's name, under autocast of what it casts to; float32's with ``ieee`` or ``tf32``, or
    ``default`` under PyTorch's own flags: float32 here, beside cuDNN's TF32.
    """
    if dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        return name
    if tf32_allowed():
        return f"{name} tf32"
    theirs: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return f"{name} {'default' if theirs == 'tf32' else 'ieee'}"


@cache
def has_compiled_kernels(key: str) -> bool:
    """Whether the extension has kernels of its own for a dispatch key; first asked by register."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("rnnfast::rnn_layer", key))


def one_direction_at_a_time(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.rnnfast.rnn_bidirectional_layer`` by calls of ``rnn_layer``."""
    half = len(weights) // 2
    biases = [None] * (4 - half)
    outs, states = zip(
        *(
            torch.ops.rnnfast.rnn_layer.default(
                input, None if hx is None else hx[d], *weights[d * half : (d + 1) * half], *biases,
                batch_sizes, nonlinearity, d == 1,
            )
            for d in (0, 1)
        ),
        strict=True,
    )  # fmt: skip
    return torch.cat(outs, -1), torch.stack(states)


def using_up_nothing(backward: Any) -> Any:
    """``torch.ops.rnnfast._rnn_layer_backward_`` by a kernel of ``rnn_layer_backward``."""

    def run(*args: Any) -> tuple[Tensor | None, ...]:
        *arguments, _, d_w_ih, d_w_hh, d_b = args
        grads = list(backward(*arguments))
        for i, total in enumerate((d_w_ih, d_w_hh, d_b), 2):
            if total is not None and grads[i] is not None:
                total.add_(grads[i])
                grads[i] = None
        return tuple(grads)

    return run


def choose_between(
    ops: library.Library, key: str, is_ours: IsOurs, forward: Any, backward: Any
) -> None:
    """Let a dispatch key's calls run on these kernels where ``is_ours`` says so, and on those
    registered before where not.
    """
    # Of each op: our kernel, and what its arguments say about whether a call is ours.
    ops_of_a_layer: dict[str, tuple[Any, Callable[..., tuple[Any, ...]]]] = {
        "rnn_layer": (
            forward,
            lambda x, hx, w_ih, w_hh, b_ih, b_hh, n, *_: (x, w_hh.shape[0], n is not None),
        ),
        "rnn_layer_backward": (
            backward,
            lambda g, g_n, x, hx, w_ih, w_hh, out, n, *_: (x, w_hh.shape[0], n is not None),
        ),
    }
    if key == "CPU":  # elsewhere the one is composite, and the other never called
        ops_of_a_layer["rnn_bidirectional_layer"] = (
            one_direction_at_a_time,
            lambda x, hx, weights, n, *_: (x, weights[1].shape[0], n is not None),
        )
        ops_of_a_layer["_rnn_layer_backward_"] = (
            using_up_nothing(backward),
            ops_of_a_layer["rnn_layer_backward"][1],
        )
    for op, (kernel, subject) in ops_of_a_layer.items():
        before = library.get_kernel(f"rnnfast::{op}", key)

        def run(
            keyset: Any,
            *args: Any,
            kernel: Any = kernel,
            subject: Any = subject,
            before: Any = before,
        ) -> Any:
            return kernel(*args) if is_ours(*subject(*args)) else before.call_boxed(keyset, *args)

        with warnings.catch_warnings():  # that a kernel is overridden: it is, on purpose
            warnings.simplefilter("ignore", UserWarning)
            ops.impl(op, run, key, with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
