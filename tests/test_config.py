"""Reading config.json: what transformers writes is read, both eras of keys, and what we don't know is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from gemcut.config import FAMILY, GemmaConfig, token_ids
from gemcut.errors import ConfigError, GemcutError
from support import tiny_config

FULL, SLIDING = "full_attention", "sliding_attention"


def _gemma2(**changes: Any) -> dict[str, Any]:
    """The keys of a Gemma 2 config.json as Google published them (27B, era of transformers 4.42)."""
    data: dict[str, Any] = {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "initializer_range": 0.02,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "use_cache": True,
        "vocab_size": 256000,
    }
    return _changed(data, changes)


def _gemma3(**changes: Any) -> dict[str, Any]:
    """A Gemma 3 text config.json of the era before ``rope_parameters`` (1B)."""
    data: dict[str, Any] = {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    }
    return _changed(data, changes)


_ABSENT = object()


def _changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**data, **changes}.items() if value is not _ABSENT}


# What is read


def test_published_gemma2_config_is_the_family_entry() -> None:
    assert GemmaConfig.from_dict(_gemma2()) == FAMILY["gemma-2-27b"]


def test_published_gemma3_config_is_the_family_entry() -> None:
    assert GemmaConfig.from_dict(_gemma3(torch_dtype="bfloat16")) == FAMILY["gemma-3-1b"]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("through_json", [False, True], ids=["dict", "json"])
def test_reads_what_transformers_writes(model_type: str, through_json: bool) -> None:
    theirs = tiny_config(model_type, num_hidden_layers=7, rms_norm_eps=1e-5)
    data = json.loads(theirs.to_json_string(use_diff=False)) if through_json else theirs.to_dict()
    ours = GemmaConfig.from_dict(data)
    for name in [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "max_position_embeddings",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "bos_token_id",
        "pad_token_id",
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.rope_local_theta == 10_000.0
    assert ours.rope_theta == (10_000.0 if model_type == "gemma2" else 1_000_000.0)
    assert ours.qk_norm == (model_type == "gemma3_text")
    assert ours.eos_token_ids == (1,)


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    """Our config.json means the same network to transformers and, read again, to us."""
    ours = FAMILY[name]
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert GemmaConfig.from_file(tmp_path / "config.json") == ours
    kind = Gemma2Config if ours.model_type == "gemma2" else Gemma3TextConfig
    theirs = kind.from_pretrained(tmp_path)
    assert GemmaConfig.from_dict(theirs.to_dict()) == ours
    assert theirs.layer_types == list(ours.layer_types)
    assert theirs.query_pre_attn_scalar == ours.query_pre_attn_scalar


def test_layer_kinds_without_layer_types() -> None:
    """Gemma 2: 0-indexed even layers slide. Gemma 3: every sixth layer sees everything."""
    assert GemmaConfig.from_dict(_gemma2(num_hidden_layers=5)).layer_types == (SLIDING, FULL, SLIDING, FULL, SLIDING)
    assert GemmaConfig.from_dict(_gemma3()).full_layers == (5, 11, 17, 23)
    assert GemmaConfig.from_dict(_gemma3(sliding_window_pattern=_ABSENT)).full_layers == (5, 11, 17, 23)
    assert GemmaConfig.from_dict(_gemma3(sliding_window_pattern=3, num_hidden_layers=7)).full_layers == (2, 5)


def test_listed_layer_types_win() -> None:
    config = GemmaConfig.from_dict(_gemma2(num_hidden_layers=3, layer_types=[FULL, FULL, SLIDING]))
    assert config.full_layers == (0, 1)
    assert config.sliding_layers == (2,)


@pytest.mark.parametrize("key", ["sliding_window", "sliding_window_size"])
def test_either_key_of_the_window(key: str) -> None:
    data = _gemma2(sliding_window=_ABSENT, sliding_window_size=_ABSENT)
    assert GemmaConfig.from_dict({**data, key: 1234}).sliding_window == 1234
    other = ({"sliding_window", "sliding_window_size"} - {key}).pop()
    assert GemmaConfig.from_dict({**data, key: 1234, other: None}).sliding_window == 1234


def test_the_old_hidden_act_is_not_the_activation() -> None:
    assert GemmaConfig.from_dict(_gemma2(hidden_act="gelu")) == FAMILY["gemma-2-27b"]
    assert GemmaConfig.from_dict(_gemma2(hidden_act="gelu", hidden_activation=None)) == FAMILY["gemma-2-27b"]


def test_null_cap_means_no_cap_and_a_missing_one_the_default() -> None:
    off = GemmaConfig.from_dict(_gemma2(attn_logit_softcapping=None, final_logit_softcapping=None))
    assert (off.attn_logit_softcapping, off.final_logit_softcapping) == (None, None)
    default = GemmaConfig.from_dict(_gemma2(attn_logit_softcapping=_ABSENT, final_logit_softcapping=_ABSENT))
    assert (default.attn_logit_softcapping, default.final_logit_softcapping) == (50.0, 30.0)
    gemma3 = GemmaConfig.from_dict(_gemma3(attn_logit_softcapping=_ABSENT, final_logit_softcapping=_ABSENT))
    assert (gemma3.attn_logit_softcapping, gemma3.final_logit_softcapping) == (None, None)


@pytest.mark.parametrize("era", ["flat keys", "rope_parameters"])
def test_linear_rope_scaling_of_gemma3(era: str) -> None:
    """4B and larger stretch the full layers' positions by 8; sliding layers are as they were."""
    if era == "flat keys":
        data = _gemma3(rope_scaling={"rope_type": "linear", "factor": 8.0})
    else:
        data = _gemma3(
            rope_theta=_ABSENT,
            rope_local_base_freq=_ABSENT,
            rope_parameters={
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        )
    config = GemmaConfig.from_dict(data)
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling_factor) == (1e6, 1e4, 8.0)
    assert GemmaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("given", "ids"), [(1, (1,)), ([1, 107], (1, 107)), (_ABSENT, (1,)), (None, (1,))])
