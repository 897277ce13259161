"""Ctrl-C at every line from a stream down to the network: every text is whole, every stream ends, nothing stays."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import Any

import pytest

from engine.driver import assert_consistent, assert_nothing_held
from engine.words import Words, new_gemma
from gemcut.engine import SamplingParams
from gemcut.engine.results import TextStream
from gemcut.gemma import Gemma

WAY = ("/gemcut/engine/", "/gemcut/gemma.py", "/gemcut/text/detokenizer.py")


#: (prompt, parameters): texts of one prompt beside others, a stop text, penalties, draws, log-probabilities, scoring.
JOBS: list[tuple[list[int], dict[str, Any]]] = [
    ([5, 6, 7, 8, 9], {"temperature": 0, "max_new_tokens": 4}),
    ([9, 8, 7], {"seed": 50, "max_new_tokens": 5, "logprobs": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
    ([4] * 9, {"seed": 7, "max_new_tokens": 3}),
]


def params(place: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{**JOBS[place][1], **more})


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
    """Raises KeyboardInterrupt at the n-th line of the way that this thread runs from now on."""

    def __init__(self, place: int) -> None:
        self.left, self.where = place, ""

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
        if kind == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self._trace


class Reader:
    """Reads all jobs piece by piece and goes on wherever it was struck."""

    def __init__(self, gemma: Gemma) -> None:
        self.gemma = gemma
        self.streams: dict[int, TextStream] = {}
        self.pieces: list[list[str]] = [[] for _ in JOBS]
        self.left: TextStream | None = None

    def work(self) -> None:
        for place, (prompt, _) in enumerate(JOBS):
            if place not in self.streams:
                self.streams[place] = self.gemma.stream_ids(prompt, params(place), prompt_logprobs=place == 2)
        if self.left is None:
            self.left = self.gemma.stream_ids([3, 3], SamplingParams(temperature=0, max_new_tokens=20))
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
        assert self.left.result.finish_reason == "cancelled", where
        self.left = None
        self.streams.clear()


def run_struck(gemma: Gemma, places: list[int]) -> list[str]:
    """One reading, struck at each of ``places`` lines after the last strike; where that was."""
    engine = gemma.engine
    engine.cache.forget()  # so that each reading runs the same lines
    reader, struck = Reader(gemma), []
    for place in [*places, 0]:
        with Strike(place) as strike:
            try:
                reader.work()
            except KeyboardInterrupt:
                assert strike.struck
                struck.append(strike.where)
    where = ", ".join(struck)
    assert_consistent(engine)
    reader.check(where)
    for _ in range(100):  # requests that were struck before anybody had them
        if engine.has_work:
            engine.step()
    assert_nothing_held(engine)
    return struck


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Strikes in a destructor only where the test's own streams are dropped, not in those of other tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def lines() -> list[str]:
    """The lines of a reading that is not struck, one after the other."""
    seen: list[str] = []

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        if not any(part in frame.f_code.co_filename for part in WAY):
            return None
        if kind == "line":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    reader, before = Reader(new_gemma()), sys.gettrace()
    sys.settrace(trace)
    try:
        reader.work()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.slow
def test_struck_once_at_each_line() -> None:
    """Each line of the source the first time that it runs."""
    expected()
    gemma, ran = new_gemma(), lines()
    first = sorted(ran.index(line) + 1 for line in set(ran))
    struck = [run_struck(gemma, [place]) for place in first]
    assert [where.split()[0] for (where,) in struck] == [ran[place - 1] for place in first]
    assert len(first) > 300
    assert all(any(part in line for line in ran) for part in WAY)


@pytest.mark.slow
def test_struck_twice() -> None:
    expected()
    gemma, total, chance = new_gemma(), len(lines()), random.Random(3)
    for _ in range(60):
        run_struck(gemma, [chance.randrange(1, total), chance.randrange(1, 400)])


@pytest.mark.slow
def test_struck_anywhere() -> None:
    """Lines that have run before, in other states. (All of them: run this file as a program; four minutes.)"""
    expected()
    gemma, total = new_gemma(), len(lines())
    assert total > 4000
    for place in range(5, total + 1, 17):
        run_struck(gemma, [place])


if __name__ == "__main__":
    expected()
    everywhere = new_gemma()
    for line in range(1, len(lines()) + 1):
        run_struck(everywhere, [line])
    print(f"struck at {line} lines")
