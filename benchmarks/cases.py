"""What is measured: the cases, the arithmetic each one costs, and their inputs.

The letters are those of the kernels: B sequences of T steps, I inputs, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast.sine


@dataclass(frozen=True)
class Case:
    """One thing to time, side by side, by all contenders that can do it.

    Attributes:
        work: ``"inference"`` is the forward without autograd; ``"training"`` the forward and the
            gradients of all parameters (not of the input) from a given gradient of the output.
        module: ``"RNN"``; ``"RNNCell"``, called T times from Python; or ``"sine"``, an epoch of
            ``rnnfast.sine``: forward, loss, backward and Adam.
        packed: the sequences have lengths from T down to T / 4.
        series: ``"grid"``, or the sweep that a plot draws: ``"H sweep"``, ``"T sweep"``.
    """

    work: str
    B: int
    T: int
    I: int
    H: int
    module: str = "RNN"
    nonlinearity: str = "tanh"
    num_layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    dtype: str = "float32"
    series: str = "grid"

    @property
    def variant(self) -> str:
        """What is not the default: ``"relu, packed"``."""
        named = {
            self.module: self.module != "RNN",
            self.nonlinearity: self.nonlinearity != "tanh",
            f"{self.num_layers} layers": self.num_layers > 1,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
            self.dtype: self.dtype != "float32",
        }
        return ", ".join(name for name, shown in named.items() if shown)

    @property
    def id(self) -> str:
        """Name of the group: ``"inference 32x100x32x64 relu, packed"``."""
        series = "" if self.series == "grid" else f" ({self.series})"
        shape = f"{self.B}x{self.T}x{self.I}x{self.H}"
        return f"{self.work} {shape} {self.variant}".strip() + series

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence, longest first."""
        if not self.packed:
            return [self.T] * self.B
        return [round(self.T * (1 - 0.75 * b / max(self.B - 1, 1))) for b in range(self.B)]

    @property
    def layer_inputs(self) -> list[int]:
        """Input size of each layer."""
        directions = 2 if self.bidirectional else 1
        return [self.I] + [directions * self.H] * (self.num_layers - 1)

    @property
    def flops(self) -> int:
        """Of the matrix products alone, a multiplication and an addition counted as two.

        Forward: 2 rows H (I + H) for each layer and direction. Training adds the recurrence of the
        backward, 2 rows H H, the weight gradients, 2 rows H (I + H), and the gradient that an upper
        layer hands to the one below, 2 rows H I.
        """
        rows, H = sum(self.lengths), self.H
        total = 0
        for layer, I in enumerate(self.layer_inputs):
            total += 2 * rows * H * (I + H)
            if self.work == "training":
                total += 2 * rows * H * H + 2 * rows * H * (I + H)
                total += 2 * rows * H * I if layer else 0
        return total * (2 if self.bidirectional else 1)


class Problem:
    """A case's weights and inputs, the same for every contender.

    Attributes:
        module: nn.RNN, nn.RNNCell or the sine task's model, whose weights all contenders take.
        x: ``[T, B, I]``, padded where the case is packed; the sine task's windows, ``[B, T, 1]``.
        hx: ``[D * num_layers, B, H]``.
        target: the gradient of the output that training starts from, ``[T, B, D * H]`` or the
            packed rows of it; the sine task's targets, ``[B, 1]``.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.module = self._new(nn.RNN, nn.RNNCell)
        directions = 2 if case.bidirectional else 1
        self.x = torch.randn(case.T, case.B, case.I)
        self.hx = torch.randn(directions * case.num_layers, case.B, case.H).mul(0.5)
        self.target = torch.randn(case.T, case.B, directions * case.H)
        if case.module == "sine":
            self.x, self.target = rnnfast.sine.data("position")
        elif case.packed:
            self.target = self.pack(self.target).data
        self._to(case.dtype)

    def cast(self, dtype: str) -> Problem:
        """The same values in another dtype: float64 for the truth."""
        other = copy.copy(self)
        other.case = replace(self.case, dtype=dtype)
        other.module = copy.deepcopy(self.module)
        other._to(dtype)
        return other

    def _to(self, dtype: str) -> None:
        options: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, dtype)}
        self.module.to(**options)
        self.x, self.hx, self.target = (
            t.to(**options) for t in (self.x, self.hx, self.target)
        )  # fmt: skip

    def _new(self, rnn: Callable[..., nn.Module], cell: Callable[..., nn.Module]) -> nn.Module:
        case = self.case
        if case.module == "sine":
            return rnnfast.sine.RNNModel(rnn)  # type: ignore[arg-type]
        if case.module == "RNNCell":
            return cell(case.I, case.H, nonlinearity=case.nonlinearity)
        return rnn(
            case.I, case.H, case.num_layers,
            nonlinearity=case.nonlinearity, bidirectional=case.bidirectional,
        )  # fmt: skip

    def build(self, rnn: Callable[..., nn.Module], cell: Callable[..., nn.Module]) -> nn.Module:
        """The case's module, made of the given classes, with the weights of all contenders."""
        module = self._new(rnn, cell).to(self.device, getattr(torch, self.case.dtype))
        module.load_state_dict(self.module.state_dict())
        return module

    def pack(self, padded: Tensor) -> PackedSequence:
        """The rows of a padded ``[T, B, *]`` that are alive."""
        return pack_padded_sequence(padded, torch.tensor(self.case.lengths))

    @property
    def input(self) -> Tensor | PackedSequence:
        """What nn.RNN is called with."""
        return self.pack(self.x) if self.case.packed else self.x