def test_end_of_sequence_ids(given: Any, ids: tuple[int, ...]) -> None:
    assert GemmaConfig.from_dict(_gemma2(eos_token_id=given)).eos_token_ids == ids


def test_keys_that_change_nothing_are_ignored() -> None:
    assert GemmaConfig.from_dict(_gemma2(some_new_key=[1, {"a": 2}], use_cache=False)) == FAMILY["gemma-2-27b"]


@pytest.mark.parametrize("name", FAMILY)
def test_number_of_parameters_is_that_of_transformers(name: str) -> None:
    """Counted on the meta device, where transformers' 27B takes no memory."""
    config = FAMILY[name]
    kinds = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM)}
    config_class, model_class = kinds[config.model_type]
    with torch.device("meta"):
        theirs = model_class(config_class.from_dict(config.to_dict()))
    assert config.num_parameters() == theirs.num_parameters()


def test_published_sizes() -> None:
    """In billions, as the model card and the reports give them."""
    billions = {name: round(config.num_parameters() / 1e9, 2) for name, config in FAMILY.items()}
    assert billions == {
        "gemma-2-2b": 2.61,
        "gemma-2-9b": 9.24,
        "gemma-2-27b": 27.23,
        "gemma-3-270m": 0.27,
        "gemma-3-1b": 1.00,
    }


