"""What transformers' loader skips or tolerates in a folder loads here too, to the same logits; what is no checkpoint
gemcut reads is told by name, with what to take instead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
)

from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.safetensors_header import INDEX
from gemcut.errors import CheckpointError, ConfigError, GemcutError
from gemcut.loading import load_network
from gemcut.model.dense import dense_logits
from support import hf_model, save_checkpoint, tiny_config

IDS = torch.tensor([2, 17, 5, 300, 44, 9, 9, 120, 6, 31])


def ours(folder: Path) -> torch.Tensor:
    model = load_network(resolve(folder), dtype=torch.float32, device=torch.device("cpu"), kernels="plain")
    return dense_logits(model, IDS)


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(IDS[None]).logits[0]


def agree(folder: Path) -> None:
    torch.testing.assert_close(ours(folder), theirs(folder), atol=2e-5, rtol=1e-5)  # fp32, sums in another order


@pytest.fixture(params=["gemma2", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "tiny", hf_model(tiny_config(request.param)), max_shard_size="100KB")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def add(file: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(file), **{k.replace("__", "."): v for k, v in tensors.items()}}, file, {"format": "pt"})


def edit(file: Path, change: Any) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_rotary_buffers_at_any_place(folder: Path) -> None:
    half = torch.ones(8)
    names = ["model__rotary_emb__inv_freq", "model__layers__1__self_attn__rotary_emb__inv_freq"]
    names += ["model__rotary_emb_local__inv_freq", "rotary_emb__inv_freq", "model__rotary_emb__cos_cached"]
    names += ["model__rotary_emb__full_attention_inv_freq", "model__rotary_emb__full_attention_original_inv_freq"]
    add(files(folder)[0], **{name: half + i for i, name in enumerate(names)})
    agree(folder)
    edit(folder / INDEX, lambda d: d["weight_map"].update({"model.rotary_emb.inv_freq": files(folder)[0].name}))
    agree(folder)


def test_a_tied_head_that_the_index_lists_and_no_shard_holds(folder: Path) -> None:
    edit(folder / INDEX, lambda d: d["weight_map"].update({"lm_head.weight": files(folder)[-1].name}))
    agree(folder)


def test_a_head_equal_to_the_embedding(folder: Path) -> None:
    where = json.loads((folder / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]
    embedding = load_file(folder / where)["model.embed_tokens.weight"]
    add(files(folder)[-1], lm_head__weight=embedding.clone())
    agree(folder)  # the index does not list it
    edit(folder / INDEX, lambda d: d["weight_map"].update({"lm_head.weight": files(folder)[-1].name}))
    agree(folder)


def test_a_tensor_that_the_index_forgot(folder: Path) -> None:
    edit(folder / INDEX, lambda d: d["weight_map"].pop("model.layers.1.mlp.up_proj.weight"))
    agree(folder)


def test_an_empty_tensor_a_counter_and_a_value_head_beside_the_weights(folder: Path) -> None:
    extra = {"v_head__summary__weight": torch.ones(1, 48), "v_head__summary__bias": torch.ones(1)}
    extra["v_head__steps"] = torch.tensor([3, 4])
    extra["model__rotary_emb__inv_freq"] = torch.ones(0)
    add(files(folder)[1], **extra)
    agree(folder)
    add(files(folder)[1], **{"model__layers__0__mlp__down_proj__weight": torch.ones(0)})  # as DeepSpeed leaves them
    with pytest.raises(CheckpointError, match=r"down_proj.weight (has shape \[0\]|is there twice)"):
        ours(folder)


def test_files_beside_a_checkpoint_change_nothing(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "README.md", "model.onnx", "x.gguf"):
        (folder / name).write_bytes(b"no matter")
    (folder / "checkpoint-500").mkdir()
    agree(folder)


@pytest.mark.parametrize("era", [4, 5])
def test_both_eras_of_keys_and_missing_ones(folder: Path, era: int) -> None:
    data = json.loads((folder / "config.json").read_text())
    rope = data.pop("rope_parameters")
    data |= {"pad_token_id": -1, "use_cache": False, "cache_implementation": "static"}
    dtype = data.pop("dtype", None) or data.pop("torch_dtype", "float32")
    if era == 4:
        data["torch_dtype"] = dtype
        if data["model_type"] == "gemma2":
            data["rope_theta"] = rope["rope_theta"]
        else:
            data["rope_theta"] = rope["full_attention"]["rope_theta"]
            data["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            data["sliding_window_pattern"] = data.pop("_sliding_window_pattern", 6)
        data.pop("layer_types")
    else:
        data |= {"rope_parameters": rope, "dtype": dtype}
    for name in ("sliding_window", "bos_token_id", "attention_bias", "hidden_activation"):
        data.pop(name, None)
    (folder / "config.json").write_text(json.dumps(data))
    agree(folder)


def test_head_dim_missing_is_256(tmp_path: Path) -> None:
    """transformers' default, not hidden_size / num_attention_heads; the window is 4096."""
    folder = save_checkpoint(tmp_path / "wide", hf_model(tiny_config(head_dim=256, sliding_window=4096)))
    edit(folder / "config.json", lambda d: [d.pop("head_dim"), d.pop("sliding_window")])
    assert (resolve(folder).config().head_dim, resolve(folder).config().sliding_window) == (256, 4096)
    agree(folder)


