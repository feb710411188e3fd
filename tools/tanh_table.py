"""Writes csrc/cpu/tanh_table.h: `python tools/tanh_table.py > csrc/cpu/tanh_table.h`.

tanh(a) for a >= 0 as c0 + d (c1 + d (c2 + ...)), d = a - center, in 32 intervals, chosen by a
float's exponent and first two mantissa bits: four to an octave, from 1/16 to 16. The
first one reaches down to 0, where center and c0 are 0, so that small results keep their relative
accuracy. In the others the center is a float near the middle whose tanh is, by luck, almost a float
too: c0 then is as good as exact (S. Gal, "An accurate elementary mathematical library for the IEEE
floating point standard", 1991), d is exact by Sterbenz's lemma, and what is left to go wrong is the
rounding of the last addition.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

DEGREE = 5
SATURATED = 10.0  # the last interval in use: tanh is 1 to the last bit of a float from 9.02 on
FIRST_EXPONENT, PER_OCTAVE, INTERVALS = -4, 4, 32
CANDIDATES = 4096  # floats on either side of the middle


def center_of(low: Any, high: float) -> tuple[np.float32, np.float32]:
    """The float near the middle whose tanh is nearest to a float, and that float."""
    middle = np.float32((low + high) / 2)
    steps = np.arange(-CANDIDATES, CANDIDATES, dtype=np.int32)
    candidates = (middle.view(np.int32) + steps).view(np.float32)
    exact = np.tanh(candidates.astype(np.longdouble))
    rounded = exact.astype(np.float32)
    best = np.argmin(np.abs(exact - rounded))
    return candidates[best], rounded[best]


def fit(low: float, high: float, center: Any, constant: Any) -> list[np.float32]:
    """c1, ..., as floats: the relative error of the sum is least, by Lawson's reweighting."""
    # Chebyshev nodes, none of them at the center, where any coefficients do.
    nodes = np.cos(np.pi * (np.arange(2000) + 0.5) / 2000)
    a = ((low + high) / 2 + (high - low) / 2 * nodes).astype(np.longdouble)
    d = (a - np.longdouble(center)).astype(np.float64)
    rest = np.tanh(a) - np.longdouble(constant)
    scale = 1 / np.tanh(a).astype(np.float64)
    coefficients = []
    for first in range(1, DEGREE + 1):  # each rounded, and the later ones fitted to what is left
        powers = np.stack([d**k for k in range(first, DEGREE + 1)], axis=1) * scale[:, None]
        columns = np.abs(powers).max(axis=0)
        target = rest.astype(np.float64) * scale
        weights = np.ones(len(d))
        for _ in range(60):
            root = np.sqrt(weights)[:, None]
            x = np.linalg.lstsq(powers / columns * root, target * root[:, 0], rcond=None)[0]
            error = np.abs(target - powers / columns @ x)
            weights = weights * error / (error * weights).sum() if error.max() > 0 else weights
        c = np.float32(x[0] / columns[0])
        coefficients.append(c)
        rest = rest - np.longdouble(c) * d.astype(np.longdouble) ** first
    return coefficients


def table() -> NDArray[np.float32]:
    """Rows center, c0, c1, ...; columns at the place that an interval's bits select."""
    rows = np.zeros((DEGREE + 2, INTERVALS), np.float32)
    for i in range(INTERVALS):
        octave, part = 2.0 ** (FIRST_EXPONENT + i // PER_OCTAVE), i % PER_OCTAVE
        low = np.float32(octave * (1 + part / PER_OCTAVE))
        high = octave * (1 + (part + 1) / PER_OCTAVE)
        place = int(low.view(np.uint32) >> 21) % INTERVALS
        if low >= SATURATED:
            rows[:2, place] = low, 1
        elif i == 0:
            rows[2:, place] = fit(0.0, high, 0.0, 0.0)
        else:
            center, constant = center_of(low, high)
            rows[:, place] = [center, constant, *fit(float(low), high, center, constant)]
    return rows


if __name__ == "__main__":
    print("// Written by tools/tanh_table.py, which says what this is.\n#pragma once\n")
    print("namespace rnnfast::cpu {\n")
    print(f"constexpr int kTanhDegree = {DEGREE};")
    print("// center, c0, c1, ...")
    print(f"alignas(64) constexpr float kTanhTable[kTanhDegree + 2][{INTERVALS}] = {{")
    for row in table():
        print("    {" + ", ".join(f"{x:.8e}f" for x in row) + "},")
    print("};\n\n}  // namespace rnnfast::cpu")
