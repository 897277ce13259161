"""Checkpoints that transformers with bitsandbytes wrote, read here; and everything that can be wrong with one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gemcut.checkpoint.names import hf_module
from gemcut.checkpoint.quantize import quantize_checkpoint
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.write import save_folder
from gemcut.errors import CheckpointError
from gemcut.loading import export_network, load_network
from gemcut.model.dense import dense_logits
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.four_bit import block_absmax
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import FourBitWeight, Int8Weight
from support import gguf_path, hf_model, save_checkpoint, tiny_config

bitsandbytes = pytest.importorskip("bitsandbytes")

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4-stored-as-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
    "nf4-skip": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": ["o_proj", "lm_head"],
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2 in bf16 whose rows are whole blocks."""
    config = tiny_config(hidden_size=128, intermediate_size=192, num_hidden_layers=2, head_dim=32)
    return save_checkpoint(tmp_path_factory.mktemp("whole") / "model", hf_model(config, dtype=torch.bfloat16))


def cut_by_transformers(whole: Path, folder: Path, kind: str, shard: str = "5GB") -> tuple[Path, Any]:
    """The folder that ``save_pretrained`` writes of a quantized model that has not run, and that model."""
    config = BitsAndBytesConfig(**CONFIGS[kind])
    model = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=config, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu"
    )
    model.save_pretrained(folder, max_shard_size=shard)
    return folder, model


