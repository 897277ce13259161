"""Rows chosen together are those that a loop over rows chooses, whatever they ask for; and a request's own edit."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from typing import Any

import pytest
import torch

from engine import sampler_by_row
from engine.driver import Recording, assert_nothing_held, twins
from gemcut.engine import Edit, Request, SamplingParams
from gemcut.engine.edits import unpacked
from gemcut.engine.request import RowError, Sequence
from gemcut.engine.sampler import sample
from gemcut.engine.sampling import LEAST


def random_params(chance: random.Random, vocabulary: int) -> SamplingParams:
    """Every mix: most fields at rest most of the time, else anything that is accepted."""

    def some(rest: Any, *values: Any) -> Any:
        return chance.choice(values) if chance.random() < 0.4 else rest

    low = some(0, 1, 3)
    return SamplingParams(
        max_new_tokens=9,
        min_new_tokens=low,
        temperature=some(1.0, 0.0, 0.3, 0.7, 1.7, 100.0, LEAST),
        top_k=some(0, 1, 5, 40, 64, 1000, 10**6),
        top_p=some(1.0, 0.9, 0.95, 0.5, 1e-9, 0.999999),
        min_p=some(0.0, 0.05, 1e-4, 1.0),
        repetition_penalty=some(1.0, 1.3, 0.8, LEAST),
        presence_penalty=some(0.0, 0.7, -2.0),
        frequency_penalty=some(0.0, 0.3, -1.1),
        logit_bias=some({}, {3: 2.5, 17: -1e9}, {chance.randrange(vocabulary): 1e9}, dict.fromkeys(range(40), 1.5)),
        seed=chance.randrange(2**63),
        logprobs=some(None, 0, 3, 20),
        do_sample=None,
    )


def random_sequence(chance: random.Random, vocabulary: int) -> Sequence:
    prompt = tuple(chance.randrange(vocabulary) for _ in range(chance.randrange(1, 30)))
    stops = frozenset(chance.randrange(vocabulary) for _ in range(2))
    sequence = Sequence(Request(prompt_ids=prompt, params=random_params(chance, vocabulary), stop_ids=stops))
    for _ in range(chance.randrange(6)):
        sequence.append(chance.choice((chance.randrange(vocabulary), *prompt)))
    return sequence


@pytest.mark.parametrize(
    ("vocabulary", "batches", "most"), [(64, 60, 64), (900, 60, 64), (6000, 40, 64), (70_000, 8, 24)]
)
def test_the_rows_together_are_the_rows_apart(vocabulary: int, batches: int, most: int) -> None:
    """Tokens and log-probabilities, bit for bit: some 5,000 rows of every mix, a third with many equal logits."""
    chance, generator = random.Random(vocabulary), torch.Generator().manual_seed(vocabulary)
    drawn = failed = 0
    for _ in range(batches):
        count = chance.randrange(1, most + 1)
        logits = torch.randn(count, vocabulary, generator=generator) * torch.rand(count, 1, generator=generator) * 8
        if chance.random() < 1 / 3:
            logits = logits.bfloat16().float()
        for row in logits:
            if chance.random() < 0.03:
                row[chance.randrange(vocabulary)] = chance.choice((torch.nan, torch.inf, -torch.inf))
        sequences = [random_sequence(chance, vocabulary) for _ in range(count)]
        before = logits.clone()
        expected, expected_logprobs = sampler_by_row.sample(logits, sequences, lambda: "why")
        found, logprobs = sample(logits, sequences, lambda: "why")
        assert found == expected
        assert logprobs == expected_logprobs
        assert torch.equal(logits, before) or not logits.isfinite().all()
        drawn += sum(not sequence.request.params.greedy for sequence in sequences)
        failed += sum(isinstance(token, RowError) for token in found)
    assert drawn > batches * most / 4
    assert failed > 0


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    chance, generator = random.Random(1), torch.Generator().manual_seed(1)
    logits = torch.randn(40, 5000, generator=generator) * 4
    sequences = [random_sequence(chance, 5000) for _ in range(40)]
    together = sample(logits, sequences)
    order = list(range(40))
    chance.shuffle(order)
    shuffled = sample(logits[order], [sequences[i] for i in order])
    assert [shuffled[0][order.index(i)] for i in range(40)] == together[0]
    apart = [sample(logits[i : i + 1], sequences[i : i + 1]) for i in range(40)]
    assert [(tokens[0], logprobs[0]) for tokens, logprobs in apart] == list(zip(*together, strict=True))


def test_no_operation_waits_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor becomes Python's numbers (on a GPU: a wait) as often for 64 rows of every mix as for 16."""
    counts = []
    for rows in (16, 64):
        chance, asked = random.Random(2), []
        sequences = [random_sequence(chance, 3000) for _ in range(rows)]
        logits = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(2)) * 9
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
                inner = getattr(torch.Tensor, name)

                def heard(self: Any, *args: Any, inner: Any = inner, asked: list[int] = asked) -> Any:
                    asked.append(1)
                    return inner(self, *args)

                patch.setattr(torch.Tensor, name, heard)
            sample(logits, sequences)
        counts.append(len(asked))
    assert counts[0] == counts[1] <= 6


# ---- a request's own edit --------------------------------------------------------------------------------------------


def words_of(allowed: Many[int], vocabulary: int) -> torch.Tensor:
    words = [0] * -(-vocabulary // 32)
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)


