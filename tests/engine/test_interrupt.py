"""Ctrl-C at every line: every text is whole, every stream ends, nothing stays.

It comes to the main thread. There it strikes the one who reads streams, or, where an engine has no loop, the steps.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Many
from functools import cache, partial
from types import FrameType
from typing import Any

import pytest

from engine.driver import assert_consistent, assert_nothing_held
from engine.words import Words, new_gemma
from gemcut.engine import Request, SamplingParams
from gemcut.engine.results import Completion, TextStream
from gemcut.gemma import Gemma
from gemcut.text import Detokenizer

WAY = ("/gemcut/engine/", "/gemcut/gemma.py", "/gemcut/text/detokenizer.py")


#: (prompt, parameters): texts of one prompt beside others, a stop text, penalties, draws, log-probabilities, scoring.
JOBS: list[tuple[list[int], dict[str, Any]]] = [
    ([5, 6, 7, 8, 9], {"temperature": 0, "max_new_tokens": 4}),
    ([9, 8, 7], {"seed": 50, "max_new_tokens": 5, "logprobs": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
    ([4] * 9, {"seed": 7, "max_new_tokens": 3}),
]


def params(place: int) -> SamplingParams:
    if place == len(JOBS):  # one that is cancelled
        return SamplingParams(temperature=0, max_new_tokens=20)
    return SamplingParams(**JOBS[place][1])


@cache
def expected() -> list[tuple[tuple[int, ...], str, tuple[float, ...]]]:
    """(tokens, text, prompt log-probabilities) of each job alone, none of which ends early."""
    results = []
    for place, (prompt, _) in enumerate(JOBS):
        (result,) = new_gemma().complete([prompt], params(place), prompt_logprobs=True)
        assert result.finish_reason == "length"
        assert result.text == Words().decode(list(result.token_ids))
        assert result.prompt_logprobs is not None
        results.append((result.token_ids, result.text, result.prompt_logprobs))
    return results


class Strike:
    """Raises KeyboardInterrupt at the n-th line of the way that this thread runs from now on, or at a line's first run.

    0 strikes nowhere.
    """

    def __init__(self, place: int | str) -> None:
        self.left, self.where = (place, "") if isinstance(place, int) else (1, "")
        self.line = None if isinstance(place, int) else place

    @property
    def struck(self) -> bool:
        return self.left <= 0

    def __enter__(self) -> Strike:
        self.before = sys.gettrace()
        if not self.struck:
            sys.settrace(self._trace)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, kind: str, _: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in WAY):
            return None
        if kind == "line" and self.line in (None, f"{frame.f_code.co_filename}:{frame.f_lineno}"):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self._trace


class Reader:
    """Reads all jobs piece by piece, through a loop, and goes on wherever it was struck."""

    def __init__(self, gemma: Gemma) -> None:
        self.gemma = gemma
        self.streams: dict[int, TextStream] = {}
        self.pieces: list[list[str]] = [[] for _ in JOBS]
        self.left: TextStream | None = None

    def work(self) -> None:
        for place, (prompt, _) in enumerate(JOBS):
            if place not in self.streams:
                self.streams[place] = self.gemma.stream_ids(
                    prompt, params(place), prompt_logprobs_from=1 if place == 2 else None
                )
        if self.left is None:
            self.left = self.gemma.stream_ids([3, 3], params(len(JOBS)))
        for place, stream in self.streams.items():
            for piece in stream:
                self.pieces[place].append(piece)
            if place == 0:
                self.left.close()

    def check(self, where: str) -> None:
        for place, (tokens, text, scores) in enumerate(expected()):
            result = self.streams[place].result
            assert result.token_ids == tokens, where
            assert result.finish_reason == "length", where
            assert result.text == text, where
            assert "".join(self.pieces[place]) == text, where
            if place == 1:
                assert result.logprobs is not None
                assert tuple(entry.token_id for entry in result.logprobs) == tokens, where
            if place == 2:
                assert result.prompt_logprobs == pytest.approx(scores, abs=1e-5), where
        assert self.left is not None
        left = self.left.result
        # On a busy machine the loop's thread may have ended it before this one came to close it.
        assert left.finish_reason == "cancelled" or len(left.token_ids) == params(len(JOBS)).max_new_tokens, where
        self.left = None
        self.streams.clear()


class Stepper:
    """Does the steps of an engine without a loop, and goes on wherever it was struck."""

    def __init__(self, gemma: Gemma) -> None:
        self.engine = gemma.engine
        self.sequences = {
            place: self.engine.prepare(self._request(prompt, params(place), place == 2, gemma.tokenizer))
            for place, (prompt, _) in enumerate([*JOBS, ([3, 3], {})])
        }

    def _request(self, prompt: list[int], own: SamplingParams, scored: bool, words: Any) -> Request:
        text = partial(Detokenizer, words, prompt_ids=tuple(prompt))
        return Request(prompt_ids=tuple(prompt), params=own, text=text, prompt_logprobs_from=1 if scored else None)

    def work(self) -> None:
        for sequence in self.sequences.values():
            self.engine.start(sequence)
        while self.engine.has_work:
            self.engine.step()
            if self.sequences[0].finished:
                self.engine.drop(self.sequences[len(JOBS)])

    def check(self, where: str) -> None:
        for place, (tokens, text, scores) in enumerate(expected()):
            result = Completion.of(self.sequences[place])
            assert (result.token_ids, result.text, result.finish_reason) == (tokens, text, "length"), where
            if place == 1:
                assert result.logprobs is not None
                assert tuple(entry.token_id for entry in result.logprobs) == tokens, where
            if place == 2:
                assert result.prompt_logprobs == pytest.approx(scores, abs=1e-5), where
        assert Completion.of(self.sequences[len(JOBS)]).finish_reason == "cancelled", where


Way = type[Reader] | type[Stepper]


def run_struck(gemma: Gemma, way: Way, places: Many[int | str]) -> list[str]:
    """One reading, struck at each of ``places`` (lines after the last strike, or a line itself); where that was."""
    gemma.loop.close()
    gemma.engine.cache.forget()  # so that each reading runs the same lines
    reader, struck = way(gemma), []
    for place in [*places, 0]:
        with Strike(place) as strike:
            try:
                reader.work()
            except KeyboardInterrupt:
                assert strike.struck
                struck.append(strike.where)
    where = ", ".join(struck)
    reader.check(where)
    del reader
    gemma.loop.close()  # requests that were struck before anybody had them
    while gemma.engine.has_work:
        gemma.engine.step()
    assert_consistent(gemma.engine)
    assert_nothing_held(gemma.engine)
    return struck


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Strikes in a destructor only where the test's own streams are dropped, not in those of other tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def lines(way: Way) -> list[str]:
    """The lines of a reading that is not struck, one after the other."""
    seen: list[str] = []

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in WAY):
            return None
        if kind == "line":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    reader, before = way(new_gemma()), sys.gettrace()
    sys.settrace(trace)
    try:
        reader.work()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("way", "least"), [(Reader, 100), (Stepper, 280)])
def test_struck_once_at_each_line(way: Way, least: int) -> None:
    """Each line of the source the first time that it runs."""
    expected()
    gemma, ran = new_gemma(), dict.fromkeys(lines(way))
    struck = [where.split()[0] for line in ran for where in run_struck(gemma, way, [line])]
    assert len(struck) > least
    # Whether a reader waits depends on timing: those lines are not run each time.
    missed = set(ran) - set(struck)
    assert not missed if way is Stepper else all("loop.py" in line or "results.py" in line for line in missed)
    assert struck == [line for line in ran if line not in missed]


def test_who_was_struck_while_starting_the_thread_locks_nobody_out() -> None:
    """Where a ``with`` ends, a strike comes before the lock is free again: nobody may wait for it without end."""
    gemma = new_gemma()
    gemma.loop._starting.acquire()
    for _ in range(2):
        done: list[Completion] = []
        thread = threading.Thread(
            target=lambda done=done: done.extend(gemma.complete([[5, 6]], params(0))), daemon=True
        )
        thread.start()
        thread.join(30)
        assert [len(result.token_ids) for result in done] == [4]
        assert not gemma.loop._starting.locked()
        gemma.loop.close()


@pytest.mark.slow
@pytest.mark.parametrize(("way", "times", "most"), [(Reader, 60, 400), (Stepper, 60, 400)])
def test_struck_twice(way: Way, times: int, most: int) -> None:
    expected()
    gemma, total, chance = new_gemma(), len(lines(way)), random.Random(3)
    for _ in range(times):
        run_struck(gemma, way, [chance.randrange(1, total), chance.randrange(1, most)])


@pytest.mark.slow
@pytest.mark.parametrize(("way", "least", "stride"), [(Reader, 700, 11), (Stepper, 3000, 61)])
def test_struck_anywhere(way: Way, least: int, stride: int) -> None:
    """Lines that have run before, in other states. (All of them: run this file as a program; four minutes.)"""
    expected()
    gemma, total = new_gemma(), len(lines(way))
    assert total > least
    for place in range(5, total + 1, stride):
        run_struck(gemma, way, [place])


if __name__ == "__main__":
    expected()
    everywhere = new_gemma()
    for each in (Reader, Stepper):
        for number in range(1, len(lines(each)) + 1):
            run_struck(everywhere, each, [number])
        print(f"struck at {number} lines")
