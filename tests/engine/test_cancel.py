"""What cancelling does, and what is left after an error or Ctrl-C."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import pytest
import torch

from engine.driver import GREEDY, Recording, assert_consistent, assert_nothing_held, greedy, small_model
from gemcut.engine import Engine, EngineLoop, Request, SamplingParams
from gemcut.engine.cache import bytes_per_block
from gemcut.engine.request import RowError

# ---- cancelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_cancel_gives_blocks_back_at_once(when: str) -> None:
    engine = Recording(small_model(), max_batch_tokens=8, max_batch_size=1 if when == "waiting" else 64, sequences=4)
    other = engine.add([1, 2], greedy(30))
    sequence = engine.add([3] * 40, greedy(30))
    for _ in range({"waiting": 2, "prefill": 3, "decode": 15}[when]):
        engine.step()
    assert sequence.status.value == ("waiting" if when == "waiting" else "running")
    assert {
        "waiting": sequence.computed == 0,
        "prefill": 0 < sequence.computed < 40,
        "decode": sequence.output_length > 2,
    }[when]
    before = engine.cache.full.free
    held = len(engine.scheduler.tables[sequence.id].full) if when != "waiting" else 0
    assert engine.cancel(sequence.id)
    assert engine.cache.full.free == before + held
    assert_consistent(engine)
    assert not engine.cancel(sequence.id)
    output = sequence.output_length
    events = engine.finish()
    mine = [e for e in events if e.request_id == sequence.id]
    assert [(e.token_id, e.finish_reason) for e in mine] == [(None, "cancelled")]
    assert sequence.output_length == output
    assert other.output_length == 30
    assert_nothing_held(engine)


def test_cancel_unknown_or_ended() -> None:
    engine = Recording(small_model())
    assert not engine.cancel(10**9)
    sequence = engine.add([1], greedy(1))
    engine.finish()
    assert not engine.cancel(sequence.id)
    assert_nothing_held(engine)


def test_cancel_while_preempted() -> None:
    model = small_model()
    full, sliding = bytes_per_block(model.config, model.dtype, 4)
    engine = Recording(model, kv_memory=10 * (full + sliding), max_batch_tokens=8)
    sequences = [engine.add([i] * 10, greedy(20)) for i in range(3)]
    while not engine.scheduler.preemptions:
        assert engine.has_work
        engine.step()
    victim = next(s for s in sequences if s.preemptions)
    assert victim.status.value == "waiting"
    engine.cancel(victim.id)
    assert_consistent(engine)
    engine.finish()
    assert_nothing_held(engine)
    assert all(s.output_length == 20 for s in sequences if s is not victim)


class Meddler:
    """A text sink that cancels requests from within a step, as a destructor run by the garbage collector may."""

    stopped: str | None = None

    def __init__(self, engine: Engine, after: int) -> None:
        self.engine, self.after, self.victims, self.pieces = engine, after, [], 0

    def push(self, token_id: int) -> str:
        self.pieces += 1
        if self.pieces == self.after:
            self.answers = [self.engine.cancel(victim) for victim in self.victims]
        return "x"

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("after", [1, 5])
def test_cancel_from_within_a_step(after: int) -> None:
    engine = Recording(small_model(), max_batch_tokens=16, max_batch_size=5)
    sink = Meddler(engine, after)
    first = engine.add([1], greedy(20))
    meddler = engine.add([2], greedy(20), text=lambda: sink)
    beside, prefilling = engine.add([5], greedy(20)), engine.add([3] * 90, greedy(2))
    waiting = [engine.add([4], greedy(20)) for _ in range(3)][-1]
    victims = [first, meddler, beside, prefilling, waiting]
    sink.victims = [victim.id for victim in victims]
    events = engine.finish()
    assert sink.answers == [True] * 5
    for victim in victims:
        mine = [e for e in events if e.request_id == victim.id]
        assert mine[-1].finish_reason == "cancelled"
        assert [e.token_id for e in mine[:-1]] == victim.tokens[victim.prompt_length :]
        assert all(e.finish_reason is None for e in mine[:-1])
    # The step that was under way is done to its end for all of them.
    assert [v.output_length for v in victims] == [after, after, after, 0, 0]
    assert_nothing_held(engine)


@pytest.mark.parametrize("place", ["embed", "head"])
def test_cancel_while_the_network_runs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    engine = Recording(model, max_batch_tokens=16)
    one, other, third = (engine.add([n], greedy(6)) for n in range(3))
    engine.step()
    module = model.embed
    working, cancelled = (module.forward, "forward") if place == "embed" else (module.logits, "logits")

    def meddling(rows: Any) -> Any:
        if engine.cancel(other.id):
            engine.cancel(one.id)
        return working(rows)

    monkeypatch.setattr(module, cancelled, meddling)
    events = engine.finish()
    ends = [(e.request_id, e.finish_reason) for e in events if e.finish_reason]
    assert sorted(ends) == [(one.id, "cancelled"), (other.id, "cancelled"), (third.id, "length")]
    for sequence in (one, other):
        assert sequence.output_length == 2
        assert [e.token_id for e in events if e.request_id == sequence.id] == [sequence.tokens[-1], None]
    assert third.output_length == 6
    assert_nothing_held(engine)


def test_threads_submit_and_cancel() -> None:
    engine = Recording(small_model(), sequences=3, max_batch_tokens=16)
    alone = {n: engine.answers([[n] * 9], greedy(15))[0] for n in range(4)}
    loop = EngineLoop(engine)
    wrong: list[object] = []

    def work(n: int) -> None:
        for turn in range(12):
            sequence = loop.submit(Request(prompt_ids=(n,) * 9, params=greedy(15)))
            if turn % 3 == 2:
                loop.wait(sequence, 0)
                loop.cancel(sequence)
            while not sequence.finished:
                loop.wait(sequence, len(sequence.events))
            new = sequence.tokens[9:]
            if new != alone[n][: len(new) if turn % 3 == 2 else 15]:
                wrong.append((n, sequence.tokens))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    loop.close()
    assert_nothing_held(engine)


# ---- errors in the middle of a step ------------------------------------------------------------------------------


def crowd(engine: Recording, reference: Recording) -> list[list[int]]:
    """Six requests in ``engine``; what they must answer."""
    params = [SamplingParams(seed=i, max_new_tokens=10) for i in range(6)]
    prompts = [[i + 1] * (5 + 7 * i) for i in range(6)]
    for prompt, own in zip(prompts, params, strict=True):
        engine.add(prompt, own, prompt_logprobs_from=1)
    return reference.answers(prompts, params)


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt(), RuntimeError("CUDA error")])
@pytest.mark.parametrize("place", ["network", "sampler"])
def test_failed_step_can_be_done_again(error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails once does not fail again where it is done in parts, or anew: no request ends by it."""
    model = small_model()
    engine = Recording(model, max_batch_tokens=16)
    expected = crowd(engine, Recording(model))
    owner, name = (model, "head") if place == "network" else (sys.modules["gemcut.engine.engine"], "sample")
    working, inner, calls, failures, together = getattr(owner, name), engine._run, 0, 0, False

    def run(batch: Any) -> None:
        nonlocal together
        together = len(batch) > 1  # a request alone is not done again: its own failure ends it
        inner(batch)

    def failing(*args: Any) -> Any:
        nonlocal calls, failures
        calls += 1
        if calls % 5 == 0 and (together or isinstance(error, KeyboardInterrupt)):
            failures += 1
            raise error
        return working(*args)

    monkeypatch.setattr(engine, "_run", run)
    monkeypatch.setattr(owner, name, failing)
    struck = 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            struck += 1
            assert_consistent(engine)
    assert failures > 3
    assert struck == (failures if isinstance(error, KeyboardInterrupt) else 0)
    assert [s.tokens[s.prompt_length :] for s in engine.live.values()] == expected
    assert [len(s.prompt_scores) for s in engine.live.values()] == [s.prompt_length - 1 for s in engine.live.values()]
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), r"memory ran out while \d+ tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), r"memory ran out while \d+ tokens"),
        (RuntimeError("CUDA error:\nno kernel image"), "RuntimeError: CUDA error: no kernel image"),
    ],
)
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_request_that_makes_the_network_fail_ends_alone(error: Exception, message: str, when: str) -> None:
    """Whatever batch it is in fails; the others' texts are those of a run without it, to the bit."""
    model = small_model()
    engine = Recording(model, max_batch_tokens=16)
    expected = crowd(engine, Recording(model))
    bad = engine.add([9] * 11, greedy(8))
    working, tried = engine.runner.run, 0

    def run(batch: Any, tables: Any) -> Any:
        nonlocal tried
        late = when == "prefill" or bad.output_length > 2
        if late and any(scheduled.sequence is bad for scheduled in batch):
            tried += 1
            large = torch.empty(1000)
            assert large.numel()
            raise error
        return working(batch, tables)

    engine.runner.run = run  # type: ignore[method-assign]
    events = engine.finish()
    assert tried > 1  # together with others first
    last = [e for e in events if e.request_id == bad.id][-1]
    assert last.finish_reason == "error"
    assert re.match(message, str(last.error))
    assert "\n" not in str(last.error)
    assert bad.cause is error
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "run"]
    assert frames
    assert not any("large" in frame.f_locals for frame in frames)  # no tensor stays because of the error
    others = [s for s in engine.live.values() if s is not bad]
    assert [s.tokens[s.prompt_length :] for s in others] == expected
    assert_nothing_held(engine)


