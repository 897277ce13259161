"""Completion and TextStream, through Gemma with the real tokenizer and a tiny random network."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.driver import CPU, assert_nothing_held, settled, small_model
from engine.words import Gate
from gemcut.engine import EngineConfig, SamplingParams, TokenEvent
from gemcut.engine.results import Completion
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.gemma import Gemma
from gemcut.model.dense import dense_logits
from gemcut.text import Tokenizer
from support import tokenizer_dir

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    model = small_model(vocab_size=256_000, context=128)
    tokenizer = Tokenizer.from_folder(tokenizer_dir())
    return Gemma(model, tokenizer, CPU, engine=EngineConfig(block_size=4, max_batch_tokens=16, sequences=6))


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, nothing stays in the engine."""
    yield
    if "gemma" in request.fixturenames:
        gc.collect()
        assert_nothing_held(request.getfixturevalue("gemma").engine)


def params(seed: int, new: int = 24, **more: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_new_tokens=new, **more)


@pytest.mark.slow
def test_completion(gemma: Gemma) -> None:
    ids = gemma.encode(PROMPT)
    (result,) = gemma.complete([ids], params(1, logprobs=2), prompt_logprobs=True)
    assert result.prompt_ids == tuple(ids)
    assert result.prompt_tokens == len(ids) == 6
    assert len(result.token_ids) == 24
    assert result.text == gemma.tokenizer.decode(list(result.token_ids))
    assert (result.finish_reason, result.stop_reason) == ("length", None)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 5
    (plain,) = gemma.complete([ids], params(1))
    assert plain.logprobs is None
    assert plain.prompt_logprobs is None
    assert plain.token_ids == result.token_ids


def test_stats_count_what_was_done(gemma: Gemma) -> None:
    ids = [7, *gemma.encode(PROMPT)] * 3
    before = time.perf_counter()
    (first,) = gemma.complete([ids], params(1))
    elapsed = time.perf_counter() - before
    (again,) = gemma.complete([ids], params(1))
    assert (first.stats.prefill_tokens, first.stats.cached_tokens, first.stats.generated_tokens) == (21, 0, 24)
    assert (again.stats.prefill_tokens, again.stats.cached_tokens) == (1, 20)
    stats = first.stats
    assert stats.queued_seconds >= 0
    assert 0 < stats.prefill_seconds + stats.decode_seconds <= elapsed
    assert stats.prefill_tokens_per_second == pytest.approx(21 / stats.prefill_seconds)
    assert stats.decode_tokens_per_second == pytest.approx(23 / stats.decode_seconds)
    (none,) = gemma.complete([[9] * 9], params(1, new=0))
    assert none.stats.generated_tokens == 0
    assert none.stats.decode_tokens_per_second == 0
    assert none.stats.prefill_tokens_per_second > 0
    assert (none.text, none.finish_reason, none.token_ids) == ("", "length", ())


