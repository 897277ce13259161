"""Folders that training writes and reads, against transformers and safetensors; memory; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CheckpointError, ParameterError
from gemcut.training.export import export_folder, hugging_face_shapes
from gemcut.training.importing import HuggingFaceFolder
from support import hf_model, save_checkpoint, tiny_config

EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, np.ndarray[Any, Any]]


def numbers(model: Any) -> Tensors:
    return {n: p.detach().float().numpy() for n, p in model.named_parameters() if n != "lm_head.weight"}


def read_all(folder: Path) -> Tensors:
    opened = HuggingFaceFolder(folder)
    return {name: opened.read(name) for name in opened.names}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20)[None]).logits
    return found


@pytest.fixture(params=["gemma2", "gemma3_text"])
def model(request: pytest.FixtureRequest) -> Any:
    return hf_model(tiny_config(request.param))


def ours(model: Any) -> GemmaConfig:
    return GemmaConfig.from_dict(model.config.to_dict())


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_transformers_loads_an_export_with_equal_logits(model: Any, tmp_path: Path, limit: int) -> None:
    mixed = dict(reversed(numbers(model).items()))  # any order will do
    out = export_folder(tmp_path / "out", ours(model), mixed.items(), dtype="float32", max_shard_bytes=limit)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))
    assert (out / "model.safetensors").exists() == (limit > 20_000)
    assert [path for path in tmp_path.iterdir() if path != out] == []
    if limit == 20_000:
        shards = sorted(out.glob("model-*.safetensors"))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in mixed.values())
        assert {name: shard.name for shard in shards for name in load_file(shard)} == index["weight_map"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_torchs_rounding(model: Any, tmp_path: Path, dtype: str) -> None:
    out = export_folder(tmp_path / "out", ours(model), numbers(model).items(), dtype=dtype)
    stored = load_file(out / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.detach().to(getattr(torch, dtype))), name
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_rows_of_a_padded_table_are_cut(model: Any, tmp_path: Path) -> None:
    padded = numbers(model)
    padded[EMBEDDING] = np.concatenate([padded[EMBEDDING], np.full((64, 48), 7, np.float32)])
    out = export_folder(tmp_path / "out", ours(model), padded.items(), dtype="float32")
    assert torch.equal(load_file(out / "model.safetensors")[EMBEDDING], model.get_parameter(EMBEDDING))


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_import_of_what_transformers_saved(model: Any, tmp_path: Path, size: str) -> None:
    folder = HuggingFaceFolder(save_checkpoint(tmp_path / "theirs", model, max_shard_size=size))
    wanted = numbers(model)
    assert sorted(folder.names) == sorted(wanted)
    for name, values in wanted.items():
        assert np.array_equal(folder.read(name), values), name
    # and back: the same bytes as transformers'
    out = export_folder(tmp_path / "out", folder.config, ((n, folder.read(n)) for n in folder.names), dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))


def test_import_keeps_bfloat16(tmp_path: Path) -> None:
    model = hf_model(tiny_config(), dtype=torch.bfloat16)
    folder = HuggingFaceFolder(save_checkpoint(tmp_path / "theirs", model))
    assert folder.dtype == ml_dtypes.bfloat16
    for name, values in numbers(model).items():
        assert folder.read(name).dtype == ml_dtypes.bfloat16
        assert np.array_equal(folder.read(name).astype(np.float32), values)


def test_files_beside_the_weights_are_copied(model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "generation_config.json": '{"top_k": 3}'}
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "optimizer.bin").write_text("not wanted")
    out = export_folder(tmp_path / "out", ours(model), numbers(model).items(), beside=source)
    assert {name: (out / name).read_text() for name in texts} == texts
    assert not (out / "optimizer.bin").exists()
    other = export_folder(
        tmp_path / "other", ours(model), numbers(model).items(), beside=source, generation_config={"top_k": 5}
    )
    assert json.loads((other / "generation_config.json").read_text()) == {"top_k": 5}


def test_one_tensor_in_memory(tmp_path: Path) -> None:
    """60 tensors of 8 MB and less: never two of them at once beside what is being written."""
    config = FAMILY["gemma-2-2b"].replace(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=8,
        layer_types=FAMILY["gemma-2-2b"].layer_types[:8],
    )
    shapes = hugging_face_shapes(config)
    largest = 512 * 4096 * 4

    def tensors() -> Iterator[tuple[str, Any]]:
        for i, (name, shape) in enumerate(shapes.items()):
            yield name, np.full(shape, i, np.float32)

    def peak() -> int:
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        out = export_folder(tmp_path / "out", config, tensors(), dtype="bfloat16")
        # the tensor, its copy in bf16, one byte a number that says it is finite
        assert peak() < largest * (1 + 0.5 + 0.25) + (1 << 20)
        folder = HuggingFaceFolder(out)
        tracemalloc.reset_peak()
        for i, name in enumerate(shapes):
            assert folder.read(name).flat[-1] == np.array(i, ml_dtypes.bfloat16)
        assert peak() < largest / 2 * (1 + 0.5) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert (out / "model.safetensors").stat().st_size > 12 * largest


def _broken(model: Any, what: str) -> Tensors:
    found, norm = numbers(model), "model.layers.1.input_layernorm.weight"
    if what == "missing":
        del found[norm]
    elif what == "surplus":
        found["model.layers.9.input_layernorm.weight"] = found[norm]
    elif what == "shape":
        found[norm] = found[norm][:-1]
    elif what == "short table":
        found[EMBEDDING] = found[EMBEDDING][:-1]
    elif what == "nan":
        found[norm] = found[norm] * np.nan
    return found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"tensor model\.layers\.1\.input_layernorm\.weight is missing"),
        ("surplus", r"model\.layers\.9\.input_layernorm\.weight: the config has no place for it"),
        ("shape", r"model\.layers\.1\.input_layernorm\.weight: its shape is \[47\]; the config asks for \[48\]"),
        ("short table", r"embed_tokens\.weight: its shape is \[319, 48\]; the config asks for \[320, 48\]"),
        ("nan", r"model\.layers\.1\.input_layernorm\.weight as BF16: it holds NaN or infinity"),
    ],
)
def test_export_names_the_wrong_tensor_and_leaves_nothing(model: Any, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        export_folder(tmp_path / "out", ours(model), _broken(model, what).items())
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses(model: Any, tmp_path: Path) -> None:
    twice = [*numbers(model).items(), *list(numbers(model).items())[:1]]
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: it came twice"):
        export_folder(tmp_path / "out", ours(model), twice)
    huge = {name: values * 1e6 for name, values in numbers(model).items()}
    with pytest.raises(CheckpointError, match="as F16: it holds NaN or infinity"):
        export_folder(tmp_path / "out", ours(model), huge.items(), dtype="float16")
    with pytest.raises(ParameterError, match="dtype is 'int8'; expected one of"):
        export_folder(tmp_path / "out", ours(model), [], dtype="int8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        export_folder(tmp_path / "taken", ours(model), [])
    (tmp_path / "plain").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export_folder(tmp_path / "plain" / "out", ours(model), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "taken"]


def test_a_process_that_does_not_write_takes_part(model: Any, tmp_path: Path) -> None:
    asked = iter(numbers(model).items())
    export_folder(tmp_path / "out", ours(model), asked, writes=False)
    assert next(asked, None) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"tensor model\.layers\.1\.input_layernorm\.weight is missing"),
        ("surplus", r"unexpected tensor model\.layers\.9\.input_layernorm\.weight"),
        ("shape", r"tensor model\.layers\.1\.input_layernorm\.weight has shape \[47\]; the config asks for \[48\]"),
        ("short table", r"tensor model\.embed_tokens\.weight has shape \[319, 48\]; the config asks for \[320, 48\]"),
        ("nan", r"tensor model\.layers\.1\.input_layernorm\.weight holds NaN or infinity"),
    ],
)
def test_import_names_the_wrong_tensor(model: Any, tmp_path: Path, what: str, message: str) -> None:
    folder = save_checkpoint(tmp_path / "model", model)
    tensors = {name: torch.from_numpy(values.copy()) for name, values in _broken(model, what).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as error:
        read_all(folder)
    assert "\n" not in str(error.value)


def test_import_refuses_packed_weights_and_a_head_of_its_own(model: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", model)
    tensors = {name: torch.from_numpy(values.copy()) for name, values in numbers(model).items()}
    same = {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}
    save_file(same, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(HuggingFaceFolder(folder).read(EMBEDDING), tensors[EMBEDDING].numpy())
    same["lm_head.weight"][319, 47] += 1
    save_file(same, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        HuggingFaceFolder(folder).read(EMBEDDING)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has dtype I8; training starts from whole weights"):
        HuggingFaceFolder(folder)


def test_no_torch() -> None:
    code = (
        "import sys, gemcut; assert 'jax' not in sys.modules and 'torch' not in sys.modules\n"
        "import pkgutil, importlib, gemcut.training as t\n"
        "for m in pkgutil.walk_packages(t.__path__, 'gemcut.training.'): importlib.import_module(m.name)\n"
        "print('torch' in sys.modules, 'gemcut.engine' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr[-2000:]
