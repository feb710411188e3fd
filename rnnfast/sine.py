"""The sine task: the RNN tutorial's regression, trained with nn.RNN and with rnnfast.RNN.

``python -m rnnfast.sine`` trains the same model from the same seed with both, epoch by epoch in
turn, prints the losses side by side and the time per epoch of each. ``--plot FILE.png`` draws the
predictions and the loss curves.

The tutorial's windows are raw positions up to 100, from which so small a network barely learns;
``--windows sine`` feeds windows of the sine itself, learns it, and continues it on its own output.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .modules import RNN

if TYPE_CHECKING:
    from rich.console import Console

POINTS, SPAN, WINDOW, HIDDEN = 200, 100.0, 10, 16
STEP = SPAN / (POINTS - 1)
REPORT_EVERY = 10


class RNNModel(nn.Module):
    """The tutorial's model: an RNN whose last output goes through a linear layer.

    Args:
        rnn_class: ``nn.RNN`` or ``rnnfast.RNN``.
    """

    def __init__(self, rnn_class: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = rnn_class(1, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows ``[B, WINDOW, 1]`` to the next value ``[B, 1]``."""
        h0 = torch.zeros(1, x.size(0), HIDDEN, dtype=x.dtype, device=x.device)
        out, _ = self.rnn(x, h0)
        result: Tensor = self.fc(out[:, -1, :])
        return result


def data(windows: str) -> tuple[Tensor, Tensor]:
    """Return float64 inputs ``[190, 10, 1]`` and targets ``[190, 1]``.

    Args:
        windows: ``"position"`` for windows of x, ``"sine"`` for windows of sin(x).
    """
    x = torch.linspace(0, SPAN, POINTS, dtype=torch.float64)
    series = x if windows == "position" else torch.sin(x)
    inputs = series.unfold(0, WINDOW, 1)[:-1].unsqueeze(-1).contiguous()
    return inputs, torch.sin(x[WINDOW:]).unsqueeze(-1)


@dataclass
class Run:
    """One contender: its model and what was measured of it."""

    name: str
    model: RNNModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def epoch(self, inputs: Tensor, targets: Tensor) -> None:
        """Take one full-batch step and note its loss and duration."""
        begin = time.perf_counter()
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(loss.item())  # reading the loss waits for the device
        self.seconds.append(time.perf_counter() - begin)


def train(
    windows: str, epochs: int, seed: int, dtype: torch.dtype, device: str, console: Console
) -> list[Run]:
    """Train both contenders from one seed, their epochs alternating, and return them."""
    inputs, targets = (x.to(device, dtype) for x in data(windows))
    contenders: list[tuple[str, Callable[..., nn.RNNBase]]] = [
        ("nn.RNN", nn.RNN),
        ("rnnfast.RNN", RNN),
    ]
    runs = []
    for name, rnn_class in contenders:
        torch.manual_seed(seed)
        model = RNNModel(rnn_class).to(device, dtype)
        runs.append(Run(name, model, torch.optim.Adam(model.parameters(), lr=0.01)))
    from rich.progress import Progress  # not above: the model and its data need no rich

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=epochs)
        for _ in range(epochs):
            for run in runs:
                run.epoch(inputs, targets)
            progress.advance(task)
    return runs


@torch.no_grad()
def predict(model: RNNModel, inputs: Tensor) -> Tensor:
    """The model's value for every window: ``[B]``."""
    values: Tensor = model(inputs)
    return values.squeeze(-1)


@torch.no_grad()
def forecast(model: RNNModel, window: Tensor, steps: int) -> Tensor:
    """Continue a series from its last ``[WINDOW]`` values, feeding back what was predicted."""
    series = window.clone()
    for _ in range(steps):
        series = torch.cat([series, predict(model, series[-WINDOW:].view(1, WINDOW, 1))])
    return series[WINDOW:]


def report(runs: Sequence[Run], epochs: int, console: Console) -> None:
    """Print the losses every ten epochs, and the time per epoch."""
    from rich.table import Table

    table = Table("epoch", *(f"loss, {run.name}" for run in runs), "same 4 digits")
    for epoch in range(REPORT_EVERY, epochs + 1, REPORT_EVERY):
        shown = [f"{run.losses[epoch - 1]:.4f}" for run in runs]
        table.add_row(str(epoch), *shown, "yes" if len(set(shown)) == 1 else "no")
    if table.row_count:
        console.print(table)
    medians = [statistics.median(run.seconds) for run in runs]
    for run, median in zip(runs, medians, strict=True):
        console.print(
            f"{run.name:12} {median * 1e6:7.0f} us per epoch (median), final loss "
            f"{run.losses[-1]:.6f}"
        )
    threads = torch.get_num_threads()
    console.print(
        f"rnnfast.RNN is {medians[0] / medians[1]:.2f} times as fast per epoch, whole training "
        f"step, {threads} thread{'s' * (threads > 1)}"
    )


def plot(runs: Sequence[Run], windows: str, dtype: torch.dtype, device: str, file: str) -> None:
    """Draw predictions (and, for windows of the sine, the forecast) and the loss curves."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    inputs, targets = (x.to(device, dtype) for x in data(windows))
    x = torch.linspace(0, SPAN, POINTS)[WINDOW:]
    styles = [("C0", "-", 3.0), ("C1", "--", 1.5)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.5), width_ratios=(2, 1), layout="constrained"
    )
    left.plot(x, targets.squeeze(-1).cpu(), color="0.8", linewidth=5, label="sin x")
    for run, (color, line, width) in zip(runs, styles, strict=True):
        left.plot(x, predict(run.model, inputs).cpu(), line, color=color, lw=width, label=run.name)
        right.plot(run.losses, line, color=color, lw=width, label=run.name)
        if windows == "sine":
            steps = 60
            ahead = SPAN + STEP * torch.arange(1, steps + 1)
            last = torch.sin(torch.linspace(0, SPAN, POINTS, dtype=torch.float64))[-WINDOW:]
            values = forecast(run.model, last.to(device, dtype), steps)
            known = predict(run.model, inputs[-1:])
            left.plot(
                torch.cat([x[-1:], ahead]),
                torch.cat([known, values]).cpu(),
                line,
                color=color,
                lw=width,
            )
            if run is runs[0]:
                left.plot(ahead, torch.sin(ahead), color="0.8", linewidth=5, zorder=0)
                left.axvspan(SPAN, float(ahead[-1]), color="0.95", zorder=-1)
                left.text(SPAN + 1, 1.15, "forecast on its own output")
                left.set_ylim(-1.5, 1.4)
    left.set(xlabel="x", title=f"Predictions (windows: {windows})")
    left.legend(loc="lower left", ncols=3)
    right.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title="Loss")
    right.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast.sine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--epochs", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters; default: 0")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--windows", choices=("position", "sine"), default="position")
    parser.add_argument("--plot", metavar="FILE.png", help="draw predictions and losses")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    try:
        from rich.console import Console
    except ImportError:
        sys.exit("rnnfast.sine needs rich, and matplotlib for --plot: pip install rich matplotlib")
    console = Console(highlight=False)
    dtype: torch.dtype = getattr(torch, options.dtype)
    runs = train(options.windows, options.epochs, options.seed, dtype, options.device, console)
    report(runs, options.epochs, console)
    if options.windows == "sine":
        rmse = math.sqrt(runs[1].losses[-1])
        console.print(f"rnnfast.RNN predicts the next value of the sine to {rmse:.4f} (rms)")
    if options.plot:
        plot(runs, options.windows, dtype, options.device, options.plot)
        console.print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
