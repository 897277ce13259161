"""``generate`` beside transformers' on the same weights in fp32: token for token where nothing is drawn."""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers

from gemcut import hf
from gemcut.errors import ContextLengthError, ParameterError, UnsupportedError

PROMPTS = ["Write me a poem about Machine Learning.", "The", "日本語 and\n\nmore of it, " * 2]


@pytest.fixture
def one(tokenizer: Any) -> Any:
    return tokenizer(PROMPTS[0], return_tensors="pt")


@pytest.fixture
def batch(tokenizer: Any) -> Any:
    return tokenizer(PROMPTS, padding=True, return_tensors="pt")


def agree(model: Any, reference: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """Both models' sequences, which must be equal; the sequences."""
    ours = model.generate(**inputs, **options)
    theirs = reference.generate(**inputs, **{"do_sample": False, **options})
    assert ours.dtype == torch.int64
    assert ours.tolist() == theirs.tolist()
    return ours


# ---- greedy ------------------------------------------------------------------------------------------------------


def test_greedy_past_the_window(model: Any, reference: Any, one: Any) -> None:
    out = agree(model, reference, one, max_new_tokens=40)
    assert len(set(out[0, -40:].tolist())) > 10  # a text that repeats one token would prove little


def test_left_padded_batch(model: Any, reference: Any, batch: Any) -> None:
    assert (batch.attention_mask == 0).any()
    out = agree(model, reference, batch, max_new_tokens=20)
    for i, prompt in enumerate(batch.input_ids):
        alone = prompt[batch.attention_mask[i] == 1][None]
        assert model.generate(alone, max_new_tokens=20)[0, -20:].tolist() == out[i, -20:].tolist()


def test_padding_is_recognised_without_a_mask(model: Any, reference: Any, batch: Any) -> None:
    assert torch.equal(
        model.generate(batch.input_ids, max_new_tokens=8),
        reference.generate(**batch, max_new_tokens=8, do_sample=False),
    )


def test_right_padding_continues_the_text_itself(model: Any, tokenizer: Any, batch: Any) -> None:
    right = tokenizer(PROMPTS, padding=True, padding_side="right", return_tensors="pt")
    expected = model.generate(**batch, max_new_tokens=8)
    out = model.generate(**right, max_new_tokens=8)
    assert torch.equal(out[:, -8:], expected[:, -8:])
    assert torch.equal(out[:, :-8], right.input_ids)


def test_ways_to_hand_in_the_prompt(model: Any, tokenizer: Any, one: Any) -> None:
    expected = model.generate(**one, max_new_tokens=4)
    config = hf.GenerationConfig(max_new_tokens=4)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", max_length=None)
    for out in (
        model.generate(one, max_new_tokens=4),
        model.generate(one.input_ids, max_new_tokens=4),
        model.generate(input_ids=one.input_ids, generation_config=config),
        model.generate(one.input_ids, config),
        model.generate(one.input_ids.tolist(), max_new_tokens=4),
        model.generate(inputs=one.input_ids.int(), attention_mask=one.attention_mask.bool(), max_new_tokens=4),
    ):
        assert torch.equal(out, expected)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=False)
    assert torch.equal(model.generate(chat, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    assert torch.equal(model.generate(**chat, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    assert model.generate(max_new_tokens=4)[0, 0] == 2  # nothing at all: from <bos>


@pytest.mark.slow
def test_eos_ends_each_row_and_padding_fills_it(model: Any, reference: Any, batch: Any) -> None:
    free = model.generate(**batch, max_new_tokens=20)[:, -20:]
    ends = [int(free[0, 3]), int(free[2, 7])]
    out = agree(model, reference, batch, max_new_tokens=20, eos_token_id=ends)
    assert (out[0, -1], out[0, -10]) == (0, 0)
    out = agree(model, reference, batch, max_new_tokens=20, eos_token_id=ends[0], pad_token_id=5)
    assert out[0, -1] == 5
    agree(model, reference, batch, max_new_tokens=20, eos_token_id=ends, min_new_tokens=10)
    width = batch.input_ids.shape[1]
    agree(model, reference, batch, max_length=width + 20, eos_token_id=ends, min_length=width + 6)


def test_end_of_turn_ends_an_answer_by_default(model: Any) -> None:
    assert model.generation_config.eos_token_id == [1, 107]


@pytest.mark.slow
def test_stop_strings(model: Any, reference: Any, one: Any, tokenizer: Any, reference_tokenizer: Any) -> None:
    free = model.generate(**one, max_new_tokens=20)[0, one.input_ids.shape[1] :].tolist()
    left, right = (tokenizer.decode([token]) for token in free[5:7])
    stop = left[-1] + right[:2]  # across two tokens
    assert stop in tokenizer.decode(free)
    ours = model.generate(**one, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    theirs = reference.generate(
        **one, max_new_tokens=20, stop_strings=[stop], tokenizer=reference_tokenizer, do_sample=False
    )
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] == one.input_ids.shape[1] + 7
    assert torch.equal(model.generate(**one, max_new_tokens=20, stop_strings=stop), ours)


def test_penalty_and_suppression(model: Any, reference: Any, one: Any) -> None:
    plain = agree(model, reference, one, max_new_tokens=20)
    changed = agree(model, reference, one, max_new_tokens=20, repetition_penalty=0.2)
    assert not torch.equal(changed, plain)
    agree(model, reference, one, max_new_tokens=20, repetition_penalty=3.0)
    suppressed = [int(plain[0, -20]), int(plain[0, -10])]
    out = agree(model, reference, one, max_new_tokens=20, suppress_tokens=suppressed)
    assert not set(out[0, -20:].tolist()) & set(suppressed)


# ---- length ------------------------------------------------------------------------------------------------------


def test_lengths(model: Any, one: Any, batch: Any) -> None:
    width = one.input_ids.shape[1]
    assert model.generate(one).shape[1] == 64  # all the room there is
    assert model.generate(one, max_length=width + 3).shape[1] == width + 3
    with pytest.warns(UserWarning, match="max_new_tokens counts"):
        assert model.generate(one, max_length=60, max_new_tokens=2).shape[1] == width + 2
    with pytest.raises(ParameterError, match=f"max_length is {width} but the prompt alone has {width}"):
        model.generate(one, max_length=width)
    with pytest.raises(ContextLengthError, match="64"):
        model.generate(one, max_new_tokens=64)
    with pytest.raises(ContextLengthError, match="shorten the prompt"):
        model.generate(torch.full((1, 64), 5))


def test_max_time(model: Any, one: Any) -> None:
    width = one.input_ids.shape[1]
    assert model.generate(one, max_time=1e-9, max_new_tokens=20).shape[1] == width + 1
    assert model.generate(one, max_time=600.0, max_new_tokens=20).shape[1] == width + 20
    assert not model.gemma.engine.has_work


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_sampling_follows_torch_seed(model: Any, batch: Any) -> None:
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 4, "max_new_tokens": 6}
    torch.manual_seed(3)
    first, second = model.generate(**batch, **options), model.generate(**batch, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**batch, **options), first)
    assert not torch.equal(first, second)
    assert first.shape == (12, batch.input_ids.shape[1] + 6)
    for i in range(3):
        group = first[4 * i : 4 * i + 4]
        assert (group[:, :-6] == batch.input_ids[i]).all()
        assert len({tuple(row) for row in group[:, -6:].tolist()}) > 1
    assert torch.equal(model.generate(**batch, seed=5, **options), model.generate(**batch, seed=5, **options))


@pytest.mark.slow
def test_sampled_first_tokens_have_the_distribution_transformers_would_draw_from(
    model: Any, reference: Any, one: Any
) -> None:
    options = {"do_sample": True, "top_k": 8, "temperature": 0.05, "max_new_tokens": 1}
    draws = 1000
    tokens = model.generate(**one, num_return_sequences=draws, seed=0, **options)[:, -1]
    scores = reference.generate(**one, output_scores=True, return_dict_in_generate=True, **options).scores[0][0]
    expected = scores.softmax(-1)
    assert expected[tokens].min() > 0
    likely = expected.topk(8)
    assert likely.values[0] < 0.9  # or the test would see one token alone
    for token, p in zip(likely.indices, likely.values, strict=True):
        share = (tokens == token).float().mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1e-3


@pytest.mark.slow
def test_top_k_is_50_as_in_transformers(model: Any, reference: Any, one: Any) -> None:
    tokens = model.generate(**one, do_sample=True, temperature=50.0, num_return_sequences=400, seed=1, max_new_tokens=1)
    best = set(reference(**one).logits[0, -1].topk(50).indices.tolist())
    drawn = set(tokens[:, -1].tolist())
    assert drawn <= best
    assert len(drawn) > 40
    tokens = model.generate(
        **one, do_sample=True, top_k=0, temperature=50.0, num_return_sequences=100, seed=1, max_new_tokens=1
    )
    assert len(set(tokens[:, -1].tolist()) - best) > 50


# ---- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7, "suppress_tokens": [7]},
        {"renormalize_logits": True},
        {"min_new_tokens": 3, "eos_token_id": [1, 9]},
    ],
    ids=str,
)
def test_logits_and_scores(options: dict[str, Any], model: Any, reference: Any, batch: Any) -> None:
    asked = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 5}
    rows = {"input_ids": batch.input_ids[:1, -8:], "attention_mask": batch.attention_mask[:1, -8:]}
    ours = model.generate(**rows, **asked, **options)
    theirs = reference.generate(**rows, do_sample=False, **asked, **options)
    assert isinstance(ours, hf.model.GenerateOutput)
    assert torch.equal(ours["sequences"], theirs.sequences)
    assert ours.keys() == ["sequences", "scores", "logits"]
    assert ours.past_key_values is None
    for name in ("logits", "scores"):
        assert len(ours[name]) == len(theirs[name]) == 5
        for left, right in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(left.isinf(), right.isinf())
            torch.testing.assert_close(left, right, atol=1e-4, rtol=0)


