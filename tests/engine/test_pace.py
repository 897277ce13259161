"""The time budget of a step: what is learned of steps' times, and what prompts get beside answers. Clocks are false."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.driver import CPU, assert_consistent, assert_nothing_held, small_model
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.pace import CPU_STEP_SECONDS, LEAST_PROMPT, Load, StepTimes, step_budget
from gemcut.engine.request import Sequence
from gemcut.engine.scheduler import Scheduled, load_of
from gemcut.errors import ParameterError


def cost(load: Load, factor: float = 1.0) -> float:
    """A device's time: 4 ms a step, 1 ms a prompt token, 3 ms an answer, 10 µs a token of context."""
    return factor * (0.004 + 0.001 * load.prompt + 0.003 * load.answers + 1e-5 * load.context)


def random_load(chance: random.Random) -> Load:
    answers = chance.randrange(9)
    return Load(chance.choice((0, 32, 100, 400)), answers, answers * chance.randrange(1, 2000))


def test_times_are_learned_and_followed() -> None:
    chance, times = random.Random(1), StepTimes()
    for factor in (1.0, 4.0, 0.5):  # the device gets slower, then faster
        for _ in range(150):
            load = random_load(chance)
            times.learn(load, cost(load, factor) * chance.uniform(0.95, 1.05))
        for _ in range(50):
            load = random_load(chance)
            assert times.seconds(load) == pytest.approx(cost(load, factor), rel=0.1)


def test_what_was_never_seen_costs_nothing_yet_and_numbers_stay_sound() -> None:
    times = StepTimes()
    assert times.seconds(Load(100, 3, 500)) == 0
    assert times.prompt_tokens(3, 500, 0.5, 512) == LEAST_PROMPT
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        times.learn(Load(1, 1, 1), seconds)
    assert times.known == 0
    for _ in range(20):  # always the same step: its parts cannot be told apart, and none becomes negative
        times.learn(Load(64, 4, 400), 0.2)
    assert times.seconds(Load(64, 4, 400)) == pytest.approx(0.2, rel=0.01)
    assert times.seconds(Load(0, 0, 0)) >= 0
    assert 0 <= times.seconds(Load(0, 4, 400)) <= times.seconds(Load(64, 4, 400))


def test_as_many_prompt_tokens_as_fit() -> None:
    chance, times = random.Random(2), StepTimes()
    for _ in range(200):
        load = random_load(chance)
        times.learn(load, cost(load))
    # 0.3 s - 4 ms - 8 answers of 3 ms - 8,000 tokens of context of 10 µs leave 192 tokens of 1 ms.
    assert times.prompt_tokens(8, 8000, 0.3, 512) == pytest.approx(192, abs=6)
    assert times.prompt_tokens(8, 8000, 0.3, 50) == 50
    assert times.prompt_tokens(8, 8000, 0.05, 512) == LEAST_PROMPT  # the answers alone take longer


class Timed:
    """An engine on a false clock, which the network's runs move on."""

    def __init__(self, step_seconds: Any, factor: float = 1.0, **sizes: Any) -> None:
        config = EngineConfig(
            block_size=4, sequences=12, step_seconds=step_seconds, **{"max_batch_tokens": 200, **sizes}
        )
        self.engine = Engine(small_model(window=16, context=600), CPU, config)
        self.now, self.factor = 0.0, factor
        self.steps: list[Load] = []
        self.engine.clock = lambda: self.now
        inner = self.engine.runner.run

        def run(batch: list[Scheduled], tables: Any) -> torch.Tensor:
            load = load_of(batch)
            self.steps.append(load)
            self.now += cost(load, self.factor)
            return inner(batch, tables)

        self.engine.runner.run = run  # type: ignore[method-assign]

    def submit(self, length: int, new: int, seed: int = 0) -> Sequence:
        chance = random.Random(seed)
        ids = tuple(chance.randrange(64) for _ in range(length))
        return self.engine.submit(Request(prompt_ids=ids, params=SamplingParams(max_new_tokens=new, seed=seed)))

    def finish(self) -> None:
        while self.engine.has_work:
            self.engine.step()
            assert_consistent(self.engine)
        assert_nothing_held(self.engine)


def traffic(timed: Timed) -> list[list[int]]:
    """Four answers, and prompts that come beside them."""
    answers = [timed.submit(10, 120, seed) for seed in range(4)]
    prompts = []
    for turn in range(6):
        for _ in range(6):
            timed.engine.step()
        prompts.append(timed.submit(400, 5, 10 + turn))
    timed.finish()
    return [sequence.output_ids for sequence in (*answers, *prompts)]


def test_steps_with_answers_keep_to_the_budget() -> None:
    budget = 0.12
    bounded, free = Timed(budget), Timed(None)
    assert traffic(bounded) == traffic(free)
    mixed = [cost(load) for load in bounded.steps if load.answers and load.prompt]
    late = mixed[5:]  # by then it has learned
    assert len(late) > 20
    assert max(late) < 1.1 * budget
    assert sorted(late)[len(late) // 2] > 0.8 * budget  # and what there is room for is used
    assert max(cost(load) for load in free.steps if load.answers) > 1.6 * budget


def test_a_slow_device_still_gets_on() -> None:
    """Where the answers alone take more than the budget, prompts come in the smallest chunks; none waits for ever."""
    timed = Timed(0.01, factor=3.0)
    texts = traffic(timed)
    assert [len(text) for text in texts] == [120] * 4 + [5] * 6
    assert {load.prompt for load in timed.steps[5:] if load.answers and load.prompt} <= set(range(LEAST_PROMPT + 1))


def test_without_answers_a_prompt_is_not_cut() -> None:
    timed = Timed(0.01)
    timed.submit(400, 2)
    timed.finish()
    assert [load.prompt for load in timed.steps] == [200, 200, 0]


def test_answers_come_before_prompts() -> None:
    """A step of eight tokens: seven answers, and what is left goes to the prompt; each answer moves in each step."""
    timed = Timed(10.0, max_batch_tokens=8)
    answers = [timed.submit(1, 30, seed) for seed in range(7)]
    timed.engine.step()
    prompt = timed.submit(60, 3, 50)
    for turn in range(2, 20):
        timed.engine.step()
        assert [answer.output_length for answer in answers] == [turn] * 7
    assert prompt.computed > 10
    timed.finish()


def test_budgets_that_are_asked_for() -> None:
    assert step_budget("auto", CPU) == CPU_STEP_SECONDS
    assert step_budget("auto", torch.device("cuda")) is None
    assert step_budget(None, CPU) is None
    assert step_budget(0, CPU) is None
    assert step_budget(2, torch.device("cuda")) == 2.0
    for wrong in (-1, float("nan"), float("inf"), "fast", True, False):
        with pytest.raises(ParameterError, match=r"step_seconds is .*; expected seconds, None or 0"):
            step_budget(wrong, CPU)  # type: ignore[arg-type]
