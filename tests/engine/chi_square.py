"""A chi-square test by hand."""

from __future__ import annotations

import math

import numpy as np


def critical(df: int) -> float:
    """The value a chi-square variable of ``df`` degrees exceeds with probability 0.001 (Wilson and Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + 3.0902 * math.sqrt(2 / (9 * df))) ** 3


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells that expect fewer than five draws are put together."""
    assert (counts[expected == 0] == 0).all(), "a token was drawn that must never be"
    common = expected >= 5
    cells = [(counts[common], expected[common])]
    if expected[~common].sum() >= 5:
        cells.append((counts[~common].sum(keepdims=True), expected[~common].sum(keepdims=True)))
    statistic = sum(float(((c - e) ** 2 / e).sum()) for c, e in cells)
    return statistic, sum(len(c) for c, _ in cells) - 1
