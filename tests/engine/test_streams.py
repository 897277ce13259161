"""Streams of one engine: what one does, or fails at, never reaches another; each comes to its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from engine.driver import assert_consistent, assert_nothing_held, settled
from engine.words import Gate, Words, new_gemma
from gemcut.engine import Request, SamplingParams
from gemcut.engine.results import TextStream
from gemcut.errors import GemcutError, ParameterError, RequestError
from gemcut.gemma import Gemma

PROMPTS = [[5, 6, 7], [9] * 11, [4, 3, 4, 3, 4], [8, 2]]


def drawn(seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_new_tokens": 9, "ignore_eos": True, **more})


def alone(prompt: list[int], params: SamplingParams) -> tuple[tuple[int, ...], str]:
    (result,) = new_gemma().complete([prompt], params)
    return result.token_ids, result.text


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Start ``work``; what is returned waits for it and gives what it gave."""
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(work()), daemon=True)
    thread.start()

    def wait() -> object:
        thread.join(30)
        assert not thread.is_alive(), "it never ends"
        return got[0]

    return wait


# ---- a request's own failures ------------------------------------------------------------------------------------


class Lacking(Words):
    """A tokenizer that lacks some ids, or whose decoding fails in other ways."""

    def __init__(self, lacks: int, error: Exception) -> None:
        self.lacks, self.error = lacks, error

    def token_text(self, token: int) -> str:
        if token == self.lacks:
            raise self.error
        return super().token_text(token)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ParameterError("id 21 is not in the vocabulary"), "id 21 is not in the vocabulary"),
        (KeyError(21), "KeyError: 21"),
        (RecursionError(), "RecursionError: no message"),
    ],
    ids=["ours", "theirs", "silent"],
)
def test_id_the_tokenizer_lacks_ends_one_stream(error: Exception, message: str) -> None:
    gemma = new_gemma()
    expected = [alone(prompt, drawn(n)) for n, prompt in enumerate(PROMPTS)]
    lacks = next(token for token in expected[1][0][3:] if token % 3 != 2 and token not in (0, 1))
    place = expected[1][0].index(lacks)
    good = gemma.tokenizer
    streams = []
    for n, prompt in enumerate(PROMPTS):
        gemma.tokenizer = Lacking(lacks, error) if n == 1 else good  # type: ignore[assignment]
        streams.append(gemma.stream_ids(prompt, drawn(n)))
    gemma.tokenizer = good
    for n, stream in enumerate(streams):
        if n != 1:
            assert "".join(stream) == expected[n][1]
            assert (stream.result.token_ids, stream.result.finish_reason) == (expected[n][0], "length")
    broken, pieces = streams[1], []
    for _ in range(2):  # it says so each time, and what was read before stays right
        with pytest.raises(RequestError) as raised:
            pieces.extend(broken)
        assert str(raised.value) == message
    with pytest.raises(RequestError):
        list(broken.events())
    result = broken.result
    assert (result.finish_reason, result.error, result.stop_reason) == ("error", message, None)
    assert result.token_ids == expected[1][0][:place]
    assert result.text == "".join(pieces) == "".join(event.text for event in broken._sequence.events)
    with pytest.raises(RequestError):
        result.checked()
    assert_nothing_held(gemma.engine)


def test_texts_alone_are_whole_or_raise() -> None:
    gemma = new_gemma()
    (free,) = gemma.complete([gemma.encode("abc")], drawn(1))
    lacks = next(token for token in free.token_ids if token % 3 != 2 and token > 1)
    assert gemma.generate("abc", seed=1, max_new_tokens=9, ignore_eos=True) == free.text
    gemma.tokenizer = Lacking(lacks, ValueError("lacking"))  # type: ignore[assignment]
    for prompts in ("abc", ["abc", "abcd"]):
        with pytest.raises(RequestError, match="ValueError: lacking"):
            gemma.generate(prompts, seed=1, max_new_tokens=9, ignore_eos=True)
    (result,) = gemma.complete([gemma.encode("abc")], drawn(1))
    assert result.finish_reason == "error"
    assert_nothing_held(gemma.engine)


class Meddling(Words):
    """Decoding that itself asks the model for something."""

    gemma: Gemma

    def token_text(self, token: int) -> str:
        self.gemma.tokenizer = Words()  # type: ignore[assignment]
        self.gemma.complete([[1, 2]], drawn(1))
        return ""


