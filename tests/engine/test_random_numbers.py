"""The random numbers behind sampling: evenly spread, unrelated, and fixed for ever."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.chi_square import chi_square, critical
from engine.driver import Recording, small_model
from gemcut.engine import SamplingParams
from gemcut.engine.sampler import uniform


def test_critical_values_are_those_of_the_tables() -> None:
    for df, value in ((3, 16.266), (10, 29.588), (30, 59.703), (99, 148.230)):
        assert critical(df) == pytest.approx(value, rel=0.02)


def test_uniform_is_evenly_spread() -> None:
    streams = {
        "places": [uniform(5, i) for i in range(20000)],
        "seeds": [uniform(i, 0) for i in range(20000)],
        "far seeds": [uniform(i * 2**44 + 1, 3) for i in range(20000)],
        "negative": [uniform(-i, 7) for i in range(20000)],
    }
    for name, values in streams.items():
        assert all(0 <= v < 1 for v in values)
        counts, _ = np.histogram(values, bins=100, range=(0, 1))
        statistic, df = chi_square(counts.astype(float), np.full(100, 200.0))
        assert statistic < critical(df), name
        pairs, _, _ = np.histogram2d(values[:-1], values[1:], bins=10, range=((0, 1), (0, 1)))
        statistic, df = chi_square(pairs.ravel(), np.full(100, 199.99))
        assert statistic < critical(df), name
        assert len(set(values)) == 20000


def test_uniform_of_neighbours_is_unrelated() -> None:
    """Seeds and places side by side, as in a batch of one prompt with seeds 0, 1, 2, …"""
    grid = np.array([[uniform(seed, place) for place in range(100)] for seed in range(200)])
    for one, other in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid[1:, :-1], grid[:-1, 1:])):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 3.3 / math.sqrt(one.size)


def test_uniform_is_fixed_for_ever() -> None:
    """A seed in somebody's notebook must give the same text next year."""
    values = [0.28176129772258496, 0.80255116473696, 0.7361455668314747, 0.7108646800171026]
    assert [uniform(0, 0), uniform(0, 1), uniform(42, 7), uniform(-1, 0)] == values
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_seed_decides() -> None:
    engine = Recording(small_model(), sequences=4)
    params = [SamplingParams(seed=s, max_new_tokens=20) for s in (1, 1, 2, None)]
    one, same, other, drawn = engine.answers([[1, 2]] * 4, params)
    assert one == same
    assert one != other
    assert one != drawn
