"""Standard errors, McNemar and bootstrap by arithmetic and by definition; macro averages."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from gemcut.evaluation import Item, Pair, Score
from gemcut.evaluation.figures import compare, mcnemar, mean_figure
from gemcut.evaluation.rows.exams import macro


def test_mean_and_error_by_hand() -> None:
    figure = mean_figure([1, 0, 0, 1, 1], 100)
    assert figure.value == pytest.approx(60)
    assert figure.error == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 4))
    assert mean_figure([1]).error is None


@pytest.mark.parametrize(("one", "two"), [(0, 0), (0, 5), (3, 9), (6, 6), (1, 12)])
def test_mcnemar_by_counting_coins(one: int, two: int) -> None:
    """Of all ways n coins can fall, the share in which the rarer side is at least as rare, both sides."""
    n, least = one + two, min(one, two)
    extreme = sum(min(sum(coins), n - sum(coins)) <= least for coins in product((0, 1), repeat=n))
    assert mcnemar(one, two) == pytest.approx(min(1.0, extreme / 2**n))


def test_large_counts_are_no_trouble() -> None:
    assert mcnemar(5000, 5000) == pytest.approx(1, abs=0.01)
    assert mcnemar(4000, 6000) < 1e-80


def test_bootstrap_covers_the_difference() -> None:
    chance = random.Random(1)
    first = {str(i): float(chance.random() < 0.5) for i in range(400)}
    second = {name: float(chance.random() < 0.6) for name in first}
    second["extra"] = 1.0
    found = compare(first, second)
    assert found.count == 400
    difference = found.second - found.first
    assert found.low < difference < found.high
    # For a mean the interval is nearly that of the normal distribution.
    values = [second[name] - first[name] for name in first]
    error = math.sqrt(sum((v - difference) ** 2 for v in values) / 399 / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.only_second - found.only_first == pytest.approx(400 * difference)
    assert found.p is not None
    assert compare({"a": 0.3}, {"a": 0.5}).p is None


def test_mean_over_tasks() -> None:
    items = [Item(id=str(i), request=Pair(texts=("a",)), target=0, group=group) for i, group in enumerate("aabbbb")]
    scores = [Score(values={"acc": value}) for value in (1, 0, 1, 1, 0, 1)]
    (figure,) = macro("acc")(items, scores).values()
    assert figure.value == pytest.approx((50 + 75) / 2)
    errors = (100**2 * (0.25 * 2) / 2, 100**2 * (0.75 * 0.25 * 4 / 3) / 4)
    assert figure.error == pytest.approx(math.sqrt(sum(errors)) / 2)
    assert macro("acc")(items[:3], scores[:3])["acc_by_task"].error is None