@pytest.mark.parametrize("place", ["push", "finish", "logit_bias", "logits"])
def test_failing_request_ends_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Meddler):
        def push(self, token_id: int) -> str:
            if place == "push":
                raise ValueError("no such token")
            return "x"

        def finish(self) -> str:
            raise ValueError("no such token")

    model = small_model()
    engine = Recording(model, max_batch_tokens=16)
    expected = crowd(engine, Recording(model))
    params = SamplingParams(temperature=0, max_new_tokens=4, logit_bias={1: 1.0})
    sink = (lambda: Broken(engine, 0)) if place in ("push", "finish") else None
    broken = engine.add([9, 9], params, text=sink)
    if place == "logit_bias":
        params.logit_bias[10**6] = 1.0  # type: ignore[index]
    elif place == "logits":
        module = sys.modules["gemcut.engine.engine"]
        working = module.sample  # type: ignore[attr-defined]

        def with_a_bad_row(logits: Any, sequences: Any, explain: Any) -> Any:
            tokens, logprobs = working(logits, sequences, explain)
            return [
                RowError("no such token") if s is broken else t for s, t in zip(sequences, tokens, strict=True)
            ], logprobs

        monkeypatch.setattr(module, "sample", with_a_bad_row)
    events = engine.finish()
    last = [e for e in events if e.request_id == broken.id][-1]
    assert (last.finish_reason, last.token_id, last.text) == ("error", None, "")
    assert last.error is not None
    assert ("token id 1000000: this model's ids" if place == "logit_bias" else "no such token") in last.error
    assert [s.tokens[s.prompt_length :] for s in list(engine.live.values())[:6]] == expected
    assert_nothing_held(engine)


