"""GGUF files of both converters against transformers on the model they were made from; keys not to be ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Q

from checkpoint import gguf_files as made
from gemcut.checkpoint import ggml_types
from gemcut.checkpoint.quantize import quantize_checkpoint
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError, ConfigError, GemcutError
from gemcut.quantization.spec import Quantization
from gemcut.text import Tokenizer

IDS = [2, 280, 271, 300, 17, 255, 310, 11, 275, 290, 301, 302]


def same(path: Path, model: Any) -> None:
    """gemcut's logits from the file are transformers' from the model, to the rounding of fp32."""
    found, expected = made.logits(path, IDS), made.expected_logits(model, IDS)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("generation", [2, 3])
def test_a_file_of_llama_cpp_equals_its_folder(tmp_path: Path, generation: int) -> None:
    model = made.tiny(generation)
    same(made.write(tmp_path / "x.gguf", model, made.metadata(model)), model)


@pytest.mark.parametrize(("generation", "age"), [(2, ""), (3, "first"), (3, "later")])
def test_a_file_of_ollama_equals_its_folder(tmp_path: Path, generation: int, age: str) -> None:
    """Own spellings of the rope bases, a list of bools, no space prefix, a rowless token, a cap of 30 for none."""
    kinds = ["full_attention" if i in (2, 3, 6) else "sliding_attention" for i in range(7)]
    options: dict[str, Any] = {"rope_theta": 500.0}  # of sliding layers in Gemma 3
    if generation == 2:
        options = {}
    elif age == "later":
        options["layer_types"] = kinds  # not the pattern of every sixth
    model = made.tiny(generation, **options)
    tokens, scores, types = made.vocabulary(1)
    vocab = ([*tokens, "<image_soft_token>"], [*scores, -1000.0], [*types, 4])
    path = made.write(
        tmp_path / "x.gguf",
        model,
        made.ollama_metadata(model, age),
        vocab=vocab,
        general={"tokenizer.ggml.eos_token_ids": [1, 5], "tokenizer.ggml.add_padding_token": False},
        space_prefix=None,
    )
    same(path, model)
    source = resolve(path)
    assert source.config().eos_token_ids == (1, 5)
    tokenizer = source.tokenizer()
    assert tokenizer.vocab_size == made.VOCAB
    folders = Tokenizer.from_gguf_vocab(*made.vocabulary())  # types as tokenizer_config.json has them
    for text in ("the  <b>the\n\nthe\n x", "<start_of_turn>the<end_of_turn>\n", "   the", "€ <b", "<image_soft_token>"):
        assert tokenizer.encode(text) == folders.encode(text), text
        assert tokenizer.encode(text, parse_special=False) == folders.encode(text, parse_special=False), text
    assert tokenizer.special_ids == folders.special_ids


def test_merges_of_a_file_are_taken(tmp_path: Path) -> None:
    """Ollama's file made from a folder without tokenizer.model: kind gpt2, bytes as normal pieces, merges in order."""
    model = made.tiny(3)
    tokens, _, types = made.vocabulary(1)
    types = [3 if i < 6 else 4 if i < 11 else 1 for i in range(len(types))]
    path = made.write(
        tmp_path / "x.gguf",
        model,
        made.ollama_metadata(model, "later"),
        vocab=(tokens, [float(i) for i in range(len(tokens))], types),
        general={"tokenizer.ggml.merges": ["▁ t"], "tokenizer.ggml.pre": "default"},
        space_prefix=None,
    )
    raw = path.read_bytes()
    at = raw.index(b"tokenizer.ggml.model") + 20 + 4
    kind = (4).to_bytes(8, "little") + b"gpt2"
    # "llama" is one byte longer: the key before it gives that byte back by becoming longer itself.
    changed = raw[:at] + kind + raw[at + 13 :]
    name = b"tokenizer.ggml.pre"
    where = changed.index(name) - 8
    end = where + 8 + len(name) + 4
    value = (8).to_bytes(8, "little") + b"defaults"
    path.write_bytes(changed[:end] + value + changed[end + 8 + 7 :])
    tokenizer = resolve(path).tokenizer()
    # scores would have joined "he" and "▁the" too
    names = [tokenizer.id_to_token(i) for i in tokenizer.encode("the the  <b>€", add_bos=False)]
    assert names == ["t", "h", "e", "▁t", "h", "e", "▁", "▁", "<b>", "<0xE2>", "<0x82>", "<0xAC>"]