def test_sink_that_waits_for_the_model_fails_alone() -> None:
    gemma = new_gemma()
    text = alone(PROMPTS[0], drawn(0))[1]
    meddling = Meddling()
    gemma.tokenizer, meddling.gemma = meddling, gemma  # type: ignore[assignment]
    broken = gemma.stream_ids(PROMPTS[1], drawn(1))
    gemma.tokenizer = Words()  # type: ignore[assignment]
    good = gemma.stream_ids(PROMPTS[0], drawn(0))
    assert in_thread(lambda: "".join(good))() == text
    assert "within a step" in str(broken.result.error)
    assert_nothing_held(gemma.engine)


# ---- several at work ---------------------------------------------------------------------------------------------


def test_answers_that_nobody_reads_are_whole() -> None:
    gemma = new_gemma()
    streams = [gemma.stream_ids(prompt, drawn(n)) for n, prompt in enumerate(PROMPTS)]
    first = next(streams[0])
    settled(gemma.engine)
    for n, stream in enumerate(streams):
        text = in_thread(lambda stream=stream: "".join(stream))()  # type: ignore[misc]
        assert (first if n == 0 else "") + str(text) == alone(PROMPTS[n], drawn(n))[1]


def test_two_share_an_engine() -> None:
    one, other = new_gemma(), new_gemma()
    other.loop = one.loop
    streams = [gemma.stream_ids(PROMPTS[n], drawn(n)) for n, gemma in enumerate((one, other, one, other))]
    waits = [in_thread(lambda stream=stream: "".join(stream)) for stream in streams]  # type: ignore[misc]
    assert [wait() for wait in waits] == [alone(PROMPTS[n], drawn(n))[1] for n in range(4)]
    assert_nothing_held(one.engine)


def test_nobody_waits_for_a_step_to_start_or_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    free = gemma.engine.cache.full.free
    gate = Gate(gemma, monkeypatch)
    kept, dropped = (gemma.stream_ids(PROMPTS[n], drawn(n)) for n in (0, 1))
    gate.wait()
    second = gemma.stream_ids(PROMPTS[2], drawn(2))  # each of these comes back while a step holds the thread
    third = gemma.stream_ids(PROMPTS[3], drawn(3))
    third.cancel()
    dropped.cancel()
    with pytest.raises(ParameterError, match="empty"):
        gemma.stream_ids([], drawn(2))
    assert not any(stream._sequence.events for stream in (kept, second, third))
    del dropped
    gate.open()
    assert "".join(kept) == alone(PROMPTS[0], drawn(0))[1]
    assert "".join(second) == alone(PROMPTS[2], drawn(2))[1]
    assert (third.result.finish_reason, third.result.token_ids) == ("cancelled", ())
    assert_nothing_held(gemma.engine)
    assert gemma.engine.cache.full.free == free


def test_last_stream_cancelled_during_its_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    gate = Gate(gemma, monkeypatch)
    stream = gemma.stream_ids(PROMPTS[1], drawn(1))
    wait = in_thread(lambda: list(stream))
    gate.wait()
    stream.cancel()
    gate.open()
    assert wait() == []
    assert_nothing_held(gemma.engine)
    assert_consistent(gemma.engine)


def test_stream_without_an_owner_is_dropped_at_the_next_step() -> None:
    gemma = new_gemma()
    stream = gemma.stream_ids(PROMPTS[1], drawn(1))
    sequence = stream._sequence
    stream._engine = None  # type: ignore[assignment]  # its destructor does nothing, as if it had been struck
    del stream
    assert sequence.abandoned
    gemma.complete([PROMPTS[0]], drawn(0, max_new_tokens=1))
    assert sequence.events[-1].finish_reason == "cancelled"
    assert_nothing_held(gemma.engine)


def test_engine_of_a_loop_is_stepped_by_its_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    inner, said = gemma.engine.runner.run, []

    def run(*args: Any) -> Any:
        with pytest.raises(GemcutError, match="within a step"):
            gemma.engine.step()
        said.append(1)
        return inner(*args)

    monkeypatch.setattr(gemma.engine.runner, "run", run)
    assert gemma.complete([PROMPTS[0]], drawn(0))[0].token_ids == alone(PROMPTS[0], drawn(0))[0]
    assert said
    for call in (gemma.engine.step, lambda: gemma.engine.cancel(0), lambda: gemma.engine.submit(request(3))):
        with pytest.raises(RuntimeError, match="belongs to the thread"):
            call()
    gemma.loop.close()
    assert gemma.engine.step() == []