def test_scores_of_sampling_are_what_was_drawn_from(model: Any, reference: Any, one: Any) -> None:
    options = {"do_sample": True, "temperature": 0.1, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "max_new_tokens": 1}
    asked = {"output_scores": True, "return_dict_in_generate": True}
    ours, theirs = model.generate(**one, **asked, **options), reference.generate(**one, **asked, **options)
    torch.testing.assert_close(ours.scores[0], theirs.scores[0], atol=1e-4, rtol=1e-4)
    assert ours.scores[0].isfinite().sum() > 1
    assert list(ours) == ["sequences", "scores"]


def test_scores_without_a_dict_warn(model: Any, one: Any) -> None:
    with pytest.warns(UserWarning, match="output_scores has no effect without return_dict_in_generate"):
        assert isinstance(model.generate(one, max_new_tokens=1, output_scores=True), torch.Tensor)


def test_threads_do_not_mix(model: Any, batch: Any) -> None:
    expected = [model.generate(batch.input_ids[i : i + 1], max_new_tokens=12) for i in range(3)]
    got: list[Any] = [None] * 3

    def work(i: int) -> None:
        got[i] = model.generate(batch.input_ids[i : i + 1], max_new_tokens=12)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---- warnings and refusals ---------------------------------------------------------------------------------------


