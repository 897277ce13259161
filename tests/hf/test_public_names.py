"""Every public name of transformers' classes is there, or says what to use instead."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemcut import hf
from gemcut.errors import GemcutError
from gemcut.hf.public_names import CONFIG, ENCODING, MODEL, OUTPUT, TOKENIZER


def public(*things: Any) -> set[str]:
    return {name for thing in things for name in dir(thing) if not name.startswith("_")}


@pytest.fixture(scope="module")
def pairs(model: Any, reference: Any, loaded_tokenizer: Any, reference_tokenizer: Any) -> dict[str, Any]:
    """For each kind: (ours, transformers' public names, our table)."""
    ids = {"input_ids": torch.tensor([[2, 10, 11]])}
    generated = model.generate(**ids, max_new_tokens=1, return_dict_in_generate=True)
    return {
        "model": (model, public(transformers.Gemma2ForCausalLM, reference), MODEL),
        "tokenizer": (loaded_tokenizer, public(transformers.PreTrainedTokenizerFast, reference_tokenizer), TOKENIZER),
        "config": (model.config, public(transformers.Gemma2Config, reference.config), CONFIG),
        "encoding": (
            loaded_tokenizer("a"),
            public(transformers.BatchEncoding) - public(dict),
            ENCODING,
        ),
        "output": (model(**ids), public(CausalLMOutputWithPast), OUTPUT),
        "generated": (generated, public(GenerateDecoderOnlyOutput), OUTPUT),
    }


KINDS = ["model", "tokenizer", "config", "encoding", "output", "generated"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_name_is_there_or_answered(kind: str, pairs: dict[str, Any]) -> None:
    ours, names, table = pairs[kind]
    assert len(names) > 12
    answers = {name: _answer(ours, name) for name in sorted(names) if not hasattr(ours, name)}
    assert [name for name, answer in answers.items() if name not in table or "\n" in answer] == []
    assert {name: answer.partition(": ")[2] for name, answer in answers.items()} == {n: table[n] for n in answers}


def _answer(ours: Any, name: str) -> str:
    with pytest.raises(AttributeError) as caught:
        getattr(ours, name)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_for_what_is_there(kind: str, pairs: dict[str, Any]) -> None:
    ours, _, table = pairs[kind]
    there = [name for name in table if hasattr(ours, name)]
    # GenerateOutput has the field, always None; the forward call's output has not.
    assert there == (["past_key_values"] if kind == "generated" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_protocols_see_a_plain_attribute_error(kind: str, pairs: dict[str, Any]) -> None:
    ours, _, table = pairs[kind]
    for name in ("__array__", "__deepcopy__", "__getstate_manages_dict__", "_repr_html_", "no_such_name"):
        assert not hasattr(ours, name)
        assert getattr(ours, name, 5) == 5
        with pytest.raises(AttributeError) as caught:
            getattr(ours, name)
        assert not isinstance(caught.value, GemcutError)
    missing = next(name for name in table if name != "past_key_values")
    assert not hasattr(ours, missing)
    with pytest.raises(AttributeError, match=missing):
        getattr(ours, missing)


@pytest.mark.slow
def test_what_can_be_copied_is_copied(model: Any, tokenizer: Any) -> None:
    dialogue = [{"role": "user", "content": "hi"}]
    written = tokenizer.apply_chat_template(dialogue, tokenize=False)  # its template is compiled now
    encoding, output = tokenizer(["a", "b c"], padding=True), model(torch.tensor([[2, 10, 11]]))
    for again in (copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        assert again(encoding).data == encoding.data
        assert torch.equal(again(output).logits, output.logits)
        assert again(model.config).to_dict() == model.config.to_dict()
        assert again(model.generation_config) == model.generation_config
        other = again(tokenizer)
        assert other("Hello wörld <bos>").data == tokenizer("Hello wörld <bos>").data
        assert other.decode([2, 10, 999]) == tokenizer.decode([2, 10, 999])
        assert other.padding_side == "left"
        assert other.apply_chat_template(dialogue, tokenize=False) == written
        config = hf.BitsAndBytesConfig(load_in_4bit=True)
        assert again(config).to_dict() == config.to_dict()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied(way: Any, model: Any) -> None:
    with pytest.raises(GemcutError, match=r"a GemmaForCausalLM cannot be pickled or copied.*in each process"):
        way(model)


def test_torch_compile_is_refused_by_name(model: Any) -> None:
    with pytest.raises(GemcutError, match=r"torch\.compile: gemcut has kernels of its own"):
        torch.compile(model)
    with pytest.raises(GemcutError, match=r"model\.forward cannot be replaced; torch\.compile"):
        model.forward = torch.compile(model.forward)
    with pytest.raises(AttributeError, match="'compile': gemcut has kernels"):
        model.compile()
    assert model(torch.tensor([[2, 10]])).logits.shape[1] == 2
