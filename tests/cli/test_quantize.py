"""gemcut quantize: a folder with its report, and one line for everything that cannot be."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers

import support
from gemcut.calibration.samples import read_calibration_text
from gemcut.calibration.streamed import compare_checkpoints
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.shard import ShardWriter
from gemcut.kernels.cpu import library
from gemcut.text import Tokenizer

from .conftest import Cli


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = support.tiny_config(
        vocab_size=256000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=128
    )
    model = support.hf_model(config, dtype=torch.bfloat16)
    return support.save_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", model, tokenizer=True)


def test_a_folder_and_a_report(cli: Cli, whole: Path, tmp_path: Path) -> None:
    run = cli("quantize", whole, tmp_path / "out", "--to", "nf4", "--head", "int8")
    assert run.code == 0
    assert run.err == ""
    assert [line.split()[:5] for line in run.out.splitlines()[1:3]] == [
        ["embed_tokens", "×", "1", "whole", "32.8"],
        ["down_proj", "×", "2", "nf4", "11.0"],
    ]
    assert run.out.splitlines()[-1].startswith(str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "gemcut_quantization.json").read_text())
    assert report["quantization"]["head"] == "int8"
    assert 0.05 < report["weights"]["model.layers.0.mlp.up_proj.weight"]["relative_error"] < 0.15
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_json(cli: Cli, whole: Path, tmp_path: Path) -> None:
    report = json.loads(cli("quantize", whole, tmp_path / "out", "--to", "int8", "--json").out)
    assert report == json.loads((tmp_path / "out" / "gemcut_quantization.json").read_text())


def test_calibration_by_a_text(cli: Cli, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run = cli("quantize", whole, tmp_path / "out", "--calibrate", tmp_path / "text.txt", "--json")
    assert run.code == 0
    assert "too short to hold a ninth of it out; 1,152 tokens are enough" in run.err
    assert json.loads(run.out)["options"]["calibration_tokens"] > 256


@pytest.mark.slow
def test_calibration_reports_what_the_held_out_text_lost(cli: Cli, whole: Path, tmp_path: Path) -> None:
    lines = [f"Chapter {i}: the {i * 7919 % 1000} quick foxes jump over {i} lazy dogs.\n" for i in range(200)]
    (tmp_path / "text.txt").write_text("".join(lines))
    run = cli("quantize", whole, tmp_path / "out", "--calibrate", tmp_path / "text.txt")
    assert run.code == 0
    report = json.loads((tmp_path / "out" / "gemcut_quantization.json").read_text())
    found, nearest = report["held_out"], report["held_out_nearest_codes"]
    assert f"perplexity {found['perplexity']:.2f}, was {found['reference_perplexity']:.2f}" in run.out
    # An independent reference: transformers, on the same held-out documents.
    tokenizer = Tokenizer.from_folder(whole)
    every = read_calibration_text(tmp_path / "text.txt", tokenizer, tokens=18432, context=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager")
    loss, count = 0.0, 0
    with torch.no_grad():
        for document in every[8::9]:
            ids = torch.tensor([document])
            loss += model(ids, labels=ids).loss.item() * (len(document) - 1)
            count += len(document) - 1
    assert found["tokens"] == count
    assert found["reference_perplexity"] == pytest.approx(math.exp(loss / count), rel=0.02)  # bf16 beside fp32
    assert 0 < found["kl"] < found["kl_p99"]
    # "Without calibration" is what a folder cut without it gives.
    assert cli("quantize", whole, tmp_path / "nearest").code == 0
    documents = [document for document in every[8::9] if len(document) > 1]
    (expected,) = compare_checkpoints(resolve(whole), [resolve(tmp_path / "nearest")], documents)
    assert nearest == pytest.approx(dataclasses.asdict(expected))
    assert f"without calibration {nearest['kl']:.4f}" in run.out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--to", "int4"), ["--to is 'int4'", "nf4, fp4, int8"]),
        (("--head", "nf4"), ["head is 'nf4'", "int8"]),
        (("--block-size", "100"), ["--block-size is 100", "64"]),
        (("--block-size", "256"), ["blocks of 256 do not divide", "64"]),
        (("--max-shard-size", "big"), ["max-shard-size is 'big'", "5GB"]),
        (("--to", "int8", "--calibrate", "README.md"), ["--calibrate is for nf4 and fp4"]),
        (("--calibrate", "/nowhere.txt"), ["/nowhere.txt", "No such file"]),
    ],
)
def test_bad_options(cli: Cli, whole: Path, tmp_path: Path, args: tuple[str, ...], parts: list[str]) -> None:
    run = cli("quantize", whole, tmp_path / "out", *args)
    assert run.code == 2
    assert run.out == ""
    for part in parts:
        assert part in run.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "is empty"), (b"\xff\xfe\x00", "is not UTF-8 text"), (b"short", "calibration needs 256")]
)
def test_bad_calibration_texts(cli: Cli, whole: Path, tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "text").write_bytes(data)
    run = cli("quantize", whole, tmp_path / "out", "--calibrate", tmp_path / "text")
    assert run.code == 2
    assert words in run.error


def test_places_that_are_taken(cli: Cli, whole: Path) -> None:
    run = cli("quantize", whole, whole)
    assert run.code == 2
    assert "already exists and is not empty" in run.error


@pytest.mark.parametrize(
    ("shard", "words"), [("5GB", "stopped before the first file was finished"), ("20kB", "the same command goes on")]
)
def test_ctrl_c_says_what_is_left(
    cli: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str, words: str
) -> None:
    write, added = ShardWriter.add, []

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        added.append(name)
        if len(added) > 20:
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    run = cli("quantize", whole, tmp_path / "out", "--max-shard-size", shard)
    assert run.code == 130
    assert words in run.err
    assert (list(tmp_path.iterdir()) == []) is (shard == "5GB")


def test_loading_options_that_contradict_each_other(cli: Cli, whole: Path) -> None:
    for args, words in (
        (("--head", "int8"), "--head needs --quantization"),
        (("--no-double-quant",), "--no-double-quant needs --quantization"),
        (("--quantization", "int4"), "--quantization is 'int4'"),
    ):
        run = cli("generate", "Hello", "--model", whole, *args)
        assert run.code == 2
        assert words in run.error


def test_a_cut_folder_is_planned_for_as_it_loads(cli: Cli, whole: Path, tmp_path: Path) -> None:
    cli("quantize", whole, tmp_path / "out", "--to", "nf4")
    plan = ("plan", tmp_path / "out", "--memory", "1GB", "--json")
    (as_it_is,) = json.loads(cli(*plan).out)["plans"]
    (cut_head,) = json.loads(cli(*plan, "--quantization", "nf4", "--head", "int8").out)["plans"]
    assert cut_head["weights_bytes"] < as_it_is["weights_bytes"]
    run = cli(*plan, "--quantization", "int8")
    assert run.code == 2
    assert "quantized already (nf4) and cannot be loaded in int8" in run.error


def test_missing_kernels_are_spoken_of(cli: Cli, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = ("generate", "Hello", "--model", whole, "--max-new-tokens", "1", "--device", "cpu")
    monkeypatch.setattr(library, "unavailable", lambda: "the CPU kernels are not built")
    with pytest.warns(UserWarning, match="many times slower than it could be on this CPU: the CPU kernels are not"):
        run = cli(*generate)
    assert run.code == 0


@pytest.mark.parametrize(
    "place", ["file/out", "file/deep/out", "/proc/gemcut/out", "n" * 250, "loop/out", "closed/out"]
)
def test_a_place_that_cannot_be_written_is_met_before_anything_is_downloaded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Long before the hub is asked: nothing is resolved, and nothing is left."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "closed").mkdir(mode=0o555)
    if place == "closed/out" and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    asked: list[object] = []
    monkeypatch.setattr("gemcut.checkpoint.resolve.resolve", lambda *args, **kwargs: asked.append(args))
    run = cli("quantize", "owner/name", tmp_path / place)
    assert run.code == 2
    assert run.error.startswith(f"error: cannot write {tmp_path / place}: ")
    assert run.error.endswith("choose a place where files can be written")
    assert asked == []
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop", "closed"}


def test_missing_folders_above_are_made(cli: Cli, whole: Path, tmp_path: Path) -> None:
    assert cli("quantize", whole, tmp_path / "a" / "b" / "out").code == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"out"}
