"""The name classifier: words of different lengths, one packed batch, the last state decides.

    python examples/names.py

The words are letters' names in eight scripts, from the Unicode database of the standard library
("ALGIZ EOLHX" is Runic, "BEH MEDIAL FORM" Arabic); a fifth of them is held out. Both contenders
start from the same seed and take their epochs in turn; an epoch is one step on the whole batch.
"""

import argparse
import re
import statistics
import time
import unicodedata

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast

SCRIPTS = ("ARABIC", "COPTIC", "ETHIOPIC", "GLAGOLITIC", "RUNIC", "SHAVIAN", "SINHALA", "TIFINAGH")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ "


def words():
    """Pairs of a letter's name and the number of its script, each once."""
    pattern = re.compile(rf"({'|'.join(SCRIPTS)}) (?:SMALL )?(?:LETTER|SYLLABLE) ([A-Z ]+)")
    names = (unicodedata.name(chr(i), "") for i in range(0x20000))
    found = {m.groups() for m in map(pattern.fullmatch, names) if m}
    return sorted((name, SCRIPTS.index(script)) for script, name in found)


class Classifier(nn.Module):
    """A packed batch of embedded words to the logits of the scripts."""

    def __init__(self, rnn_class, hidden):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), hidden)
        self.rnn = rnn_class(hidden, hidden, bidirectional=True)  # the one word
        self.head = nn.Linear(2 * hidden, len(SCRIPTS))

    def forward(self, packed):
        packed = packed._replace(data=self.embed(packed.data))
        _, h_n = self.rnn(packed)
        return self.head(torch.cat([h_n[0], h_n[1]], -1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--words", type=int, help="use so many, default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()

    pairs = words()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [pairs[i] for i in order[: options.words]]
    encoded = [torch.tensor([ALPHABET.index(c) for c in word]) for word, _ in pairs]
    scripts = torch.tensor([script for _, script in pairs])
    held_out = len(pairs) // 5
    train_x = pack_sequence(encoded[held_out:], enforce_sorted=False)
    test_x = pack_sequence(encoded[:held_out], enforce_sorted=False)
    train_y, test_y = scripts[held_out:], scripts[:held_out]
    print(
        f"{len(train_y)} words of {min(map(len, encoded))} to {max(map(len, encoded))} letters "
        f"in one batch, {held_out} held out"
    )

    models, losses, seconds = {}, {}, {}
    for name, rnn_class in (("nn.RNN", nn.RNN), ("rnnfast.RNN", rnnfast.RNN)):
        torch.manual_seed(options.seed)
        models[name] = Classifier(rnn_class, options.hidden).to(getattr(torch, options.dtype))
        losses[name], seconds[name] = [], []
    optimizers = {name: torch.optim.Adam(m.parameters(), 1e-2) for name, m in models.items()}

    print("epoch" + "".join(f"{'loss, ' + name:>20}" for name in models))
    for i in range(1, options.epochs + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            loss = nn.functional.cross_entropy(model(train_x), train_y)
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            losses[name].append(loss.item())
            seconds[name].append(time.perf_counter() - begin)
        if i % max(options.epochs // 10, 1) == 0:
            print(f"{i:5}" + "".join(f"{losses[name][-1]:20.6f}" for name in models))

    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print(f"largest difference of the losses: {difference:.1e}")
    for name, model in models.items():
        with torch.no_grad():
            right = (model(test_x).argmax(-1) == test_y).float().mean().item()
        milliseconds = statistics.median(seconds[name]) * 1e3
        print(f"{name:12} {milliseconds:7.2f} ms per epoch (median), {right:.0%} right, held out")


if __name__ == "__main__":
    main()
