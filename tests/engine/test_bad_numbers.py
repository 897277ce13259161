"""NaN and infinity: the request that meets them ends with a reason, and no neighbour is changed by a bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.driver import CPU, twins
from gemcut.config import GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from gemcut.engine.diagnosis import explain_bad_logits
from gemcut.engine.request import RowError, Sequence
from gemcut.engine.sampler import sample
from gemcut.model import Model, attention
from gemcut.model.attention import AttentionSpec, attend, attend_decode
from gemcut.model.bind import bind_kernels

BAD, SOUND = 7, 8  # token ids: the first one's vector is NaN
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = [(dtype, "plain") for dtype in DTYPES] + [(torch.bfloat16, "auto"), (torch.float32, "auto")]


@contextmanager
def nan_vector(model: Model) -> Iterator[None]:
    """While it lasts, token ``BAD`` enters the network as NaN; the head keeps its row."""
    hook = model.embed.register_forward_hook(
        lambda module, args, out: out.masked_fill((args[0] == BAD)[:, None], torch.nan)
    )
    try:
        yield
    finally:
        hook.remove()


def network(dtype: torch.dtype, kernels: str, model_type: str = "gemma2") -> Model:
    model, _ = twins(model_type, dtype)
    bind_kernels(model, CPU, kernels)
    return model


class Desk:
    """An engine and what came of its requests."""

    def __init__(self, model: Model, **sizes: Any) -> None:
        self.engine = Engine(model, CPU, EngineConfig(**{"block_size": 4, "max_context": 96, **sizes}))
        self.events: dict[int, list[TokenEvent]] = {}

    def submit(self, prompt: list[int], new: int = 8, *, bias: dict[int, float] | None = None, **more: Any) -> Sequence:
        params = SamplingParams(temperature=0, max_new_tokens=new, logprobs=5 if new else None, logit_bias=bias or {})
        return self.engine.submit(Request(prompt_ids=tuple(prompt), params=params, **more))

    def run(self) -> None:
        while self.engine.has_work:
            for event in self.engine.step():
                self.events.setdefault(event.request_id, []).append(event)

    def said(self, sequence: Sequence) -> list[Any]:
        return [(event.token_id, event.logprob, event.finish_reason) for event in self.events[sequence.id]]


def prompt(seed: int, length: int) -> list[int]:
    ids = torch.randint(20, 320, (length,), generator=torch.Generator().manual_seed(seed))
    return [2, *ids.tolist()]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(("dtype", "kernels"), PATHS, ids=str)
def test_a_neighbour_in_the_same_steps_is_not_changed(dtype: torch.dtype, kernels: str, model_type: str) -> None:
    """Prompts side by side, then decode steps with padded blocks: the same as beside a sound request."""
    model = network(dtype, kernels, model_type)
    found = []
    for token in (SOUND, BAD):
        desk = Desk(model)
        with nan_vector(model):
            # As many rows in every step, whatever becomes of the others: the third meets the token while it is decoded.
            others = [desk.submit([*prompt(1, 21), token], 1), desk.submit([token, *prompt(2, 3)], 1)]
            others.append(desk.submit(prompt(5, 4), 2, bias={token: 1e9}))
            # (None begins as another does, whose blocks it would take over only where they are sound.)
            neighbours = [desk.submit(prompt(10 + seed, 1 + 6 * seed)) for seed in range(4)]
            desk.run()
        found.append([desk.said(neighbour) for neighbour in neighbours])
        ends = [desk.events[other.id][-1] for other in others]
        assert {end.finish_reason for end in ends} == ({"length"} if token == SOUND else {"error"})
        for end in ends:
            assert token == SOUND or "hold NaN or infinity" in str(end.error)
    assert found[0] == found[1]


@pytest.mark.parametrize(("dtype", "kernels"), PATHS, ids=str)
def test_blocks_that_held_nan_are_used_again(dtype: torch.dtype, kernels: str) -> None:
    """A cache that is filled with NaN gives every later request what a fresh one gives: bit for bit."""
    model = network(dtype, kernels)
    fresh, used = Desk(model), Desk(model)
    for group in (used.engine.cache.full_storage, used.engine.cache.sliding_storage):
        group.fill_(torch.nan)
    lengths = [1, 3, 4, 9, 17, 30]
    ones, others = ([desk.submit(prompt(n, n)) for n in lengths] for desk in (fresh, used))
    fresh.run()
    used.run()
    for one, other in zip(ones, others, strict=True):
        assert fresh.said(one) == used.said(other)
        assert all(math.isfinite(event[1].logprob) for event in used.said(other))


def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over a prompt as a GPU's kernels compute it: a tile's rows get NaN from keys that they do not see."""
    careful = attention._never_through_masks

    def careless(product: Any, device: torch.device) -> Tensor:
        return product(False) if isinstance(product, partial) else careful(product, device)  # ``attend`` hands partials

    monkeypatch.setattr(attention, "_never_through_masks", careless)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(("dtype", "kernels"), PATHS, ids=str)
