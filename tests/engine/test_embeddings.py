"""Embeddings against the mean of transformers' last hidden states, in every way a prompt can go through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.driver import CPU, GREEDY, Recording, assert_nothing_held, greedy_by_transformers, prompts_of, twins
from gemcut.engine import EngineConfig, SamplingParams
from gemcut.engine.request import Sequence
from gemcut.engine.results import Completion
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.gemma import Gemma

NO_TOKENS = SamplingParams(max_new_tokens=0)


def expected(reference: Any, ids: list[int], start: int) -> Tensor:
    """Of transformers: ``last_hidden_state`` is behind the final norm."""
    with torch.no_grad():
        return reference.model(torch.tensor([ids])).last_hidden_state[0, start:].double().mean(0)  # type: ignore[no-any-return]


def assert_embedded(sequence: Sequence, reference: Any, start: int) -> None:
    found = Completion.of(sequence).embedding
    assert found is not None
    assert found.dtype == torch.float32
    prompt = list(sequence.request.prompt_ids)
    assert (found - expected(reference, prompt, start)).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("chunk", [5, 512])
def test_equal_to_transformers(model_type: str, chunk: int) -> None:
    """From any place, in chunks and whole, with an answer behind and without, beside others and their scores."""
    model, reference = twins(model_type)
    prompts = prompts_of(33, 20, 2, 1, 27, 26, seed=4)
    starts = [1, 19, 1, 0, 14, 0]
    engine = Recording(model, max_batch_tokens=chunk, sequences=4)
    sequences = [
        engine.add(ids, GREEDY if n % 2 else NO_TOKENS, embed_from=start, prompt_logprobs_from=1 if n == 0 else None)
        for n, (ids, start) in enumerate(zip(prompts, starts, strict=True))
    ]
    plain = engine.add(prompts[0])
    engine.finish()
    for n, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        assert_embedded(sequence, reference, start)
        expected_ids = greedy_by_transformers(reference, prompts[n]) if n % 2 else []
        assert sequence.output_ids == expected_ids
    assert len(sequences[0].prompt_scores) == 32
    assert plain.output_ids == greedy_by_transformers(reference, prompts[0])
    assert Completion.of(plain).embedding is None
    assert_nothing_held(engine)


def test_the_cache_serves_what_stands_before_it_alone() -> None:
    """A beginning that is there already is taken over up to the first token that counts."""
    model, reference = twins()
    (prompt,) = prompts_of(30, seed=8)
    engine = Recording(model)
    engine.answers([prompt])
    whole, rest = engine.add(prompt, NO_TOKENS, embed_from=0), engine.add(prompt, NO_TOKENS, embed_from=16)
    engine.finish()
    assert (whole.cached_tokens, rest.cached_tokens) == (0, 16)
    assert_embedded(whole, reference, 0)
    assert_embedded(rest, reference, 16)


def test_a_preempted_request_counts_each_token_once() -> None:
    """Both grow until one must give its blocks back and computes its prompt again."""
    model, reference = twins()
    prompts = prompts_of(30, 34, seed=9)
    engine = Recording(model, max_batch_tokens=8, sequences=2)
    spare = [engine.cache.full.allocate() for _ in range(engine.cache.full.count - 24)]
    params = SamplingParams(temperature=0, max_new_tokens=30)
    sequences = [engine.add(prompt, params, embed_from=1) for prompt in prompts]
    engine.finish()
    assert engine.scheduler.preemptions > 0
    for sequence in sequences:
        assert_embedded(sequence, reference, 1)
    for block in spare:
        engine.cache.full.release(block)
    assert_nothing_held(engine)


def test_a_step_that_was_struck_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the sum and before the token: the same rows come again, or the request starts anew."""
    model, reference = twins()
    (prompt,) = prompts_of(20, seed=2)
    engine = Recording(model, max_batch_tokens=6)
    sequence = engine.add(prompt, GREEDY, embed_from=1)
    inner, calls = engine.scheduler.computed, 0

    def struck(scheduled: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        inner(scheduled)

    monkeypatch.setattr(engine.scheduler, "computed", struck)
    with pytest.raises(KeyboardInterrupt):
        engine.finish()
    engine.finish()
    assert_embedded(sequence, reference, 1)


def test_numbers_that_are_not_finite_end_the_request_alone() -> None:
    model, _ = twins()
    engine = Recording(model, max_batch_tokens=64)
    bad, good = (engine.add(ids, NO_TOKENS, embed_from=0) for ids in prompts_of(12, 9, seed=3))
    inner = engine.runner._hidden

    def hidden(*arguments: Any) -> Tensor:
        rows = inner(*arguments).clone()
        rows[3] = float("inf")
        return rows

    engine.runner._hidden = hidden  # type: ignore[method-assign]
    engine.finish()
    assert Completion.of(bad).finish_reason == "error"
    assert Completion.of(good).finish_reason == "length"
    assert Completion.of(good).embedding is not None
    assert_nothing_held(engine)


@pytest.mark.parametrize("start", [-1, 3, 2.0, True, "0"])
def test_a_bad_place_is_refused(start: Any) -> None:
    engine = Recording(twins()[0])
    with pytest.raises(ParameterError, match=r"embed_from is .*; expected a place from 0 \(the first token\) to 2"):
        engine.add([1, 2, 3], NO_TOKENS, embed_from=start)


def test_a_list_of_texts_and_one() -> None:
    """Through Gemma: ``<bos>`` is left out where a prompt begins with it."""
    model, reference = twins()
    gemma = Gemma(model, None, CPU, engine=EngineConfig(block_size=4, max_batch_tokens=16, sequences=2))
    bos = gemma.bos_id
    prompts = [[bos, 5, 6, 7], [8, 9, 10], [bos, *range(20, 60)]]
    found = gemma.embed(prompts)
    assert (found.shape, found.dtype) == ((3, 48), torch.float32)
    for row, ids in zip(found, prompts, strict=True):
        assert (row - expected(reference, ids, int(ids[0] == bos))).abs().max() < 1e-4
    assert torch.equal(gemma.embed(prompts[1]), gemma.embed([prompts[1]]))
    assert gemma.embed([]).shape == (0, 48)
    with pytest.raises(ParameterError, match="text 1 is empty; expected at least one token besides <bos>"):
        gemma.embed([[5], [bos]])
    with pytest.raises(ContextLengthError):
        gemma.embed([[5] * 300])
    assert_nothing_held(gemma.engine)
