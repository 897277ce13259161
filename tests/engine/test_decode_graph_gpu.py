"""Decode graphs for many sequences on an NVIDIA GPU: sizes up to 256, draws of all kinds together, no memory left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.decode_graph import SIZES
from gemcut.engine.request import Sequence
from gemcut.model import Model
from gpu_support import network

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"top_k": 5},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 64, "min_p": 0.02},
]


def prompt(seed: int) -> tuple[int, ...]:
    length = 3 + seed % 29
    return 2, *torch.randint(20, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine_of(model: Model, **sizes: Any) -> Engine:
    return Engine(model, CUDA, EngineConfig(**{"max_context": 128, "sequences": 256, **sizes}))


def run(engine: Engine, params: list[SamplingParams], first: int = 0) -> list[list[int]]:
    """The answers to as many prompts, all submitted at once."""
    asked: list[Sequence] = [
        engine.submit(Request(prompt_ids=prompt(first + i), params=p)) for i, p in enumerate(params)
    ]
    while engine.has_work:
        engine.step()
    assert all(sequence.events[-1].finish_reason == "length" for sequence in asked)
    return [sequence.output_ids for sequence in asked]


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_as_many_at_once_as_there_are_rows_answer_as_alone(weights: str) -> None:
    model = network(weights, bound=True)
    engine, alone = engine_of(model), engine_of(model)
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    together = run(engine, [params] * 256)
    assert engine.config.max_batch_size == 256
    assert engine.runner._graphs is not None
    assert SIZES[-1] in engine.runner._graphs._graphs
    same = [run(alone, [params], seed)[0] == together[seed] for seed in range(0, 256, 5)]
    # Other kernels serve other numbers of rows: where two tokens are nearly as likely, rounding decides.
    assert sum(same) >= 0.9 * len(same)


def test_requests_of_all_kinds_together_draw_as_by_the_sampler() -> None:
    model = network("nf4", bound=True)
    params = [
        SamplingParams(**{"max_new_tokens": 10, "ignore_eos": True, "seed": i, **KINDS[i % len(KINDS)]})
        for i in range(48)
    ]
    engine, general = engine_of(model), engine_of(model)
    served = 0
    tokens = engine.runner.tokens

    def counted(*given: Any) -> Any:
        nonlocal served
        found = tokens(*given)
        served += found is not None
        return found

    engine.runner.tokens = counted  # type: ignore[method-assign]
    general.runner.tokens = lambda batch, tables: None  # type: ignore[method-assign]
    found, expected = run(engine, params), run(general, params)
    assert served >= 6  # of 9 steps
    same = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
    assert (
        same >= 0.98 * 480
    )  # a number within rounding of a border draws the neighbour, and the answer goes on from it


@pytest.mark.parametrize("sizes", [{"block_size": 4, "sequences": 8}, {"sequences": 64}], ids=["few blocks", "many"])
@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS[2:4]], ids=["greedy", "drawn"])
def test_requests_that_come_and_go_answer_as_alone(sizes: dict[str, int], kinds: list[dict[str, Any]]) -> None:
    """Steps computed ahead while others end, start and lose their blocks, which go to somebody else at once."""
    model = network("int8", bound=True)
    engine, alone = engine_of(model, **sizes), engine_of(model)
    params = [
        SamplingParams(
            **{
                "max_new_tokens": 2 + 7 * i % 41,
                "ignore_eos": True,
                "seed": i,
                "temperature": 0.4,
                **kinds[i % len(kinds)],
            }
        )
        for i in range(60)
    ]
    asked: list[Sequence] = []
    taken = 0
    ahead = engine.runner.computed_ahead

    def counted(*given: Any) -> Any:
        nonlocal taken
        found = ahead(*given)
        taken += len(found)
        return found

    engine.runner.computed_ahead = counted  # type: ignore[method-assign]
    steps = 0
    while engine.has_work or len(asked) < len(params):
        if len(asked) < len(params) and steps % 3 == 0:
            asked.append(engine.submit(Request(prompt_ids=prompt(len(asked)), params=params[len(asked)])))
        engine.step()
        steps += 1
    assert taken > 20
    assert [sequence.output_length for sequence in asked] == [p.max_new_tokens for p in params]
    same = [
        sequence.output_ids == run(alone, [p], i)[0] for i, (sequence, p) in enumerate(zip(asked, params, strict=True))
    ]
    assert sum(same) >= 0.9 * len(same)
    assert engine.cache.full.free == engine.cache.full.count
    assert engine.cache.sliding.free == engine.cache.sliding.count


def test_without_memory_for_a_capture_steps_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("int8", bound=True)
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    expected = run(engine_of(model), [params] * 3)
    engine = engine_of(model)

    def fail(self: object, *args: object, **how: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", fail)
    with pytest.warns(UserWarning, match="no memory for a CUDA graph of steps of 4 sequences"):
        found = run(engine, [params] * 3)
    monkeypatch.undo()
    assert torch.cuda.current_stream(CUDA) == torch.cuda.default_stream(CUDA)
    assert found == expected
    assert run(engine, [params] * 3) == expected
    assert len(run(engine, [params] * 7)[6]) == 6  # another size is captured
    assert engine.runner._graphs is not None
    assert engine.runner._graphs._graphs[8] is not None