def decoded_by_bitsandbytes(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """A quantized layer's matrix as bitsandbytes decodes it to ``dtype``."""
    weight = module.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = dtype
        return torch.as_tensor(bitsandbytes.functional.dequantize_4bit(weight.data.view(torch.uint8), state))
    scale = weight.SCB if weight.SCB is not None else module.state.SCB
    codes = weight.CB if weight.CB is not None else weight.data
    return codes.float() * scale.float()[:, None] / 127.0


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saved_loads_with_equal_weights_and_logits(
    kind: str, shard: str, whole: Path, tmp_path: Path
) -> None:
    folder, model = cut_by_transformers(whole, tmp_path / "cut", kind, shard)
    source = resolve(folder)
    spec = source.quantization
    assert spec is not None
    assert spec.format == kind.split("-")[0]
    assert kind == "int8" or spec.double_quant == (kind == "nf4-nested")
    modules = {
        f"layers.{i}.{ours}.weight": model.get_submodule(f"model.layers.{i}.{theirs}")
        for i in range(2)
        for ours, theirs in (
            ("attention.q_proj", "self_attn.q_proj"),
            ("attention.o_proj", "self_attn.o_proj"),
            ("mlp.up_proj", "mlp.up_proj"),
            ("mlp.down_proj", "mlp.down_proj"),
        )
    }
    packed = 0
    for name, weight in source.tensors():
        if name not in modules:
            continue
        if isinstance(weight, torch.Tensor):
            assert kind == "nf4-skip"
            assert "o_proj" in name
            assert torch.equal(weight, modules[name].weight)
            continue
        packed += 1
        theirs = decoded_by_bitsandbytes(modules[name], torch.bfloat16)
        ours = dequantize_weight(weight, torch.bfloat16)
        if isinstance(weight, Int8Weight):
            torch.testing.assert_close(dequantize_weight(weight, torch.float32), theirs, rtol=1e-6, atol=0)
        else:
            assert torch.equal(ours, theirs.view_as(ours))
            assert block_absmax(weight).isfinite().all()
    assert packed == len(modules) - (2 if kind == "nf4-skip" else 0)

    # The reference: transformers' network with the matrices that bitsandbytes decodes, in fp32.
    reference = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                target = reference.get_submodule(name).weight
                target.copy_(decoded_by_bitsandbytes(module, torch.float32).view_as(target))
        ids = torch.arange(5, 45)
        expected = reference(input_ids=ids[None]).logits[0]
    ours = load_network(
        source, dtype=torch.float32, device=torch.device("cpu"), quantization=spec.replace(compute_dtype=torch.float32)
    )
    torch.testing.assert_close(dense_logits(ours, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_was_saved_after_a_forward_pass_on_a_cpu_loads(whole: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """With AVX512-BF16 the pass packs weights another way, and saving nests their statistics anew, in their dtype.

    Their packing is called here, so that every processor tests it.
    """
    config = BitsAndBytesConfig(**CONFIGS["nf4-nested"])
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=config, dtype=dtype, device_map="cpu")
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        weight = layer.weight
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
                weight.data, weight.quant_state
            )
    model.save_pretrained(tmp_path / "model")
    source = resolve(tmp_path / "model")
    states = [bytes(t.tolist()) for n, t in load_file(tmp_path / "model/model.safetensors").items() if "state" in n]
    assert {json.loads(state)["nested_dtype"] for state in states} == {str(dtype).removeprefix("torch.")}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, device_map="cpu")
    seen = 0
    for name, found in source.tensors(dtype=dtype):
        if isinstance(found, FourBitWeight):
            module = theirs.get_submodule(hf_module(name))
            assert torch.equal(dequantize_weight(found, dtype), decoded_by_bitsandbytes(module, dtype)), name
            seen += 1
    assert seen == len(layers) == 14


def test_a_network_in_bf16_runs_from_a_cut_folder(whole: Path, tmp_path: Path) -> None:
    folder, _ = cut_by_transformers(whole, tmp_path / "cut", "nf4-nested")
    model = load_network(resolve(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.quantization is not None
    weights = model.layers[0].attention.qkv_proj.weights
    assert [type(weight) for weight in weights] == [FourBitWeight] * 3
    cut_here = load_network(
        resolve(whole), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=Quantization("nf4")
    )
    ids = torch.arange(5, 45)
    # transformers' nested statistics may be the neighbouring code: nearly, not bit for bit
    torch.testing.assert_close(dense_logits(model, ids), dense_logits(cut_here, ids), rtol=0.05, atol=0.05)


def test_the_head_of_a_cut_folder_can_be_cut_while_loading(whole: Path, tmp_path: Path) -> None:
    folder, _ = cut_by_transformers(whole, tmp_path / "cut", "nf4")
    asked = Quantization("nf4", head="int8")
    model = load_network(resolve(folder), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=asked)
    assert isinstance(model.embed.weights[0], Int8Weight)


def test_another_format_is_refused(whole: Path, tmp_path: Path) -> None:
    folder, _ = cut_by_transformers(whole, tmp_path / "cut", "nf4")
    with pytest.raises(CheckpointError, match="quantized already"):
        load_network(
            resolve(folder), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=Quantization("int8")
        )


# ---- bad folders -----------------------------------------------------------------------------------------------------

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
Damage = Callable[[dict[str, torch.Tensor]], None]


def _state(**changes: Any) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        state = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _set(leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{NAME}.{leaf}"] = change(tensors[f"{NAME}.{leaf}"]).contiguous()

    return apply


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no state": (lambda t: t.pop(STATE), "no quant_state"),
    "no absmax": (lambda t: t.pop(f"{NAME}.absmax"), "absmax is missing"),
    "no nested table": (lambda t: t.pop(f"{NAME}.nested_quant_map"), "nested_quant_map is missing"),
    "no codes": (lambda t: t.pop(NAME), "missing"),
    "short absmax": (_set("absmax", lambda x: x[:-1]), "absmax is"),
    "absmax of another dtype": (_set("absmax", lambda x: x.float()), "absmax is"),
    "short codes": (lambda t: t.update({NAME: t[NAME][:-8].contiguous()}), "bytes of codes"),
    "another table": (_set("quant_map", lambda x: x * 1.1), "not the table"),
    "another nested table": (_set("nested_quant_map", lambda x: x * 1.1), "not the table"),
    "NaN in statistics": (_set("nested_absmax", lambda x: x * float("nan")), "NaN"),
    "wrong shape": (_state(shape=[128, 191]), "bytes of codes"),
    "transposed shape": (_state(shape=[128, 192]), "shape"),
    "huge shape": (_state(shape=[1 << 40, 1 << 40]), "wrong shape"),
    "odd blocksize": (_state(blocksize=63), "blocksize"),
    "blocksize as text": (_state(blocksize="64"), "blocksize"),
    "unknown type": (_state(quant_type="nf3"), "nf3"),
    "unknown dtype": (_state(dtype="float8"), "dtype"),
    "unknown key": (_state(extra=1), "unknown 'extra'"),
    "missing key": (_state(dtype=None), "lacks 'dtype'"),
    "dtype that is a list": (_state(dtype=["bfloat16"]), "dtype"),
    "several states": (lambda t: t.update({STATE[:-3] + "fp4": t[STATE].clone()}), "several quant_state tensors"),
    "infinite offset": (_state(nested_offset=float("inf")), "finite"),
    "offset beyond fp32": (_state(nested_offset=1e39), "finite"),
    "offset beyond every float": (_state(nested_offset=10**400), "finite"),
    "nested blocks": (_state(nested_blocksize=128), "nested blocks"),
    "nested dtype": (_state(nested_dtype="int8"), "nested blocks"),
    "no nested dtype": (_state(nested_dtype=32), "nested blocks"),
    "no JSON": (lambda t: t.update({STATE: torch.full((40,), 91, dtype=torch.uint8)}), "JSON"),
    "long state": (lambda t: t.update({STATE: torch.zeros(5000, dtype=torch.uint8)}), "short text"),
    "a stray companion": (
        lambda t: t.update({"model.norm.weight.absmax": torch.zeros(3, dtype=torch.uint8)}),
        "quant_state",
    ),
}


@pytest.fixture(scope="module")
def cut(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_by_transformers(whole, tmp_path_factory.mktemp("cut") / "model", "nf4-nested")[0]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_named(kind: str, cut: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[kind]
    tensors = load_file(cut / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((cut / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=words) as caught:
        list(resolve(tmp_path).tensors())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by GPTQ, which is not supported"),
        ({"quant_method": "awq"}, "by AWQ, which is not supported"),
        ({"quant_method": None}, "names no quant_method"),
        ({}, "names no quant_method"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "nf3"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "int3"},
            "'int3'; expected one of",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": "o_proj"}, "skip_modules"),
        ([1], "no JSON object"),
        (None, "no quantization_config"),
    ],
)
def test_bad_configs_are_refused_by_name(change: Any, words: str, cut: Path, tmp_path: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["quantization_config"] = change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=words):
        list(resolve(tmp_path).tensors())


@pytest.mark.parametrize(
    "changes", [{"load_in_4bit": False, "load_in_8bit": True}, {"bnb_4bit_quant_type": "fp4"}], ids=["int8", "fp4"]
)
def test_a_config_of_another_format_than_the_tensors_is_refused(
    changes: dict[str, Any], cut: Path, tmp_path: Path
) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"_proj\.weight is nf4, but config.json says (int8|fp4)"):
        list(resolve(tmp_path).tensors())


def test_whole_tensors_under_a_config_of_cut_ones_are_refused(whole: Path, tmp_path: Path) -> None:
    config = {**json.loads((whole / "config.json").read_text()), "quantization_config": {"load_in_8bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"says int8, but every tensor is whole; .*remove quantization_config"):
        list(resolve(tmp_path).tensors())


@pytest.mark.parametrize("layout", [torch.tensor(float("nan")), torch.zeros(2, dtype=torch.uint8)])
def test_a_damaged_layout_of_int8_is_named(layout: torch.Tensor, whole: Path, tmp_path: Path) -> None:
    folder, _ = cut_by_transformers(whole, tmp_path / "model", "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_format"] = layout
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: weight_format is"):
        list(resolve(folder).tensors())


def test_an_old_layout_of_int8_is_refused(whole: Path, tmp_path: Path) -> None:
    folder, _ = cut_by_transformers(whole, tmp_path / "cut", "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="old layout"):
        list(resolve(folder).tensors())


def test_a_config_of_the_old_kind_is_read(cut: Path, tmp_path: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes())
    spec = resolve(tmp_path).quantization
    assert spec == Quantization("nf4", double_quant=False, compute_dtype=torch.float32)


@pytest.mark.slow
def test_the_real_270m_in_both_directions(tmp_path: Path) -> None:
    source = resolve(gguf_path())
    cpu = torch.device("cpu")
    model = load_network(source, dtype=torch.bfloat16, device=cpu)
    whole = save_folder(tmp_path / "whole", source.config(), export_network(model), source.tokenizer())
    ids = torch.tensor(
        source.tokenizer().encode("In a small village by the sea there lived an old man of many talents.")
    )

    quantize_checkpoint(source, tmp_path / "ours", Quantization("nf4"))
    cut_by_transformers(whole, tmp_path / "theirs", "nf4-nested")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        here = dense_logits(load_network(resolve(folder), dtype=torch.bfloat16, device=cpu), ids)
        there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        assert isinstance(there.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
        with torch.no_grad():
            expected = there(input_ids=ids[None]).logits[0].float()
        # two bf16 computations of one network; a wrong weight or statistic gives errors near 1
        assert (here - expected).norm() / expected.norm() < 0.03
        assert (here.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
