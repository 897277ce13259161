"""Scores of many texts: each as it is alone, shared places computed once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.driver import CPU, twins
from gemcut.engine import EngineConfig, PromptLogprob
from gemcut.errors import GemcutError
from gemcut.gemma import Gemma
from gemcut.scoring import Portion, score_texts


def score_alone(text: Sequence[int], start: int) -> list[PromptLogprob]:
    """Numbers that depend on a token and all before it, as a model's do."""
    return [
        PromptLogprob(text[place], -float(hash(tuple(text[: place + 1])) % 10**6), place, 0, 0.0)
        for place in range(start, len(text))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_each_text_has_its_own_scores(seed: int) -> None:
    """Any texts, any starts; and no beginning is computed twice where its scores were known."""
    chance = random.Random(seed)
    texts = [[chance.randrange(2) for _ in range(chance.randrange(1, 9))] for _ in range(chance.randrange(12))]
    starts = [chance.randrange(1, len(text) + 1) for text in texts]
    if seed % 2:
        starts = [1] * len(texts)
    computed: list[tuple[int, ...]] = []

    def compute(parts: list[Portion]) -> list[list[PromptLogprob]]:
        for part in parts:
            text = texts[part.text]
            computed.extend(tuple(text[: place + 1]) for place in range(part.start, len(text)))
        return [score_alone(texts[part.text], part.start) for part in parts]

    found = score_texts(texts, starts, compute)
    assert found == [score_alone(text, start) for text, start in zip(texts, starts, strict=True)]
    if seed % 2:
        assert len(computed) == len(set(computed))


def test_through_a_network_as_transformers() -> None:
    model, reference = twins()
    gemma = Gemma(model, None, CPU, engine=EngineConfig(block_size=4, max_batch_tokens=64, sequences=6))
    chance = random.Random(5)
    context = [2, *(chance.randrange(320) for _ in range(21))]
    texts = [[*context, *(chance.randrange(320) for _ in range(n))] for n in (5, 1, 9, 0)]
    texts += [[*texts[2][:27], 7, 8], texts[0], [2], [2, 9]]
    starts = [22, 22, 1, 3, 22, 1, 1, 1]
    computed = 0
    inner = gemma.engine.runner.run

    def run(batch: Any, tables: Any) -> Any:
        nonlocal computed
        computed += sum(scheduled.length for scheduled in batch)
        return inner(batch, tables)

    gemma.engine.runner.run = run  # type: ignore[method-assign]
    scores = gemma.score(texts, start=starts, ranks=True)
    for text, start, own in zip(texts, starts, scores, strict=True):
        with torch.no_grad():
            logprobs = reference(torch.tensor([text])).logits[0].log_softmax(-1)
        assert len(own) == len(text) - start
        for place, score in enumerate(own, start):
            before = logprobs[place - 1]
            assert score.token_id == text[place]
            assert score.logprob == pytest.approx(before[text[place]].item(), abs=1e-4)
            assert score.rank == 1 + int((before > before[text[place]]).sum())
            assert score.greedy_id == int(before.argmax())
            assert score.greedy_logprob == pytest.approx(before.max().item(), abs=1e-4)
    computed = 0
    plain = gemma.score(texts)
    # Of each text the block that it does not share whole, and what is in none.
    assert computed <= len({tuple(text[: i + 1]) for text in texts for i in range(len(text))}) + 4 * len(texts)
    assert [len(own) for own in plain] == [len(text) - 1 for text in texts]
    assert plain[2] == pytest.approx([score.logprob for score in scores[2]], abs=1e-5)
    assert gemma.score([]) == []


@pytest.mark.parametrize(
    ("texts", "start", "said"),
    [
        ([[2, 3]], 0, "start is 0; expected a place from 1"),
        ([[2, 3]], 3, "expected a place from 1 (the second token) to the text's length, 2"),
        ([[2, 3], [2]], [1], "2 texts but 1 places in start"),
        ([[2, 3]], "1", "start is '1'; expected a place from 1 on, or one for each text"),
        ([[2, 3]], 1.0, "start is 1.0"),
        ([[2, 3]], [True], "start is True"),
        ([[2], []], 1, "the prompt is empty"),
        ([[2], [999]], 1, "prompt has token id 999"),
        ([[2], [2] * 300], 1, "the context holds 256"),
    ],
)
def test_what_is_wrong_is_said(texts: Any, start: Any, said: str) -> None:
    gemma = Gemma(twins()[0], None, CPU, engine=EngineConfig(block_size=4))
    with pytest.raises(GemcutError) as caught:
        gemma.score(texts, start=start)
    assert said in str(caught.value)
    assert not gemma.engine.scheduler.running
    assert not gemma.engine.scheduler.waiting
