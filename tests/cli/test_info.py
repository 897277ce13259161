"""gemcut info: this machine, and a model's shape, chat format and licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from gguf.constants import GGMLQuantizationType

import gemcut
import support
from checkpoint import gguf_files
from gemcut.cli.info import quantization, quantization_words
from gemcut.quantization.spec import Quantization
from gemcut.text.tokenizer import Tokenizer

from .conftest import Cli, process


def keys(value: Any) -> Iterator[str]:
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def test_this_machine(cli: Cli) -> None:
    report = json.loads(cli("info", "--json").out)
    assert report["gemcut"] == gemcut.__version__
    assert report["torch"] == torch.__version__
    cpu = report["devices"][0]
    assert (cpu["device"], cpu["threads"]) == ("cpu", torch.get_num_threads())
    assert isinstance(cpu["free_bytes"], int)
    assert report["dtypes"] == ["float32", "bfloat16", "float16"]
    packages = {entry["package"]: entry["version"] for entry in report["optional"]}
    assert packages["transformers"] == transformers.__version__
    assert all(re.fullmatch(r"[a-z0-9_]+", key) for key in keys(report))
    text = cli("info").out
    for part in (torch.__version__, "bfloat16", "gemcut cache", "hub cache", "cpu, ", "pip install -e '.[demo]'"):
        assert part in text


def test_kernels(cli: Cli, tiny: Path) -> None:
    """Every part names what computes it and why each other code does not."""
    report = json.loads(cli("info", "--kernels", "--json").out)
    assert (report["model"], report["dtype"]) == ("gemma-2-27b", "bfloat16")
    cpu = report["devices"][0]
    assert cpu["device"] == "cpu"
    parts = cpu["parts"]
    reason = "needs an NVIDIA GPU"
    for format in ("whole", "int8", "nf4"):
        assert parts[f"{format}_layers"]["not"]["cuda"] == reason
    assert parts["attention"] == {"uses": ["eager"], "not": {"hopper": reason, "triton": reason}}
    assert parts["between_products"]["uses"][0] in ("cpu", "plain")
    assert parts["decode"] == {"uses": ["step by step (CUDA graphs: needs an NVIDIA GPU)"], "not": {}}
    for part in parts:
        assert re.fullmatch(r"[a-z0-9_]+", part)
    text = cli("info", tiny, "--kernels").out
    assert "not triton: needs an NVIDIA GPU" in text
    assert "attention on cpu" in text
    assert json.loads(cli("info", "9b", "--kernels", "--json").out)["model"] == "9b"


def test_a_folder(cli: Cli, tiny: Path) -> None:
    report = json.loads(cli("info", tiny, "--json").out)
    config = json.loads((tiny / "config.json").read_text())
    expected = {
        "model": str(tiny),
        "path": str(tiny),
        "missing": None,
        "quantization": None,
        "architecture": config["model_type"],
        "layers": config["num_hidden_layers"],
        "full_layers": config["layer_types"].count("full_attention"),
        "sliding_layers": config["layer_types"].count("sliding_attention"),
        "sliding_window": config["sliding_window"],
        "context": 8192,
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "query_heads": config["num_attention_heads"],
        "key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocabulary_size": 256_000,
        "attention_soft_cap": 5.0,
        "logit_soft_cap": 3.0,
        "stop_tokens": [{"id": 1, "token": "<eos>"}, {"id": 107, "token": "<end_of_turn>"}],
        "chat_template": "gemma",
        "instruction_tuned": True,
        "licence_notice": None,
    }
    assert {name: report[name] for name in expected} == expected
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["size_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(re.fullmatch(r"[a-z0-9_]+", key) for key in keys(report))
    text = cli("info", tiny).out
    for part in ("8,192", "4: 2 full, 2 sliding", "attention 5, logits 3", "1 <eos>", "none came with these files"):
        assert part in text


def test_no_tokenizer_is_built(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would take a second or two; the stop tokens and the chat format are looked up instead."""
    model = gguf_files.tiny(2, hidden_size=64)
    file = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model))
    before = [cli("info", path, "--json").out for path in (tiny, file)]

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a tokenizer was built")

    for name in ("from_folder", "from_gguf_vocab", "quick_from_gguf_vocab"):
        monkeypatch.setattr(Tokenizer, name, built)
    assert [cli("info", path, "--json").out for path in (tiny, file)] == before
    assert '"chat_template": "gemma"' in before[0]