def test_gemma2_files_of_june_2024_get_window_and_caps(tmp_path: Path) -> None:
    model = made.tiny(2, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    section = made.metadata(model)
    for key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        del section[key]
    path = made.write(tmp_path / "x.gguf", model, section)
    config = resolve(path).config()
    assert (config.sliding_window, config.attn_logit_softcapping, config.final_logit_softcapping) == (4096, 50.0, 30.0)
    same(path, model)


def test_a_cap_of_zero_is_none(tmp_path: Path) -> None:
    model = made.tiny(2)
    section = made.metadata(model) | {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}
    model.config.attn_logit_softcapping = model.config.final_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    same(made.write(tmp_path / "x.gguf", model, section), model)


def test_keys_that_change_the_numbers_are_read(tmp_path: Path) -> None:
    """Each against a transformers model that has the same."""
    linear = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
    cases: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (2, {"rope_theta": 300.0}, {"rope.freq_base": 300.0}),
        (2, {"query_pre_attn_scalar": 25}, {"attention.scale": 0.2}),
        (3, {"rope_theta": 300.0}, {"rope.freq_base_swa": 300.0}),
        (3, {"layer_types": ["full_attention"] * 7}, {"attention.sliding_window": None}),
        (3, {"layer_types": ["full_attention"] * 7}, {"attention.sliding_window_pattern": 1}),
        (3, {"layer_types": ["sliding_attention"] * 7}, {"attention.sliding_window_pattern": 0}),
        (3, {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
         {"attention.sliding_window_pattern": 2}),
        (3, {}, {"attention.head_count": [4] * 7, "attention.layer_norm_rms_epsilon": None}),
        (3, {}, {"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": 16}),
        (3, {}, {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}),
        (3, {"scaled": linear}, {"rope.scaling.factor": 8.0}),  # without a type it is linear, as in llama.cpp
        (3, {"scaled": linear}, {"rope.scaling.type": "linear", "rope.scale_linear": 8.0}),
    ]  # fmt: skip
    for number, (generation, options, keys) in enumerate(cases):
        options = dict(options)
        scaled = options.pop("scaled", None)
        model = made.tiny(generation, **options)
        section = made.metadata(model)
        if scaled:
            model.config.rope_parameters["full_attention"] = scaled
            model = made.hf_model(model.config)
        path = made.write(tmp_path / f"{number}.gguf", model, section | keys)
        try:
            same(path, model)
        except AssertionError as error:
            raise AssertionError(keys) from error


@pytest.mark.parametrize(
    ("generation", "keys", "message"),
    [
        (3, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope_type is 'yarn'"),
        (2, {"rope.scaling.factor": 4.0}, "rope_type is 'linear'"),
        (2, {"rope.freq_base_swa": 300.0}, "one base for all layers"),
        (
            3,
            {"rope.freq_base": 1e6, "rope.global.freq_base": 1e5},
            "rope.freq_base is '1000000.0'; expected the 100000",
        ),
        (3, {"rope.freq_scale": 0.125}, "rope.freq_scale is '0.125'; expected 1"),
        (3, {"rope.dimension_count": 8}, "rope.dimension_count is '8'; expected 16"),
        (3, {"attention.causal": False}, "attention.causal is 'False'; expected True"),
        (3, {"attention.scale": 0.0}, "attention.scale is '0.0'"),
        (3, {"attention.sliding_window_pattern": [True, False]}, "one true or false for each of 7 layers"),
        (3, {"attention.sliding_window_pattern": "six"}, "expected a whole number"),
        (3, {"attention.sliding_window": None, "attention.sliding_window_pattern": [True] * 7}, "the width"),
        (3, {"attention.head_count_kv": [2, 2, 2, 2, 2, 2, 1]}, "head_count_kv is .* expected a whole number"),
        (2, {"attention.sliding_window": 0}, "sliding_window is 0"),
        (2, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1"),
        (2, {"expert_count": 8}, "expert_count is '8'; expected 0"),
        (3, {"vocab_size": 7}, "vocab_size is '7'"),
        (3, {"vision.block_count": 27}, "holds an image encoder"),
        (3, {"swiglu_clamp": 3.0}, "gemma3.swiglu_clamp is '3.0'; gemcut does not know this key"),
        (2, {"context_length": "long"}, "context_length is 'long'; expected a whole number"),
    ],
)
def test_keys_gemcut_cannot_honour_are_refused(
    tmp_path: Path, generation: int, keys: dict[str, Any], message: str
) -> None:
    model = made.tiny(generation)
    path = made.write(tmp_path / "x.gguf", model, made.metadata(model) | keys)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(path).config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["output.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", [Q.F32, Q.F16])
def test_a_head_of_its_own(tmp_path: Path, name: str, kind: Q) -> None:
    model = made.tiny(2)
    table = made.named(model)["token_embd.weight"]
    equal = made.write(tmp_path / "a.gguf", model, made.metadata(model), kind=kind, tensors={name: table})
    if kind is Q.F32:
        same(equal, model)
    else:
        made.logits(equal, IDS)
    other = table.copy()
    other[-1, -1] += 1.0
    path = made.write(tmp_path / "b.gguf", model, made.metadata(model), kind=kind, tensors={name: other})
    with pytest.raises(CheckpointError, match=f"{name} differs from the embedding"):
        made.logits(path, IDS)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        quantize_checkpoint(resolve(path), tmp_path / "out", Quantization("int8"))
    assert not (tmp_path / "out").exists()
    short = made.write(tmp_path / "c.gguf", model, made.metadata(model), kind=kind, tensors={name: table[:-1]})
    with pytest.raises(CheckpointError, match="unlike the embedding"):
        resolve(short).config()


def test_rotary_constants(tmp_path: Path) -> None:
    """Old exporters' frequencies are skipped, factors of one too; factors that stretch are refused."""
    model = made.tiny(2)
    ones = np.ones(8, np.float32)
    tensors = {"blk.0.self_attn.rotary_emb.inv_freq": ones * 0.3, "rope_freqs.weight": ones}
    same(made.write(tmp_path / "a.gguf", model, made.metadata(model), tensors=tensors), model)
    path = made.write(tmp_path / "b.gguf", model, made.metadata(model), tensors={"rope_freqs.weight": ones * 2})
    with pytest.raises(CheckpointError, match="stretches the rotary angles"):
        resolve(path).config()


def test_rows_without_tokens(tmp_path: Path) -> None:
    """A table padded to a multiple: the file may have fewer tokens, or dummies as both converters write them."""
    model = made.tiny(2, vocab_size=made.VOCAB + 3)
    tokens, scores, types = made.vocabulary()
    dummies = ([f"[PAD{i}]" for i in range(3)], [f"[PAD{made.VOCAB + i}]" for i in range(3)])
    paddings: list[tuple[list[str], int]] = [([], 1), (dummies[0], 4), (dummies[1], 5)]
    for number, (names, kind) in enumerate(paddings):
        vocab = (tokens + names, scores + [-1.0] * len(names), types + [kind] * len(names))
        path = made.write(tmp_path / f"{number}.gguf", model, made.metadata(model), vocab=vocab)
        same(path, model)
        assert resolve(path).tokenizer().vocab_size == made.VOCAB


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"general.type": "adapter", "adapter.type": "lora", "general.base_model.0.name": "Gemma 2 2b It"},
         "is a LoRA adapter of Gemma 2 2b It, not a model; merge it into its base"),
        ({"adapter.type": "lora"}, "is a LoRA adapter of a gemma2 model"),
        ({"general.type": "mmproj"}, "image encoder .mmproj. that belongs to a model"),
        ({"general.type": "imatrix"}, "importance matrix"),
    ],
)  # fmt: skip
def test_files_that_are_no_model(tmp_path: Path, general: dict[str, str], message: str) -> None:
    model = made.tiny(2)
    path = made.write(tmp_path / "x.gguf", model, made.metadata(model), general=general)
    with pytest.raises(CheckpointError, match=message):
        resolve(path).config()


