"""Traffic of many threads and tasks through one loop, with every kind of failure: who survives has the text it would
have alone, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from engine.driver import assert_consistent, assert_nothing_held, settled
from engine.words import Words, new_gemma
from gemcut.engine import SamplingParams
from gemcut.engine.results import TextStream
from gemcut.errors import RequestError
from gemcut.gemma import Gemma

#: What a request does: it is read by a thread or a task, or it goes wrong in one of many ways.
WAYS = ("thread", "task", "events", "cancelled", "dropped", "broken sink", "broken network", "bad bias")
NEW = 7
BAD = 61  # a prompt that begins with this token makes the network fail


def params(number: int) -> SamplingParams:
    mixed: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "frequency_penalty": 0.4},
        {"min_p": 0.05, "repetition_penalty": 1.2, "logprobs": 1},
    ]
    return SamplingParams(seed=number, max_new_tokens=NEW, ignore_eos=True, **mixed[number % len(mixed)])


def prompt_of(number: int) -> list[int]:
    chance = random.Random(number)
    return [chance.randrange(2, 60) for _ in range(chance.choice([1, 3, 9, 17]))]


@cache
def alone(number: int) -> tuple[tuple[int, ...], str]:
    (result,) = new_gemma().complete([prompt_of(number)], params(number))
    return result.token_ids, result.text


class Breaking(Words):
    """A tokenizer whose decoding fails at the n-th token of each answer."""

    def __init__(self, place: int) -> None:
        self.left = place

    def token_text(self, token: int) -> str:
        self.left -= 1
        if self.left <= 0:
            raise ValueError("this text cannot be written")
        return super().token_text(token)


def failing_network(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = gemma.engine.runner.run

    def run(batch: Any, tables: Any) -> Any:
        if any(scheduled.sequence.tokens[0] == BAD for scheduled in batch):
            raise torch.OutOfMemoryError("no room")
        return inner(batch, tables)

    monkeypatch.setattr(gemma.engine.runner, "run", run)


def begin(gemma: Gemma, lock: threading.Lock, number: int, way: str) -> TextStream:
    """Start request ``number``; what is to go wrong in it is prepared."""
    prompt, own = prompt_of(number), params(number)
    if way == "broken network":
        prompt = [BAD, *prompt]
    if way == "bad bias":
        own = SamplingParams(max_new_tokens=NEW, logit_bias={3: 0.5})
        own.logit_bias[3] = float("nan")  # type: ignore[index]
    with lock:  # the tokenizer is the model's
        gemma.tokenizer = Breaking(1 + number % 3) if way == "broken sink" else Words()  # type: ignore[assignment]
        return gemma.stream_ids(prompt, own)


def check(stream: TextStream, number: int, way: str, text: str) -> None:
    result = stream.result
    if way in ("thread", "task", "events"):
        assert (result.token_ids, result.finish_reason, text) == (alone(number)[0], "length", alone(number)[1])
    elif way == "cancelled":
        assert result.finish_reason in ("cancelled", "length")
        assert result.token_ids == alone(number)[0][: len(result.token_ids)]
    elif result.finish_reason != "length" or way != "broken sink":  # bytes alone may make no text
        assert result.finish_reason == "error"
        expected = {"broken sink": "cannot be written", "broken network": "memory ran out", "bad bias": "NaN"}[way]
        assert expected in str(result.error)


def serve(gemma: Gemma, lock: threading.Lock, numbers: range, chance: random.Random) -> None:
    """Requests one after the other, three of them at a time, each in a way that is drawn."""

    async def read(stream: TextStream) -> str:
        return "".join([piece async for piece in stream])

    for first in numbers[::3]:
        group = [
            (number, way, begin(gemma, lock, number, way))
            for number in range(first, min(first + 3, numbers.stop))
            for way in [chance.choice(WAYS)]
        ]
        for number, way, stream in group:
            if way == "dropped":
                continue
            text = ""
            try:
                if way == "task":
                    text = asyncio.run(read(stream))
                elif way == "events":
                    text = "".join(event.text for event in stream.events())
                elif way == "cancelled":
                    for _ in range(chance.randrange(3)):
                        next(stream, None)
                    stream.cancel()
                else:
                    text = "".join(stream)
            except RequestError:
                assert way in ("broken sink", "broken network", "bad bias")
            check(stream, number, way, text)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "somebody waits for ever"
    if failures:
        raise failures[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_survivors_of_any_traffic_have_their_own_texts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = new_gemma(sequences=2 + seed, max_batch_tokens=[8, 5, 16, 64][seed], max_batch_size=[64, 2, 3, 64][seed])
    failing_network(gemma, monkeypatch)
    lock = threading.Lock()
    in_threads(
        4, lambda index: serve(gemma, lock, range(30 * index, 30 * index + 30), random.Random(10 * seed + index))
    )
    gc.collect()
    assert_nothing_held(gemma.engine)
    assert_consistent(gemma.engine)
    assert not gemma.loop.busy


@pytest.mark.slow
def test_nothing_of_a_request_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory stays flat, however many requests there are: the objects that Python knows are counted."""
    gemma, lock = new_gemma(), threading.Lock()
    failing_network(gemma, monkeypatch)

    def many(rounds: int) -> int:
        for turn in range(rounds):
            serve(gemma, lock, range(24), random.Random(turn % 3))
        settled(gemma.engine)
        gc.collect()
        return len(gc.get_objects())

    many(3)
    before = many(3)
    after = many(9)  # 216 requests
    assert after - before < 100
