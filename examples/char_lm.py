"""A character-level language model, trained with nn.RNN and, one word changed, with rnnfast.RNN.

    python examples/char_lm.py

The text is the Zen of Python (PEP 20, in the public domain), which the standard library carries as
the module `this`; --text takes another. Two layers with dropout, truncated backpropagation: the
text is cut into parallel streams, walked in windows, the hidden state carried over and detached.

Both contenders start from the same seed, draw the same dropout masks, and take their epochs in
turn. What is timed is the whole epoch: forward, backward, clipping and the optimiser.
"""

import argparse
import contextlib
import io
import statistics
import time
from codecs import decode
from pathlib import Path

import torch
from torch import nn

import rnnfast


def zen() -> str:
    """The Zen of Python, which `this` prints when it is imported and keeps in rot13."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return decode(this.s, "rot13")


class CharLM(nn.Module):
    """Characters [B, T] and a state to the logits of each next character, and the next state."""

    def __init__(self, rnn_class, characters, hidden):
        super().__init__()
        self.embed = nn.Embedding(characters, hidden)
        self.rnn = rnn_class(hidden, hidden, 2, batch_first=True, dropout=0.2)  # the one word
        self.head = nn.Linear(hidden, characters)

    def forward(self, x, state=None):
        out, state = self.rnn(self.embed(x), state)
        return self.head(out), state


def epoch(model, optimizer, data, window):
    """One walk along the streams [B, length]; the mean loss per character in nats."""
    model.train()
    state, losses = None, []
    for begin in range(0, data.size(1) - 1, window):
        x = data[:, begin : begin + window][:, : data.size(1) - 1 - begin]
        y = data[:, begin + 1 : begin + 1 + x.size(1)]
        logits, state = model(x, state)
        state = state.detach()  # the truncation
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * x.size(1))
    return sum(losses) / (data.size(1) - 1)


@torch.no_grad()
def sample(model, alphabet, length, prompt="Beautiful "):
    """The prompt continued, one character at a time."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    text, state = [c for c in prompt if c in alphabet] or [alphabet[0]], None
    x = torch.tensor([[alphabet.index(c) for c in text]])
    for _ in range(length):
        logits, state = model(x, state)
        p = torch.softmax(logits[0, -1].double() / 0.7, -1)
        x = torch.multinomial(p, 1, generator=generator).view(1, 1)
        text.append(alphabet[int(x)])
    return "".join(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a file, default: the Zen of Python")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--streams", type=int, default=8, help="the batch")
    parser.add_argument("--window", type=int, default=25, help="steps between two truncations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()

    text = options.text.read_text() if options.text else zen()
    alphabet = sorted(set(text))
    length = len(text) // options.streams
    data = torch.tensor([alphabet.index(c) for c in text[: length * options.streams]])
    data = data.view(options.streams, length)
    print(f"{len(text)} characters, {len(alphabet)} different; {options.streams} streams")

    models, losses, seconds = {}, {}, {}
    for name, rnn_class in (("nn.RNN", nn.RNN), ("rnnfast.RNN", rnnfast.RNN)):
        torch.manual_seed(options.seed)
        model = CharLM(rnn_class, len(alphabet), options.hidden)
        models[name] = model.to(getattr(torch, options.dtype))
        losses[name], seconds[name] = [], []
    optimizers = {name: torch.optim.Adam(m.parameters(), 3e-3) for name, m in models.items()}

    print("epoch" + "".join(f"{'loss, ' + name:>20}" for name in models))
    for i in range(1, options.epochs + 1):
        for name, model in models.items():
            torch.manual_seed(options.seed + i)  # of the dropout masks, the same for both
            begin = time.perf_counter()
            losses[name].append(epoch(model, optimizers[name], data, options.window))
            seconds[name].append(time.perf_counter() - begin)
        if i % max(options.epochs // 10, 1) == 0:
            print(f"{i:5}" + "".join(f"{losses[name][-1]:20.6f}" for name in models))

    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print(f"largest difference of the losses: {difference:.1e}")
    for name in models:
        print(f"{name:12} {statistics.median(seconds[name]) * 1e3:7.2f} ms per epoch (median)")
    for name, model in models.items():
        print(f"\n--- sampled from {name}\n{sample(model, alphabet, 200)}")


if __name__ == "__main__":
    main()