def test_the_text_part_of_a_model_that_sees_pictures(tmp_path: Path) -> None:
    text = tiny_config("gemma3_text")
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "seeing")
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(ours(tmp_path / "seeing"), expected, atol=2e-5, rtol=1e-5)
    tensors = load_file(tmp_path / "seeing" / "model.safetensors")
    assert any("vision_tower" in name for name in tensors)
    other = {name.replace("model.language_model.", "language_model.model.") for name in tensors}
    old = {name.replace("language_model.model.", "model.language_model.") for name in tensors}
    assert other != old  # the two eras name the text network differently: both load
    for rename in (
        lambda n: n.replace("language_model.model.", "model.language_model."),
        lambda n: n.replace("model.language_model.", "language_model.model."),
    ):
        save_file({rename(name): value for name, value in tensors.items()}, tmp_path / "seeing" / "model.safetensors")
        torch.testing.assert_close(ours(tmp_path / "seeing"), expected, atol=2e-5, rtol=1e-5)


# ---- refusals that lead somewhere --------------------------------------------------------------------------------


def look(folder: Path) -> None:
    source = resolve(folder)
    source.config()
    source.generation_config()
    assert source.quantization is None
    source.tensor_shapes()


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(GemcutError) as caught:
        look(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "plain", hf_model(tiny_config()))


def test_an_adapter_is_called_an_adapter_of_its_base(plain: Path, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "google/gemma-2-2b-it", "r": 8}
    alone = tmp_path / "adapter"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(json.dumps(config))
    (alone / "adapter_model.safetensors").write_bytes(b"")
    said = ("LORA adapter of google/gemma-2-2b-it", "merge_and_unload", "take the base")
    refused(alone, *said)
    (alone / "config.json").write_bytes((plain / "config.json").read_bytes())  # trainers copy the base's
    refused(alone, *said)
    (alone / "adapter_config.json").write_text("[" * 200_000)
    refused(alone, "adapter of a base it does not name")
    (plain / "adapter_config.json").write_text(json.dumps(config))  # a merged model with its adapter's leftovers
    ours(plain)
    add(plain / "model.safetensors", **{"model__layers__0__mlp__up_proj__lora_A__weight": torch.ones(2, 2)})
    refused(plain, "lora_A", "merge it")


