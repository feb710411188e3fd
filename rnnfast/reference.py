"""The executable specification: one layer, one direction, forward and backward, in plain PyTorch.

    z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh,    h_t = act(z_t),    act = tanh or ReLU

with the shapes of `torch.nn.RNN <https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html>`_
for a single layer and direction: ``T`` steps, ``B`` sequences, ``I`` input and ``H`` hidden
features. Every kernel is tested against these functions in float64, and they run wherever no
kernel applies. They are differentiable any number of times, in reverse and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "check_directions",
    "check_layer",
    "rnn_layer",
    "rnn_layer_backward",
    "rnn_layer_double_backward",
    "unknown_nonlinearity",
]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
_REDUCED = (torch.bfloat16, torch.float16)


def unknown_nonlinearity(nonlinearity: object) -> RuntimeError:
    """The compiled op's error about a nonlinearity that is neither ``"tanh"`` nor ``"relu"``."""
    return RuntimeError(
        f"rnnfast: unknown nonlinearity '{nonlinearity}', expected 'tanh' or 'relu'"
    )


def check_layer(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> None:
    """Raise RuntimeError unless the tensors form one layer, as the compiled op does."""
    if nonlinearity not in _ACTIVATIONS:
        raise unknown_nonlinearity(nonlinearity)
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(f"rnnfast: expected input of {rank} dimensions, got {list(input.shape)}")
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(
            "rnnfast: expected w_ih and w_hh of 2 dimensions, got "
            f"{list(w_ih.shape)} and {list(w_hh.shape)}"
        )
    input_size, hidden_size = input.shape[-1], w_hh.shape[0]
    if input_size == 0 or hidden_size == 0:
        raise RuntimeError(
            "rnnfast: input_size and hidden_size must be greater than zero, got "
            f"{input_size} and {hidden_size}"
        )
    if batch_sizes is not None and (batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1):
        raise RuntimeError(
            "rnnfast: expected batch_sizes to be a contiguous 1-D int64 tensor on the CPU, got "
            f"{list(batch_sizes.shape)} of {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    expected: list[tuple[str, Tensor | None, list[int]]] = [
        ("w_ih", w_ih, [hidden_size, input_size]),
        ("w_hh", w_hh, [hidden_size, hidden_size]),
        ("b_ih", b_ih, [hidden_size]),
        ("b_hh", b_hh, [hidden_size]),
    ]
    if batch_sizes is None:
        expected.append(("hx", hx, [input.shape[1], hidden_size]))
    elif hx is not None:
        expected.append(("hx", hx, [hx.shape[0], hidden_size]))
    for name, x, shape in expected:
        if x is None:
            continue
        if list(x.shape) != shape:
            raise RuntimeError(f"rnnfast: expected {name} of size {shape}, got {list(x.shape)}")
        if x.dtype != input.dtype:
            raise RuntimeError(
                f"rnnfast: expected {name} of dtype {input.dtype} like the input, got {x.dtype}"
            )
        if x.device != input.device:
            raise RuntimeError(
                f"rnnfast: expected {name} on {input.device} like the input, got {x.device}"
            )


def check_directions(hx: Tensor | None, weights: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless these are of two directions, as the compiled op does first."""
    if len(weights) not in (4, 8):
        raise RuntimeError(
            f"rnnfast: expected 4 weights, or 8 with biases, for two directions, got {len(weights)}"
        )
    if hx is not None and (hx.dim() != 3 or hx.shape[0] != 2):
        raise RuntimeError(
            f"rnnfast: expected hx of 3 dimensions, the first 2, got {list(hx.shape)}"
        )
    forth, back = weights[1], weights[len(weights) // 2 + 1]
    if forth.shape != back.shape:
        raise RuntimeError(
            "rnnfast: expected w_hh of one size in both directions, got "
            f"{list(forth.shape)} and {list(back.shape)}"
        )


def _each(f: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> list[Any]:
    return [x if x is None else f(x) for x in tensors]


def _sizes_of(input: Tensor, hx: Tensor | None, batch_sizes: Tensor) -> list[int]:
    sizes: list[int] = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for t, n in enumerate(sizes):
        if n <= 0 or (t > 0 and n > sizes[t - 1]):
            raise RuntimeError(
                "rnnfast: expected batch_sizes to be positive and never increasing, "
                f"got {n} at step {t}"
            )
    if sum(sizes) != input.shape[0]:
        raise RuntimeError(
            f"rnnfast: expected packed input of {sum(sizes)} rows, the sum of batch_sizes, "
            f"got {input.shape[0]}"
        )
    if hx is not None and hx.shape[0] != sizes[0]:
        raise RuntimeError(
            f"rnnfast: expected hx of size {[sizes[0], hx.shape[1]]}, got {list(hx.shape)}"
        )
    return sizes


def _last(steps: Sequence[Tensor]) -> Tensor:
    """The last row of each sequence, from the steps of a batch sorted by decreasing length."""
    final = []
    live = 0
    for step in reversed(steps):
        final.append(step[live:])
        live = max(live, step.shape[0])
    return torch.cat(final) if len(final) > 1 else final[0]


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
    """Run one layer in one direction over all steps.

    Args:
        input: ``[T, B, I]``, or packed ``[rows, I]`` with ``batch_sizes``.
        hx: initial state ``[B, H]``; None is zeros.
        w_ih: ``[H, I]``.
        w_hh: ``[H, H]``.
        b_ih: ``[H]`` or None.
        b_hh: ``[H]`` or None.
        batch_sizes: int64 ``[T]`` on the CPU, as in a PackedSequence, or None.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        reverse: walk from the last step to the first.

    Returns:
        ``out`` of ``[T, B, H]`` (packed: ``[rows, H]``) and ``h_n`` of ``[B, H]``, the state after
        each sequence's last visited step. bfloat16 and float16 are storage types: the arithmetic
        and the carried state are float32.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not form a layer.
    """
    device_type = input.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(x: Tensor) -> Tensor:
            kept = x.dtype == torch.float64 or not x.is_floating_point()
            return x if kept else x.to(dtype)

        narrow = _each(cast, input, hx, w_ih, w_hh, b_ih, b_hh)
        layer: Any = (*narrow, batch_sizes, nonlinearity, reverse)
        with torch.autocast(device_type, enabled=False):
            return rnn_layer(*layer)

    check_layer(input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity)
    if input.dtype in _REDUCED:
        wide: Any = (
            *_each(Tensor.float, input, hx, w_ih, w_hh, b_ih, b_hh),
            batch_sizes,
            nonlinearity,
            reverse,
        )
        out, h_n = rnn_layer(*wide)
        return out.to(input.dtype), h_n.to(input.dtype)

    act = _ACTIVATIONS[nonlinearity]
    projected = F.linear(input, w_ih, b_ih)
    if b_hh is not None:  # not b_ih + b_hh: each is to have a gradient of its own
        projected = projected + b_hh
    if batch_sizes is None:
        steps = list(projected.unbind(0))
    else:
        steps = list(torch.split(projected, _sizes_of(input, hx, batch_sizes)))

    start = steps[0].new_zeros(steps[0].shape) if hx is None else hx
    h = start[:0]
    for t in _order(len(steps), reverse):
        h = act(steps[t] + F.linear(_entering(h, steps[t].shape[0], start), w_hh))
        steps[t] = h
    h_n = steps[0].clone() if reverse else _last(steps).clone()
    return (torch.stack(steps) if batch_sizes is None else torch.cat(steps)), h_n


def _pre_activation_gradients(
    hs: Sequence[Tensor],
    gs: Sequence[Tensor],
    grad_h_n: Tensor | None,
    w_hh: Tensor,
    nonlinearity: str,
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """``dh_t`` and ``dz_t`` of :func:`rnn_layer_backward` for every step."""
    dhs, dzs = list(hs), list(hs)
    dz: Tensor | None = None
    for t in _order(len(hs), not reverse):
        h, g = hs[t], gs[t]
        live, carried = h.shape[0], 0 if dz is None else min(dz.shape[0], h.shape[0])
        parts = []
        if carried and dz is not None:
            parts.append(g[:carried] + dz[:carried] @ w_hh)
        if carried < live:
            end = g[carried:]
            parts.append(end if grad_h_n is None else end + grad_h_n[carried:live])
        if len(parts) > 1:
            dhs[t] = torch.cat(parts)
        else:  # none of an empty batch
            dhs[t] = parts[0] if parts else g
        dzs[t] = dz = _through(dhs[t], h, nonlinearity)
    return dhs, dzs


def _rows(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The rows of each step, of a dense or packed tensor."""
    return list(torch.split(x.flatten(0, -2), sizes))


def _through(d: Tensor, h: Tensor, nonlinearity: str) -> Tensor:
    """``d act'``, from the output ``h``."""
    return d * (1 - h * h) if nonlinearity == "tanh" else torch.where(h <= 0, 0.0, d)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _entering(h: Tensor, live: int, start: Tensor) -> Tensor:
    """The state that enters a step of ``live`` sequences: ``h`` of the step before, and ``start``
    of the sequences that begin here.
    """
    carried = h[:live]
    begin = carried.shape[0]
    return carried if begin == live else torch.cat([carried, start[begin:live]])


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of ``input, hx, w_ih, w_hh`` and of either bias, from those of the outputs.

    With ``g_t`` the gradient of ``out_t`` (plus that of ``h_n`` at each sequence's last visited
    step), the recurrence runs against the forward's direction::

        dh_t = g_t + W_hh^T dz_{t+1},    dz_t = dh_t * act'(h_t)

    where ``act'`` is ``1 - h^2`` for tanh; of ReLU, ``dz_t`` is 0 where ``h_t <= 0`` and else
    ``dh_t``, which so passes where ``h_t`` is NaN, as in PyTorch. The rest is
    ``d_input_t = W_ih^T dz_t``, ``d_w_ih = sum dz_t x_t^T``, ``d_w_hh = sum dz_t h_{t-1}^T``,
    ``d_bias = sum dz_t``.

    Args:
        grad_out: as ``out``; None is zeros.
        grad_h_n: ``[B, H]``; None is zeros.
        input: as in :func:`rnn_layer`, and so ``hx``, ``w_ih``, ``w_hh``, ``batch_sizes``,
            ``nonlinearity`` and ``reverse``.
        out: the forward's, ``[T, B, H]`` or packed ``[rows, H]``.

    Returns:
        ``d_input`` like ``input``; ``d_hx`` of ``[B, H]``, None without ``hx``; ``d_w_ih`` of
        ``[H, I]``, ``d_w_hh`` of ``[H, H]`` and ``d_bias`` of ``[H]``, in the dtype of the input;
        of bfloat16 and float16 the arithmetic is float32.
    """
    if input.dtype in _REDUCED:
        wide: Any = (
            *_each(Tensor.float, grad_out, grad_h_n, input, hx, w_ih, w_hh, out),
            batch_sizes,
            nonlinearity,
            reverse,
        )
        grads = rnn_layer_backward(*wide)
        return tuple(_each(lambda x: x.to(input.dtype), *grads))

    sizes = [input.shape[1]] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    hs = _rows(out, sizes)
    gs = _rows(torch.zeros_like(out) if grad_out is None else grad_out, sizes)
    _, dzs = _pre_activation_gradients(hs, gs, grad_h_n, w_hh, nonlinearity, reverse)
    dz = torch.cat(dzs)
    h_prev = torch.cat(_shifted(hs, hx, reverse))
    d_hx = None if hx is None else (_last(dzs) if reverse else dzs[0]) @ w_hh
    d_input = (dz @ w_ih).reshape(input.shape)
    return d_input, d_hx, dz.t() @ input.flatten(0, -2), dz.t() @ h_prev, dz.sum(0)


def _shifted(hs: Sequence[Tensor], hx: Tensor | None, reverse: bool) -> list[Tensor]:
    """``h_{t-1}`` of every row: ``hx``, or zeros, where a sequence begins."""
    order = _order(len(hs), reverse)
    start = hs[0].new_zeros(hs[0].shape) if hx is None else hx
    shifted, h = list(hs), start[:0]
    for t in order:
        shifted[t] = _entering(h, hs[t].shape[0], start)
        h = hs[t]
    return shifted


def rnn_layer_double_backward(
    gg_input: Tensor | None,
    gg_hx: Tensor | None,
    gg_w_ih: Tensor | None,
    gg_w_hh: Tensor | None,
    gg_bias: Tensor | None,
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
) -> tuple[Tensor | None, ...]:
    """Gradients of ``grad_out, grad_h_n, input, hx, w_ih, w_hh, out`` from those, ``gg_*``, of the
    results of :func:`rnn_layer_backward`.

    With ``q_t`` and ``r_t`` the gradients of ``dz_t`` and ``dh_t``, the recurrence is linear and
    runs in the forward's direction, from ``r_{-1} = gg_hx`` on::

        a_t = W_ih gg_input_t + gg_w_ih x_t + gg_w_hh h_{t-1} + gg_bias
        q_t = a_t + W_hh r_{t-1},    r_t = q_t * act'(h_t)

    and the rest is ``r_t`` for ``grad_out_t`` and, at each sequence's last visited step,
    ``grad_h_n``; ``gg_w_ih^T dz_t`` for ``input_t``; ``sum dz_t gg_input_t^T`` for ``w_ih``;
    ``sum dz_t r_{t-1}^T`` for ``w_hh``; ``act''(h_t) dh_t q_t + gg_w_hh^T dz_{t+1}`` for ``out_t``,
    with ``act'' = -2 h`` for tanh; and the same last term for ``hx``.

    Args:
        gg_input: like ``input``, and so ``gg_hx, gg_w_ih, gg_w_hh``; ``gg_bias`` is of ``[H]``. Of
            each, None is zeros. The rest is as in :func:`rnn_layer_backward`.

    Returns:
        The seven gradients, each like its tensor; None of what is None.
    """
    if input.dtype in _REDUCED:
        tensors = (gg_input, gg_hx, gg_w_ih, gg_w_hh, gg_bias, grad_out, grad_h_n)
        wide: Any = (
            *_each(Tensor.float, *tensors, input, hx, w_ih, w_hh, out),
            batch_sizes,
            nonlinearity,
            reverse,
        )
        grads = rnn_layer_double_backward(*wide)
        return tuple(_each(lambda x: x.to(input.dtype), *grads))

    sizes = [input.shape[1]] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    h, x = out.flatten(0, -2), input.flatten(0, -2)
    hs = _rows(out, sizes)
    gs = _rows(torch.zeros_like(out) if grad_out is None else grad_out, sizes)
    dhs, dzs = _pre_activation_gradients(hs, gs, grad_h_n, w_hh, nonlinearity, reverse)
    dh, dz = torch.cat(dhs), torch.cat(dzs)

    a = torch.zeros_like(h)
    if gg_input is not None:
        a = a + gg_input.flatten(0, -2) @ w_ih.t()
    if gg_w_ih is not None:
        a = a + x @ gg_w_ih.t()
    if gg_w_hh is not None:
        a = a + torch.cat(_shifted(hs, hx, reverse)) @ gg_w_hh.t()
    if gg_bias is not None:
        a = a + gg_bias
    start = hs[0].new_zeros(hs[0].shape) if gg_hx is None else gg_hx
    qs, r_prev, rs = _rows(a, sizes), list(hs), list(hs)
    r = start[:0]
    for t in _order(len(hs), reverse):
        r_prev[t] = _entering(r, sizes[t], start)
        qs[t] = qs[t] + r_prev[t] @ w_hh.t()
        rs[t] = r = _through(qs[t], hs[t], nonlinearity)

    d_out = torch.zeros_like(h) if nonlinearity == "relu" else -2 * h * dh * torch.cat(qs)
    d_hx = None
    if gg_w_hh is not None:
        passed = [step @ gg_w_hh for step in dzs]
        d_outs = _rows(d_out, sizes)
        for before, t in pairwise(_order(len(hs), reverse)):
            n = min(sizes[before], sizes[t])
            d_outs[before] = d_outs[before] + F.pad(passed[t][:n], (0, 0, 0, sizes[before] - n))
        d_out = torch.cat(d_outs)
        if hx is not None:
            d_hx = _last(passed) if reverse else passed[0]
    r_n = None
    if grad_h_n is not None:
        r_n = rs[0] if reverse else _last(rs)
    return (
        None if grad_out is None else torch.cat(rs).reshape(out.shape),
        r_n,
        None if gg_w_ih is None else (dz @ gg_w_ih).reshape(input.shape),
        d_hx,
        None if gg_input is None else dz.t() @ gg_input.flatten(0, -2),
        dz.t() @ torch.cat(r_prev),
        d_out.reshape(out.shape),
    )
