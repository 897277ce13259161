"""From scores to figures: means with standard errors, paired comparisons of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemcut.evaluation.row import Figure, Item, Row, Score


def mean_figure(values: Sequence[float], scale: float = 1.0) -> Figure:
    """Mean and its standard error, the sample's standard deviation over the root of n; no error for fewer than two."""
    numbers = np.array(values, np.float64)
    error = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) * scale if len(numbers) > 1 else None
    return Figure(value=float(numbers.mean()) * scale, error=error, count=len(numbers))


def figures(row: Row, items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Figure]:
    """A row's figures by metric: the means over items that have it, then what the row itself makes of them."""
    by_metric: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.values.items():
            by_metric.setdefault(name, []).append(float(value))
    found = {name: mean_figure(values, row.scale) for name, values in by_metric.items()}
    if row.extra is not None and items:
        found |= row.extra(items, scores)
    return found


def by_group(row: Row, items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Figure]:
    """The row's own metric by the items' group; empty where there are no groups or the metric is no item's."""
    found: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        if item.group and row.metric in score.values:
            found.setdefault(item.group, []).append(float(score.values[row.metric]))
    return {name: mean_figure(values, row.scale) for name, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs over the items that both have.

    Attributes:
        count: of those items.
        first, second: the means.
        only_first, only_second: items that one alone has right.
        p: of McNemar's exact test that both are right equally often; None where values are not 0 and 1.
        low, high: 95 % interval of second - first by bootstrap over items.
    """

    count: int
    first: float
    second: float
    only_first: int
    only_second: int
    p: float | None
    low: float
    high: float


def compare(
    first: Mapping[str, float], second: Mapping[str, float], *, seed: int = 0, draws: int = 10_000
) -> Comparison:
    """Compare values by item id; there must be common items."""
    common = [name for name in first if name in second]
    one, two = (np.array([values[name] for name in common], np.float64) for values in (first, second))
    binary = bool(np.isin(one, (0, 1)).all() and np.isin(two, (0, 1)).all())
    only_first, only_second = int((one > two).sum()), int((two > one).sum())
    difference = two - one
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, (1 << 22) // max(1, len(common)))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        means[start : start + rows] = difference[generator.integers(0, len(common), (rows, len(common)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Comparison(
        count=len(common),
        first=float(one.mean()),
        second=float(two.mean()),
        only_first=only_first,
        only_second=only_second,
        p=mcnemar(only_first, only_second) if binary else None,
        low=float(low),
        high=float(high),
    )


def mcnemar(one: int, two: int) -> float:
    """The exact test of McNemar, two-sided: how likely the smaller of two counts is this small by fair coins."""
    n = one + two
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(one, two) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
