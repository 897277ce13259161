"""What the engine refuses before it starts, and how requests end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.driver import CPU, Recording, assert_nothing_held, greedy, small_model, twins
from gemcut.cache_blocks import sliding_blocks_needed
from gemcut.engine import Engine, EngineConfig, SamplingParams
from gemcut.engine.cache import bytes_per_block
from gemcut.errors import CapacityError, ContextLengthError, ParameterError

# ---- refused before it starts ------------------------------------------------------------------------------------


def test_too_long_for_the_context_names_both_numbers() -> None:
    engine = Recording(small_model(context=96))
    with pytest.raises(
        ContextLengthError, match=r"90 tokens and up to 7 new .* 97 together; the context holds 96: .*6"
    ):
        engine.add([1] * 90, greedy(7))
    with pytest.raises(ContextLengthError, match=r"97 tokens .* holds 96: shorten the prompt"):
        engine.add([1] * 97, greedy(0))
    assert_nothing_held(engine)
    assert len(engine.answers([[1] * 90], greedy(6))[0]) == 6


def test_context_is_used_to_the_last_token() -> None:
    model, reference = twins()
    engine = Recording(model, max_context=40, sequences=1)
    sequence = engine.add([5] * 33, greedy(7))
    engine.finish()
    assert len(sequence.tokens) == 40
    ids = torch.tensor([[5] * 33])
    with torch.no_grad():
        expected = reference.generate(
            ids, attention_mask=ids * 0 + 1, max_new_tokens=7, do_sample=False, eos_token_id=None
        )
    assert sequence.tokens == expected[0].tolist()


def test_impossible_for_the_cache_names_both_numbers() -> None:
    model = small_model(window=6, context=96)
    full, sliding = bytes_per_block(model.config, model.dtype, 4)
    engine = Recording(model, kv_memory=12 * full + 5 * sliding, max_batch_tokens=8)
    assert (engine.cache.full.count, engine.cache.sliding.count) == (12, 5)
    with pytest.raises(CapacityError, match=r"needs 13 full-attention cache blocks of 4 tokens; 12 are available"):
        engine.add([1] * 40, greedy(12))
    assert_nothing_held(engine)
    assert engine.steps == 0
    assert len(engine.answers([[1] * 36], greedy(12))[0]) == 12
    # With many tokens a step it is the sliding group that does not suffice.
    engine = Recording(model, sequences=1, max_batch_tokens=8)
    engine.chunk = 50
    with pytest.raises(CapacityError, match=r"needs 15 sliding-attention cache blocks of 4 tokens; 5 are available"):
        engine.add([1] * 60, greedy(20))


@pytest.mark.slow
@pytest.mark.parametrize("window", [6, 40, 96])
@pytest.mark.parametrize("chunk", [8, 96])
def test_kv_memory_serves_the_longest_request_it_can(window: int, chunk: int) -> None:
    """The memory is split so that one request may use nearly all of it, also where no whole context fits."""
    model = small_model(window=window, context=96)
    full, sliding = bytes_per_block(model.config, model.dtype, 4)
    for memory in range(2 * (full + sliding), 40 * (full + sliding), 3 * full + 7):
        engine = Recording(model, kv_memory=memory, max_batch_tokens=chunk)
        blocks = range(1, 25)
        cost = [n * full + sliding_blocks_needed(model.config, 4 * n, min(chunk, 96), 4) * sliding for n in blocks]
        longest = 4 * sum(c <= memory for c in cost)
        assert engine.answers([[1] * (longest - 3)], greedy(3))
        with pytest.raises((CapacityError, ContextLengthError)):
            engine.add([1] * (longest - 3), greedy(4))
        assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([3, 64], "prompt has token id 64; this model's ids go from 0 to 63"),
        ([-1], "prompt has token id -1"),
        ([1.5], "prompt has token id 1.5"),
        (["a"], "prompt has token id 'a'"),
        ([True], "prompt has token id True"),
    ],
)
def test_bad_prompt(prompt: list[Any], message: str) -> None:
    engine = Recording(small_model())
    with pytest.raises(ParameterError, match=message):
        engine.add(prompt)
    assert_nothing_held(engine)


def test_bad_request() -> None:
    engine = Recording(small_model())
    with pytest.raises(ParameterError, match="logit_bias has token id 64"):
        engine.add([1], SamplingParams(logit_bias={64: 1.0}))
    with pytest.raises(ParameterError, match="stop texts are found in decoded text only"):
        engine.add([1], SamplingParams(stop=("x",)))
    engine.add([1], request_id=-7)
    with pytest.raises(ParameterError, match="request id -7 is already in use"):
        engine.add([1], request_id=-7)
    engine.finish()
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_context": 97}, "max_context is 97; this model takes from 2 to 96"),
        ({"max_context": 0}, "max_context is 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"max_batch_size": -1}, "max_batch_size is -1"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Engine(small_model(), CPU, EngineConfig(**sizes))


@pytest.mark.parametrize("memory", [-1, 0, 100])
def test_kv_memory_too_small_says_what_suffices(memory: int) -> None:
    model = small_model(window=6, context=96)
    with pytest.raises(CapacityError, match=f"kv_memory of {memory} bytes holds no sequence; at least") as caught:
        Engine(model, CPU, EngineConfig(kv_memory=memory, block_size=4))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    engine = Engine(model, CPU, EngineConfig(kv_memory=least, block_size=4))
    assert engine.cache.nbytes <= least
    assert (engine.cache.full.count, engine.cache.sliding.count) == (1, 1)
    with pytest.raises(CapacityError):
        Engine(model, CPU, EngineConfig(kv_memory=least - 1, block_size=4))


def test_kv_memory_is_kept() -> None:
    model, _ = twins()
    for memory in (50_000, 123_457, 400_000):
        engine = Engine(model, CPU, EngineConfig(kv_memory=memory))
        full, sliding = bytes_per_block(model.config, model.dtype, 16)
        shape = engine.cache.shape
        assert engine.cache.nbytes == shape.full_blocks * full + shape.sliding_blocks * sliding
        assert memory - 2 * (full + sliding) < engine.cache.nbytes <= memory


def test_bytes_per_block_by_hand() -> None:
    model, _ = twins()  # 2 layers of each kind, 2 kv heads of 16, fp32, keys and values
    assert bytes_per_block(model.config, torch.float32, 16) == (2 * 2 * 16 * 2 * 4 * 16,) * 2


def test_no_new_tokens() -> None:
    engine = Recording(small_model())
    sequences = [engine.add([1, 2, 3], greedy(n), prompt_logprobs_from=1) for n in (0, 2, 0)]
    events = engine.finish()
    ends = {e.request_id: e for e in events if e.finish_reason}
    assert [ends[s.id].finish_reason for s in sequences] == ["length"] * 3
    assert [len(s.tokens) - 3 for s in sequences] == [0, 2, 0]
    assert [len(s.prompt_scores) for s in sequences] == [2, 2, 2]
    assert ends[sequences[0].id].token_id is None
    assert_nothing_held(engine)


def test_stop_ids() -> None:
    model = small_model()
    free = Recording(model).answers([[1, 2]], greedy(12))[0]
    stop = next(token for token in free if token != free[0])
    place = free.index(stop)
    engine = Recording(model)
    sequence = engine.add([1, 2], greedy(12), stop_ids=frozenset({stop, 1}))
    last = engine.finish()[-1]
    assert (last.finish_reason, last.stop_reason, last.token_id) == ("stop", stop, stop)
    assert sequence.tokens[2:] == free[: place + 1]
    ignoring = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    sequence = engine.add([1, 2], ignoring, stop_ids=frozenset({stop}))
    last = engine.finish()[-1]
    assert (last.finish_reason, last.stop_reason, sequence.tokens[2:]) == ("length", None, free)
    later = SamplingParams(temperature=0, max_new_tokens=12, min_new_tokens=place + 3)
    # Ids the network does not have (a tokenizer may know more) are no reason to fail.
    sequence = engine.add([1, 2], later, stop_ids=frozenset({stop, 5000}))
    engine.finish()
    assert stop not in sequence.tokens[2 : 2 + place + 3]
    assert len(sequence.tokens) - 2 >= place + 3
