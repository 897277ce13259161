"""NaN and infinity on an NVIDIA GPU: decode graphs, draws behind them, the one launch, prefill graphs, launches.

As on a CPU (test_bad_numbers.py): the request that meets them ends with a reason, and no neighbour is changed by a bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gemcut.engine import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from gemcut.engine.request import Sequence
from gemcut.model import Model
from gemcut.model.quantized import Int8Embedding
from gpu_support import network

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
BAD, SOUND = 7, 8  # token ids
#: Logits through the sampler, the likeliest token in a graph, draws behind one.
HOW: dict[str, dict[str, Any]] = {
    "logprobs": {"temperature": 0, "logprobs": 5},
    "greedy": {"temperature": 0},
    "draw": {"temperature": 1.3},
    "top_k": {"temperature": 1.3, "top_k": 40, "top_p": 0.95},
}


def overflowing(weights: str, **changes: Any) -> Model:
    """A network of finite weights in which token ``BAD`` enters as infinity; its logit is 0 for everybody else.

    3e37 times sqrt(256) is beyond fp32. The final norm's scale of that column is 0, so the head's row adds nothing.
    """
    model = network(weights, bound=True, **changes)
    if isinstance(model.embed, Int8Embedding):
        weight = model.embed.table  # views of what the kernels read
        weight.codes[BAD], weight.absmax[BAD] = 0, 3e37
        weight.codes[BAD, 3] = 127
    else:
        model.embed.weight[BAD] = 0
        model.embed.weight[BAD, 3] = 3e37
    model.norm.scale[3] = 0
    return model


class Desk:
    """An engine and what came of its requests."""

    def __init__(self, model: Model, **sizes: Any) -> None:
        self.engine = Engine(
            model, CUDA, EngineConfig(**{"block_size": 4, "max_context": 256, "sequences": 6, **sizes})
        )
        self.events: dict[int, list[TokenEvent]] = {}

    def submit(self, prompt: list[int], new: int = 8, how: str = "logprobs") -> Sequence:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, seed=len(prompt), **HOW[how])
        return self.engine.submit(Request(prompt_ids=tuple(prompt), params=params))

    def step(self) -> None:
        for event in self.engine.step():
            self.events.setdefault(event.request_id, []).append(event)

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def said(self, sequence: Sequence) -> list[Any]:
        return [(event.token_id, event.logprob, event.finish_reason) for event in self.events[sequence.id]]

    def end(self, sequence: Sequence) -> tuple[Any, str]:
        event = self.events[sequence.id][-1]
        return event.finish_reason, str(event.error)


def prompt(seed: int, length: int) -> list[int]:
    ids = torch.randint(20, 1000, (length,), generator=torch.Generator().manual_seed(seed))
    return [2, *ids.tolist()]


SHAPES = [("bf16", 64), ("int8", 64), ("nf4", 64), ("bf16", 128), ("nf4", 256)]  # heads of 128 and 256: Hopper's kernel


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("weights", "head_dim"), SHAPES)
def test_a_neighbour_in_the_same_steps_is_not_changed(weights: str, head_dim: int, graphs: bool) -> None:
    """Prompts side by side, fresh ones and ones that go on from cached beginnings: the same as beside sound ones."""
    model = overflowing(weights, head_dim=head_dim)
    found = []
    for token in (SOUND, BAD):
        desk, said = Desk(model), []
        if not graphs:
            desk.engine.runner.prefill_refusal = "compared with"
        for how in HOW:  # a prefill graph's second batch is captured, the third is replayed
            # No neighbour begins as they do: it would wait for a beginning that is not shared where that went bad.
            others = [desk.submit([*prompt(11, 21), token], 1, how), desk.submit([token, *prompt(12, 3)], 1, how)]
            neighbours = [desk.submit(prompt(seed, 2 + 6 * seed), 8, how) for seed in range(4)]
            desk.run()
            said.append([desk.said(neighbour) for neighbour in neighbours])
            for other in others:
                reason, text = desk.end(other)
                assert reason == ("length" if token == SOUND else "error")
                assert token == SOUND or "all weights are finite, so a computation overflowed in bfloat16" in text
        found.append(said)
    assert found[0] == found[1]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_a_request_that_goes_bad_while_it_is_decoded(weights: str, how: str) -> None:
    """One of four: it ends within two steps, its neighbours go on bit for bit, and its blocks are used again."""
    model, found = network(weights, bound=True), []
    for value in (None, torch.nan, torch.inf):
        desk = Desk(model)
        asked = [desk.submit(prompt(seed, 5 + 6 * seed), 30, how) for seed in range(4)]
        while any(sequence.output_length < 4 for sequence in asked):
            desk.step()
        victim = asked.pop(1)
        before = victim.output_length
        if value is None:
            desk.engine.cancel(victim.id)
        else:
            block = desk.engine.scheduler.tables[victim.id].full[0]
            desk.engine.cache.full_storage[-1, 1, block, 0] = value
            for _ in range(2):
                desk.step()
            reason, text = desk.end(victim)
            assert reason == "error"
            assert victim.output_length <= before + 1
            assert "all weights are finite" in text
        desk.run()
        asked += [desk.submit(prompt(seed, 9 + 7 * seed), 12, how) for seed in range(4, 10)]
        desk.run()
        found.append([desk.said(sequence) for sequence in asked])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_single_request_goes_bad_and_the_next_one_is_sound(weights: str, one_launch: bool, how: str) -> None:
    model = network(weights, bound=True)
    used, fresh = Desk(model), Desk(model)
    for desk in (used, fresh):
        desk.engine.runner.one_launch = one_launch
    victim = used.submit(prompt(1, 20), 30, how)
    while victim.output_length < 4:
        used.step()
    assert used.engine.runner._graphs is not None
    assert (used.engine.runner._graphs._graphs[1].step is not None) == one_launch
    block = used.engine.scheduler.tables[victim.id].full[1]
    used.engine.cache.full_storage[0, 0, block, 2] = torch.nan  # a key
    used.run()
    reason, text = used.end(victim)
    assert reason == "error"
    assert victim.output_length <= 5
    assert "hold NaN or infinity" in text
    ours, theirs = (desk.submit(prompt(2, 30), 12, how) for desk in (used, fresh))
    used.run()
    fresh.run()
    assert used.said(ours) == fresh.said(theirs)
    assert used.end(ours)[0] == "length"


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("weights", "head_dim"), SHAPES)
def test_blocks_that_held_nan_are_used_again(weights: str, head_dim: int, graphs: bool) -> None:
    """A cache that is filled with NaN gives every later request what a fresh one gives: bit for bit."""
    model = network(weights, bound=True, head_dim=head_dim)
    fresh, used = (Desk(model, max_batch_tokens=64) for _ in range(2))
    for group in (used.engine.cache.full_storage, used.engine.cache.sliding_storage):
        group.fill_(torch.nan)
    found = []
    for desk in (fresh, used):
        if not graphs:
            desk.engine.runner.prefill_refusal = "compared with"
        said = []
        for how in HOW:
            asked = [desk.submit(prompt(n, n), 8, how) for n in (1, 3, 4, 9, 17, 30, 100)]
            desk.run()
            said += [desk.said(sequence) for sequence in asked]
        found.append(said)
    assert found[0] == found[1]
    assert all(math.isfinite(event[1].logprob) for said in found[1][:7] for event in said)


@pytest.mark.parametrize("new", [0, 4])
def test_the_tensor_is_named(new: int) -> None:
    model = network("bf16", bound=True)
    model.layers[2].post_feedforward_norm.scale[5] = torch.nan  # type: ignore[union-attr, index]
    desk = Desk(model)
    params = SamplingParams(temperature=0, max_new_tokens=new)
    sequence = desk.engine.submit(
        Request(prompt_ids=(2, 30, 31), params=params, prompt_logprobs_from=1 if new == 0 else None)
    )
    desk.run()
    reason, text = desk.end(sequence)
    assert reason == "error"
    assert "tensor layers.2.post_feedforward_norm.scale does" in text