# B, T, I, H. The public grid, the README's rows.
PUBLIC = [
    (190, 10, 1, 16),  # the sine task
    (1, 10, 1, 16),
    (32, 100, 32, 64),
    (64, 100, 128, 128),
    (1, 1000, 64, 64),
    (64, 100, 256, 256),
    (16, 200, 512, 512),
    (64, 50, 1024, 1024),
]
# Sizes that fit no vector width, few sequences, long sequences, wide inputs.
ODD = [
    (7, 50, 20, 50),
    (20, 28, 28, 100),  # an image, row by row
    (3, 2000, 64, 200),
    (3, 100, 8, 20),
    (128, 64, 16, 20),
    (20, 100, 300, 100),
    (1, 300, 200, 200),
    (7, 500, 32, 128),
    (20, 35, 650, 650),  # a word-level language model
    (32, 70, 200, 200),
    (256, 50, 64, 50),
    (1, 100, 1024, 1024),
]
RELU = [(190, 10, 1, 16), (32, 100, 32, 64), (20, 28, 28, 100), (64, 100, 256, 256)]
BIDIRECTIONAL = [(20, 28, 28, 100), (32, 100, 32, 64), (64, 50, 256, 256)]
PACKED = [(7, 50, 20, 50), (32, 100, 32, 64), (64, 100, 256, 256)]
CELL = [(B, 100, H, H) for B in (1, 8, 64) for H in (16, 64, 256)]
HALF = [(32, 100, 256, 256), (64, 100, 512, 512), (32, 50, 1024, 1024)]
H_SWEEP = [(B, 100, H, H) for B in (1, 32) for H in (16, 32, 64, 128, 256, 512, 1024)]
T_SWEEP = [(32, T, 128, 128) for T in (10, 30, 100, 300, 1000, 3000)]
# Where cuDNN runs a persistent kernel (H <= 256), and where it launches step by step.
GPU = [
    (B, T, H, H)
    for H in (128, 256, 512, 768, 1024, 2048)
    for B in (1, 16, 128)
    for T in (128, 1024)
]


def cases(full: bool, device: str) -> list[Case]:
    """The cases of a run: a quick look, or the whole grid and the sweeps."""
    return [
        replace(case, work=work)
        for case in (_full(device) if full else _quick(device))
        for work in ("inference", "training")
        if case.module != "sine" or work == "training"
    ]


def _quick(device: str) -> Iterator[Case]:
    work = ""
    for shape in PUBLIC:
        yield Case(work, *shape)
    yield Case(work, 7, 50, 20, 50)
    yield Case(work, 20, 28, 28, 100, nonlinearity="relu")
    yield Case(work, 20, 28, 28, 100, num_layers=2, bidirectional=True)
    yield Case(work, 32, 100, 32, 64, packed=True)
    yield Case(work, 8, 100, 64, 64, module="RNNCell")
    yield Case(work, *PUBLIC[0], module="sine")
    yield Case(work, 32, 20, 256, 256, dtype="bfloat16")


def _full(device: str) -> Iterator[Case]:
    work = ""
    for shape in PUBLIC + ODD:
        yield Case(work, *shape)
    for shape in RELU:
        yield Case(work, *shape, nonlinearity="relu")
    for shape in BIDIRECTIONAL:
        yield Case(work, *shape, num_layers=2, bidirectional=True)
    for shape in PACKED:
        yield Case(work, *shape, packed=True)
    for shape in CELL:
        yield Case(work, *shape, module="RNNCell")
    yield Case(work, *PUBLIC[0], module="sine")
    for shape in HALF:
        yield Case(work, *shape, dtype="bfloat16")
    if device == "cuda":
        for shape in GPU:
            yield Case(work, *shape)
            yield Case(work, *shape, dtype="bfloat16")
    for shape in H_SWEEP:
        yield Case(work, *shape, series="H sweep")
    for shape in T_SWEEP:
        yield Case(work, *shape, series="T sweep")
