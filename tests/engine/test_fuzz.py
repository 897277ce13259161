"""Hundreds of random requests with random cancels: no block is lost, no content changes under a published name."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.driver import CPU, assert_consistent, assert_nothing_held, small_model
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.blocks import BlockPool
from gemcut.engine.cache import bytes_per_block
from gemcut.engine.request import Sequence

VOCABULARY = 64


class Life:
    """Random requests from a few families of beginnings, so that prefixes are shared, and random cancels."""

    def __init__(self, engine: Engine, seed: int, *, longest: int = 60, most_new: int = 24) -> None:
        self.engine, self.chance, self.longest, self.most_new = engine, random.Random(seed), longest, most_new
        self.families = [[self.chance.randrange(VOCABULARY) for _ in range(60)] for _ in range(6)]
        self.live: dict[int, Sequence] = {}
        self.ended: dict[int, str] = {}
        self.sent: dict[int, list[int]] = {}
        self.all: list[Sequence] = []
        self.published: dict[tuple[str, bytes], Tensor] = {}

    def submit(self) -> None:
        family = self.chance.choice(self.families)
        prompt = family[: self.chance.randrange(1, self.longest)]
        prompt += [self.chance.randrange(VOCABULARY) for _ in range(self.chance.randrange(8))]
        params = SamplingParams(
            max_new_tokens=self.chance.choice((0, 1, 3, 8, self.most_new)), seed=self.chance.randrange(100)
        )
        stops = frozenset(self.chance.sample(range(VOCABULARY), self.chance.choice((0, 0, 2))))
        request = Request(
            prompt_ids=tuple(prompt),
            params=params,
            stop_ids=stops,
            prompt_logprobs_from=self.chance.choice((None,) * 19 + (len(prompt) // 2 + 1,)),
        )
        sequence = self.engine.submit(request)
        self.live[sequence.id] = sequence
        self.sent[sequence.id] = []
        self.all.append(sequence)

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request_id not in self.ended, "an event after the last one"
            if event.token_id is not None:
                self.sent[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                self.ended[event.request_id] = event.finish_reason
                self.live.pop(event.request_id, None)

    def cancel(self) -> None:
        victim = self.chance.choice(list(self.live))
        assert self.engine.cancel(victim)
        assert not self.engine.cancel(victim)
        self.live.pop(victim)

    def contents(self) -> None:
        """What lies under a name is always the same, up to rounding, whichever request computed it and wherever."""
        for name, pool, storage in (
            ("full", self.engine.cache.full, self.engine.cache.full_storage),
            ("sliding", self.engine.cache.sliding, self.engine.cache.sliding_storage),
        ):
            if not pool._block_of:
                continue
            now = storage[:, :, list(pool._block_of.values())].unbind(2)
            before = [self.published.setdefault((name, key), one) for key, one in zip(pool._block_of, now, strict=True)]
            torch.testing.assert_close(torch.stack(now), torch.stack(before), atol=1e-4, rtol=1e-4)

    def run(self, requests: int, *, crowd: int, cancels: float) -> None:
        while len(self.all) < requests or self.live:
            while len(self.all) < requests and len(self.live) < crowd and self.chance.random() < 0.7:
                self.submit()
            if self.live and self.chance.random() < cancels:
                self.cancel()
            self.step()
            if self.chance.random() < 0.03:
                assert_consistent(self.engine)
                self.contents()
        while self.engine.has_work:
            self.step()


def engine_of(blocks: float, *, chunk: int = 24, batch: int = 16, block: int = 4) -> Engine:
    """An engine whose cache holds ``blocks`` whole contexts of 96."""
    model = small_model(VOCABULARY)
    config = EngineConfig(max_batch_tokens=chunk, max_batch_size=batch, block_size=block, sequences=1)
    one = Engine(model, CPU, config).cache.shape
    full, sliding = bytes_per_block(model.config, model.dtype, block)
    memory = int(blocks * (one.full_blocks * full + one.sliding_blocks * sliding)) + 1
    return Engine(
        model, CPU, EngineConfig(max_batch_tokens=chunk, max_batch_size=batch, block_size=block, kv_memory=memory)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "blocks", "crowd", "chunk", "block"),
    [(1000, 4.0, 12, 24, 4), (500, 1.2, 8, 24, 4), (300, 8.0, 40, 7, 3)],
    ids=["roomy", "scarce", "crowded"],
)
def test_no_block_is_lost(requests: int, blocks: float, crowd: int, chunk: int, block: int) -> None:
    engine = engine_of(blocks, chunk=chunk, block=block)
    scarce = blocks < 2  # short prompts are let in together, long answers then run out of blocks
    life = Life(engine, seed=requests, longest=25 if scarce else 60, most_new=60 if scarce else 24)
    life.run(requests, crowd=crowd, cancels=0.03)
    assert_consistent(engine)
    assert_nothing_held(engine)
    assert len(life.ended) == requests
    reasons = set(life.ended.values())
    assert reasons == {"stop", "length", "cancelled"}
    for sequence in life.all:
        assert life.sent[sequence.id] == sequence.tokens[sequence.prompt_length :]
    # All of this did happen:
    assert sum(s.cached_tokens > 0 for s in life.all) > requests / 20
    assert engine.scheduler.preemptions > (50 if scarce else -1)
    # And the answers are those of an engine that does one thing at a time and remembers nothing.
    finished = [s for s in life.all if life.ended[s.id] != "cancelled" and s.request.params.max_new_tokens > 1]
    alone = engine_of(2.0, chunk=96)
    for sequence in life.chance.sample(finished, 40):
        twin = alone.submit(
            Request(
                prompt_ids=sequence.request.prompt_ids,
                params=sequence.request.params,
                stop_ids=sequence.request.stop_ids,
            )
        )
        while alone.has_work:
            alone.step()
        alone.cache.forget()
        assert twin.tokens == sequence.tokens


@pytest.mark.slow
def test_queue_always_moves() -> None:
    """With room for barely one request, whatever is accepted is served: each step computes at least one token."""
    chance = random.Random(8)
    for block in (1, 2, 5, 16):
        for chunk in (1, 2, 7, 96):
            engine = engine_of(1.0, chunk=chunk, block=block)
            life = Life(engine, seed=chunk, most_new=30)
            idle = 0
            for _ in range(6):
                life.submit()
            while engine.has_work:
                before = engine.scheduler.preemptions
                work = sum(s.computed for s in life.all) + len(life.ended)
                life.step()
                moved = sum(s.computed for s in life.all) + len(life.ended) != work
                idle = 0 if moved or engine.scheduler.preemptions > before else idle + 1
                assert idle < 2
                if chance.random() < 0.05:
                    assert_consistent(engine)
            assert_nothing_held(engine)
            assert len(life.ended) == 6


def test_prompt_waits_for_its_sliding_blocks_too() -> None:
    """A prompt whose first chunk fits, but not its whole window, is not started, thrown away and started again."""
    model = small_model(VOCABULARY, window=24)
    engine = Engine(model, CPU, EngineConfig(max_batch_tokens=8, block_size=4, sequences=1))
    assert (engine.cache.full.count, engine.cache.sliding.count) == (24, 9)
    requests = [
        Request(prompt_ids=(1,) * 20, params=SamplingParams(temperature=0, max_new_tokens=20)),
        Request(prompt_ids=(2,) * 48, params=SamplingParams(temperature=0, max_new_tokens=5)),
    ]
    first, second = (engine.submit(request) for request in requests)
    while engine.has_work:
        engine.step()
    assert (first.output_length, second.output_length) == (20, 5)
    assert engine.scheduler.preemptions == 0


def test_block_pool_alone() -> None:
    pool = BlockPool(3)
    first, second, third = pool.allocate(), pool.allocate(), pool.allocate()
    assert {first, second, third} == {0, 1, 2}
    assert pool.free == 0
    pool.publish(first, b"a")
    pool.publish(second, b"a")  # the same content again: the first stays the one found
    assert pool.lookup(b"a") == first
    pool.publish(second, b"b")
    pool.release(first)
    pool.release(second)
    pool.release(third)
    assert pool.free == 3
    assert pool.lookup(b"a") == first  # still there, though nobody uses it
    pool.share(first)
    assert pool.free == 2
    pool.release(first)
    assert pool.allocate() == third  # never published: goes first
    assert pool.allocate() == second  # then the one not used for longest
    assert pool.lookup(b"b") is None
    assert pool.lookup(b"a") == first
    assert pool.allocate() == first
    assert pool.lookup(b"a") is None
