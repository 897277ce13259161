"""Any order of submitting, reading, cancelling, leaving and failing, found by Hypothesis; threads and asyncio readers.

Who survives has the text that the request has alone; nobody waits for ever; nothing of anybody stays behind.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from engine.driver import assert_consistent, assert_nothing_held, settled
from engine.test_traffic import Breaking, alone, params, prompt_of
from engine.words import Words, new_gemma
from gemcut.engine import SamplingParams
from gemcut.engine.results import TextStream
from gemcut.errors import RequestError
from gemcut.gemma import Gemma

NUMBERS = st.integers(0, 23)


class FailingParts:
    """Stages of the engine that fail on demand: the next call of one raises, once."""

    def __init__(self, gemma: Gemma) -> None:
        self.due: dict[str, int] = {}
        self.struck = 0
        runner, model = gemma.engine.runner, gemma.model
        self._inner = runner.run, model.head
        self._runner, self._model = runner, model
        error = torch.OutOfMemoryError("no room")
        runner.run = self._failing("allocation", runner.run, error)  # type: ignore[method-assign]

        def head(hidden: Tensor) -> Tensor:
            logits = self._inner[1](hidden)
            if self._strikes("logits"):
                logits[0] = torch.nan
            return logits

        object.__setattr__(model, "head", head)  # the model is shared by all tests: ``restore`` takes it off
        layer = model.layers[-1]
        self._layer = layer
        forward = layer.attention.attend
        self._attend = forward
        layer.attention.attend = self._failing("kernel", forward, RuntimeError("the kernel cannot be launched"))

    def _strikes(self, stage: str) -> bool:
        if self.due.get(stage, 0) > 0:
            self.due[stage] -= 1
            self.struck += 1
            return True
        return False

    def _failing(self, stage: str, inner: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if self._strikes(stage):
                raise error
            return inner(*args, **more)

        return call

    def restore(self) -> None:
        self._runner.run = self._inner[0]  # type: ignore[method-assign]
        object.__delattr__(self._model, "head")
        self._layer.attention.attend = self._attend


class Traffic(RuleBasedStateMachine):
    """What people do to one loop, in any order. A failure of a stage may end requests; the others are not touched."""

    @initialize(
        sequences=st.integers(1, 4),
        chunk=st.sampled_from([2, 5, 8, 64]),
        batch=st.sampled_from([1, 2, 5, 64]),
        budget=st.sampled_from([None, 1e-9, 1.0]),
    )
    def begin(self, sequences: int, chunk: int, batch: int, budget: float | None) -> None:
        for number in range(24):  # before anything fails: the network is shared
            alone(number)
        self.before = set(threading.enumerate())
        self.gemma = new_gemma(sequences=sequences, max_batch_tokens=chunk, max_batch_size=batch, step_seconds=budget)
        self.parts = FailingParts(self.gemma)
        self.live: list[tuple[TextStream, int, str]] = []

    # ---- what people do ------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, way=st.sampled_from(["good", "good", "good", "broken sink"]))
    def submit(self, number: int, way: str) -> None:
        self.gemma.tokenizer = Breaking(1 + number % 3) if way == "broken sink" else Words()  # type: ignore[assignment]
        self.live.append((self.gemma.stream_ids(prompt_of(number), params(number)), number, way))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), pieces=st.integers(1, 3))
    def read_some(self, which: int, pieces: int) -> None:
        stream, _, _ = self.live[which % len(self.live)]
        try:
            for _ in range(pieces):
                next(stream, None)
        except RequestError:
            pass

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), how=st.sampled_from(["thread", "task"]))
    def read_to_the_end(self, which: int, how: str) -> None:
        stream, number, way = self.live.pop(which % len(self.live))
        got: list[str] = []

        async def pieces() -> None:
            got.extend([piece async for piece in stream])

        def read() -> None:
            try:
                if how == "task":
                    asyncio.run(pieces())
                else:
                    got.extend(stream)
            except RequestError:
                pass

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(60)
        assert not reader.is_alive(), "it waits for ever"
        self.check(stream, number, way)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        stream, number, _ = self.live.pop(which % len(self.live))
        stream.cancel()
        result = stream.result
        assert result.finish_reason in ("cancelled", "length", "error")
        assert result.token_ids == alone(number)[0][: len(result.token_ids)]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def stop_reading(self, which: int) -> None:
        del self.live[which % len(self.live)]
        gc.collect(0)

    @rule(stage=st.sampled_from(["allocation", "kernel", "logits"]), times=st.integers(1, 3))
    def fail(self, stage: str, times: int) -> None:
        self.parts.due[stage] = times

    # ---- what must hold ------------------------------------------------------------------------------------------

    def check(self, stream: TextStream, number: int, way: str) -> None:
        result, (tokens, text) = stream.result, alone(number)
        assert result.token_ids == tokens[: len(result.token_ids)]
        if result.finish_reason == "length":
            assert result.token_ids == tokens
            if way == "good":
                assert result.text == text
        else:
            assert result.finish_reason == "error"
            assert way == "broken sink" or self.parts.struck, "an error came from nowhere"
            said = ("cannot be written", "memory ran out", "cannot be launched", "NaN")
            assert any(words in str(result.error) for words in said)

    @invariant()
    def ends_are_whole(self) -> None:
        for stream, number, _ in getattr(self, "live", []):
            ids = stream._sequence.output_ids
            assert tuple(ids) == alone(number)[0][: len(ids)]

    def teardown(self) -> None:
        if not hasattr(self, "gemma"):
            return
        try:
            while self.live:
                self.read_to_the_end(0, "thread")
            gc.collect()
            assert_nothing_held(self.gemma.engine)
            assert_consistent(self.gemma.engine)
            assert not self.gemma.loop.busy
            self.gemma.loop.close()
            left = [t for t in threading.enumerate() if t not in self.before and t.name.startswith("gemcut")]
            assert not left
        finally:
            self.parts.restore()


QUICK = settings(
    max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestTraffic = Traffic.TestCase
TestTraffic.settings = QUICK


class LongTraffic(Traffic):
    """The same, for longer and with other orders each time."""


TestLongTraffic = pytest.mark.slow(LongTraffic.TestCase)
TestLongTraffic.settings = settings(QUICK, max_examples=20, stateful_step_count=30, derandomize=False)


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests() -> None:
    """Requests that are read, cancelled and dropped: neither objects nor memory grow with their number."""
    gemma = new_gemma(sequences=8, max_batch_tokens=64)
    short = SamplingParams(max_new_tokens=2, temperature=0)
    right = [gemma.stream_ids(prompt_of(n), short).result.token_ids for n in range(24)]

    def many(requests: int) -> tuple[int, int]:
        for first in range(0, requests, 20):
            streams = [gemma.stream_ids(prompt_of(n % 24), short) for n in range(first, first + 20)]
            for place, stream in enumerate(streams):
                if place % 5 == 1:
                    stream.cancel()
                elif place % 5 != 2:
                    assert stream.result.token_ids == right[(first + place) % 24]
            del streams, stream
        settled(gemma.engine)
        gc.collect()
        return len(gc.get_objects()), resident()

    many(1000)
    objects, memory = many(1000)
    later_objects, later_memory = many(8000)
    assert later_objects - objects < 200
    assert later_memory - memory < 8 << 20
    assert_nothing_held(gemma.engine)


def resident() -> int:
    """Bytes that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
