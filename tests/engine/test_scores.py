"""Scores of a prompt's tokens against transformers' log-softmax; what sharing a beginning saves."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.driver import GREEDY, Recording, assert_nothing_held, prompts_of, small_model, twins
from gemcut.config import GemmaConfig
from gemcut.engine import PromptLogprob, SamplingParams
from gemcut.engine.cache import bytes_per_block
from gemcut.engine.logprobs import prompt_scores, scores_of
from gemcut.engine.scheduler import Scheduled
from gemcut.errors import ParameterError
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from support import TINY

NO_TOKENS = SamplingParams(max_new_tokens=0)


def expected_of(reference: Any, ids: list[int]) -> Tensor:
    """fp32 [len(ids), V]: transformers' log-probabilities behind each token."""
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


def assert_scores(found: list[PromptLogprob], reference: Any, ids: list[int], start: int) -> None:
    assert len(found) == len(ids) - start
    logprobs = expected_of(reference, ids)
    for place, score in enumerate(found, start):
        before = logprobs[place - 1]
        assert score.token_id == ids[place]
        assert score.logprob == pytest.approx(before[ids[place]].item(), abs=1e-4)
        assert score.rank == 1 + int((before > before[ids[place]]).sum())
        assert score.greedy_id == int(before.argmax())
        assert score.greedy_logprob == pytest.approx(before.max().item(), abs=1e-4)


class Counting(Recording):
    """Counts the tokens that go through the network, and the rows that go through the head."""

    def __init__(self, model: Any, **sizes: Any) -> None:
        super().__init__(model, **sizes)
        self.tokens = self.heads = 0
        inner = self.runner.run

        def run(batch: list[Scheduled], tables: Any) -> Tensor:
            self.tokens += sum(scheduled.length for scheduled in batch)
            return inner(batch, tables)

        self.runner.run = run  # type: ignore[method-assign]

    def finish(self, limit: int = 100_000) -> Any:
        inner = type(self.model).head

        def head(model: Any, hidden: Tensor) -> Tensor:
            self.heads += len(hidden)
            return inner(model, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.model), "head", head)
            return super().finish(limit)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("chunk", [6, 512])
def test_scores_from_any_place(model_type: str, chunk: int) -> None:
    """With answers behind them and without, in parts and whole, beside others."""
    model, reference = twins(model_type)
    prompts = prompts_of(33, 20, 2, 1, 27, 27, seed=4)
    starts = [1, 19, 1, 1, 14, 27]
    engine = Recording(model, max_batch_tokens=chunk, sequences=4)
    sequences = [
        engine.add(ids, GREEDY if n % 2 else NO_TOKENS, prompt_logprobs_from=start)
        for n, (ids, start) in enumerate(zip(prompts, starts, strict=True))
    ]
    plain = engine.add(prompts[0])
    engine.finish()
    for sequence, ids, start in zip(sequences, prompts, starts, strict=True):
        assert_scores(sequence.prompt_scores, reference, ids, start)
    assert plain.prompt_scores == []
    assert plain.output_length == GREEDY.max_new_tokens
    assert_nothing_held(engine)


def test_continuations_of_one_context_cost_one_prefill_of_it() -> None:
    """Submitted at once. The head is computed for the places that are wanted alone."""
    model, reference = twins()
    (context,) = prompts_of(40, seed=8)
    endings = prompts_of(5, 7, 3, 6, 4, seed=9)
    engine = Counting(model, sequences=6)
    sequences = [engine.add([*context, *end], NO_TOKENS, prompt_logprobs_from=40) for end in endings]
    engine.finish()
    for sequence, end in zip(sequences, endings, strict=True):
        assert_scores(sequence.prompt_scores, reference, [*context, *end], 40)
    wanted = sum(map(len, endings))
    # The token before the first one that is scored is computed for each, and with it the block it is in.
    assert engine.tokens == 40 + wanted + 4 * 4
    assert engine.heads == wanted
    assert [sequence.cached_tokens for sequence in sequences] == [0, 36, 36, 36, 36]


def test_a_shared_beginning_is_not_waited_for_in_vain() -> None:
    """The one who computes it is cancelled: the others go on without it."""
    model, reference = twins()
    (context,) = prompts_of(40, seed=8)
    engine = Counting(model, sequences=6, max_batch_tokens=16)
    first, *others = (engine.add([*context, n], NO_TOKENS, prompt_logprobs_from=40) for n in range(3))
    engine.step()
    assert engine.scheduler.running == [first]
    engine.cancel(first.id)
    engine.finish()
    for sequence in others:
        assert_scores(sequence.prompt_scores, reference, sequence.tokens, 40)
    assert_nothing_held(engine)


def test_little_in_common_is_not_waited_for() -> None:
    engine = Recording(small_model())
    beginning = [5, 6, 7, 8]
    one, other = (engine.add([*beginning, *range(n, n + 20)], GREEDY) for n in (10, 40))
    engine.step()
    assert engine.scheduler.running == [one, other]
    twin, third = (engine.add([*beginning, *beginning, n], GREEDY) for n in (1, 2))
    engine.step()
    assert engine.scheduler.running == [one, other, twin]
    assert list(engine.scheduler.waiting) == [third]
    engine.finish()
    assert third.cached_tokens == 8


