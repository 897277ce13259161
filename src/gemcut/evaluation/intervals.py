"""95 % intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # of the normal distribution, two-sided


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share; (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    # At the ends rounding would leave 1e-17 where it is 0 or 1.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == count else middle + half)


def difference(hits: int, count: int, other_hits: int, other_count: int) -> tuple[float, float, float]:
    """(share - other share, its interval by Newcombe's tenth method, which joins Wilson's of both)."""
    one, other = hits / max(1, count), other_hits / max(1, other_count)
    low, high = wilson(hits, count)
    other_low, other_high = wilson(other_hits, other_count)
    gap = one - other
    return gap, gap - math.hypot(one - low, other_high - other), gap + math.hypot(high - one, other - other_low)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The interval of a mean by bootstrap (percentiles); the mean twice where there is one value alone."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return (float(numbers.mean()),) * 2 if len(numbers) else (0.0, 0.0)
    generator = np.random.default_rng(seed)
    means = np.array([numbers[generator.integers(0, len(numbers), len(numbers))].mean() for _ in range(draws)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