@pytest.mark.slow
def test_ctrl_c_at_any_line() -> None:
    """Ctrl-C at one line after the other of the engine's own code: it always goes on and nothing is lost."""
    model = small_model()
    engine = Recording(model, max_batch_tokens=16, kv_memory=30_000)
    countdown = 0

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        nonlocal countdown
        if "gemcut/engine" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if kind == "line":
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
        return trace

    struck = lines = 0
    prompts = [[i + 1] * (3 + 11 * i) for i in range(4)]
    expected = Recording(model).answers(prompts, greedy(6))
    for start in range(1, 2200, 13):
        sequences = [engine.add(prompt, greedy(6)) for prompt in prompts]
        countdown = start
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            while engine.has_work:
                engine.step()
        except KeyboardInterrupt:
            struck += 1
        finally:
            sys.settrace(before)
        lines = max(lines, start)
        assert_consistent(engine)
        engine.finish()
        assert_nothing_held(engine)
        for sequence, answer in zip(sequences, expected, strict=True):
            assert sequence.tokens[sequence.prompt_length :][:6] == answer
            assert sequence.ended is not None
    assert struck > 100


def test_engine_default_is_greedy_free() -> None:
    """Two requests without a seed do not share one."""
    engine = Recording(small_model(), sequences=4)
    texts = engine.answers([[1, 2, 3]] * 4, SamplingParams(max_new_tokens=20))
    assert len({tuple(text) for text in texts}) == 4
    assert engine.answers([[1, 2, 3]] * 2, GREEDY)[0] == engine.answers([[1, 2, 3]], GREEDY)[0]
