"""BitsAndBytesConfig and quantized loading, beside transformers with bitsandbytes on a CPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers

import support
from gemcut import Gemma, hf
from gemcut.errors import CheckpointError, GemcutError, ParameterError, UnsupportedError
from gemcut.hf.model import GemmaForCausalLM
from gemcut.quantization.four_bit import block_absmax
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import FourBitWeight, Int8Weight

#: The model card's three configurations.
INT8 = {"load_in_8bit": True}
FOUR_BIT = {"load_in_4bit": True}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
    "bnb_4bit_quant_type": "nf4",
}
CARD = {"int8": INT8, "4-bit": FOUR_BIT, "nf4": NF4}
SNIPPET = """
# pip install bitsandbytes accelerate
from transformers import AutoTokenizer, AutoModelForCausalLM, BitsAndBytesConfig
{config}
tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-27b-it")
model = AutoModelForCausalLM.from_pretrained(
    "google/gemma-2-27b-it",
    quantization_config=quantization_config)

input_text = "Write me a poem about Machine Learning."
input_ids = tokenizer(input_text, return_tensors="pt").to("cuda")

outputs = model.generate(**input_ids)
print(tokenizer.decode(outputs[0]))
"""
CONFIGS = {
    "int8": "quantization_config = BitsAndBytesConfig(load_in_8bit=True)",
    "4-bit": "quantization_config = BitsAndBytesConfig(load_in_4bit=True)",
    "nf4": """
import torch
nf4_config = BitsAndBytesConfig(load_in_4bit=True,
                                bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16,
                                bnb_4bit_quant_type="nf4")
quantization_config = nf4_config
""",
}
IDS = torch.tensor([[2, 5, 77, 1000, 5, 9, 31, 8]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint whose row length is a multiple of a block, which bitsandbytes' products need."""
    config = support.tiny_config(
        vocab_size=256000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = support.hf_model(config, dtype=torch.bfloat16)
    return support.save_checkpoint(
        tmp_path_factory.mktemp("cut") / "tiny", model, tokenizer=True, bos_token_id=2, eos_token_id=1, pad_token_id=0
    )


def theirs(folder: Path, config: dict[str, Any]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**config), attn_implementation="eager"
    )


