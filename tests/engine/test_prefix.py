"""Prefix sharing: what is found in the cache, and that it changes nothing."""

from __future__ import annotations

import pytest

from engine.driver import (
    Recording,
    assert_consistent,
    assert_nothing_held,
    greedy_by_transformers,
    prompts_of,
    twins,
)
from gemcut.engine import SamplingParams
from gemcut.engine.blocks import ROOT_KEY, root_key

TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("window", [4, 30])
@pytest.mark.parametrize("chunk", [3, 64])
def test_shared_prefix_changes_nothing(window: int, chunk: int) -> None:
    model, reference = twins(window=window)
    beginning = prompts_of(41)[0]
    tails = prompts_of(1, 5, 20, seed=9)
    engine = Recording(model, max_batch_tokens=chunk)
    first = engine.add(beginning + tails[0])
    engine.finish()
    others = [engine.add(beginning + tail) for tail in tails]
    engine.finish()
    assert first.cached_tokens == 0
    # 41 tokens fill ten blocks of 4; with a window of 4 the first request has given the early sliding blocks back.
    assert [s.cached_tokens for s in others] == [40, 40, 40]
    for sequence in (first, *others):
        prompt = list(sequence.request.prompt_ids)
        assert sequence.tokens[len(prompt) :] == greedy_by_transformers(reference, prompt)
    assert engine.largest_error() < TOLERANCE
    assert_nothing_held(engine)


def test_prefix_is_shared_while_its_owner_runs() -> None:
    model, _ = twins()
    engine = Recording(model)
    prompt = prompts_of(30)[0]
    owner = engine.add(prompt, SamplingParams(temperature=0, max_new_tokens=40))
    engine.step()
    guest = engine.add([*prompt[:29], 7])
    engine.step()
    tables = engine.scheduler.tables
    assert tables[owner.id].full[:7] == tables[guest.id].full[:7]
    assert tables[owner.id].full[7] != tables[guest.id].full[7]
    assert guest.cached_tokens == 28
    engine.finish()
    assert engine.largest_error() < TOLERANCE
    assert_nothing_held(engine)


def test_answer_is_shared_with_the_next_turn() -> None:
    model, _ = twins()
    engine = Recording(model)
    turn = engine.add(prompts_of(10)[0])
    engine.finish()
    again = engine.add([*turn.tokens, 3, 4, 5])
    engine.finish()
    # The last token of the answer has never been through the network: 21 of 22 tokens fill five blocks.
    assert again.cached_tokens == 20
    assert engine.largest_error() < TOLERANCE


def test_whole_prompt_in_cache_leaves_one_token() -> None:
    model, _ = twins()
    engine = Recording(model)
    prompt = prompts_of(32)[0]
    first, second = engine.answers([prompt]), engine.add(prompt)
    engine.finish()
    assert second.cached_tokens == 28
    assert second.tokens[32:] == first[0]


def test_prefix_shorter_than_needed_window_is_not_used() -> None:
    """Where the sliding blocks a query needs are gone, the full ones alone must not count as a hit."""
    model, _ = twins(window=8)
    engine = Recording(model)
    prompt = prompts_of(60)[0]
    engine.answers([prompt])
    cache = engine.cache
    # Take every sliding block for something else: their contents are evicted, those of the full group stay.
    for block in [cache.sliding.allocate() for _ in range(cache.sliding.count)]:
        cache.sliding.release(block)
    again = engine.add(prompt)
    engine.finish()
    assert again.cached_tokens == 0
    assert engine.largest_error() < TOLERANCE


def test_prefix_ends_where_its_window_is_whole() -> None:
    """A shorter beginning of a longer request is usable only where its own last window is still there."""
    model, _ = twins(window=8)
    engine = Recording(model)
    prompt = prompts_of(60)[0]
    engine.answers([prompt])
    pool = engine.cache.sliding
    engine.add(prompt)
    engine.tend()
    sequence = next(iter(engine.scheduler.waiting))
    keys = [engine.cache._key(sequence.tokens, sequence.block_keys, i) for i in range(14)]
    # Forget the sliding block 9 (tokens 36 to 39): a query at 40 or 44 needs it, one at 48 sees 41 to 48 only.
    lost = pool.lookup(keys[9])
    assert lost is not None
    del pool._kept[lost], pool._block_of[pool._key_of.pop(lost)]
    pool._blank.append(lost)
    for length, usable in ((60, 56), (50, 48), (48, 36), (47, 36), (41, 36), (37, 36), (36, 32)):
        assert engine.cache.match_prefix(prompt[:length], [])[1] == usable, length
    engine.finish()


def test_eviction_forgets_the_oldest_and_stays_right() -> None:
    model, reference = twins()
    engine = Recording(model, sequences=1, max_context=64)
    prompts = prompts_of(40, 40, 40, seed=11)
    answers = [engine.answers([p])[0] for p in prompts]
    again = [engine.add(prompts[i]) for i in (2, 0)]
    engine.finish()
    assert again[0].cached_tokens == 36
    assert again[1].cached_tokens == 0  # 16 blocks hold 64 tokens: the first of three prompts is long gone
    assert [s.tokens[40:] for s in again] == [answers[2], answers[0]]
    assert answers == [greedy_by_transformers(reference, p) for p in prompts]
    assert engine.largest_error() < TOLERANCE


def test_requests_share_with_those_of_their_salt_alone() -> None:
    """Neither finished ones nor those under way: how long a prompt takes tells nothing of another salt's prompts."""
    model, reference = twins()
    (prompt,) = prompts_of(40, seed=6)
    engine = Recording(model, sequences=4)
    for salt, cached in ((b"", 0), (b"", 36), (b"one", 0), (b"one", 36), (b"two", 0), (b"", 36), (b"one", 36)):
        sequence = engine.add(prompt, cache_salt=salt)
        engine.finish()
        assert (salt, sequence.cached_tokens) == (salt, cached)
        assert sequence.output_ids == greedy_by_transformers(reference, prompt)
    first, same, other = (engine.add([9, *prompt], cache_salt=salt) for salt in (b"one", b"one", b"two"))
    engine.step()
    assert engine.scheduler.running == [first, other]  # ``same`` waits for what ``first`` computes
    assert_consistent(engine)
    engine.finish()
    assert [s.cached_tokens for s in (first, same, other)] == [0, 40, 0]
    assert_nothing_held(engine)


def test_salts_give_different_names() -> None:
    roots = [root_key(salt) for salt in (b"", b"gemcut", b"a", b"b", b"ab", b"\0")]
    assert len(set(roots)) == len(roots)
    assert roots[0] == ROOT_KEY
