"""The sampler against direct float64 computations in numpy, against transformers, and by statistics.

The chi-square tests have fixed seeds and ask for p > 0.001: they pass or fail for good.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.chi_square import chi_square, critical
from engine.driver import Recording, twins
from gemcut.engine import Request, SamplingParams
from gemcut.engine.draw import SORT_FIRST, DrawMode, DrawParams, draw
from gemcut.engine.edits import change_logits
from gemcut.engine.request import Sequence
from gemcut.engine.sampler import candidates, sample
from gemcut.errors import ParameterError

VOCABULARY = 40


def sequence_of(
    params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3, 3), output: tuple[int, ...] = (), stops: Any = ()
) -> Sequence:
    sequence = Sequence(Request(prompt_ids=prompt, params=params, stop_ids=frozenset(stops)))
    for token in output:
        sequence.append(token)
    return sequence


def logits_of(rows: int = 1, vocabulary: int = VOCABULARY, seed: int = 0, spread: float = 2.5) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def changed_by_hand(row: Tensor, p: SamplingParams, prompt: Any, output: Any, stops: Any = ()) -> np.ndarray:
    """Penalties and bias, token by token, from their definitions."""
    logits = row.numpy().astype(np.float64)
    for token in range(len(logits)):
        if token in prompt or token in output:
            if logits[token] > 0:
                logits[token] /= p.repetition_penalty
            else:
                logits[token] *= p.repetition_penalty
        times = list(output).count(token)
        if times:
            logits[token] -= p.presence_penalty
        logits[token] -= times * p.frequency_penalty
        logits[token] += p.logit_bias.get(token, 0.0)
        if token in stops and len(output) < p.min_new_tokens:
            logits[token] = -np.inf
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def distribution_by_hand(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, top-p and min-p, renormalising after each; float64 [V]."""
    probabilities = softmax(logits / p.temperature)
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    if p.top_k:
        probabilities[order[p.top_k :]] = 0
        probabilities /= probabilities.sum()
    if p.top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= p.top_p:
                probabilities[token] = 0
            mass += probabilities[token]
        probabilities /= probabilities.sum()
    if p.min_p > 0:
        probabilities[probabilities < p.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


# ---- what is drawn follows the distribution ----------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.8},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_k_all": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all_filters": {"temperature": 1.4, "top_k": 15, "top_p": 0.9, "min_p": 0.03},
    "repetition": {"repetition_penalty": 1.7},
    "encouraged": {"repetition_penalty": 0.7, "presence_penalty": -1.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "bias": {"logit_bias": {0: 3.0, 5: -4.0, 39: 2.5}},
    "everything": {
        "temperature": 1.2,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {4: 2.0, 8: -1.0},
    },
}
PROMPT, OUTPUT = (1, 2, 3, 3), (4, 8, 8, 8, 2)
#: Fields that say how long an answer is, when it ends or what comes with it, or that only switch a draw on. A grammar's
#: draws are in test_grammar.py: only an engine with a vocabulary knows what it allows.
NOT_OF_A_DRAW = {
    "watermark",  # tests/safety/test_watermark.py has its distribution over keys
    *("max_new_tokens", "min_new_tokens", "stop", "ignore_eos"),
    *("seed", "logprobs", "do_sample", "grammar"),
}


def test_every_field_of_a_draw_has_a_case() -> None:
    """Whoever adds a field is asked for a case, whose distribution is worked out by hand."""
    named = {name for values in SETTINGS.values() for name in values}
    assert {field.name for field in dataclasses.fields(SamplingParams)} - NOT_OF_A_DRAW == named


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("by", ["seed", "place"])
def test_draws_follow_the_distribution(name: str, by: str) -> None:
    """4,000 draws: with as many seeds at one place, and with one seed at as many places."""
    n, row = 4000, logits_of(seed=7)[0]
    row[[4, 8, 3]] = torch.tensor([3.0, 6.0, 4.0])  # tokens the penalties are about shall count
    params = SamplingParams(seed=11, **SETTINGS[name])
    expected = distribution_by_hand(changed_by_hand(row, params, PROMPT, OUTPUT), params)
    if by == "seed":
        sequences = [sequence_of(SamplingParams(seed=i, **SETTINGS[name]), PROMPT, OUTPUT) for i in range(n)]
        tokens, _ = sample(row.expand(n, -1), sequences)
    else:

        class Elsewhere(Sequence):  # the same text, but the random numbers of a later place
            place = 0

            @property
            def output_length(self) -> int:
                return self.place

        sequences = []
        for i in range(n):
            sequence = Elsewhere(Request(prompt_ids=PROMPT, params=params))
            for token in OUTPUT:
                sequence.append(token)
            sequence.place = i
            sequences.append(sequence)
        tokens, _ = sample(row.expand(n, -1), sequences)
    counts = np.bincount(tokens, minlength=VOCABULARY).astype(float)
    statistic, df = chi_square(counts, expected * n)
    assert statistic < critical(df)
    # The test can fail: the plain distribution does not pass for any other.
    if name not in ("plain", "top_k_all"):
        plain = softmax(row.numpy().astype(np.float64))
        statistic, df = chi_square(counts, plain * n)
        assert statistic > critical(df)


@pytest.mark.parametrize("seed", range(12))
def test_candidates_by_hand(seed: int) -> None:
    """Which tokens remain and with what probability, exactly."""
    chance = np.random.default_rng(seed)
    row = logits_of(seed=100 + seed, spread=float(chance.uniform(0.2, 5)))[0]
    params = SamplingParams(
        temperature=float(chance.uniform(0.2, 2.5)),
        top_k=int(chance.choice([0, 1, 3, 12, 40, 90])),
        top_p=float(chance.choice([1.0, 0.99, 0.7, 0.3, 0.01])),
        min_p=float(chance.choice([0.0, 0.001, 0.1, 0.6, 1.0])),
    )
    expected = distribution_by_hand(row.numpy().astype(np.float64), params)
    probabilities, ids = candidates(row, params.temperature, params.top_k, params.top_p, params.min_p)
    found = np.zeros(VOCABULARY)
    found[ids.numpy() if ids is not None else slice(None)] = (probabilities / probabilities.sum()).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert ((found > 0) == (expected > 0)).all()


def test_filters_as_transformers() -> None:
    for seed in range(20):
        row = logits_of(seed=200 + seed)
        ids = torch.zeros(1, 1, dtype=torch.long)
        for k, p, floor, temperature in (
            (0, 0.9, 0.0, 1.0),
            (5, 1.0, 0.0, 1.0),
            (0, 1.0, 0.1, 1.0),
            (12, 0.8, 0.05, 1.5),
        ):
            scores = TemperatureLogitsWarper(temperature)(ids, row)
            for warper in (
                TopKLogitsWarper(k) if k else None,
                TopPLogitsWarper(p) if p < 1 else None,
                MinPLogitsWarper(floor) if floor else None,
            ):
                scores = warper(ids, scores) if warper is not None else scores
            theirs = scores.softmax(-1)[0]
            probabilities, kept = candidates(row[0], temperature, k, p, floor)
            assert kept is not None
            ours = torch.zeros(VOCABULARY).index_put((kept,), probabilities / probabilities.sum())
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_repetition_penalty_as_transformers() -> None:
    row = logits_of(seed=3)
    context = (*PROMPT, *OUTPUT)
    theirs = RepetitionPenaltyLogitsProcessor(1.6)(torch.tensor([context]), row.clone())[0]
    seen: list[int] = []
    for _ in range(VOCABULARY):  # greedy tokens one after another, each banned once it was found
        bias = dict.fromkeys(seen, -1e9)
        params = SamplingParams(temperature=0, repetition_penalty=1.6, logit_bias=bias)
        tokens, _ = sample(row, [sequence_of(params, PROMPT, OUTPUT)])
        seen += tokens
    assert seen == theirs.argsort(descending=True).tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_takes_the_likeliest_after_penalties(name: str) -> None:
    rows = logits_of(30, seed=5)
    settings = {**SETTINGS[name], "temperature": 0}
    params = SamplingParams(**settings)
    tokens, _ = sample(rows, [sequence_of(params, PROMPT, OUTPUT)] * 30)
    assert tokens == [int(changed_by_hand(row, params, PROMPT, OUTPUT).argmax()) for row in rows]
    before = rows.clone()
    sample(rows, [sequence_of(params, PROMPT, OUTPUT)] * 30)
    assert torch.equal(rows, before)  # the caller's logits are not changed


def test_mixed_batch_is_row_by_row() -> None:
    rows = logits_of(len(SETTINGS) + 1, seed=6)
    sequences = [sequence_of(SamplingParams(seed=i, **s), PROMPT, OUTPUT) for i, s in enumerate(SETTINGS.values())]
    sequences.append(sequence_of(SamplingParams(temperature=0), PROMPT, OUTPUT))
    together, _ = sample(rows, sequences)
    apart = [sample(row[None], [sequence])[0][0] for row, sequence in zip(rows, sequences, strict=True)]
    assert together == apart


def test_min_new_tokens_forbids_stops_until_then() -> None:
    row = torch.zeros(1, VOCABULARY)
    row[0, 9] = 50.0
    params = SamplingParams(temperature=0, min_new_tokens=2, max_new_tokens=5)
    for output, allowed in (((), False), ((7,), False), ((7, 7), True)):
        (token,), _ = sample(row, [sequence_of(params, output=output, stops={9, 10**6, -1})])
        assert (token == 9) is allowed


# ---- tails and shortcuts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3, 3.0, 8.0])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.5, 0.0), (0.95, 0.0), (0.999999, 0.0), (1.0, 0.02), (1.0, 0.9), (0.9, 0.5)]
)
def test_shortcut_equals_full_sort(spread: float, top_p: float, min_p: float) -> None:
    """Sorting 1,024 of 5,000 first must give what sorting all gives; a flat row cannot be cut short."""
    row = logits_of(vocabulary=5000, seed=9, spread=spread)[0] + torch.linspace(0, 1e-4, 5000)
    probabilities, ids = candidates(row, 1.0, 0, top_p, min_p)
    ordered, order = (row - row.max()).softmax(-1).sort(descending=True)
    keep = torch.ones(5000, dtype=torch.bool)
    if top_p < 1:
        keep &= ordered.double().cumsum(0) - ordered < top_p
    if min_p > 0:
        keep &= ordered >= min_p * ordered[0]
    assert ids is not None
    assert torch.equal(probabilities, ordered[keep])
    if spread >= 0.3:  # else many tokens have the same fp32 probability, in any order
        assert torch.equal(ids, order[keep])
    assert len(set(ids.tolist())) == len(ids)
    if spread == 0.0 and top_p > 0.3 and min_p < 0.5:
        assert len(ids) > SORT_FIRST  # here the shortcut does not suffice