def test_those_behind_a_waiting_one_start() -> None:
    engine = Recording(small_model())
    first = engine.add(list(range(30)), GREEDY)
    follower = engine.add([*range(29), 60], GREEDY)
    stranger = engine.add([50, 51, 52], GREEDY)
    engine.step()
    assert engine.scheduler.running == [first, stranger]
    engine.step()
    assert engine.scheduler.running == [first, stranger, follower]
    assert follower.cached_tokens == 28
    engine.finish()
    alone = Recording(small_model())
    assert alone.answers([[*range(29), 60]], GREEDY) == [follower.output_ids]


def test_scores_outlive_a_preemption() -> None:
    """What was computed is kept, and nothing is scored twice."""
    model, reference = twins()
    prompts = prompts_of(24, 24, 24, seed=6)
    memory = 20 * sum(bytes_per_block(model.config, model.dtype, 4))
    engine = Counting(model, kv_memory=memory, max_context=56, max_batch_tokens=8)
    new = SamplingParams(temperature=0, max_new_tokens=25)
    sequences = [engine.add(ids, new, prompt_logprobs_from=5) for ids in prompts]
    engine.finish()
    assert engine.scheduler.preemptions > 0
    for sequence, ids in zip(sequences, prompts, strict=True):
        assert_scores(sequence.prompt_scores, reference, ids, 5)
    assert engine.heads == 3 * (24 - 5) + 3 * 25


@pytest.mark.parametrize("place", [0, -1, 4, True, 1.0, "1"])
def test_a_place_that_is_none(place: Any) -> None:
    engine = Recording(small_model())
    with pytest.raises(ParameterError, match=f"prompt_logprobs_from is {place!r}; expected a place from 1"):
        engine.add([1, 2, 3], prompt_logprobs_from=place)
    end = engine.add([1, 2, 3], NO_TOKENS, prompt_logprobs_from=3)
    engine.finish()
    assert end.prompt_scores == []


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (7, 1000), (3, 300_001)])
def test_scores_of_rows_by_float64(rows: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocabulary, generator=generator) * 6
    chance = random.Random(3)
    tokens = [chance.randrange(vocabulary) for _ in range(rows)]
    tokens[0] = int(logits[0].argmax())
    logits[-1, :2] = logits[-1, tokens[-1]]  # as likely is no likelier
    exact = logits.double().log_softmax(-1)
    for row, token, (logprob, greedy, rank, best) in zip(
        exact, tokens, scores_of(logits, tokens).tolist(), strict=True
    ):
        assert logprob == pytest.approx(row[token].item(), abs=2e-5)
        assert greedy == pytest.approx(row.max().item(), abs=2e-5)
        assert rank == 1 + int((row > row[token]).sum())
        assert row[int(best)] == row.max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_row_of_numbers_has_no_score(value: float) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    sound = scores_of(logits, [4, 5, 6])
    logits[1, 77] = value
    found = scores_of(logits, [4, 5, 6])
    assert torch.equal(found[[0, 2]], sound[[0, 2]])
    assert not found[1, 0].isfinite()


@pytest.mark.parametrize("sizes", [{}, {"dtype": torch.bfloat16}, {"rows": 1}, {"vocabulary": 24_577}], ids=str)
@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_a_large_vocabulary_in_tiles(sizes: dict[str, Any], kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 of the head's own logits: with a soft-cap, several rows, an odd end, and equal logits."""
    sizes = {"dtype": torch.float32, "rows": 70, "vocabulary": 20_000, **sizes}
    values = {**TINY, "model_type": "gemma2", "vocab_size": sizes["vocabulary"], "num_hidden_layers": 1}
    model = Model(GemmaConfig.from_dict({**values, "final_logit_softcapping": 30.0}), dtype=sizes["dtype"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + name.endswith("scale"))
    model.embed.weight.data[9000] = model.embed.weight.data[17]  # two tokens that are always alike
    bind_kernels(model, torch.device("cpu"), kernels)
    hidden = torch.randn(sizes["rows"], 48, generator=generator)
    tokens = torch.randint(sizes["vocabulary"], (sizes["rows"],), generator=generator).tolist()
    tokens[0] = 9000
    asked: list[int] = []
    head = Model.head
    monkeypatch.setattr(Model, "head", lambda model, rows: (asked.append(len(rows)), head(model, rows))[1])
    with torch.inference_mode():
        found = prompt_scores(model, hidden, tokens)
        assert len(asked) <= 2  # else it was done row by row
        exact = head(model, hidden).double()
    for row, token, score in zip(exact, tokens, found, strict=True):
        assert score is not None
        logprobs = row.log_softmax(-1)
        assert score.token_id == token
        assert score.logprob == pytest.approx(logprobs[token].item(), abs=2e-5)
        assert score.greedy_logprob == pytest.approx(logprobs.max().item(), abs=2e-5)
        # A product with other columns beside it may round the last bit of a logit in another way.
        near = 1e-6 * row.abs().max()
        assert int((row > row[token] + near).sum()) < score.rank <= 1 + int((row > row[token] - near).sum())
        assert row[score.greedy_id] >= row.max() - near
    hidden[0, 3] = torch.nan
    spoilt = prompt_scores(model, hidden, tokens)
    assert spoilt[0] is None
    assert None not in spoilt[1:]
    model.embed.weight.data[12_345] = torch.inf
    bind_kernels(model, torch.device("cpu"), kernels)
    assert set(prompt_scores(model, hidden, tokens)) == {None}