@pytest.mark.parametrize(
    ("stored", "parts"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["AWQ"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ"]),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, ["EXL2"]),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, ["compressed-tensors"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["fp8"]),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, ["MLX"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["MLX"]),
        ({"quantization_config": {"quant_method": ["x"] * 1000}}, ["['x', 'x'"]),
    ],
)
def test_other_quantizations_are_named(plain: Path, stored: dict[str, Any], parts: list[str]) -> None:
    edit(plain / "config.json", lambda d: d.update(stored))
    refused(plain, *parts, "whole weights", "nf4")


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"model__layers__0__mlp__up_proj__qweight": torch.ones(2, 2, dtype=torch.int32)}, ["GPTQ or AWQ"]),
        ({"model__layers__0__mlp__up_proj__q_perm": torch.ones(2, dtype=torch.int16)}, ["EXL2"]),
        ({"model__layers__0__mlp__up_proj__scales": torch.ones(2)}, ["MLX"]),
        ({"model__layers__0__mlp__up_proj__weight_scale": torch.ones(2)}, ["compressed-tensors"]),
        ({"score__weight": torch.ones(2, 48)}, ["classifier"]),
        ({"model__norm__weight": torch.ones(48).to(torch.float8_e4m3fn)}, ["F8_E4M3", "fp8", "original weights"]),
        ({"model__layers__0__mlp__up_proj__weight": torch.ones(96, 6, dtype=torch.int32)}, ["I32", "packed"]),
    ],
)
def test_their_tensors_are_named_where_the_config_says_nothing(plain: Path, tensors: Any, parts: list[str]) -> None:
    add(plain / "model.safetensors", **tensors)
    refused(plain, *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pytorch_model.bin", ["pickled", "never opened", "save_pretrained"]),
        ("consolidated.00.pth", ["pickled"]),
        ("model.ckpt", ["pickled"]),
        ("flax_model.msgpack", ["Flax", "Kaggle's transformers variant"]),
        ("_METADATA", ["Orbax", "Kaggle's transformers variant"]),
        ("2b-it/_METADATA", ["Orbax", "Kaggle's transformers variant"]),
        ("model.weights.h5", ["Keras"]),
        ("saved_model.pb", ["TensorFlow"]),
        ("gemma2-2b.task", ["LiteRT"]),
        ("model.onnx", ["ONNX"]),
        ("weights.npz", ["MLX"]),
        ("2b-it-sfp.sbs", ["gemma.cpp"]),
        ("tiny.Q4_K_M.gguf", ["GGUF", "own path"]),
    ],
)
def test_other_files_are_named(plain: Path, tmp_path: Path, name: str, parts: list[str]) -> None:
    (plain / "model.safetensors").unlink()
    alone = tmp_path / "alone"
    for folder in (plain, alone):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (plain / name).write_bytes(b"\x80\x04 not to be opened")
    refused(plain, name, *parts)
    (plain / name).rename(alone / name)
    refused(alone, name, *parts)  # without config.json, too
    if Path(name).name not in ("_METADATA", "saved_model.pb", "tiny.Q4_K_M.gguf"):
        refused(alone / name, name, *parts)  # given alone


def test_one_file_of_a_folder(plain: Path) -> None:
    refused(plain / "model.safetensors", "is one file of a checkpoint; give its folder")


def test_a_sequence_classifier(tmp_path: Path) -> None:
    Gemma2ForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    refused(tmp_path / "classifier", "Gemma2ForSequenceClassification", "judges texts", "google/gemma-2-2b-it")
    edit(tmp_path / "classifier" / "config.json", lambda d: d.pop("architectures"))
    refused(tmp_path / "classifier", "score.weight", "classifier")


# ---- files without end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [INDEX, "generation_config.json", "config.json"])
def test_json_that_is_a_trap(folder: Path, name: str) -> None:
    for trap in ("[" * 200_000, '{"weight_map":' + '{"a":' * 200_000, '{"x": ' + "9" * 5000 + "}"):
        (folder / name).write_text(trap)
        with pytest.raises(GemcutError) as caught:
            look(folder)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


def test_a_header_of_brackets(plain: Path) -> None:
    for text in (b"[" * 200_000, b'{"a":' * 200_000, b'{"a": {"dtype": ' + b"[" * 200_000):
        (plain / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        refused(plain, "damaged safetensors header")


def test_devices_and_fifos_are_no_files(plain: Path, tmp_path: Path) -> None:
    refused(Path("/dev/zero"), "neither a folder nor a regular file")
    os.mkfifo(tmp_path / "fifo.gguf")
    refused(tmp_path / "fifo.gguf", "neither a folder nor a regular file")
    (plain / "model.safetensors").unlink()
    (plain / "model.safetensors").symlink_to("/dev/zero")
    refused(plain, "model.safetensors is a device; expected a regular file")
    (plain / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(plain / "generation_config.json")
    assert resolve(plain).generation_config() == {}  # is_file says no: as if there were none


def test_a_folder_without_permission_or_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no regular file"):
        resolve(tmp_path)