def ours(folder: Path, **config: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf.BitsAndBytesConfig(**config))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CARD))
def test_card_snippets_run_with_the_import_changed(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = SNIPPET.format(config=CONFIGS[name]).replace("from transformers import", "from gemcut import")
    program = program.replace('"google/gemma-2-27b-it"', repr(str(checkpoint)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "cuda" is taken as "cpu" here
        exec(compile(program, name, "exec"), {})
    assert capsys.readouterr().out.startswith("<bos>Write me a poem about Machine Learning.")


@pytest.mark.parametrize("name", list(CARD))
def test_stored_bytes_and_logits_are_those_of_bitsandbytes(name: str, checkpoint: Path) -> None:
    reference, model = theirs(checkpoint, CARD[name]), ours(checkpoint, **CARD[name])
    assert model.dtype is reference.dtype is torch.bfloat16
    for index, layer in enumerate(reference.model.layers):
        attention, mlp = model.gemma.model.layers[index].attention, model.gemma.model.layers[index].mlp
        q, k, v = attention.qkv_proj.weights
        gate, up = mlp.gate_up_proj.weights
        pairs = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": attention.o_proj.weights[0],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": mlp.down_proj.weights[0],
        }
        for where, weight in pairs.items():
            parameter = layer.get_submodule(where).weight
            if name == "int8":
                assert isinstance(weight, Int8Weight)
                assert torch.equal(weight.codes, parameter.data), where
                assert torch.equal(weight.absmax, parameter.SCB.flatten()), where
                continue
            assert isinstance(weight, FourBitWeight)
            state = parameter.quant_state
            assert torch.equal(weight.codes, parameter.data.flatten()), where
            assert weight.quant_type == state.quant_type
            if weight.nested is None:
                assert torch.equal(weight.absmax, state.absmax), where
            else:
                # Their nearest of 256 goes through a table of 65536 bins: at worst the neighbour, or a bin's width off.
                decoded = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                near = (block_absmax(weight) - decoded).abs() < 2 / 65535 * weight.nested.scale.max()
                assert (near | ((weight.absmax.int() - state.absmax.int()).abs() <= 1)).all(), where
    with torch.no_grad():
        expected = reference(IDS).logits.float()
        whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")(IDS).logits
    error = (model(IDS).logits - expected).square().mean().sqrt()
    # Their bf16 steps, and for int8 their 8-bit activations, are the difference: a fraction of the format's own error.
    format_error = (whole.float() - expected).square().mean().sqrt()
    assert error < (1.0 if name == "int8" else 0.15) * format_error


@pytest.mark.parametrize("config", [{}, INT8, FOUR_BIT, NF4, {**INT8, "llm_int8_skip_modules": ["lm_head", "o_proj"]}])
def test_dictionaries_are_those_of_transformers(config: dict[str, Any]) -> None:
    mine, reference = hf.BitsAndBytesConfig(**config), transformers.BitsAndBytesConfig(**config)
    assert mine.to_dict() == reference.to_dict()
    assert mine.to_diff_dict() == reference.to_diff_dict()
    assert mine.to_json_string() == reference.to_json_string()
    assert json.loads(mine.to_json_string(use_diff=False)) == json.loads(reference.to_json_string(use_diff=False))
    assert mine.is_quantizable() == reference.is_quantizable()
    assert mine.quantization_method() == reference.quantization_method()
    assert hf.BitsAndBytesConfig.from_dict(reference.to_dict()).to_dict() == reference.to_dict()
    assert dict(mine) == dict(reference)


def test_every_field_reaches_the_specification() -> None:
    config = hf.BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["o_proj"])
    assert config.to_quantization() == Quantization("nf4", compute_dtype=torch.bfloat16, skip=("o_proj", "lm_head"))
    plain = hf.BitsAndBytesConfig(load_in_4bit=True).to_quantization()
    assert plain == Quantization("fp4", double_quant=False, compute_dtype=torch.float32)
    assert hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0).to_quantization() == Quantization("int8")
    config, unused = hf.BitsAndBytesConfig.from_dict(NF4, return_unused_kwargs=True, load_in_4bit=True, other=1)
    assert unused == {"other": 1}


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ParameterError, "both True"),
        ({"load_in_4bit": "yes"}, ParameterError, "load_in_4bit is 'yes'; expected True or False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, ParameterError, "'nf4' or 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int4"}, ParameterError, "expected bfloat16, float16"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": 3}, ParameterError, "expected a torch.dtype or its name"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bits"}, ParameterError, "bnb_4bit_quant_storage is 'bits'"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, ParameterError, "a number of 0 or more"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, ParameterError, "a number of 0 or more"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "o_proj"}, ParameterError, "a list of module names"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, UnsupportedError, "llm_int8_has_fp16_weight"),
        ({"load_in_8bit": True, "llm_int8_tresh": 1.0}, ParameterError, "no argument 'llm_int8_tresh'"),
        ({"load_in_8bit": True, "quant_method": "gptq"}, ParameterError, "quant_method is 'gptq'"),
    ],
)
def test_bad_configs_are_refused_by_name(config: dict[str, Any], error: type[GemcutError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        hf.BitsAndBytesConfig(**config)
    assert "\n" not in str(caught.value)


def test_a_config_that_chooses_nothing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ParameterError, match="sets neither load_in_4bit nor load_in_8bit"):
        ours(checkpoint)


def test_quant_storage_is_accepted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="packed bytes are kept as uint8"):
        hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16).to_quantization()