def request(seed: int, **more: Any) -> Request:
    return Request(prompt_ids=(1, 2), params=drawn(seed), **more)


def test_an_id_in_use_starts_nothing() -> None:
    gemma = new_gemma()
    first = gemma.loop.prepare(request(0, request_id=-7))
    fresh, again = gemma.loop.prepare(request(1)), gemma.loop.prepare(request(2, request_id=-7))
    with pytest.raises(ParameterError, match="request id -7 is already in use"):
        gemma.loop.start([first, fresh, again])
    assert not gemma.loop.busy
    gemma.loop.start([first, fresh])
    for sequence in (first, fresh):
        gemma.loop.wait(sequence, 8)
        assert len(sequence.output_ids) == 9
    assert_nothing_held(gemma.engine)


class Closing(Words):
    """Decoding that closes the engine which waits for it."""

    gemma: Gemma

    def token_text(self, token: int) -> str:
        self.gemma.loop.close()
        return ""


def test_sink_that_closes_the_engine_fails_alone() -> None:
    gemma, closing = new_gemma(), Closing()
    gemma.tokenizer, closing.gemma = closing, gemma  # type: ignore[assignment]
    broken = gemma.stream_ids(PROMPTS[1], drawn(1))
    gemma.tokenizer = Words()  # type: ignore[assignment]
    assert gemma.complete([PROMPTS[0]], drawn(0))[0].text == alone(PROMPTS[0], drawn(0))[1]
    assert "cannot be closed within a step" in str(broken.result.error)
    assert_nothing_held(gemma.engine)


def test_stream_of_another_engine_is_refused() -> None:
    one, other = new_gemma(), new_gemma()
    stream = TextStream(other.loop, one.loop.prepare(request(0)))
    with pytest.raises(RuntimeError, match="not in this engine"):
        next(stream)


# ---- the thread --------------------------------------------------------------------------------------------------


def threads_of_engines() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gemcut-engine"]


def test_no_thread_before_the_first_request_and_after_the_last_owner() -> None:
    gc.collect()
    before = set(threads_of_engines())
    gemma = new_gemma()
    engine = weakref.ref(gemma.engine)
    assert set(threads_of_engines()) <= before
    gemma.complete([PROMPTS[0]], drawn(0))
    (mine,) = set(threads_of_engines()) - before
    unread = gemma.stream_ids(PROMPTS[1], drawn(1))
    del gemma
    assert unread.result.finish_reason == "length"  # whoever holds a stream holds the engine
    del unread
    gc.collect()
    mine.join(10)
    assert not mine.is_alive()
    gc.collect()
    assert engine() is None  # the thread does not keep the weights


def test_closed_loop_ends_its_requests_and_can_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    gate = Gate(gemma, monkeypatch)
    stream = gemma.stream_ids(PROMPTS[1], drawn(1))
    gate.wait()
    closing = in_thread(gemma.loop.close)
    gate.open()
    closing()
    assert stream.result.finish_reason == "cancelled"
    assert_nothing_held(gemma.engine)
    assert gemma.complete([PROMPTS[0]], drawn(0))[0].text == alone(PROMPTS[0], drawn(0))[1]