@pytest.mark.parametrize(("kind", "base"), [(Gemma2Config, _gemma2), (Gemma3TextConfig, _gemma3)])
def test_a_missing_key_means_what_it_means_to_transformers(kind: Any, base: Any) -> None:
    """Every key alone, and all together: the same network as transformers' config, written out in full."""
    whole = base(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    cases = [{"model_type": whole["model_type"]}]
    cases += [{k: v for k, v in whole.items() if k != key} for key in whole if key != "model_type"]
    for data in cases:
        if "sliding_window" not in data:
            data.pop("sliding_window_size", None)  # Google's other spelling, which transformers does not read
        ours = GemmaConfig.from_dict(data)
        theirs = GemmaConfig.from_dict(kind.from_dict(data).to_dict())
        assert ours.replace(torch_dtype=None) == theirs.replace(torch_dtype=None), sorted(set(whole) - set(data))


def test_the_text_part_of_a_gemma_3_that_sees_pictures() -> None:
    """4B's published config.json leaves out what is transformers' default."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    data = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    data |= {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152}}
    ours = GemmaConfig.from_dict(data)
    assert (ours.num_attention_heads, ours.num_key_value_heads, ours.head_dim, ours.vocab_size) == (8, 4, 256, 262_208)
    assert (ours.eos_token_ids, ours.torch_dtype, ours.max_position_embeddings) == ((1, 106), "bfloat16", 131_072)
    assert (ours.rope_scaling_factor, ours.rope_theta, ours.rope_local_theta) == (8.0, 1e6, 1e4)
    theirs = GemmaConfig.from_dict(Gemma3TextConfig.from_dict(text).to_dict())
    assert ours.replace(eos_token_ids=(1,), torch_dtype=None) == theirs.replace(torch_dtype=None)


def test_minus_one_means_none_and_either_name_of_the_dtype() -> None:
    assert GemmaConfig.from_dict(_gemma2(pad_token_id=-1, eos_token_id=-1)) == FAMILY["gemma-2-27b"]
    for keys in ({"dtype": "float16"}, {"dtype": None, "torch_dtype": "float16"}, {"torch_dtype": "torch.float16"}):
        assert GemmaConfig.from_dict(_gemma2(**{"torch_dtype": _ABSENT, **keys})).torch_dtype == "float16"
    assert GemmaConfig.from_dict(_gemma2(dtype={"": "float16"}, torch_dtype=None)).torch_dtype is None


@pytest.mark.parametrize("brackets", ["[" * 200_000, '{"a":' * 200_000, '{"model_type":' + "[" * 500 + "]" * 500 + "}"])
def test_brackets_without_end(tmp_path: Path, brackets: str) -> None:
    (tmp_path / "config.json").write_text(brackets)
    with pytest.raises(ConfigError, match="nested more than 64 levels deep"):
        GemmaConfig.from_file(tmp_path / "config.json")


def test_a_config_that_is_no_regular_file(tmp_path: Path) -> None:
    for make, what in (
        (lambda p: p.symlink_to("/dev/zero"), "a device"),
        (os.mkfifo, "a FIFO"),
        (Path.mkdir, "a folder"),
    ):
        file = tmp_path / what[2:] / "config.json"
        file.parent.mkdir()
        make(file)
        with pytest.raises(ConfigError, match=f"it is {what}; expected a regular file"):
            GemmaConfig.from_file(file)


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown activation": ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    "exact gelu": ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "unknown old activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "untied head": ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "two-way attention": ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "contradictory windows": ({"sliding_window": 4096, "sliding_window_size": 2048}, "4096.*2048"),
    "no window": ({"sliding_window": None, "sliding_window_size": _ABSENT}, "sliding_window is null"),
    "window of a wrong type": ({"sliding_window": [4096], "sliding_window_size": _ABSENT}, "sliding_window"),
    "windows of a wrong type": ({"sliding_window": [4096]}, "sliding_window"),
    "window 0": ({"sliding_window": 0, "sliding_window_size": 0}, "sliding_window is 0"),
    "null head_dim": ({"head_dim": None}, "head_dim is null"),
    "odd head_dim": ({"head_dim": 127}, "head_dim 127 is odd"),
    "null hidden_size": ({"hidden_size": None}, "hidden_size is null"),
    "1e9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; gemcut takes at most 1,000"),
    "1e9 positions": ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000; .* at most"),
    "a vocabulary of 10^400": ({"vocab_size": 10**400}, "vocab_size is 1000.*…; gemcut takes at most"),
    "an epsilon of 10^400": ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*…; expected a number that a float"),
    "layers as a float": ({"num_hidden_layers": 1e9}, "num_hidden_layers is 1000000000.0; expected a whole number"),
    "an activation of a megabyte": ({"hidden_activation": "x" * 10**6}, "^hidden_activation is 'x{58}…; gemcut"),
    "a classifier": ({"architectures": ["Gemma2ForSequenceClassification"]}, "judges texts and writes none"),
    "hidden_size as text": ({"hidden_size": "4608"}, "hidden_size is '4608'; expected a whole number"),
    "hidden_size as a fraction": ({"hidden_size": 4608.5}, "hidden_size is 4608.5; expected a whole number"),
    "layers as a truth value": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "negative vocabulary": ({"vocab_size": -1}, "vocab_size is -1"),
    "heads that do not divide": ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
    "too few layer types": ({"layer_types": [FULL]}, "layer_types has 1 entries for 46 layers"),
    "unknown layer type": ({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "chunked_attention"),
    "layer types as text": ({"layer_types": FULL}, "layer_types"),
    "cap of zero": ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
    "infinite cap": ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping is inf"),
    "cap as text": ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
    "epsilon NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "query scalar 0": ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "linear rope in Gemma 2": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    "yarn in rope_parameters": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    "rope_scaling as a number": ({"rope_scaling": 2.0}, "rope_scaling is 2.0"),
    "rope_parameters as a list": ({"rope_parameters": [1e4]}, "rope_parameters"),
    "one rope_parameters entry a number": ({"rope_parameters": {FULL: 1e4}}, "full_attention is 10000.0"),
    "scaling beside parameters": (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_type is 'linear'",
    ),
    "rope theta as text": ({"rope_theta": "10000"}, "rope_theta is '10000'; expected a number"),
    "end id as text": ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>'"),
    "end ids without one": ({"eos_token_id": []}, "eos_token_id"),
    "another architecture": ({"model_type": "gemma"}, "model_type is 'gemma'"),
    "no architecture": ({"model_type": _ABSENT}, "model_type is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_the_key(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        GemmaConfig.from_dict(_gemma2(**changes))
    assert "\n" not in str(caught.value)


REFUSED_GEMMA3: dict[str, tuple[dict[str, Any], str]] = {
    "linear without factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    "scaled sliding layers": (
        {"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "rope_type is 'linear'",
    ),
    "pattern 0": ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "multimodal wrapper": ({"model_type": "gemma3"}, "model_type is 'gemma3' without a text_config"),
}


@pytest.mark.parametrize("case", REFUSED_GEMMA3)
def test_gemma3_refused(case: str) -> None:
    changes, message = REFUSED_GEMMA3[case]
    with pytest.raises(ConfigError, match=message):
        GemmaConfig.from_dict(_gemma3(**changes))


def test_a_llama_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="'llama'"):
        GemmaConfig.from_dict(LlamaConfig().to_dict())


def test_token_ids() -> None:
    assert token_ids(1, "x") == (1,)
    assert token_ids([1, 107], "x") == (1, 107)
    for bad in (True, -1, 1.0, "1", [], [1, None]):
        with pytest.raises(ConfigError, match="x is"):
            token_ids(bad, "x")


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="sliding_window is 0"):
        FAMILY["gemma-2-2b"].replace(sliding_window=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("", "cannot read"),
        ("{", "cannot read"),
        ("[1]", "holds list; expected a JSON object"),
        ('{"model_type": "llama"}', "'llama'"),
    ],
)
def test_bad_files_name_themselves(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GemcutError, match=message) as caught:
        GemmaConfig.from_file(path)
    assert re.search(re.escape(str(tmp_path)), str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        GemmaConfig.from_file(tmp_path / "config.json")
