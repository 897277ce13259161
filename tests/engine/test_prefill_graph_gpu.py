"""Short prompts as CUDA graphs, against the same kernels without graphs and against the plain network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.cache import CacheShape, PagedCache, Tables
from gemcut.engine.paged import PagedKeyValues
from gemcut.engine.prefill_graph import MOST_SEQUENCES, SIZES, PrefillGraphs
from gemcut.model.dense import dense_logits
from gemcut.model.key_values import Span
from gpu_support import network, relative_error

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def batch(parts: list[tuple[int, int]], seed: int) -> tuple[list[int], list[int], list[Span]]:
    """(ids, positions, spans) of sequences given as (tokens before, new tokens)."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    for start, count in parts:
        spans.append(Span(len(ids), count, start + count))
        ids += torch.randint(0, 1000, (count,), generator=generator).tolist()
        positions += range(start, start + count)
    return ids, positions, spans


@pytest.mark.parametrize(("weights", "head_dim"), [("bf16", 64), ("int8", 64), ("nf4", 64), ("nf4", 128), ("nf4", 256)])
def test_graphs_give_the_hidden_states_and_the_cache_of_launches(weights: str, head_dim: int) -> None:
    """First runs, captures and replays with other tokens, lengths and tables; one sequence and several; older keys."""
    model, plain = (network(weights, bound=bound, head_dim=head_dim) for bound in (True, False))
    caches = [PagedCache(model.config, CacheShape(4, 400, 400), torch.bfloat16, CUDA) for _ in range(3)]
    for cache in caches:
        for storage in (cache.full_storage, cache.sliding_storage):
            storage.normal_(generator=torch.Generator(CUDA).manual_seed(3))  # blocks that others have used
    graphs = PrefillGraphs(model, caches[0], CUDA)
    cases: list[list[tuple[int, int]]] = [
        [(0, 90)], [(0, 96)], [(0, 65)], [(0, 1)], [(0, 16)], [(0, 7)], [(0, 5), (0, 60), (0, 25)], [(0, 70), (0, 20)],
        [(40, 90)], [(3, 60), (0, 5), (77, 1)], [(90, 96)], [(200, 1), (131, 2), (0, 80)], [(0, 200)], [(0, 129)],
        [(0, 180)], [(60, 250)], [(0, 260)], [(100, 300)], [(0, 500)], [(300, 12)], [(301, 3), (4, 5)], [(310, 16)],
        [(20, 1), (0, 70)], [(20, 1), (33, 1), (0, 60), (0, 8)], [(9, 1)] * 8 + [(0, 80)], [(17, 1)] * 9 + [(40, 50)],
        [(5, 1)] * 12 + [(48, 60)],
    ]  # fmt: skip
    captured = 0
    with torch.inference_mode():
        for seed, parts in enumerate(cases):
            ids, positions, spans = batch(parts, seed)
            blocks = torch.randperm(400, generator=torch.Generator().manual_seed(seed)).tolist()
            tables, at = [], 0
            for start, count in parts:
                need = -(-(start + count) // 4)
                first = max(0, start - 23) // 4  # the oldest key its first query sees through a window of 24
                sliding = [-1] * first + blocks[at + first : at + need]
                tables.append(Tables(blocks[at : at + need], sliding, first))
                at += need
            for cache in caches[1:]:
                cache.full_storage.copy_(caches[0].full_storage)
                cache.sliding_storage.copy_(caches[0].sliding_storage)
            with torch.cuda.stream(graphs._shared.stream):
                torch.full((512, 512), torch.nan, device=CUDA)  # poison what is allocated there next
            got = graphs.hidden(ids, positions, spans, tables)
            kv = PagedKeyValues(model.config, caches[1], tables, spans)
            want = model(torch.tensor(ids, device=CUDA), torch.tensor(positions, device=CUDA), kv)
            assert got is not None
            assert got.shape == want.shape
            kv = PagedKeyValues(plain.config, caches[2], tables, spans)
            other = plain(torch.tensor(ids, device=CUDA), torch.tensor(positions, device=CUDA), kv)
            assert relative_error(got, other.double()) < 0.03, parts
            # cuBLAS chooses its kernel by the number of rows; ours give the same sums for all rows of a size.
            # Decode attention splits the keys by the number of sequences, which a graph rounds up.
            exact = weights != "bf16" and 8 < len(ids) <= 384 and not (parts[0][1] == 1 and len(parts) > 1)
            assert relative_error(got, want.double()) <= (0 if exact else 0.01), parts
            for ours, theirs in (
                (caches[0].full_storage, caches[1].full_storage),
                (caches[0].sliding_storage, caches[1].sliding_storage),
            ):
                assert relative_error(ours, theirs.double()) <= (0 if exact else 0.01), parts
            captured = sum(graph._graph is not None for graph in graphs._sizes.values())
    assert captured >= 5


def test_what_does_not_fit_a_graph_is_left_to_launches() -> None:
    model = network("bf16", bound=True)
    graphs = PrefillGraphs(model, PagedCache(model.config, CacheShape(4, 400, 400), torch.bfloat16, CUDA), CUDA)
    for parts in ([(0, SIZES[-1] + 1)], [(0, 2)] * MOST_SEQUENCES, [(8200, 3)]):
        assert graphs.hidden(*batch(parts, 1), [Tables()] * len(parts)) is None
    assert not graphs._sizes


def test_without_memory_for_a_capture_prompts_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("bf16", bound=True)
    graphs = PrefillGraphs(model, PagedCache(model.config, CacheShape(4, 400, 400), torch.bfloat16, CUDA), CUDA)
    ids, positions, spans = batch([(0, 40)], 1)
    tables = [Tables(list(range(10)), list(range(10)))]
    pool = graphs._shared.pool
    with torch.inference_mode():
        first = graphs.hidden(ids, positions, spans, tables)
        assert first is not None
        first = first.clone()

        def fail(self: object, *args: object, **how: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", fail)
        with pytest.warns(UserWarning, match="no memory for a CUDA graph"):
            second = graphs.hidden(ids, positions, spans, tables)
        monkeypatch.undo()
        third = graphs.hidden(ids, positions, spans, tables)
        assert torch.cuda.current_stream(CUDA) == torch.cuda.default_stream(CUDA)
    assert graphs._shared.pool != pool
    for again in (second, third):
        assert again is not None
        assert torch.equal(again, first)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_an_engine_with_graphs_writes_the_text_of_one_without(weights: str) -> None:
    """Chats that go on from cached beginnings, prompts in chunks beside decoding, log-probabilities of prompts."""
    model = network(weights, bound=True)
    engine, twin = (
        Engine(model, CUDA, EngineConfig(max_batch_tokens=64, block_size=4, max_context=256)) for _ in range(2)
    )
    assert engine.runner.prefill_refusal is None
    twin.runner.prefill_refusal = "compared with"
    generator = torch.Generator().manual_seed(6)
    prompts = [tuple(torch.randint(0, 1000, (n,), generator=generator).tolist()) for n in (20, 45, 100, 30, 31)]
    results: list[list[Any]] = []
    for it in (engine, twin):
        found: list[Any] = []
        for _, (one, other) in itertools.product(range(2), itertools.combinations(prompts, 2)):
            params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
            sequences = [it.submit(Request(prompt_ids=prompt, params=params)) for prompt in (one, other, one + other)]
            scored = it.submit(
                Request(prompt_ids=other, params=SamplingParams(max_new_tokens=0), prompt_logprobs_from=1)
            )
            while it.has_work:
                it.step()
            found.append([s.tokens for s in sequences])
            found.append(torch.tensor([score.logprob for score in scored.prompt_scores]))
        results.append(found)
    same, plain = 0, network(weights, bound=False)
    for ours, theirs in zip(*results, strict=True):
        if isinstance(ours, torch.Tensor):
            assert (ours - theirs).abs().max() < 0.1
            continue
        same += ours == theirs
        for one, other in zip(ours, theirs, strict=True):
            place = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
            if place is not None:  # a tie, as near as rounding can bring the plain network's logits of the two
                logits = dense_logits(plain, torch.tensor(one[:place], device=CUDA))[-1]
                assert (logits[one[place]] - logits[other[place]]).abs() < 0.15, (place, one, other)
    # Of 20. Not all: without graphs the last layer computes the wanted rows only, and another number of rows takes
    # another kernel (bf16: in every layer), which rounds otherwise.
    assert same >= 16
    assert engine.runner._prefills is not None
    assert any(graph._graph is not None for graph in engine.runner._prefills._sizes.values())
