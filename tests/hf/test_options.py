"""Every field of transformers' GenerationConfig is honoured, refused by name, or warned of where it is idle."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gemcut import hf
from gemcut.errors import ParameterError, UnsupportedError

# About the file itself, not about generation.
METADATA = {"_from_model_config", "transformers_version"}
# Values that ask for what gemcut always does.
ALWAYS_SO = {"use_cache": True, "cache_implementation": "hybrid", "disable_compile": True, "num_beams": 1}
# Values with a meaning in transformers that are not its defaults. 7 for the fields that take a number.
ODD: dict[str, Any] = {
    "use_mtp": True,
    "cache_implementation": "quantized",
    "cache_config": {"nbits": 4},
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "diversity_penalty": 0.5,
    "bad_words_ids": [[5, 6]],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.5),
    "begin_suppress_tokens": [5],
    "sequence_bias": {(5,): -1.0},
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "output_attentions": True,
    "output_hidden_states": True,
    "is_assistant": True,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "x",
    "compile_config": {"mode": "default"},
    "continuous_batching_config": {"block_size": 16},
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [object()],
    "force_words_ids": [[5]],
}

# Values of which transformers makes the same tokens as without them.
IDLE: dict[str, Any] = {"use_cache": False, "early_stopping": True, "low_memory": True}

FIELDS = sorted(set(transformers.GenerationConfig().to_dict()) - METADATA)


def differs(value: Any, **others: Any) -> Callable[[Any, Any, str], None]:
    """The field changes what ``generate`` returns beside ``others``."""

    def check(model: Any, inputs: Any, name: str) -> None:
        options = {"max_new_tokens": 8, **others}
        torch.manual_seed(0)
        without = model.generate(**inputs, **options)
        torch.manual_seed(0)
        changed = model.generate(**inputs, **{**options, name: value})
        if isinstance(changed, hf.model.GenerateOutput):
            keep = without.keys() if isinstance(without, hf.model.GenerateOutput) else []
            same_scores = "scores" in keep and torch.equal(changed.scores[0], without.scores[0])
            assert changed.keys() != keep or not same_scores
        else:
            assert changed.tolist() != without.tolist()

    return check


SAMPLING = {"do_sample": True, "temperature": 5.0, "top_k": 0}
DICT = {"return_dict_in_generate": True}
#: What each honoured field is seen to do.
SEEN: dict[str, Callable[[Any, Any, str], None]] = {
    "max_new_tokens": differs(3),
    "max_length": differs(20, max_new_tokens=None),
    "min_new_tokens": differs(6, eos_token_id=list(range(3, 256000))),
    "min_length": differs(14, eos_token_id=list(range(3, 256000))),
    "max_time": differs(1e-9),
    "stop_strings": differs(["a", "e", "i", "o", "u", "n"]),
    "do_sample": differs(True, temperature=5.0),
    "temperature": differs(0.01, **SAMPLING),
    "top_k": differs(2, **SAMPLING),
    "top_p": differs(0.00001, **SAMPLING),
    "min_p": differs(0.99, **SAMPLING),
    "repetition_penalty": differs(0.2),
    "num_return_sequences": differs(2, **SAMPLING),
    "suppress_tokens": differs(list(range(3, 200000))),
    "renormalize_logits": differs(True, output_scores=True, **DICT),
    "output_scores": differs(True, **DICT),
    "output_logits": differs(True, **DICT),
    "return_dict_in_generate": differs(True),
    "eos_token_id": differs(list(range(3, 256000))),
}


def pad_token_fills(model: Any, inputs: Any, name: str) -> None:
    twice = {key: value.repeat(2, 1) for key, value in inputs.items()}
    twice["input_ids"][1, -1] = 9
    free = model.generate(**twice, max_new_tokens=8)
    first = int(free[0, inputs.input_ids.shape[1]])
    out = model.generate(**twice, max_new_tokens=8, eos_token_id=first, **{name: 7})
    assert out[0, -1] == 7


def bos_token_begins(model: Any, inputs: Any, name: str) -> None:
    assert model.generate(max_new_tokens=1, **{name: 7})[0, 0] == 7


SEEN |= {"pad_token_id": pad_token_fills, "bos_token_id": bos_token_begins}


@pytest.fixture(scope="module")
def inputs(loaded_tokenizer: Any) -> Any:
    return loaded_tokenizer("Write me a poem about Machine Learning.", return_tensors="pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no effect|.*has no effect|.*max_new_tokens counts")
@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_honoured_or_refused_by_name(name: str, model: Any, inputs: Any) -> None:
    if name in SEEN:
        SEEN[name](model, inputs, name)
        return
    value = ODD.get(name, 7)
    if name == "disable_compile":  # gemcut compiles nothing, whatever is asked
        model.generate(**inputs, max_new_tokens=1, disable_compile=True)
        return
    if name in hf.options.IDLE and name != "cache_implementation":  # see test_idle.py
        with pytest.warns(UserWarning, match=f"{name}=.* changes nothing"):
            model.generate(**inputs, max_new_tokens=1, **{name: IDLE.get(name, 7)})
        return
    for options in ({name: value}, {"generation_config": hf.GenerationConfig(**{name: value})}):
        with pytest.raises(UnsupportedError, match=f"{name}=") as caught:
            model.generate(**inputs, max_new_tokens=1, **options)
        assert "\n" not in str(caught.value)


def test_no_honoured_field_is_left_untested() -> None:
    assert set(SEEN) == hf.options.HONOURED
    assert set(SEEN) <= set(FIELDS)


def test_values_that_ask_for_what_is_always_done(model: Any, inputs: Any) -> None:
    model.generate(**inputs, max_new_tokens=1, **ALWAYS_SO)
    defaults = transformers.GenerationConfig._get_default_generation_params()
    model.generate(**inputs, **{name: value for name, value in defaults.items() if name != "max_length"})


@pytest.mark.filterwarnings("ignore:.*max_new_tokens counts")
def test_precedence(folder: Path, inputs: Any) -> None:
    config = hf.GenerationConfig(max_new_tokens=5)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    width = inputs.input_ids.shape[1]

    def new(**options: Any) -> int:
        return int(model.generate(**inputs, **options).shape[1]) - width

    assert new(generation_config=config) == 5
    assert new(generation_config=config, max_new_tokens=2) == 2
    model.generation_config.max_new_tokens = 7
    assert new() == 7
    assert new(generation_config=config) == 5
    assert new(max_length=width + 3) == 7  # as in transformers: the model's max_new_tokens counts, with a warning
    assert new(generation_config={"max_new_tokens": 4}) == 4
    assert new(max_new_tokens=None) == 7


def test_config_object(tmp_path: Path) -> None:
    config = hf.GenerationConfig(temperature=0.5, eos_token_id=[1, 107])
    assert config.temperature == 0.5
    assert config.top_k is None
    assert config.to_dict() == {"temperature": 0.5, "eos_token_id": [1, 107]}
    changed = copy.deepcopy(config)
    changed.top_k = 3
    assert changed != config
    assert repr(changed) == "GenerationConfig(temperature=0.5, eos_token_id=[1, 107], top_k=3)"
    config.save_pretrained(tmp_path)
    assert hf.GenerationConfig.from_pretrained(tmp_path) == config
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.temperature, theirs.eos_token_id) == (0.5, [1, 107])
    with pytest.raises(ParameterError, match="no field 'temprature'"):
        hf.GenerationConfig(temprature=1)
    with pytest.raises(ParameterError, match="no field 'temprature'"):
        config.temprature = 1
    with pytest.raises(AttributeError, match="temprature"):
        _ = config.temprature


def test_config_file_of_another_version_warns(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 4, "new_in_v9": 1}))
    with pytest.warns(UserWarning, match="new_in_v9"):
        assert hf.GenerationConfig.from_pretrained(tmp_path).to_dict() == {"max_new_tokens": 4}