@pytest.mark.parametrize(
    "given",
    [
        {"quantization_config": NF4},
        {"quantization_config": transformers.BitsAndBytesConfig(**NF4)},
        {"load_in_4bit": True},
        {"load_in_8bit": True},
    ],
)
def test_dictionaries_foreign_objects_and_old_flags_work(checkpoint: Path, given: dict[str, Any]) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, **given)
    eight = "load_in_8bit" in given
    assert (model.is_quantized, model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (True, eight, not eight)
    assert model.quantization_config.load_in_4bit is not eight


def test_contradictions_and_other_methods_are_refused(checkpoint: Path) -> None:
    load = hf.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ParameterError, match="load_in_4bit and quantization_config were both given"):
        load(checkpoint, load_in_4bit=True, quantization_config=NF4)
    with pytest.raises(UnsupportedError, match="quant_method 'gptq', which is not supported"):
        load(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ParameterError, match="quantization_config is of type str"):
        load(checkpoint, quantization_config="nf4")


def test_skipped_modules_stay_whole(checkpoint: Path) -> None:
    model = ours(checkpoint, **NF4, llm_int8_skip_modules=["o_proj"])
    attention = model.gemma.model.layers[0].attention
    assert isinstance(attention.o_proj.weights[0], torch.Tensor)
    assert isinstance(attention.qkv_proj.weights[0], FourBitWeight)


def test_a_cut_model_keeps_its_dtype(checkpoint: Path) -> None:
    model = ours(checkpoint, **NF4)
    assert model.to("cpu") is model
    for change in (lambda: model.to(torch.float16), model.half, model.float):
        with pytest.raises(UnsupportedError, match="load it with dtype="):
            change()


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["5GB", "20MB"])
@pytest.mark.parametrize("name", list(CARD))
def test_a_saved_cut_model_loads_in_transformers_and_here(
    name: str, shard: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = ours(checkpoint, **CARD[name])
    ids = torch.arange(5, 40)[None]
    before = model(ids).logits
    model.save_pretrained(tmp_path / "out", max_shard_size=shard)
    hf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "out")

    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert torch.equal(again(ids).logits, before)

    # Theirs: loaded without a word of configuration, compared before it runs (which would change its statistics).
    foreign = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    for index, layer in enumerate(foreign.model.layers):
        weight = model.gemma.model.layers[index].mlp.down_proj.weights[0]
        parameter = layer.mlp.down_proj.weight
        if name == "int8":
            codes = parameter.CB if parameter.CB is not None else parameter.data
            assert torch.equal(codes, weight.codes)
            continue
        assert torch.equal(parameter.data.flatten(), weight.codes)
        state = parameter.quant_state
        assert torch.equal(state.absmax, weight.absmax)
        if weight.nested is not None:
            assert torch.equal(state.state2.absmax, weight.nested.scale)
            assert float(state.offset) == weight.nested.offset
    with torch.no_grad():
        theirs_logits = foreign(ids).logits.float()
    error = (before.float() - theirs_logits).norm() / theirs_logits.norm()
    assert error < 0.05, error


def test_an_8_bit_head_survives_saving(checkpoint: Path, tmp_path: Path) -> None:
    gemma = Gemma.load(checkpoint, quantization=Quantization("nf4", head="int8"), progress=False)
    codes = gemma.model.embed.weights[0].codes
    GemmaForCausalLM(gemma).save_pretrained(tmp_path / "out")
    hf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "out")
    again = Gemma.load(tmp_path / "out", progress=False)
    assert torch.equal(again.model.embed.weights[0].codes, codes)


def test_memory_footprint_counts_every_byte(checkpoint: Path) -> None:
    model = ours(checkpoint, **NF4)
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    norms = 64 * (4 * 2 + 1)
    blocks = linears // 64
    nested = sum(-(-count // 64 // 256) for count in [64 * 64, 32 * 64, 32 * 64, 64 * 64, *[64 * 128] * 3]) * 2
    assert model.get_memory_footprint() == 256000 * 64 * 2 + linears // 2 + blocks + 4 * nested + 4 * norms


def test_without_a_config_nothing_changes(checkpoint: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype is torch.float32
    assert not model.is_quantized
    assert model.quantization_config is None


def test_a_nan_is_named(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        ours(tmp_path, **NF4)