def test_a_stop_token_that_is_no_special_one_is_named_too(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "x")
    (tmp_path / "x" / "generation_config.json").write_text('{"eos_token_id": [1, 200000]}')
    found = json.loads(cli("info", tmp_path / "x", "--json").out)["stop_tokens"]
    real = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert found == [{"id": i, "token": real.id_to_token(i)} for i in (1, 107, 200_000)]


def test_a_damaged_tokenizer_is_said(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "x")
    file = tmp_path / "x" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:3_000_000])
    run = cli("info", tmp_path / "x")
    assert run.code == 2
    assert str(file) in run.error


def test_gemma_3_270m(cli: Cli) -> None:
    support.gguf_path()  # skips without the demo extra
    report = json.loads(cli("info", "gemma-3-270m", "--json").out)
    assert report["parameters"] == 268_098_176
    assert (report["layers"], report["full_layers"], report["sliding_layers"]) == (18, 3, 15)
    assert report["stop_tokens"] == [{"id": 1, "token": "<eos>"}, {"id": 106, "token": "<end_of_turn>"}]
    assert report["instruction_tuned"] is False
    assert "Gemma Terms of Use" in report["licence_notice"]
    text = cli("info", "gemma-3-270m").out
    assert "Gemma Terms of Use" in text
    assert "use gemcut generate" in text


@pytest.mark.slow
def test_a_gated_or_absent_member_of_the_family_is_described_as_published(tmp_path: Path) -> None:
    run = process("info", "27b-it", "--json", HF_HOME=str(tmp_path))
    assert run.code == 0
    report = json.loads(run.out)
    assert report["parameters"] == 27_227_128_320
    assert report["path"] is None
    assert "google/gemma-2-27b-it" in report["missing"]
    assert "Gemma Terms of Use" in report["licence_notice"]
    assert "not here: " in process("info", "27b-it", HF_HOME=str(tmp_path)).out
    run = process("info", "27b-it", "--revision", "float16", HF_HOME=str(tmp_path))
    assert run.code == 2
    assert "float16" in run.error


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}'])
def test_folders_that_are_no_gemma(cli: Cli, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    run = cli("info", tmp_path)
    assert run.code == 2
    assert run.out == ""
    assert str(tmp_path) in run.error


def test_a_file_that_is_no_gguf(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"no such thing")
    run = cli("info", file)
    assert run.code == 2
    assert "model.gguf" in run.error


def test_quantization() -> None:
    def words(spec: Quantization) -> str:
        return quantization_words(quantization(spec))

    assert quantization(Quantization("nf4")) == {
        "format": "nf4",
        "block_size": 64,
        "double_quant": True,
        "head": None,
        "skip": None,
    }
    assert words(Quantization("nf4")) == "nf4, blocks of 64, double quantization, head whole"
    spec = Quantization("fp4", double_quant=False, block_size=128, head="int8", skip=("o_proj", "lm_head"))
    assert words(spec) == "fp4, blocks of 128, int8 head, whole too: o_proj"
    assert words(Quantization("int8")) == "int8, head whole"
    assert quantization(Quantization("int8"))["block_size"] is None


def test_a_quantized_gguf_says_that_it_is_expanded(cli: Cli, tmp_path: Path) -> None:
    """Sizes by arithmetic: whole matrices take 2 bytes a value, norms 4."""
    model = gguf_files.tiny(2, hidden_size=64)
    path = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model), kind=GGMLQuantizationType.Q8_0)
    values = sum(p.numel() * (4 if p.ndim == 1 else 2) for p in model.parameters())
    out = cli("info", path).out
    assert "Q8_0 × 29" in out  # seven matrices in each of four layers, and the embedding
    assert f"expanded while loading: {values / 1e3:.0f} kB in bfloat16" in out
    assert "Its Q8_0 weights are expanded" in cli("plan", path, "--memory", "1GB").out
    report = json.loads(cli("info", path, "--json").out)
    assert report["gguf_types"] == {"Q8_0": 29}
    assert report["expanded_bytes"]["bfloat16"] == values
    whole = gguf_files.write(tmp_path / "y.gguf", model, gguf_files.metadata(model), kind=GGMLQuantizationType.F16)
    assert "expanded" not in cli("info", whole).out + cli("plan", whole, "--memory", "1GB").out
