"""Draws in one launch against float64: a token must be the one in whose share of the probabilities the number falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemcut.engine.draw import DrawParams
from gemcut.engine.sampler import uniform
from gemcut.engine.sampling import SamplingParams
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.sampling.draw import DrawCase, draw_tokens, supports

pytestmark = pytest.mark.gpu

MODES: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 64},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 64, "top_p": 0.95, "min_p": 0.02},
    {"top_k": 50, "min_p": 0.05},
    {"top_k": 64, "top_p": 1e-9},
    {"top_k": 7, "min_p": 1.0},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.5, "min_p": 0.01},
    {"min_p": 0.05},
    {"top_p": 1e-9},
]
#: Rounding of fp32: of a capped logit 2e-6, over a temperature of 0.3 or more; of sums of probabilities.
TOLERANCE = 3e-5
#: Tokens that a draw without a top_k finds wherever they stand: as many as a part of the row passes on.
SURELY_FOUND = 60


def allowed(row: np.ndarray, params: SamplingParams, number: float) -> set[int]:
    """The tokens that the number may draw: one, or more where it lies within rounding of a border."""
    if params.greedy:
        return set(np.flatnonzero(row.max() - row <= 1e-5).tolist())
    scaled = (row - row.max()) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    filtered = params.top_k or params.top_p < 1 or params.min_p
    if not filtered:
        order = np.arange(len(row))
    order = order[: params.top_k or None]
    p = np.exp(scaled[order])
    p /= p.sum()
    ends = p.cumsum()
    found: set[int] = set()
    for slack in (-TOLERANCE, 0.0, TOLERANCE):  # where a filter ends is a matter of rounding, too
        kept = (ends - p < params.top_p + slack) | (params.top_p == 1)
        kept &= p >= params.min_p * p[0] * (1 + slack)
        last = max(int(kept.sum()), 1) - 1
        point = number * ends[last]
        inside = (ends - p <= point + TOLERANCE) & (ends >= point - TOLERANCE) & (np.arange(len(p)) <= last)
        found |= set(order[inside & (p > 0)].tolist())
    if filtered:  # logits that fp32 may take for equal stand in either order
        for i in list(found):
            found |= set(np.flatnonzero(np.abs(row - row[i]) <= 1e-5).tolist())
    return found


def width(row: np.ndarray, params: SamplingParams) -> int:
    """How many tokens top_p and min_p keep of all."""
    p = np.exp((row - row.max()) / params.temperature)
    p = -np.sort(-p / p.sum())
    return int(((p.cumsum() - p < params.top_p) & (p >= params.min_p * p[0])).sum())


def drawn(
    logits: torch.Tensor, params: list[SamplingParams], seed: int, cap: float | None
) -> tuple[list[int], list[int], list[float]]:
    values = [uniform(seed, i) for i in range(len(params))]
    table = torch.tensor([DrawParams.of(p, u) for p, u in zip(params, values, strict=True)], dtype=torch.float64).cuda()
    ids, exact = (torch.full((len(params) + 2,), -7, dtype=torch.int32, device="cuda") for _ in range(2))
    draw_tokens(logits, table, ids, exact, softcap=cap)
    assert ids[-2:].tolist() == exact[-2:].tolist() == [-7, -7]
    return ids[:-2].tolist(), exact[:-2].tolist(), values


def params_of(mode: dict[str, float], temperature: float) -> SamplingParams:
    return SamplingParams(**{"temperature": temperature, **mode})  # type: ignore[arg-type]


def check(logits: torch.Tensor, modes: list[dict[str, float]], seed: int, cap: float | None) -> int:
    """Draws a token of every row, with one mode after another; returns how many rows were exact."""
    params = [params_of(modes[i % len(modes)], 0.3 + 0.4 * (i % 5)) for i in range(len(logits))]
    assert all(supports(DrawCase(logits.shape[1], p.top_k), gpu_of(0)) is None for p in params)
    tokens, exact, values = drawn(logits, params, seed, cap)
    rows = logits.double().cpu().numpy()
    rows = rows if cap is None else cap * np.tanh(rows / cap)
    for row, p, token, number, right in zip(rows, params, tokens, values, exact, strict=True):
        if right:
            assert token in allowed(row, p, number), (p, token)
        else:
            assert not p.top_k
            assert not p.greedy
            assert width(row, p) > SURELY_FOUND
    return sum(exact)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 50, 65, 2048, 2049, 5000, 256000, 262144])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_tokens_against_float64(mode: dict[str, float], vocabulary: int, cap: float | None) -> None:
    found = 0
    for seed in (0, 5) if vocabulary > 10000 else range(6):
        logits = torch.randn(5, vocabulary, device="cuda") * (3 + seed)
        found += check(logits, [mode], seed, cap)
    assert found >= 3


@pytest.mark.parametrize("vocabulary", [65, 5000, 256000])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_each_row_has_its_own_parameters(vocabulary: int, cap: float | None) -> None:
    for seed in range(3):
        logits = torch.randn(5 * len(MODES), vocabulary, device="cuda") * (3 + 4 * seed)
        assert check(logits, MODES, seed, cap) > 3 * len(MODES)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equal_logits_and_tokens_that_cannot_be(mode: dict[str, float]) -> None:
    for seed in range(6):
        logits = (torch.randn(4, 7001, device="cuda") * 3).round()
        logits[:, seed::2] = -torch.inf
        check(logits, [mode], seed, None)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((8, 9000), -torch.inf, device="cuda")
    logits[:, [17, 2500, 8999]] = torch.tensor([1.0, 0.5, 0.0], device="cuda")
    for mode in MODES:
        for seed in range(20):
            params = [params_of(mode, 1.0)] * 8
            tokens, exact, _ = drawn(logits, params, seed, None)
            assert set(tokens) <= {17, 2500, 8999}
            assert exact == [1] * 8


def test_likeliest_tokens_side_by_side() -> None:
    """All in one part of the row, more than it passes on at first."""
    sloped = torch.arange(20000, device="cuda").flip(0)[None].expand(3, -1) * 0.002
    for mode in MODES:
        check(sloped.contiguous(), [mode], 1, None)
        check(sloped.flip(1).contiguous(), [mode], 2, 30.0)


def test_logits_that_are_not_numbers_give_a_token_in_range_and_are_not_exact() -> None:
    logits = torch.full((2, 5000), torch.nan, device="cuda")
    tokens, exact, _ = drawn(logits, [SamplingParams(temperature=1.0, top_k=9)] * 2, 1, None)
    assert all(0 <= token < 5000 for token in tokens)
    assert exact == [0, 0]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0] + [-20.0] * 3000, device="cuda").repeat(1000, 1)
    shares = torch.softmax(logits[0, :4].double(), 0).tolist()
    for mode in ({}, {"top_k": 4}):
        tokens, _, _ = drawn(logits, [SamplingParams(temperature=1.0, **mode)] * 1000, 5, None)  # type: ignore[arg-type]
        for token, share in enumerate(shares):
            assert abs(tokens.count(token) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5


def test_what_is_refused() -> None:
    gpu = gpu_of(0)
    assert "262144" in (supports(DrawCase(262145, 0), gpu) or "")
    for top_k in (0, 64):
        assert supports(DrawCase(1000, top_k), gpu) is None
    assert "top_k" in (supports(DrawCase(1000, 65), gpu) or "")
