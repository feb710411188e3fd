"""Batching rules of the ops: what ``torch.vmap`` of one call becomes.

Where the weights are shared, the vmapped dimension joins the batch and there is one call: with
``N`` members, row ``b`` of member ``n`` becomes row ``b * N + n``. A packed batch stays sorted by
length this way, with ``N`` times each of its ``batch_sizes``. Where every member has weights of its
own (an ensemble), or asks for their gradients (per-sample gradients), each is a call of its own:
the kernel keeps one ``W_hh`` at a time, and sums over all its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

__all__ = ["register"]

_Rule = Callable[..., tuple[Any, Any]]


def _join(x: Tensor | None, dim: int | None, members: int) -> Tensor | None:
    """``[..., B, F]``, vmapped at ``dim`` (None: shared), to ``[..., B * N, F]``."""
    if x is None:
        return None
    if dim is None:
        x = x.unsqueeze(-2).expand(*x.shape[:-1], members, x.shape[-1])
    else:
        x = x.movedim(dim, -2)
    return x.flatten(-3, -2)


def _part(x: Tensor | None, members: int) -> tuple[Tensor | None, int | None]:
    """The inverse of :func:`_join`, and where the vmapped dimension is."""
    if x is None:
        return None, None
    x = x.unflatten(-2, (x.shape[-2] // members, members))  # type: ignore[no-untyped-call]
    return x, x.dim() - 2


def _each(op: Any, members: int, dims: Any, args: Any) -> tuple[Any, Any]:
    """One call per member, the results stacked."""
    results = [
        op(*(x.select(d, n) if isinstance(d, int) else x for x, d in zip(args, dims, strict=True)))
        for n in range(members)
    ]
    columns = list(zip(*results, strict=True))
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in columns)
    return stacked, tuple(None if x is None else 0 for x in stacked)


def _rnn_layer(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    input, hx, w_ih, w_hh, b_ih, b_hh, batch_sizes, nonlinearity, reverse = args
    op, members = torch.ops.rnnfast.rnn_layer.default, info.batch_size
    if any(dim is not None for dim in dims[2:7]):
        return _each(op, members, dims, args)
    results = op(
        _join(input, dims[0], members),
        _join(hx, dims[1], members),
        w_ih, w_hh, b_ih, b_hh,
        None if batch_sizes is None else batch_sizes * members,
        nonlinearity, reverse,
    )  # fmt: skip
    outputs, out_dims = zip(*(_part(x, members) for x in results), strict=True)
    return outputs, out_dims


def _rnn_layer_backward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    grad_out, grad_h_n, input, hx, w_ih, w_hh, out, batch_sizes, nonlinearity, reverse, mask = args
    op, members = torch.ops.rnnfast.rnn_layer_backward.default, info.batch_size
    own_weights = any(dims[i] is not None for i in (4, 5, 7))
    if own_weights or any(mask[2:]):
        return _each(op, members, dims, args)
    d_input, d_hx, *_ = op(
        _join(grad_out, dims[0], members),
        _join(grad_h_n, dims[1], members),
        _join(input, dims[2], members),
        _join(hx, dims[3], members),
        w_ih, w_hh,
        _join(out, dims[6], members),
        None if batch_sizes is None else batch_sizes * members,
        nonlinearity, reverse, mask,
    )  # fmt: skip
    outputs, out_dims = zip(*(_part(x, members) for x in (d_input, d_hx)), strict=True)
    return (*outputs, None, None, None), (*out_dims, None, None, None)


def _of_any_size(rule: _Rule) -> _Rule:
    """The rule, for no members too: what it makes of one member of zeros, less that member.

    So errors, shapes and the ways of gradients are those of other sizes.
    """

    def with_none(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        if info.batch_size > 0:
            return rule(info, dims, *args)
        one = [
            torch.cat([x, x.new_zeros(*x.shape[:d], 1, *x.shape[d + 1 :])], d)
            if isinstance(d, int)
            else x
            for x, d in zip(args, dims, strict=True)
        ]
        outputs, out_dims = rule(info._replace(batch_size=1), dims, *one)
        pairs = zip(outputs, out_dims, strict=True)
        return tuple(x if x is None else x.narrow(d, 0, 0) for x, d in pairs), out_dims

    return with_none


def register() -> None:
    """Register the rules with the ops that the extension has defined."""
    rules: dict[str, _Rule] = {
        "rnnfast::rnn_layer": _rnn_layer,
        "rnnfast::rnn_layer_backward": _rnn_layer_backward,
    }
    for name, rule in rules.items():
        library.register_vmap(name, _of_any_size(rule))