def test_a_beginning_shared_with_nan_stays_sound(
    dtype: torch.dtype, kernels: str, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others take from the cache is theirs: parts of a prompt before the one with the NaN, and nothing else."""
    if tiles:
        in_tiles(monkeypatch)
    model = network(dtype, kernels)
    start, rest, found = prompt(3, 23), prompt(4, 6), []
    for token in (SOUND, BAD):
        desk = Desk(model, max_batch_tokens=12)
        with nan_vector(model):
            first = desk.submit([*start, token, *rest, *rest, *rest])
            desk.run()
            second = desk.submit([*start, *rest])
            desk.run()
        assert first.output_length == (8 if token == SOUND else 0)
        assert second.cached_tokens == 24
        found.append(desk.said(second))
    assert found[0] == found[1]
    whole, fresh = Desk(model), Desk(model)  # the prompt in one part
    with nan_vector(model):
        whole.submit([*start, BAD, *rest])
        whole.run()
        second, alone = (desk.submit([*start, *rest]) for desk in (whole, fresh))
        whole.run()
        fresh.run()
    assert second.cached_tokens == 0
    assert whole.said(second) == fresh.said(alone)


def test_a_prompt_in_parts_ends_at_the_part_that_is_no_numbers() -> None:
    """The other sequence of the steps goes on."""
    model = network(torch.float32, "plain")
    desk = Desk(model, max_batch_tokens=12)
    with nan_vector(model):
        first = desk.submit([*prompt(3, 10), BAD, *prompt(4, 40)])
        second = desk.submit(prompt(5, 3))
        desk.engine.step()
        events = desk.engine.step() if not first.finished else first.events
        assert [event.finish_reason for event in events if event.request_id == first.id] == ["error"]
        assert "hold NaN or infinity" in str(first.events[-1].error)
        desk.run()
    assert second.output_length == 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_attention_sees_nothing_through_its_mask(dtype: torch.dtype, odd: float) -> None:
    """Against one query at a time with the keys it sees alone, in float64."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(9, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    keys[5], values[5] = odd, odd
    spec = AttentionSpec(softcap=5.0, window=3)
    found = attend(query, keys, values, 0, spec)
    for i in range(9):
        seen = slice(max(0, i - 2), i + 1)
        expected = _by_hand(query[i], keys[seen], values[seen])
        if 5 in range(9)[seen]:
            assert found[i].isnan().all()
        else:
            assert torch.allclose(found[i].double(), expected, atol={4: 1e-5, 2: 0.05}[dtype.itemsize])
    batch = torch.stack([keys, keys.flip(0)]), torch.stack([values, values.flip(0)])
    decoded = attend_decode(query[:2], *batch, torch.tensor([5, 3]), AttentionSpec(5.0, None))
    for row, (length, k, v) in enumerate(zip((5, 3), *batch, strict=True)):
        expected = _by_hand(query[row], k[:length], v[:length])
        assert torch.allclose(decoded[row].double(), expected, atol={4: 1e-5, 2: 0.05}[dtype.itemsize])


def _by_hand(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[heads, 8] of one query, soft-capped at 5; two query heads share a key head."""
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
    scores = 5 * torch.tanh(torch.einsum("hd,lhd->hl", query.double(), k) / 5)
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), v)


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"seed": 1}, {"top_k": 5, "seed": 2}, {"top_p": 0.5, "seed": 3}]
)
@pytest.mark.parametrize(
    ("value", "whole"),
    [(math.nan, False), (math.inf, False), (-math.inf, False), (-math.inf, True)],
    ids=["nan", "inf", "-inf", "all -inf"],
)
@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.2, "logit_bias": {3: 2.0}}])
def test_a_row_that_is_no_row_of_numbers_has_no_token(params: Any, value: float, whole: bool, changes: Any) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    how = SamplingParams(**params, **changes, logprobs=2)
    sequences = [Sequence(Request(prompt_ids=(1, 2, i), params=how)) for i in range(3)]
    asked: list[int] = []
    sound, logprobs = sample(logits, sequences, lambda: asked.append(1) or "")
    assert not asked
    logits[1, slice(None) if value == -math.inf and whole else 7] = value
    found, others = sample(logits, sequences, lambda: "why")
    assert found == [sound[0], RowError("why"), sound[2]]
    assert [others[0], others[2]] == [logprobs[0], logprobs[2]]
    assert others[1] is None


# ---- who is to blame -------------------------------------------------------------------------------------------------


def _fresh(dtype: torch.dtype = torch.float32) -> Model:
    model, _ = twins("gemma2", dtype)
    copy = Model(GemmaConfig.from_dict(model.config.to_dict()), dtype=dtype)
    copy.load_state_dict(model.state_dict())
    return copy


INNER = ["layers.2.attention.qkv_proj.weight", "layers.1.mlp.down_proj.weight", "layers.3.input_norm.scale"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embed.weight", "norm.scale", *INNER])
def test_the_tensor_is_named(name: str, value: float) -> None:
    """Also where the soft-cap would make a number of the head's infinity."""
    model = _fresh()
    model.get_parameter(name).data.view(-1)[5] = value
    desk = Desk(model)
    asked, scored = desk.submit(prompt(1, 5)), desk.submit(prompt(2, 5), 0, prompt_logprobs_from=1)
    desk.run()
    for sequence in (asked, scored):
        (event,) = desk.events[sequence.id]
        assert (event.token_id, event.finish_reason) == (None, "error")
        assert f"tensor {name} does" in str(event.error)


@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_beyond_fp32_are_told_and_not_capped(sign: float, kernels: str) -> None:
    """A token whose logit overflows would be the likeliest for ever, at the soft-cap; or never come."""
    model = _fresh(torch.bfloat16)
    row = model.embed.weight.data[7]
    row.fill_(0)[5] = sign * 3e38
    model.norm.scale.data[5] = 1e6  # times 3e38: infinity, of either sign
    bind_kernels(model, CPU, kernels)
    desk = Desk(model)
    asked, scored = desk.submit(prompt(1, 5)), desk.submit(prompt(2, 5), 0, prompt_logprobs_from=1)
    desk.run()
    for sequence in (asked, scored):
        (event,) = desk.events[sequence.id]
        assert event.finish_reason == "error"
        assert "all weights are finite, so a computation overflowed in bfloat16" in str(event.error)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "dtype bfloat16 or float32"),
        (torch.bfloat16, "dtype float32"),
        (torch.float32, "train them again"),
    ],
    ids=str,
)
def test_finite_weights_are_said_to_be_so(dtype: torch.dtype, advice: str) -> None:
    text = explain_bad_logits(_fresh(dtype))
    assert "all weights are finite" in text
    assert str(dtype).removeprefix("torch.") in text
    assert text.endswith(advice)
    assert "\n" not in text
