"""gemcut.pipeline beside transformers' pipeline: the same texts, and options that are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import gemcut
import support
from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.auto import AutoModelForCausalLM

CHAT = [{"role": "user", "content": "Name a colour."}]
OTHER = [*CHAT, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Another?"}]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = support.tiny_config(vocab_size=256_000, hidden_size=16)
    return support.save_checkpoint(tmp_path_factory.mktemp("pipe") / "c", support.hf_model(config), tokenizer=True)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    theirs = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    return gemcut.pipeline("text-generation", model=folder), theirs


@pytest.mark.parametrize("more", [{}, {"return_full_text": False}, {"min_new_tokens": 3, "repetition_penalty": 1.5}])
@pytest.mark.parametrize("prompt", ["The sky is", ["The sky is", "A river that is"], CHAT, [CHAT, OTHER]])
def test_the_same_answers(pair: tuple[Any, Any], prompt: Any, more: dict[str, Any]) -> None:
    ours, theirs = pair
    assert ours(prompt, **GREEDY, **more) == theirs(prompt, **GREEDY, **more)
    assert ours(prompt, batch_size=1, **GREEDY, **more) == theirs(prompt, **GREEDY, **more)


def test_several_answers(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    found = ours(["The sky is", CHAT], max_new_tokens=4, do_sample=True, num_return_sequences=3, seed=1)
    assert [len(each) for each in found] == [3, 3]
    texts = [each["generated_text"] for each in found[0]]
    assert len(set(texts)) > 1
    assert all(text.startswith("The sky is") for text in texts)
    assert all(each["generated_text"][:1] == CHAT for each in found[1])
    assert ours([], **GREEDY) == []


def test_defaults_and_models_that_are_loaded(folder: Path, pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    again = gemcut.pipeline(model=model, tokenizer=folder, **GREEDY)
    assert again("The sky is") == ours("The sky is", **GREEDY)
    with pytest.raises(ParameterError, match="needs a tokenizer"):
        gemcut.pipeline(model=model)
    with pytest.raises(ParameterError, match="dtype is for a checkpoint's name"):
        gemcut.pipeline(model=model, tokenizer=folder, dtype="float32")


def test_what_is_refused(folder: Path, pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    for options, said in [
        ({"num_beams": 4}, "num_beams.*beam search is not in this version"),
        ({"return_tensors": True}, "return_tensors is not in this version"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is for model.generate"),
    ]:
        with pytest.raises(UnsupportedError, match=said):
            ours("x", **GREEDY, **options)
    with pytest.raises(ParameterError, match="temprature"):
        ours("x", temprature=1)
    for prompt in (3, [3], None, [["a"]]):
        with pytest.raises(ParameterError, match="expected a text, a chat"):
            ours(prompt)
    with pytest.raises(UnsupportedError, match="the one task is 'text-generation'"):
        gemcut.pipeline("summarization", model=folder)
    with pytest.raises(ParameterError, match="needs a model"):
        gemcut.pipeline("text-generation")
    with pytest.raises(ParameterError, match="give one"):
        gemcut.pipeline(model=folder, device=0, device_map="cpu")