def test_stats_of_a_cancelled_request(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(gemma, monkeypatch)
    first = gemma.stream_ids([4] * 40, params(1))
    gate.step()
    gate.wait()
    waiting = gemma.stream_ids([3] * 40, params(1))
    waiting.cancel()
    first.cancel()
    gate.open()
    stats = waiting.result.stats
    assert (stats.prefill_tokens, stats.generated_tokens, stats.prefill_seconds) == (0, 0, 0)
    assert first.result.stats.prefill_tokens == 32  # two steps of 16, of 40: the second was under way
    assert first.result.stats.prefill_tokens_per_second > 0


# ---- streams -----------------------------------------------------------------------------------------------------


def test_stream_is_the_completion_in_pieces(gemma: Gemma) -> None:
    ids = gemma.encode(PROMPT)
    (whole,) = gemma.complete([ids], params(2))
    stream = gemma.stream_ids(ids, params(2))
    pieces = list(stream)
    assert len(pieces) > 10
    assert all(pieces)
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids
    assert list(stream) == []
    assert next(stream, "end") == "end"


def test_result_in_the_middle_of_a_stream(gemma: Gemma) -> None:
    ids = gemma.encode(PROMPT)
    stream = gemma.stream_ids(ids, params(2))
    first = next(stream)
    assert stream.result.text.startswith(first)
    assert len(stream.result.token_ids) == 24


def test_events_that_come_together_are_all_kept(gemma: Gemma) -> None:
    """While nobody reads, a stream's events pile up; each must come out, one by one, the last one too."""
    ids = gemma.encode(PROMPT)
    (whole,) = gemma.complete([ids], params(3))
    slow = gemma.stream_ids(ids, params(3))
    first = next(slow)
    settled(gemma.engine)
    assert len(slow._sequence.events) == 24
    second = next(slow)
    rest: list[str] = []
    thread = threading.Thread(target=lambda: rest.extend(slow), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the stream lost its last event and never ends"
    assert [first, second, *rest] == [piece for piece in list(gemma.stream_ids(ids, params(3))) if piece]
    assert "".join([first, second, *rest]) == whole.text


def test_events_carry_ids_and_logprobs(gemma: Gemma) -> None:
    stream = gemma.stream_ids(gemma.encode(PROMPT), params(5, logprobs=1))
    events = list(stream.events())
    assert [e.token_id for e in events] == list(stream.result.token_ids)
    assert all(isinstance(e, TokenEvent) and e.logprob is not None for e in events)
    assert [e.finish_reason for e in events] == [None] * 23 + ["length"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cancel", "close", "with", "del", "exception"])
def test_leaving_a_stream_frees_its_blocks(gemma: Gemma, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = gemma.engine.cache.full.free
    gate = Gate(gemma, monkeypatch)
    stream = gemma.stream_ids(gemma.encode(PROMPT), params(6, new=60))
    gate.step(5)
    pieces = [next(stream) for _ in range(2)]
    gate.wait()
    assert gemma.engine.cache.full.free < free
    if way == "with":
        with stream:
            pieces.append(next(stream))
    elif way == "exception":
        with pytest.raises(RuntimeError), stream:
            raise RuntimeError
    elif way == "del":
        del stream
        gc.collect()
    else:
        getattr(stream, way)()
    gate.open()
    settled(gemma.engine)
    assert gemma.engine.cache.full.free == free  # behind the step that was under way
    if way != "del":
        result = stream.result
        assert result.finish_reason == "cancelled"
        assert result.text.startswith("".join(pieces))
        assert result.text == gemma.tokenizer.decode(list(result.token_ids))
        stream.cancel()  # a second time does nothing
        assert len(result.token_ids) == 6
        assert "".join(pieces) + "".join(stream) == result.text


@pytest.mark.slow
def test_stream_dropped_in_a_cycle_during_a_step(gemma: Gemma) -> None:
    """The garbage collector may run a stream's destructor anywhere, also in the middle of another's step."""
    (expected,) = gemma.complete([[1, 2, 3]], params(7, new=40))
    threshold = gc.get_threshold()
    gc.set_threshold(11)  # so that it does run all the time
    try:
        keep = gemma.stream_ids([1, 2, 3], params(7, new=40))
        for n in range(30):
            next(keep, None)
            cycle: dict[str, Any] = {"stream": gemma.stream_ids([4 + n] * 20, params(n))}
            cycle["self"] = cycle
            next(cycle["stream"])
            del cycle
    finally:
        gc.set_threshold(*threshold)
    assert keep.result.token_ids == expected.token_ids


def test_ctrl_c_inside_complete_leaves_nothing_running(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    working, calls = gemma.engine.runner.run, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            _thread.interrupt_main()  # as a person's Ctrl-C, which always comes to the main thread
        return working(*args)

    monkeypatch.setattr(gemma.engine.runner, "run", interrupted)
    free = gemma.engine.cache.full.free
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            gemma.complete([[1, 2, 3], [4] * 30, [5] * 50], params(1))
    finally:
        signal.signal(signal.SIGINT, before)
    settled(gemma.engine)
    assert calls < 20
    assert gemma.engine.cache.full.free == free
    assert not gemma.engine.scheduler.running
    assert not gemma.engine.scheduler.waiting
    monkeypatch.undo()
    assert len(gemma.complete([[1, 2, 3]], params(1))[0].token_ids) == 24


def test_one_bad_prompt_of_several_starts_none(gemma: Gemma) -> None:
    with pytest.raises(ContextLengthError):
        gemma.complete([[1, 2, 3], [4] * 200], params(1))
    with pytest.raises(ParameterError, match="2 prompts but 1 sampling parameters"):
        gemma.complete([[1], [2]], [params(1)])
    assert not gemma.engine.scheduler.running
    assert not gemma.engine.scheduler.waiting


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5])
def test_threads_stream_from_one_model(gemma: Gemma, count: int) -> None:
    prompts = [gemma.encode(f"{PROMPT} {n}") for n in range(count)]
    expected = [gemma.complete([ids], params(n, new=40))[0].text for n, ids in enumerate(prompts)]
    texts: list[list[str]] = [[] for _ in prompts]
    results: dict[int, Completion] = {}
    barrier = threading.Barrier(count)

    def work(n: int) -> None:
        barrier.wait()
        stream = gemma.stream_ids(prompts[n], params(n, new=40))
        for piece in stream:
            texts[n].append(piece)
            time.sleep(0.001 * n)  # consumers of different speed
        results[n] = stream.result

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert ["".join(pieces) for pieces in texts] == expected
    assert [results[n].text for n in range(count)] == expected


# ---- stops through the true detokenizer --------------------------------------------------------------------------


def answer(gemma: Gemma, seed: int = 9, new: int = 30) -> Completion:
    return gemma.complete([gemma.encode(PROMPT)], params(seed, new=new))[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_stop_text_across_token_borders(gemma: Gemma, seed: int) -> None:
    free = answer(gemma, seed)
    for place in (3, 9, 20):  # from the middle of one token to the middle of another
        start = len(gemma.tokenizer.decode(list(free.token_ids[:place]))) - 1
        stop = free.text[start : start + 8]
        cut = free.text.index(stop)
        stream = gemma.stream_ids(gemma.encode(PROMPT), params(seed, new=30, stop=("never to be found", stop)))
        pieces = list(stream)
        assert "".join(pieces) == free.text[:cut] == stream.result.text
        assert (stream.result.finish_reason, stream.result.stop_reason) == ("stop", stop)
        # It ends with the token that completes the stop text; no later one is computed.
        ids = list(stream.result.token_ids)
        assert ids == list(free.token_ids[: len(ids)])
        assert stop in gemma.tokenizer.decode(ids)
        assert stop not in gemma.tokenizer.decode(ids[:-1])


def test_stop_text_that_never_comes_holds_nothing_back(gemma: Gemma) -> None:
    free = answer(gemma)
    almost = free.text[-3:] + "\x00"
    (result,) = gemma.complete([gemma.encode(PROMPT)], params(9, new=30, stop=(almost,)))
    assert result.text == free.text
    assert result.finish_reason == "length"


def test_stop_text_that_the_last_token_completes(gemma: Gemma) -> None:
    free = answer(gemma)
    end = free.text[-4:]
    if free.text.index(end) != len(free.text) - 4:
        pytest.skip("the end of this random text stands in it twice")
    (result,) = gemma.complete([gemma.encode(PROMPT)], params(9, new=30, stop=(end,)))
    assert (result.text, result.finish_reason, result.stop_reason) == (free.text[:-4], "stop", end)


def test_stop_token_of_the_generation_config(gemma: Gemma) -> None:
    free = answer(gemma)
    stop = free.token_ids[7]
    place = free.token_ids.index(stop)
    other = Gemma(
        gemma.model,
        gemma.tokenizer,
        CPU,
        engine=EngineConfig(block_size=4, sequences=2),
        generation_config={"eos_token_id": [1, stop]},
    )
    assert other.stop_ids >= {1, 107, stop}
    result = answer(other)
    assert result.token_ids == free.token_ids[: place + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.text == gemma.tokenizer.decode(list(free.token_ids[:place]))
    (ignoring,) = other.complete([other.encode(PROMPT)], params(9, new=30, ignore_eos=True))
    assert ignoring.token_ids == free.token_ids
    assert_nothing_held(other.engine)


def test_end_of_turn_ends_an_answer(gemma: Gemma) -> None:
    forced = params(1, logit_bias={107: 1e6})
    (result,) = gemma.complete([gemma.encode(PROMPT)], forced)
    assert (result.token_ids, result.text, result.finish_reason, result.stop_reason) == ((107,), "", "stop", 107)
    (later,) = gemma.complete([gemma.encode(PROMPT)], params(1, min_new_tokens=5, logit_bias={107: 1e6}))
    assert len(later.token_ids) == 6
    assert later.token_ids[-1] == 107
    assert 107 not in later.token_ids[:5]


def test_generate_and_score_agree_with_the_network(gemma: Gemma) -> None:
    texts = [PROMPT, "a", ""]
    for text, scores in zip(texts, gemma.score(texts), strict=True):
        ids = gemma.encode(text)
        logprobs = dense_logits(gemma.model, torch.tensor(ids)).log_softmax(-1)
        assert scores == pytest.approx([logprobs[i, t].item() for i, t in enumerate(ids[1:])], abs=1e-4)
    one = gemma.generate(PROMPT, max_new_tokens=6, temperature=0)
    assert gemma.generate([PROMPT, PROMPT], max_new_tokens=6, temperature=0) == [one, one]
    assert "".join(gemma.generate(PROMPT, stream=True, max_new_tokens=6, temperature=0)) == one
    with pytest.raises(ParameterError, match="temprature"):
        gemma.generate(PROMPT, temprature=1)


def test_logprobs_are_refused_where_only_a_text_comes_back(gemma: Gemma) -> None:
    with pytest.raises(ParameterError, match="logprobs"):
        gemma.generate(PROMPT, logprobs=2)
    with pytest.raises(ParameterError, match="logprobs"):
        gemma.chat([{"role": "user", "content": "hi"}], logprobs=0)
