"""Draws with fixed shapes give the sampler's tokens; where they cannot they say so."""

from __future__ import annotations

import pytest
import torch

from gemcut.engine.draw import SORT_FIRST, DrawMode, DrawParams, common_mode, draw, top
from gemcut.engine.request import Request, Sequence
from gemcut.engine.sampler import sample, uniform
from gemcut.engine.sampling import LEAST, SamplingParams

MODES: list[dict[str, float]] = [
    {},
    {"top_k": 40},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 9000, "min_p": 0.01},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.001},
    {"top_p": 1e-9},
    {"min_p": 1.0},
]


def drawn(row: torch.Tensor, params: SamplingParams, seed: int) -> tuple[int, bool]:
    values = torch.tensor(DrawParams.of(params, uniform(seed, 0)), dtype=torch.float64, device=row.device)
    token, exact = draw(row, DrawMode.of(params), values)
    return int(token), bool(exact)


def expected(row: torch.Tensor, params: SamplingParams, seed: int) -> int:
    sequence = Sequence(Request(prompt_ids=(1,), params=params))
    sequence.seed = seed
    return sample(row[None], [sequence])[0][0]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_the_same_tokens(mode: dict[str, float], vocabulary: int) -> None:
    for seed in range(60):
        row = torch.randn(vocabulary) * (2 + seed % 7)
        # Powers of two, for which dividing and multiplying by the inverse (as GPUs do) are the same.
        params = SamplingParams(temperature=2.0 ** (seed % 3 - 1), **mode)  # type: ignore[arg-type]
        token, exact = drawn(row, params, seed)
        if exact or vocabulary <= SORT_FIRST or "top_k" in mode:
            assert exact
            assert token == expected(row, params, seed), seed


def test_a_flat_distribution_is_left_to_the_sampler() -> None:
    params = SamplingParams(top_p=0.9)
    assert not drawn(torch.randn(5000) * 0.01, params, 1)[1]
    assert drawn(torch.randn(5000) * 9, params, 1)[1]
    assert drawn(torch.randn(900) * 0.01, params, 1)[1]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_least_temperature_takes_the_likeliest(mode: dict[str, float]) -> None:
    row = torch.randn(300)
    token, exact = drawn(row, SamplingParams(temperature=LEAST, **mode), 3)  # type: ignore[arg-type]
    assert exact
    assert token == int(row.argmax())


def test_common_mode() -> None:
    one, other = SamplingParams(top_p=0.5), SamplingParams(min_p=0.1, temperature=3.0)
    assert common_mode([one, other]) == DrawMode(0, True)
    assert common_mode([one, SamplingParams(top_k=5)]) is None
    assert common_mode([one, SamplingParams(temperature=0)]) is None
    assert common_mode([SamplingParams()]) == DrawMode(0, False)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_same_tokens_on_a_gpu(mode: dict[str, float]) -> None:
    for seed in range(25):
        row = torch.randn(256000, device="cuda") * (2 + seed % 7)
        params = SamplingParams(temperature=0.3 + 0.13 * seed, **mode)  # type: ignore[arg-type]
        token, exact = drawn(row, params, seed)
        assert exact or "top_k" not in mode
        if exact:
            assert token == expected(row, params, seed), seed


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize(("shape", "count"), [((70_000,), 1), ((3, 70_000), 900), ((2, 8192), 40), ((2, 999), 40)])
def test_top_is_torchs(shape: tuple[int, ...], count: int, spread: float) -> None:
    """Values, places and order, also where many values are equal, and where the equal ones stand at the border."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(count)) * spread
    rounded = values.clone().bfloat16().float()
    border = values.clone()
    border[..., 77] = border[..., 78] = values.topk(count, dim=-1).values[..., -1]
    nothing = torch.full_like(values, -torch.inf)
    nothing[..., 5] = 1.0
    for case in (values, rounded, border, nothing):
        found, places = top(case, count)
        expected = case.topk(count, dim=-1)
        assert torch.equal(found, expected.values)
        assert torch.equal(places, expected.indices)