def with_edit(edit: Any, **params: Any) -> Sequence:
    return Sequence(Request(prompt_ids=(1, 2), params=SamplingParams(**params), edit=edit))


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100, 257])
def test_bits_are_tokens(vocabulary: int) -> None:
    chosen = random.Random(vocabulary).sample(range(vocabulary), (vocabulary + 1) // 2)
    (found,) = unpacked(words_of(chosen, vocabulary)[None], vocabulary)
    assert found.nonzero()[:, 0].tolist() == sorted(chosen)


def test_a_mask_and_a_bias_beside_other_rows() -> None:
    """Against the same asked for by ``logit_bias``; the neighbours do not notice."""
    vocabulary, n = 100, 60
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(4)) * 3
    allowed = [5, 31, 32, 64, 99]
    bias = torch.linspace(-2, 2, vocabulary)
    banned = {token: -1e9 for token in range(vocabulary) if token not in allowed}
    by_mask, by_bias, by_hand, plain = [], [], [], []
    for seed in range(n):
        own = {"seed": seed, "temperature": (0.0, 1.0, 1.3)[seed % 3], "top_k": (0, 3)[seed % 2]}
        by_mask.append(with_edit(lambda tokens, length: Edit(allowed=words_of(allowed, vocabulary)), **own))
        by_hand.append(with_edit(None, **own, logit_bias=banned))
        by_bias.append(with_edit(lambda tokens, length: Edit(bias=bias), **own))
        plain.append(with_edit(None, **own))
    together = sample(torch.cat([logits] * 3), [*by_mask, *plain, *by_bias])[0]
    assert together[:n] == sample(logits, by_hand)[0]
    assert set(together[:n]) <= set(allowed)
    assert len(set(together[:n])) > 1
    assert together[n : 2 * n] == sample(logits, plain)[0]
    assert together[2 * n :] == sample(logits + bias, plain)[0]


def test_an_edit_that_is_wrong_ends_its_request_alone() -> None:
    vocabulary = 70
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(5))

    def raises(tokens: Many[int], length: int) -> Edit:
        raise RuntimeError("the grammar is stuck")

    bad: dict[Any, str] = {
        raises: "RuntimeError: the grammar is stuck",
        (lambda t, n: Edit(allowed=torch.zeros(3, dtype=torch.int32))): "every token is forbidden",
        # Bits behind the vocabulary allow nothing.
        (lambda t, n: Edit(allowed=words_of([70, 71, 95], 96))): "every token is forbidden",
        (lambda t, n: Edit(bias=torch.full((70,), -torch.inf))): "every token is forbidden",
        (lambda t, n: Edit(bias=torch.full((70,), torch.nan))): "own bias makes logits NaN or infinite",
        (lambda t, n: Edit(allowed=torch.zeros(4, dtype=torch.int32))): "as torch.int32 [4]; expected torch.int32 [3]",
        (lambda t, n: Edit(bias=torch.zeros(70).double())): "bias as torch.float64 [70]; expected torch.float32 [70]",
        (lambda t, n: "yes"): "a LogitsEdit gave str; expected an Edit or None",
    }  # fmt: skip
    for greedy in (True, False):
        own: dict[str, Any] = {"temperature": 0} if greedy else {"seed": 3, "logprobs": 2}
        sequences = [with_edit(edit, **own) for edit in bad]
        tokens, logprobs = sample(logits, [*sequences, with_edit(None, **own)])
        for token, said in zip(tokens, bad.values(), strict=False):
            assert isinstance(token, RowError)
            assert said in token.message
        alone = sample(logits[8:], [with_edit(None, **own)])
        assert (tokens[8], logprobs[8]) == (alone[0][0], alone[1][0])
        assert logprobs[:8] == [None] * 8


def test_an_edit_through_the_engine() -> None:
    """It hears prompt and output, and what it says decides: here, the letters of a fixed answer."""
    model, _ = twins()
    answer, asked = [7, 300, 7, 41], []

    def edit(tokens: Many[int], prompt_length: int) -> Edit:
        asked.append((list(tokens[:prompt_length]), list(tokens[prompt_length:])))
        return Edit(allowed=words_of([answer[len(tokens) - prompt_length]], 320))

    engine = Recording(model)
    guided = engine.add([4, 5, 6], SamplingParams(seed=1, max_new_tokens=4, logprobs=0), edit=edit)
    beside = engine.add([4, 5, 6], SamplingParams(seed=1, max_new_tokens=4))
    nothing = Edit(allowed=torch.zeros(10, dtype=torch.int32))
    stuck = engine.add([9, 9], SamplingParams(seed=1, max_new_tokens=4), edit=lambda tokens, length: nothing)
    events = engine.finish()
    assert guided.output_ids == answer
    assert asked == [([4, 5, 6], answer[:n]) for n in range(4)]
    assert stuck.output_ids == []
    (end,) = [event for event in events if event.request_id == stuck.id]
    assert end.finish_reason == "error"
    assert "every token is forbidden" in str(end.error)
    alone = Recording(model)
    same = alone.add([4, 5, 6], SamplingParams(seed=1, max_new_tokens=4))
    alone.finish()
    assert beside.output_ids == same.output_ids
    assert_nothing_held(engine)


def test_min_new_tokens_and_a_mask_that_leave_nothing() -> None:
    sequence = Sequence(
        Request(
            prompt_ids=(1,),
            params=SamplingParams(temperature=0, min_new_tokens=2),
            stop_ids=frozenset({9}),
            edit=lambda tokens, length: Edit(allowed=words_of([9], 40)),
        )
    )
    (token,), _ = sample(torch.zeros(1, 40), [sequence])
    assert isinstance(token, RowError)
    assert "min_new_tokens leave none" in token.message
