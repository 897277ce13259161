"""Streams of one engine: what one does, or fails at, never reaches another; each comes to its end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.driver import assert_consistent, assert_nothing_held
from engine.words import Words, new_gemma
from gemcut.engine import SamplingParams
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


def test_somebody_else_does_all_the_steps() -> None:
    gemma = new_gemma()
    streams = [gemma.stream_ids(prompt, drawn(n)) for n, prompt in enumerate(PROMPTS)]
    first = next(streams[0])
    while gemma.engine.has_work:
        gemma.engine.step()
    for n, stream in enumerate(streams):
        text = in_thread(lambda stream=stream: "".join(stream))()  # type: ignore[misc]
        assert (first if n == 0 else "") + str(text) == alone(PROMPTS[n], drawn(n))[1]


def test_two_share_an_engine() -> None:
    one, other = new_gemma(), new_gemma()
    other.engine = one.engine
    streams = [gemma.stream_ids(PROMPTS[n], drawn(n)) for n, gemma in enumerate((one, other, one, other))]
    waits = [in_thread(lambda stream=stream: "".join(stream)) for stream in streams]  # type: ignore[misc]
    assert [wait() for wait in waits] == [alone(PROMPTS[n], drawn(n))[1] for n in range(4)]
    assert_nothing_held(one.engine)


class Gate:
    """Holds the network up in the middle of a step."""

    def __init__(self, gemma: Gemma) -> None:
        self.reached, self.open, self.gave_up = threading.Event(), threading.Event(), False
        inner = gemma.engine.runner.run

        def run(*args: Any) -> Any:
            self.reached.set()
            self.gave_up = not self.open.wait(30)
            assert not self.gave_up
            return inner(*args)

        gemma.engine.runner.run = run  # type: ignore[method-assign]


def test_nobody_waits_for_a_step_to_start_or_cancel() -> None:
    gemma = new_gemma()
    kept, dropped = (gemma.stream_ids(PROMPTS[n], drawn(n)) for n in (0, 1))
    free = gemma.engine.cache.full.free
    gate = Gate(gemma)
    wait = in_thread(lambda: "".join(kept))
    assert gate.reached.wait(30)
    second = gemma.stream_ids(PROMPTS[2], drawn(2))
    third = gemma.stream_ids(PROMPTS[3], drawn(3))
    third.cancel()
    dropped.cancel()
    with pytest.raises(ParameterError, match="empty"):
        gemma.stream_ids([], drawn(2))
    # The step that is under way lasts until it is let go on: whoever had waited for it would have seen it fail.
    assert not gate.gave_up
    del dropped
    gate.open.set()
    assert wait() == alone(PROMPTS[0], drawn(0))[1]
    assert "".join(second) == alone(PROMPTS[2], drawn(2))[1]
    assert (third.result.finish_reason, third.result.token_ids) == ("cancelled", ())
    assert gemma.engine.cache.full.free == free
    assert_nothing_held(gemma.engine)


def test_last_stream_cancelled_during_its_step_leaves_nothing() -> None:
    gemma = new_gemma()
    stream = gemma.stream_ids(PROMPTS[1], drawn(1))
    gate = Gate(gemma)
    wait = in_thread(lambda: list(stream))
    assert gate.reached.wait(30)
    stream.cancel()
    gate.open.set()
    assert wait() == []
    assert_consistent(gemma.engine)
    assert not gemma.engine._sequences


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


def test_step_from_within_a_step_is_refused() -> None:
    gemma = new_gemma()
    inner = gemma.engine.runner.run

    def run(*args: Any) -> Any:
        with pytest.raises(GemcutError, match="within a step"):
            gemma.engine.step()
        return inner(*args)

    gemma.engine.runner.run = run  # type: ignore[method-assign]
    assert gemma.complete([PROMPTS[0]], drawn(0))[0].token_ids == alone(PROMPTS[0], drawn(0))[0]


def test_struck_thread_does_not_hold_up_the_others() -> None:
    """An exception at any line of taking and leaving a turn, whose traceback is even kept."""
    gemma, kept, place = new_gemma(), [], 0
    text = alone(PROMPTS[0], drawn(0))[1]
    while True:
        place += 1
        left = place

        def trace(frame: FrameType, kind: str, _: object) -> Any:
            nonlocal left
            code = frame.f_code
            if not (code.co_filename.endswith("turns.py") or code.co_name == "_turn"):
                return trace if kind == "call" else None
            if kind == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        def struck(trace: Any = trace) -> BaseException | None:
            sys.settrace(trace)
            try:
                gemma.engine.step()
            except KeyboardInterrupt as strike:
                return strike
            finally:
                sys.settrace(None)
            return None

        stream = gemma.stream_ids(PROMPTS[0], drawn(0))
        error = in_thread(struck)()
        assert in_thread(lambda stream=stream: "".join(stream))() == text  # type: ignore[misc]
        if error is None:
            break
        kept.append(error)
    assert len(kept) > 15
    assert_nothing_held(gemma.engine)


def test_stream_of_another_engine_is_refused() -> None:
    one, other = new_gemma(), new_gemma()
    stream = TextStream(other.engine, one.engine.prepare(one.stream_ids(PROMPTS[0], drawn(0))._sequence.request))
    with pytest.raises(RuntimeError, match="not in this engine"):
        next(stream)
