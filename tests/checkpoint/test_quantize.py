"""Cutting a checkpoint on disk: what transformers reads of it, and what an interrupted run leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import support
from gemcut.checkpoint.quantize import quantize_checkpoint
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.shard import ShardWriter
from gemcut.checkpoint.working import Lock, working_folder
from gemcut.errors import CheckpointError, ParameterError
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensor

SPECS = [
    Quantization("nf4"),
    Quantization("nf4", double_quant=False, skip=("lm_head", "o_proj")),
    Quantization("fp4", block_size=32),
    Quantization("int8"),
]
NF4 = Quantization("nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = support.tiny_config(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    model = support.hf_model(config, dtype=torch.bfloat16)
    path = support.save_checkpoint(tmp_path_factory.mktemp("whole") / "tiny", model, max_shard_size="60KB")
    (path / "LICENSE").write_text("terms")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (path / "tokenizer_config.json").write_text("{}")
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bnb(spec: Quantization) -> Any:
    if spec.format == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.format,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=None if spec.skip is None else list(spec.skip),
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_transformers_loads_what_is_written(spec: Quantization, shard: int, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize_checkpoint(resolve(folder), out, spec, max_shard_bytes=shard)
    assert not working_folder(out).exists()
    assert (len(list(out.glob("model-*.safetensors"))) > 1) is (shard < 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == (
        "Linear8bitLt" if spec.format == "int8" else "Linear4bit"
    )
    ids = torch.tensor([[2, 5, 9, 31, 8, 77]])
    # transformers with the decoded weights in whole layers computes what both libraries are to compute.
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    state = dict(whole.named_parameters())
    for name, entry in report["weights"].items():
        if "format" in entry:
            packed = quantize_tensor(name, state[name].data, spec)
            original = state[name].float()
            error = (dequantize_weight(packed, torch.float32) - original).norm() / original.norm()
            assert entry["relative_error"] == pytest.approx(error.item(), rel=1e-4)
            state[name].data = dequantize_weight(packed, torch.bfloat16)
    with torch.no_grad():
        expected = whole(ids).logits.float()
        error = (theirs(ids).logits.float() - expected).abs().max()
    assert error < (0.4 if spec.format == "int8" else 0.2)  # bf16 steps of other kernels; int8: 8-bit activations


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[3]], ids=str)
def test_files_are_those_transformers_saves(spec: Quantization, folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(resolve(folder), tmp_path / "ours", spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=bnb(spec))
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if "quant_state" in name:
            a, b = (json.loads(bytes(each.tolist())) for each in (ours[name], tensor))
            assert a.pop("nested_offset", 0.0) == pytest.approx(b.pop("nested_offset", 0.0), rel=1e-6)
            assert list(a.items()) == list(b.items())
        elif (
            spec.format == "int8" or not spec.double_quant or "absmax" not in name
        ):  # nested codes: a neighbour is as good
            assert torch.equal(ours[name], tensor), name
    a, b = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("ours", "theirs"))
    assert a["quantization_config"] == b["quantization_config"]
    assert (tmp_path / "ours" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "ours" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_an_8_bit_head_is_recorded_and_the_table_stays(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(resolve(folder), tmp_path / "out", Quantization("nf4", head="int8"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["gemcut"] == {"head": "int8"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype is torch.bfloat16


class Stopped(BaseException):
    """A run that ends in the middle, as Ctrl-C does."""


def stop_after(bytes_read: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done > bytes_read:
            raise Stopped

    return progress


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path) -> None:
    source, out, said = resolve(folder), tmp_path / "out", []
    quantize_checkpoint(source, tmp_path / "at once", NF4, max_shard_bytes=30_000)
    for bytes_read in (100_000, 150_000):
        with pytest.raises(Stopped):
            quantize_checkpoint(source, out, NF4, max_shard_bytes=30_000, progress=stop_after(bytes_read))
        assert not out.exists()
    first = (working_folder(out) / "shard-0").stat().st_mtime_ns
    quantize_checkpoint(source, out, NF4, max_shard_bytes=30_000, say=said.append)
    assert "going on where an earlier run was stopped" in said[0]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "at once").iterdir())
    for file in out.rglob("*.*"):
        assert file.read_bytes() == next((tmp_path / "at once").rglob(file.name)).read_bytes(), file.name
    assert min(file.stat().st_mtime_ns for file in out.glob("*.safetensors")) == first


@pytest.mark.parametrize("change", ["options", "source", "damage", "lost key"])
def test_other_work_starts_anew(change: str, folder: Path, tmp_path: Path) -> None:
    import shutil

    copy, out, said = tmp_path / "copy", tmp_path / "out", []
    shutil.copytree(folder, copy)
    with pytest.raises(Stopped):
        quantize_checkpoint(resolve(copy), out, NF4, max_shard_bytes=30_000, progress=stop_after(100_000))
    if change == "source":
        os.utime(next(copy.glob("*.safetensors")), (1, 1))
    if change == "damage":
        (working_folder(out) / "state.json").write_text("{")
    if change == "lost key":
        (working_folder(out) / "state.json").write_text('{"shards": []}')
    spec = Quantization("fp4") if change == "options" else NF4
    quantize_checkpoint(resolve(copy), out, spec, max_shard_bytes=30_000, say=said.append)
    assert "starting anew" in said[0]
    assert any(f"bitsandbytes__{spec.format}" in name for name in tensors(out))


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_whole_and_goes_on(folder: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
from gemcut.checkpoint.quantize import quantize_checkpoint
from gemcut.checkpoint.resolve import resolve
from gemcut.quantization.spec import Quantization
def progress(done, total):
    if done > 100_000:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_checkpoint(resolve({str(folder)!r}), {str(tmp_path / "out")!r}, Quantization("nf4"), max_shard_bytes=30_000,
                    progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    quantize_checkpoint(resolve(folder), tmp_path / "out", NF4, max_shard_bytes=30_000, say=said.append)
    assert "going on" in said[0]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_stop_while_the_folder_is_looked_at_is_made_good(folder: Path, tmp_path: Path) -> None:
    def stop(path: Path) -> dict[str, Any]:
        raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(resolve(folder), tmp_path / "out", NF4, examine=stop)
    assert not (tmp_path / "out").exists()
    seen: list[list[str]] = []

    def look(path: Path) -> dict[str, Any]:
        transformers.AutoModelForCausalLM.from_pretrained(path)
        seen.append(sorted(file.name for file in path.iterdir()))
        return {"seen": True}

    said: list[str] = []
    report = quantize_checkpoint(resolve(folder), tmp_path / "out", NF4, examine=look, say=said.append)
    assert "going on" in said[0]
    assert report["seen"] is True
    assert json.loads((tmp_path / "out" / "gemcut_quantization.json").read_text()) == report
    assert seen == [sorted(file.name for file in (tmp_path / "out").iterdir())]


def test_a_full_disk_is_one_line_and_what_is_done_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = ShardWriter.add, []

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        written.append(tensor.nbytes)
        if sum(written) > 80_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(CheckpointError, match="No space left on device; finished files are kept there") as caught:
        quantize_checkpoint(resolve(folder), tmp_path / "out", NF4, max_shard_bytes=30_000)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    said: list[str] = []
    quantize_checkpoint(resolve(folder), tmp_path / "out", NF4, max_shard_bytes=30_000, say=said.append)
    assert "going on" in said[0]


def test_a_disk_full_before_the_first_file_promises_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(CheckpointError, match=r"No space left on device: free some space and run the same again$"):
        quantize_checkpoint(resolve(folder), tmp_path / "out", NF4)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_not_called_full(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"Not a directory: choose a place where files can be written$"):
        quantize_checkpoint(resolve(folder), tmp_path / "file" / "out", NF4)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_leads_to_the_folder(there: bool, folder: Path, tmp_path: Path) -> None:
    goal, link = tmp_path / "disk" / "goal", tmp_path / "link"
    (goal if there else goal.parent).mkdir(parents=True)
    link.symlink_to(goal)
    quantize_checkpoint(resolve(folder), link, NF4)
    assert link.is_symlink()
    assert (goal / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        quantize_checkpoint(resolve(folder), link, NF4)


def test_a_mount_point_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(CheckpointError, match=r"volume is a mount point; name a new folder inside it, such as "):
        quantize_checkpoint(resolve(folder), tmp_path / "volume", NF4)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_bad_places_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for out in (tmp_path / "file", tmp_path / "full", folder):
        with pytest.raises(CheckpointError, match="already exists and is not empty"):
            quantize_checkpoint(resolve(folder), out, NF4)
    with pytest.raises(ParameterError, match="blocks of 256 do not divide this model's rows of 64"):
        quantize_checkpoint(resolve(folder), tmp_path / "out", Quantization("nf4", block_size=256))


def test_two_runs_of_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    work = working_folder(tmp_path / "out")
    work.mkdir()
    with Lock(work), pytest.raises(CheckpointError, match="another run is writing"):
        quantize_checkpoint(resolve(folder), tmp_path / "out", NF4)


@pytest.mark.slow
def test_a_calibrated_run_goes_on_layer_by_layer(folder: Path, tmp_path: Path) -> None:
    from gemcut.calibration.cutter import CalibratedCutter

    generator = torch.Generator().manual_seed(3)
    documents = [[2, *torch.randint(5, 320, (60,), generator=generator).tolist()] for _ in range(4)]
    source, out, said = resolve(folder), tmp_path / "out", []

    def run(path: Path, progress: Any = None) -> None:
        cutter = CalibratedCutter(source, NF4, documents)
        quantize_checkpoint(
            source, path, NF4, cutter=cutter, options={"calibration": 1}, progress=progress, say=said.append
        )

    run(tmp_path / "at once")
    for bytes_read in (130_000, 200_000):
        with pytest.raises(Stopped):
            run(out, stop_after(bytes_read))
        assert list(working_folder(out).glob("calibration-*"))
    run(out)
    assert [line.split(": ")[1] for line in said] == ["1 files (12 tensors) are done", "2 files (23 tensors) are done"]
    for file in out.rglob("*.*"):
        assert file.read_bytes() == next((tmp_path / "at once").rglob(file.name)).read_bytes(), file.name
    transformers.AutoModelForCausalLM.from_pretrained(out)