def test_flat_row_draws_from_the_whole_nucleus() -> None:
    n = 4000
    sequences = [sequence_of(SamplingParams(seed=i, top_p=0.9)) for i in range(n)]
    row = torch.linspace(1e-3, 0, 3000)
    tokens, _ = sample(row.expand(n, -1), sequences)
    assert max(tokens) < 2705
    assert max(tokens) > 2600
    counts = np.bincount(np.array(tokens) // 270, minlength=11).astype(float)
    expected = np.array([n / 10] * 10 + [0.0])
    expected[10] = counts[10]  # a token at the very edge
    statistic, df = chi_square(counts[:10], expected[:10])
    assert statistic < critical(df)


@pytest.mark.parametrize("temperature", [1e-30, 1e-20, 1e-6, 0.01, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    row = logits_of(seed=12)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}):
        sequences = [sequence_of(SamplingParams(seed=i, temperature=temperature, **filters)) for i in range(60)]
        tokens, _ = sample(row.expand(60, -1), sequences)
        if temperature <= 0.01:
            assert set(tokens) == {int(row.argmax())}
        else:
            assert len(set(tokens)) > 3


def test_huge_bias_decides_and_bans() -> None:
    row = logits_of(seed=13)
    for temperature in (0.0, 1.0, 100.0):
        chosen = SamplingParams(temperature=temperature, seed=1, logit_bias={17: 1e9})
        assert sample(row, [sequence_of(chosen)])[0] == [17]
    allowed = {3, 30}
    ban = {token: -1e9 for token in range(VOCABULARY) if token not in allowed}
    sequences = [sequence_of(SamplingParams(seed=i, logit_bias=ban)) for i in range(400)]
    assert set(sample(row.expand(400, -1), sequences)[0]) == allowed


def test_tokens_of_probability_zero_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.full((1, 50), -200.0)
    row[0, 20:23] = 5.0
    sequences = [sequence_of(SamplingParams(seed=i)) for i in range(2000)]
    assert Counter(sample(row.expand(2000, -1), sequences)[0]).keys() == {20, 21, 22}
    for number, token in ((0.0, 20), (1 - 2.0**-53, 22)):  # the ends of what uniform gives
        monkeypatch.setattr("gemcut.engine.sampler.uniform", lambda seed, place, number=number: number)
        assert sample(row, [sequence_of(SamplingParams())])[0] == [token]


# ---- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 3, "presence_penalty": 2.0}]
)
def test_logprobs_are_those_of_the_model(settings: dict[str, Any]) -> None:
    """Of the raw softmax, before penalties, temperature and filters, whatever the neighbours ask for."""
    rows = logits_of(4, seed=14)
    wanted = [None, 0, 5, 100]
    sequences = [sequence_of(SamplingParams(seed=3, logprobs=w, **settings), output=(4,)) for w in wanted]
    tokens, logprobs = sample(rows, sequences)
    assert logprobs[0] is None
    for row, token, logprob, count in list(zip(rows, tokens, logprobs, wanted, strict=True))[1:]:
        expected = np.log(softmax(row.numpy().astype(np.float64)))
        assert logprob is not None
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(expected[token], abs=1e-5)
        order = np.argsort(-expected)[:count]
        assert [i for i, _ in logprob.top] == order.tolist()
        assert [v for _, v in logprob.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert [len(entry.top) for entry in logprobs if entry is not None] == [0, 5, VOCABULARY]


def test_logprobs_through_the_engine() -> None:
    model, reference = twins()
    engine = Recording(model)
    sequence = engine.add([4, 5, 6], SamplingParams(seed=1, logprobs=3, max_new_tokens=8))
    events = engine.finish()
    with torch.no_grad():
        expected = reference(torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
    for place, event in enumerate(events):
        assert event.logprob is not None
        values, ids = expected[2 + place].topk(3)
        assert event.logprob.logprob == pytest.approx(expected[2 + place, event.token_id].item(), abs=1e-4)
        assert [i for i, _ in event.logprob.top] == ids.tolist()
        assert [v for _, v in event.logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_of_named_tokens() -> None:
    """Beside those of the likeliest ones, each row's own, in its order; without logprobs it is refused."""
    model, reference = twins()
    engine = Recording(model)
    named = [(7, 300, 7), (), (0,)]
    params = SamplingParams(temperature=0, logprobs=2, max_new_tokens=2)
    sequences = [
        engine.submit(Request(prompt_ids=(4, 5, 6 + i), params=params, logprobs_of=ids)) for i, ids in enumerate(named)
    ]
    engine.finish()
    for ids, sequence in zip(named, sequences, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
        for place, event in enumerate(sequence.events):
            assert event.logprob is not None
            assert event.logprob.asked == pytest.approx(expected[2 + place, list(ids)].tolist(), abs=1e-4)
            assert len(event.logprob.top) == 2
    with pytest.raises(ParameterError, match="logprobs_of needs logprobs"):
        engine.submit(Request(prompt_ids=(4,), params=SamplingParams(), logprobs_of=(1,)))
    with pytest.raises(ParameterError, match="logprobs_of has token id 320"):
        engine.submit(Request(prompt_ids=(4,), params=params, logprobs_of=(320,)))


EXTREMES = {
    "temperature": (1e-30, 1e-9, 1.0, 100.0),
    "repetition_penalty": (1e-30, 1.0, 10.0),
    "logit_bias": ({}, {3: 1e9, 5: -1e9}, {3: -1e9, 4: -1e9}),
    "frequency_penalty": (-2.0, 2.0),
    "top_p": (5e-324, 1e-46, 1.0),
    "min_p": (0.0, 1e-46, 1.0),
    "top_k": (0, 7),
}


def test_every_accepted_extreme_draws_what_float64_says() -> None:
    """On the CPU's way and on the one that stands in CUDA graphs: where all but one token have no share, that one."""
    row, output = logits_of(1, 64, seed=3)[0], (3, 9, 9)
    for values in itertools.product(*EXTREMES.values()):
        params = SamplingParams(**dict(zip(EXTREMES, values, strict=True)), seed=5, max_new_tokens=9)
        sequence = sequence_of(params, output=output)
        (token,), _ = sample(row[None], [sequence])
        assert isinstance(token, int), params
        changed = changed_by_hand(row, params, (1, 2, 3, 3), output)
        scaled = (changed - changed.max()) / params.temperature
        share = np.exp(scaled) / np.exp(scaled).sum()
        # fp32 beside a bias of 1e9 has steps of 64: what is equal there is drawn alike.
        likely = changed >= changed.max() - (64 if params.logit_bias.get(3, 0) > 0 else 1e-5 * np.abs(changed).max())
        if params.top_p < 1 or params.min_p == 1 or params.temperature < 1e-6:
            assert likely[token], params
        assert share[token] > 0 or likely[token], params
        if not params.greedy:
            changed32 = row.clone()
            change_logits(changed32[None], [sequence])
            drawn, exact = draw(
                changed32, DrawMode.of(params), torch.tensor(DrawParams.of(params, 0.3), dtype=torch.float64)
            )
            assert bool(exact)
            assert share[int(drawn)] > 0 or likely[int(drawn)], params