def test_sampling_options_without_sampling_warn_once_and_change_nothing(model: Any, one: Any) -> None:
    expected = model.generate(one, max_new_tokens=4)
    with pytest.warns(UserWarning, match="temperature, top_p have no effect without do_sample=True") as seen:
        assert torch.equal(model.generate(one, max_new_tokens=4, temperature=0.7, top_p=0.9), expected)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(one, max_new_tokens=4, temperature=0.7, top_p=0.9)
        model.generate(one, max_new_tokens=4, temperature=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_p": 2.0, "do_sample": True}, "top_p is 2"),
        ({"top_k": -1, "do_sample": True}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_length": -4}, "max_length is -4"),
        ({"min_new_tokens": 5, "max_new_tokens": 2}, "min_new_tokens is 5"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"eos_token_id": 256000}, "eos_token_id is 256000"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"stop_strings": [""]}, "stop"),
        ({"max_time": 0}, "max_time is 0"),
        ({"max_new_token": 5}, "no argument 'max_new_token'"),
        ({"generation_config": 3}, "generation_config is of type int"),
        ({"input_ids": [[2]]}, "both inputs and input_ids"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \[1, 2\]"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str, model: Any, one: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(one.input_ids, **options)
    assert "\n" not in str(caught.value)
    assert not model.gemma.engine.has_work


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 0).long(), None, "at least one token"),
        (torch.tensor([2, 5]), None, "expected int64"),
        (torch.tensor([[2.0]]), None, "expected int64"),
        (torch.tensor([[2, 256000]]), None, "token id 256000"),
        (torch.tensor([[2, -1]]), None, "token id -1"),
        (torch.tensor([[2, 5, 6]]), torch.tensor([[1, 0, 1]]), "has a gap"),
        (torch.tensor([[2, 5]]), torch.tensor([[0, 0]]), "row 0 of input_ids is all padding"),
        (torch.tensor([[0, 0]]), None, "all padding"),
        ("text", None, "is of type str"),
        ({"ids": 3}, None, "expected input_ids"),
    ],
)
def test_bad_inputs(ids: Any, mask: Any, message: str, model: Any) -> None:
    with pytest.raises(ParameterError, match=message):
        model.generate(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_processor", [lambda ids, scores: scores]),
        ("stopping_criteria", [lambda ids, scores: True]),
        ("prefix_allowed_tokens_fn", lambda batch, ids: [1]),
        ("assistant_model", object()),
        ("negative_prompt_ids", torch.tensor([[2]])),
        ("custom_generate", "some/repo"),
        ("past_key_values", object()),
        ("inputs_embeds", torch.zeros(1, 2, 3)),
    ],
)
def test_refused_arguments_name_themselves(name: str, value: Any, model: Any, one: Any) -> None:
    with pytest.raises(UnsupportedError, match=name):
        model.generate(one, **{name: value})


def test_a_transformers_config_works(model: Any, reference: Any, one: Any) -> None:
    config = transformers.GenerationConfig(max_new_tokens=7, repetition_penalty=0.5)
    assert torch.equal(
        model.generate(**one, generation_config=config), reference.generate(**one, generation_config=config)
    )