# ---- types ----------------------------------------------------------------------------------------------------------


def test_every_type_of_the_gguf_library_is_known() -> None:
    for kind in Q:
        assert (ggml_types.TYPES[kind].name, ggml_types.TYPES[kind].block, ggml_types.TYPES[kind].nbytes) == (
            kind.name,
            *GGML_QUANT_SIZES[kind],
        )
    assert not ggml_types.REMOVED.keys() & ggml_types.TYPES.keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales overflow
@pytest.mark.parametrize("kind", [each for each in Q if ggml_types.TYPES[each].readable])
def test_every_readable_type_is_read(tmp_path: Path, kind: Q) -> None:
    """One matrix is replaced by random blocks of the type; gguf's own dequantization says what they mean."""
    import gguf

    model = made.tiny(2, hidden_size=256, intermediate_size=256)
    path = made.write(tmp_path / "x.gguf", model, made.metadata(model), skip=("blk.0.ffn_up.weight",))
    block, nbytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (256, 256 // block * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, value in made.metadata(model).items():
        made.add(writer, f"gemma2.{key}", value)
    for name, value in made.named(model).items():
        if name == "blk.0.ffn_up.weight":
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (_, found), *_ = resolve(path).tensors(only={"layers.0.mlp.up_proj.weight"})
    assert isinstance(found, torch.Tensor)
    if kind is Q.BF16:
        expected = torch.from_numpy(raw).view(torch.bfloat16).float()
    else:
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(np.asarray(gguf.quants.dequantize(raw, kind), np.float32))
    assert torch.equal(found.float().nan_to_num(0.5, 1, -1), expected.view(256, 256).nan_to_num(0.5, 1, -1))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "type Q4_2, which llama.cpp removed; take the Q4_0 file"),
        (31, "type Q4_0_4_4, which llama.cpp removed; take the Q4_0 file"),
        (32, "type Q4_0_4_8, which"),
        (33, "type Q4_0_8_8, which"),
        (36, "type IQ4_NL_4_4, which llama.cpp removed; take the IQ4_NL file"),
        (139, "type 139, one of ik_llama.cpp's own; take"),
        (4711, "type 4711, which gemcut does not know; take"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, number: int, message: str) -> None:
    model = made.tiny(2, hidden_size=256, intermediate_size=256)
    path = made.write(tmp_path / "x.gguf", model, made.metadata(model))
    raw = path.read_bytes()
    name = b"blk.3.ffn_down.weight"
    at = raw.index(name) + len(name) + 4 + 16
    changed = raw[:at] + number.to_bytes(4, "little") + raw[at + 4 :]
    path.write_bytes(changed)
    with pytest.raises(GemcutError, match=f"blk.3.ffn_down.weight' has {message}"):
        resolve(path).config()


@pytest.mark.parametrize("kind", [each for each in Q if not ggml_types.TYPES[each].readable])
def test_types_without_a_dequantizer(tmp_path: Path, kind: Q) -> None:
    import gguf

    block, nbytes = GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma2")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 256 // block * nbytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = (
        f"blk.0.ffn_up.weight has type {kind.name}, which cannot be dequantized here; take a file quantized as Q4_K"
    )
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / "x.gguf").config()
