"""``RNN`` and ``RNNCell``: PyTorch's modules with the forward replaced.

Parameters, initialisation, checks, messages and pickles are inherited. ``RNN`` derives from
``nn.RNNBase``, not from ``nn.RNN``: Dynamo refuses every instance of the latter, so it could not be
compiled with ``fullgraph=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, overload

import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backends, functional

if backends.extension_error is None:
    from . import _direct_calls

__all__ = ["RNN", "RNNCell"]

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
_NONLINEARITIES = {mode: name for name, mode in _MODES.items()}


class RNN(nn.RNNBase):
    r"""A drop-in ``torch.nn.RNN``: same constructor, parameters, inputs, outputs and errors.

    .. math:: h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

    or the same with ReLU, as on the page of `torch.nn.RNN
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html>`_.

    Args:
        input_size: features of the input, ``I``.
        hidden_size: features of the state, ``H``.
        num_layers: stacked layers. Default: 1.
        nonlinearity: ``"tanh"`` (default) or ``"relu"``.
        bias: whether the layers have ``b_ih`` and ``b_hh``. Default: True.
        batch_first: input and output are ``[B, T, *]`` instead of ``[T, B, *]``. Default: False.
        dropout: probability of dropout on the outputs of every layer but the last, in training.
            Default: 0.
        bidirectional: whether every layer has a reverse direction too. Default: False.
        device: of the parameters.
        dtype: of the parameters: any floating dtype; bfloat16 and float16 sum in float32.

    Inputs:
        ``input`` of ``[T, B, I]``, ``[B, T, I]``, unbatched ``[T, I]``, or a PackedSequence;
        ``hx`` of ``[D * num_layers, B, H]`` (unbatched ``[D * num_layers, H]``), zeros if absent.
        ``T`` steps, ``B`` sequences; ``D`` is 2 if bidirectional, else 1.

    Outputs:
        ``output`` of ``[T, B, D * H]`` in the layout of the input, and ``h_n`` like ``hx``.

    Raises:
        ValueError, TypeError, RuntimeError: where ``nn.RNN`` raises them.

    Example:
        >>> rnn = rnnfast.RNN(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    nonlinearity: str

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in tuple(_MODES):  # a tuple: the value may be unhashable
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity  # before reset_parameters, which may ask for it
        super().__init__(_MODES[nonlinearity], *args, **kwargs)

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the RNN; shapes and errors are those of the class."""
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            elif sorted_indices is not None and torch.compiler.is_compiling():
                # The state says the size of the batch, which no trace can read from batch_sizes.
                states = self.num_layers * (1 + self.bidirectional)
                hx = data.new_zeros(states, sorted_indices.size(0), self.hidden_size)
            output, h_n = self._run(data, hx, batch_sizes)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(h_n, unsorted_indices)

        dimensions = input.dim()
        if dimensions == 3:
            if hx is not None and hx.dim() != 3:
                raise RuntimeError(
                    f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
                )
            return self._run(input, hx, None)

        if dimensions != 2:
            raise ValueError(
                f"RNN: Expected input to be 2D or 3D, got {dimensions}D tensor instead"
            )
        if hx is not None:
            if hx.dim() != 2:
                raise RuntimeError(
                    f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor"
                )
            hx = hx.unsqueeze(1)
        batch_dim = 0 if self.batch_first else 1
        output, h_n = self._run(input.unsqueeze(batch_dim), hx, None)
        return output.squeeze(batch_dim), h_n.squeeze(1)

    def _run(
        self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        try:
            # Of a subclass an attribute may be anything, and is asked for in Python.
            if type(self) is RNN and backends.plain_calls_are_direct():
                results = _direct_calls.rnn(self, input, hx, batch_sizes)
                if results is not None:
                    return results
            weights = self._current_weights()
            nonlinearity = _NONLINEARITIES.get(self.mode)
            if nonlinearity is None:
                raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
            backend = backends.select(input, self.hidden_size, batch_sizes is not None)
            if functional.takes_whole_calls(backend):
                return functional.rnn_op(  # type: ignore[no-any-return]
                    input, hx, weights, batch_sizes, nonlinearity, self.bias, self.num_layers,
                    self.dropout if self.training else 0.0, self.bidirectional, self.batch_first,
                )  # fmt: skip
        except RuntimeError:
            # The op refuses all that nn.RNN does; nn.RNN's checks (10 % of a small call) run only
            # now, for their messages.
            _say(self._check, input, hx, self._flat_weights, batch_sizes)
            _say(self._check_kinds)
            raise
        self._check(input, hx, weights, batch_sizes)
        return functional.by_layers(backend, functional.Call(
            input, hx, weights,  # type: ignore[arg-type]
            batch_sizes, nonlinearity, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, self.batch_first,
        ))  # fmt: skip

    def _check(
        self,
        input: Tensor,
        hx: Tensor | None,
        weights: list[Tensor | None],
        batch_sizes: Tensor | None,
    ) -> None:
        """Raise nn.RNN's errors."""
        for i, weight in enumerate(weights):
            if weight is None and i:  # the first fails where its dtype is read, as in nn.RNN
                raise TypeError(f"expected Tensor as element {i} in argument 2, but got NoneType")
        if hx is None or (batch_sizes is not None and torch.compiler.is_compiling()):
            self.check_input(input, batch_sizes)  # no trace can read a packed batch's size
        else:
            self.check_forward_args(input, hx, batch_sizes)

    def _check_kinds(self) -> None:
        for name, kind in (("dropout", float), ("bidirectional", bool), ("batch_first", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind | int):
                was = type(value).__name__
                raise TypeError(f"argument '{name}' must be {kind.__name__}, not {was}")

    def _current_weights(self) -> list[Tensor | None]:
        """``_flat_weights``, made the current weights as nn.RNN does before each call.

        Its check reads every weight through ``getattr``, which costs as much as a small call; so
        it is asked only where a weight is not the parameter that it was. A compiled graph leaves
        none on the module: those of a transform (``grad`` of ``functional_call``) end with it.
        """
        if torch.compiler.is_compiling():
            return [getattr(self, name, None) for name in self._flat_weights_names]
        current = map(self._parameters.get, self._flat_weights_names)
        if not all(map(is_, current, self._flat_weights)):
            self._update_flat_weights()
        return self._flat_weights


def _say(check: Callable[..., None], *arguments: Any) -> None:
    """Raise a check's own error, not chained to the one that is being handled."""
    try:
        check(*arguments)
    except Exception as error:
        raise error from None


class RNNCell(nn.RNNCell):
    r"""A drop-in ``torch.nn.RNNCell``: one step, ``h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh)``.

    Constructor, parameters and errors are those of `torch.nn.RNNCell
    <https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html>`_.

    Inputs:
        ``input`` of ``[B, I]`` or ``[I]``; ``hx`` of ``[B, H]`` or ``[H]``, zeros if absent.

    Outputs:
        The new state, ``[B, H]`` or ``[H]``.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; shapes and errors are those of the class."""
        dimensions = input.dim()
        if dimensions not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {dimensions}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        batched = dimensions == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        try:
            h = None
            if type(self) is RNNCell and backends.plain_calls_are_direct():
                h = _direct_calls.rnn_cell(self, input, hx)
            if h is None:
                h = functional.rnn_cell(
                    input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh,
                    self.nonlinearity,
                )  # fmt: skip
        except RuntimeError:  # as in RNN
            _say(_check_cell, input, hx, self.weight_ih, self.weight_hh)
            raise
        return h if batched else h.squeeze(0)


def _check_cell(input: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor) -> None:
    """Raise nn.RNNCell's errors of sizes: PyTorch's own, whose words change with its versions."""
    if hx is None:
        hx = w_hh.new_empty((input.size(0), w_hh.size(1)))
    _VF.rnn_tanh_cell(*(torch.empty(x.shape, device="meta") for x in (input, hx, w_ih, w_hh)))