@pytest.mark.parametrize("death", [SystemExit(), ValueError("a mistake of ours")], ids=["killed", "bug"])
def test_every_waiter_is_told_when_the_thread_dies(death: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    gate = Gate(gemma, monkeypatch)
    streams = [gemma.stream_ids(prompt, drawn(n)) for n, prompt in enumerate(PROMPTS)]
    gate.step(2)
    gate.wait()
    waits = [in_thread(lambda stream=stream: stream.result) for stream in streams]  # type: ignore[misc]

    def die(*_: Any) -> None:
        raise death

    with monkeypatch.context() as patch:
        patch.setattr(gemma.engine.scheduler, "computed", die)
        gate.open()
        results: Any = [wait() for wait in waits]
    assert {result.finish_reason for result in results} == {"error"}
    name = "SystemExit: no message" if isinstance(death, SystemExit) else "ValueError: a mistake of ours"
    assert {result.error for result in results} == {f"the engine's thread ended: {name}"}
    with pytest.raises(RequestError) as raised:
        results[0].checked()
    assert raised.value.__cause__ is death
    # The next request gets another thread.
    assert gemma.complete([PROMPTS[0]], drawn(0))[0].text == alone(PROMPTS[0], drawn(0))[1]
    assert_nothing_held(gemma.engine)


def test_ten_thousand_at_once() -> None:
    gemma = new_gemma(max_batch_size=64, max_batch_tokens=512, sequences=40)
    params = SamplingParams(temperature=0, max_new_tokens=1)
    streams = [gemma.prepare_stream([n % 60, 5], params) for n in range(10_000)]
    for stream in streams:
        stream.start()
    for n, stream in enumerate(streams):
        if n % 50:
            stream.cancel()
    expected = [gemma.complete([[n, 5]], params)[0].token_ids for n in range(60)]
    for n, stream in enumerate(streams):
        result = stream.result
        if result.finish_reason != "cancelled" or n % 50 == 0:
            assert result.token_ids == expected[n % 60]
    del streams, stream
    assert_nothing_held(gemma.engine)
    assert not gemma.loop.busy


def test_requests_sent_together_share_their_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma, sizes = new_gemma(max_batch_tokens=64), []
    inner = gemma.engine.runner.run

    def run(batch: Any, tables: Any) -> Any:
        sizes.append(len(batch))
        return inner(batch, tables)

    monkeypatch.setattr(gemma.engine.runner, "run", run)
    for _ in range(20):
        gemma.complete(PROMPTS, [drawn(n) for n in range(4)])
    assert sizes == [4] * 9 * 20


def test_answers_to_one_prompt_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first find the prompt in the cache, and the steps do not depend on timing."""
    gemma, steps = new_gemma(), []
    inner = gemma.engine.runner.run

    def run(batch: Any, tables: Any) -> Any:
        steps.append([scheduled.length for scheduled in batch])
        return inner(batch, tables)

    monkeypatch.setattr(gemma.engine.runner, "run", run)
    texts = gemma.generate([7] * 17, n=3, seed=3, max_new_tokens=3)
    assert steps == [[8], [8], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert texts[0] == alone([7] * 17, drawn(3, max_new_tokens=3, ignore_eos=False))[1]


# ---- asyncio -----------------------------------------------------------------------------------------------------


def test_tasks_read_streams_side_by_side() -> None:
    gemma = new_gemma()

    async def read(n: int) -> tuple[str, str]:
        stream = gemma.stream_ids(PROMPTS[n], drawn(n))
        if n == 2:
            text = "".join([event.text async for event in stream.events()])
        else:
            text = "".join([piece async for piece in stream])
        return text, (await stream.finished()).text

    async def all_of_them() -> list[tuple[str, str]]:
        return await asyncio.gather(*(read(n) for n in range(4)))

    for n, (pieces, whole) in enumerate(asyncio.run(all_of_them())):
        assert pieces == whole == alone(PROMPTS[n], drawn(n))[1]
    assert_nothing_held(gemma.engine)


def test_task_that_is_cancelled_or_leaves_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma()
    gate = Gate(gemma, monkeypatch)

    async def work() -> None:
        waiting = asyncio.create_task(gemma.agenerate("abc", seed=1, max_new_tokens=20, ignore_eos=True))
        async with gemma.stream("xyz", seed=2, max_new_tokens=20, ignore_eos=True) as left:
            await asyncio.sleep(0.01)
            gate.step(2)
            async for _ in left:
                break
        waiting.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await left.finished()).finish_reason == "cancelled"

    asyncio.run(work())
    assert_nothing_held(gemma.engine)


def test_event_loop_that_closes_leaves_the_engine_at_work() -> None:
    gemma = new_gemma()
    stream = gemma.stream_ids(PROMPTS[0], drawn(0))

    async def begin() -> None:
        asyncio.get_running_loop().create_task(stream.finished())
        await asyncio.sleep(0)

    asyncio.run(begin())
    assert stream.result.text == alone(PROMPTS[0], drawn(0))[1]


def test_whole_answers_for_asyncio() -> None:
    gemma = new_gemma()
    options = {"seed": 3, "max_new_tokens": 5}

    async def work() -> list[Any]:
        return [
            await gemma.agenerate("abc", **options),
            await gemma.agenerate(["abc", "de"], **options),
            await gemma.agenerate("abc", n=2, **options),
        ]

    expected = [
        gemma.generate("abc", **options),
        gemma.generate(["abc", "de"], **options),
        gemma.generate("abc", n=2, **options),
    ]
    assert asyncio.run(work()) == expected
