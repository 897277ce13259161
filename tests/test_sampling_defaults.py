"""Which value a request samples with when several places name it: given, the checkpoint, built in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from gemcut import Gemma, hf
from gemcut.errors import ParameterError
from gemcut.sampling_defaults import checkpoint_level, checkpoint_words, left_out, resolve_sampling

GREEDY = "greedy"
# Every id that text, config and tokenizer call an end too: gemcut takes the union, transformers this list alone.
ENDS = [1, 107, *range(5, 256_000)]


def draw(*levels: dict[str, Any]) -> float | str:
    """The temperature that levels, from the highest to the lowest, are sampled with; "greedy" where nothing is drawn"""
    params = resolve_sampling([(f"level {i}", v) for i, v in enumerate(levels)], prompt_tokens=3, room=100).params
    return GREEDY if params.greedy else params.temperature


@pytest.mark.parametrize(
    ("given", "checkpoint", "expected"),
    [
        ({}, {}, 1.0),
        ({"temperature": 0}, {}, GREEDY),
        ({"temperature": 0.7}, {}, 0.7),
        ({}, {"temperature": 0.6}, 0.6),
        ({}, {"temperature": 0}, GREEDY),
        ({"temperature": 0.7}, {"temperature": 0.6}, 0.7),
        ({"temperature": 0}, {"temperature": 0.6}, GREEDY),
        ({"temperature": 0.7}, {"temperature": 0}, 0.7),
        # the checkpoint's switch is off
        ({}, {"do_sample": False}, GREEDY),
        ({}, {"do_sample": False, "temperature": 0.6, "top_k": 64}, GREEDY),
        ({"temperature": 0.7}, {"do_sample": False, "temperature": 0.6}, 0.7),
        ({"temperature": 0}, {"do_sample": False, "temperature": 0.6}, GREEDY),
        ({"top_k": 40}, {"do_sample": False, "temperature": 0.6}, 0.6),
        ({"top_p": 0.9}, {"do_sample": False}, 1.0),
        ({"min_p": 0.1}, {"do_sample": False}, 1.0),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {"do_sample": False}, GREEDY),  # narrow nothing, ask for nothing
        ({"repetition_penalty": 1.2, "seed": 4}, {"do_sample": False}, GREEDY),
        # the checkpoint's switch is on
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.6}, 0.6),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.6}, GREEDY),
        ({"temperature": 0.2}, {"do_sample": True, "temperature": 0.6}, 0.2),
        ({"temperature": 0.2}, {"do_sample": True, "temperature": 0}, 0.2),
        # the caller's switch
        ({"do_sample": False}, {"temperature": 0.6, "do_sample": True}, GREEDY),
        ({"do_sample": False, "temperature": 0.3}, {}, GREEDY),
        ({"do_sample": True}, {"do_sample": False}, 1.0),
        ({"do_sample": True}, {"do_sample": False, "temperature": 0.6}, 0.6),
        ({"do_sample": True}, {"temperature": 0}, 1.0),
        ({"do_sample": True, "temperature": 0.4}, {"do_sample": False}, 0.4),
        # None is the same as not there
        ({"temperature": None, "do_sample": None}, {"temperature": 0.6}, 0.6),
        ({}, {"temperature": None, "do_sample": None}, 1.0),
    ],
)
def test_the_last_word_about_a_draw(given: dict[str, Any], checkpoint: dict[str, Any], expected: float | str) -> None:
    assert draw(given, checkpoint) == expected
    assert draw(given, {}, checkpoint) == expected  # an empty level in between changes nothing
    assert draw({}, given, checkpoint) == expected


def test_levels_in_between() -> None:
    assert draw({}, {"temperature": 0.3}, {"do_sample": False}) == 0.3
    assert draw({"do_sample": True}, {"temperature": 0}, {"temperature": 0.6}) == 0.6
    assert draw({"do_sample": False}, {"temperature": 0.3}, {"do_sample": True}) == GREEDY
    assert draw({"temperature": 0.3}, {"do_sample": False}, {"do_sample": True}) == 0.3


@pytest.mark.parametrize(
    ("given", "checkpoint", "message"),
    [
        ({"do_sample": True, "temperature": 0}, {}, "^do_sample=True contradicts temperature=0"),
        ({}, {"do_sample": True, "temperature": 0}, "^checkpoint: do_sample=True contradicts"),
        ({}, {"temperature": "hot"}, "^checkpoint: temperature is 'hot'"),
        ({}, {"top_k": -1}, "^checkpoint: top_k is -1"),
        ({}, {"max_new_tokens": "many"}, "^checkpoint: max_new_tokens is 'many'"),
        ({}, {"max_length": 0}, "^checkpoint: max_length is 0"),
        ({}, {"max_length": 7}, "^checkpoint: max_length is 7 but the prompt alone has 7"),
        ({"temperature": -1}, {}, "^temperature is -1"),
        ({"max_new_tokens": True}, {}, "^max_new_tokens is True"),
        ({"warmth": 1}, {}, "^unknown sampling parameter 'warmth'"),
        ({"min_new_tokens": 5, "max_new_tokens": 2}, {}, "^min_new_tokens is 5, more than max_new_tokens"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], checkpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        resolve_sampling([("given", given), ("checkpoint", checkpoint)], prompt_tokens=7, room=100)


def test_a_bad_value_that_is_not_used_harms_nobody() -> None:
    levels = [("given", {"temperature": 0.5}), ("checkpoint", {"temperature": "hot", "top_k": 3})]
    used = resolve_sampling(levels, prompt_tokens=7, room=100)
    assert (used.params.temperature, used.params.top_k) == (0.5, 3)
    assert used.words() == "max_new_tokens 100 (built-in), temperature 0.5 (given), top_k 3 (checkpoint)"
    assert used.report()["top_k"] == {"value": 3, "origin": "checkpoint"}


@pytest.mark.parametrize(
    ("given", "checkpoint", "most", "least"),
    [  # a prompt of 10 tokens, room for 50 more, 30 built in
        ({}, {}, 30, 0),
        ({"max_new_tokens": 7}, {"max_new_tokens": 9, "max_length": 40}, 7, 0),
        ({"max_new_tokens": 70}, {}, 70, 0),  # the engine refuses what was asked for, and says why
        ({}, {"max_new_tokens": 70}, 50, 0),
        ({}, {"max_new_tokens": 40}, 40, 0),
        ({}, {"max_length": 15}, 5, 0),
        ({}, {"max_length": 8192}, 50, 0),
        ({}, {"max_length": 15, "max_new_tokens": 9}, 9, 0),
        ({"max_new_tokens": 3}, {"max_length": 2}, 3, 0),
        ({}, {"min_new_tokens": 4}, 30, 4),
        ({}, {"min_length": 14}, 30, 4),
        ({}, {"min_length": 4}, 30, 0),
        ({"max_new_tokens": 3}, {"min_new_tokens": 4}, 3, 3),
        ({"min_new_tokens": 40}, {}, 40, 40),
        ({"min_new_tokens": 20}, {"max_new_tokens": 9}, 20, 20),
        ({"min_new_tokens": 2}, {"min_new_tokens": 9}, 30, 2),
    ],
)
def test_lengths(given: dict[str, Any], checkpoint: dict[str, Any], most: int, least: int) -> None:
    levels = [("given", given), ("checkpoint", checkpoint)]
    params = resolve_sampling(levels, prompt_tokens=10, room=50, new_tokens=30).params
    assert (params.max_new_tokens, params.min_new_tokens) == (most, least)


def test_what_is_read_of_a_generation_config() -> None:
    google = {"bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106]}
    google |= {"pad_token_id": 0, "top_k": 64, "top_p": 0.95, "transformers_version": "4.50.0", "num_beams": 1}
    assert checkpoint_level(google) == ("checkpoint", {"do_sample": True, "top_k": 64, "top_p": 0.95})
    assert checkpoint_words(google) == "do_sample True, top_k 64, top_p 0.95"
    assert checkpoint_words({"eos_token_id": 1, "top_k": None}) is None
    assert left_out(google) == []
    assert left_out({"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0}) == [
        "num_beams",
        "no_repeat_ngram_size",
    ]
    with pytest.raises(ParameterError, match="suppress_tokens is nonsense"):
        checkpoint_level({"suppress_tokens": "nonsense"})


# ---- beside transformers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support.tokenizer_dir()
    config = support.tiny_config(vocab_size=256_000, hidden_size=32, num_hidden_layers=2, max_position_embeddings=64)
    model = support.hf_model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # so that greedy text does not repeat one token
    return support.save_checkpoint(tmp_path_factory.mktemp("defaults") / "tiny", model, tokenizer=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_new_tokens counts")
@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ({"do_sample": False, "max_new_tokens": 12}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 9}, {}),
        ({"do_sample": True, "top_k": 1, "max_new_tokens": 9}, {}),
        ({"do_sample": True, "top_p": 1e-9, "temperature": 0.3, "max_new_tokens": 9}, {}),
        ({"do_sample": True, "min_p": 1.0, "max_new_tokens": 9}, {}),
        ({"do_sample": False, "repetition_penalty": 3.0, "max_new_tokens": 12}, {}),
        ({"do_sample": False, "max_length": 20}, {}),
        ({"do_sample": False, "max_length": 20, "max_new_tokens": 3}, {}),
        ({"do_sample": False, "max_length": 20}, {"max_new_tokens": 5}),
        ({"do_sample": False, "max_new_tokens": 6, "eos_token_id": ENDS}, {}),
        ({"do_sample": False, "max_new_tokens": 6, "eos_token_id": ENDS, "min_new_tokens": 4}, {}),
        ({"do_sample": False, "max_new_tokens": 6, "eos_token_id": ENDS, "min_length": 9}, {}),
        ({"do_sample": False, "max_new_tokens": 6, "suppress_tokens": list(range(3, 200_000))}, {}),
        ({"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 5.0, "max_new_tokens": 6, "top_k": 7}, {"top_k": 1}),
        ({"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 9}, {}),
    ],
)
def test_a_checkpoints_defaults_are_what_transformers_takes(folder: Path, stored: dict[str, Any], given: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "pad_token_id": 0, **stored}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    gemma = Gemma.load(folder, progress=False)
    facade = hf.AutoModelForCausalLM.from_pretrained(folder)
    ids = [2, 651, 7727, 603, 9]
    expected = theirs.generate(torch.tensor([ids]), **given)[0].tolist()
    assert len(expected) > len(ids)
    assert facade.generate(torch.tensor([ids]), **given)[0].tolist() == expected
    assert list(gemma.stream(ids, **given).result.token_ids) == expected[len(ids) :]
    assert gemma.generate([ids], **given) == [gemma.stream(ids, **given).result.text]


def test_in_the_facade_max_new_tokens_wins_over_max_length(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "do_sample": False}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facade = hf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[2, 651, 7727, 603]])
    expected = theirs.generate(ids, max_length=20)
    with pytest.warns(UserWarning, match="max_new_tokens counts"):
        assert facade.generate(ids, max_length=20).tolist() == expected.tolist()


def test_stop_strings_and_settings_gemcut_lacks(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "max_new_tokens": 12}))
    whole = Gemma.load(folder, progress=False).generate("The sky is")
    file.write_text(json.dumps({"do_sample": False, "max_new_tokens": 12, "stop_strings": whole[4:6], "num_beams": 4}))
    gemma = Gemma.load(folder, progress=False)
    with pytest.warns(UserWarning, match="num_beams"):
        assert gemma.generate("The sky is") == whole[: whole.index(whole[4:6])]
    assert gemma.generate("The sky is", stop=()) == whole
