"""Writing folders: byte for byte what was read, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemcut.checkpoint import names
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.write import save_folder
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError
from gemcut.model.gemma import Model
from support import hf_model, save_checkpoint, tiny_config


def meta_model(config: GemmaConfig, dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        return Model(config, dtype=dtype)


def resolve_tiny() -> GemmaConfig:
    return GemmaConfig.from_dict(tiny_config().to_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "tiny", hf_model(tiny_config()))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_then_save_gives_the_same_tensors(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    reference = hf_model(tiny_config(model_type), dtype=dtype)
    source = resolve(save_checkpoint(tmp_path / "in", reference))
    config = source.config()
    model = meta_model(config, dtype)
    load_model_weights(model, source.tensors(), dtype=dtype, device="cpu")
    out = save_folder(
        tmp_path / "out", config, names.export_tensors(model.state_dict(), config), None, max_shard_bytes=70_000
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    saved = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    original = load_file(tmp_path / "in" / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, value in original.items():
        assert saved[name].dtype == value.dtype
        if dtype == torch.float32 and "norm" in name:
            # 1 + w is rounded to fp32 once; what the network computes with is the same bits.
            assert torch.equal(1.0 + saved[name], 1.0 + value), name
        else:
            assert torch.equal(saved[name].view(torch.uint8), value.view(torch.uint8)), name
    assert GemmaConfig.from_file(out / "config.json").torch_dtype == str(dtype).removeprefix("torch.")
    # transformers reads it, and finds its own model again.
    ids = torch.arange(20)[None] + 5
    first, again = (
        type(reference).from_pretrained(path, dtype=dtype, attn_implementation="eager")(ids).logits
        for path in (tmp_path / "in", out)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2.0**-16), (torch.float16, 2.0**-13)])
def test_every_norm_weight_of_half_precision_survives(dtype: torch.dtype, smallest: float) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite() & (every.abs() < 4096) & ((every.abs() >= smallest) | (every == 0))]
    assert len(every) > 7_000
    config = resolve_tiny().replace(hidden_size=len(every), vocab_size=1, intermediate_size=1)
    state = {name: torch.zeros(shape, dtype=dtype) for name, shape in names.expected_shapes(config).items()}
    state["norm.scale"] = 1.0 + every
    assert torch.equal(dict(names.export_tensors(state, config))["model.norm.weight"].float(), every)


def test_saving_refuses_to_mix_with_what_is_there(tmp_path: Path, folder: Path) -> None:
    config = resolve(folder).config()
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        save_folder(folder, config, [], None)
    with pytest.raises(CheckpointError, match="no tensor to save"):
        save_folder(tmp_path / "new", config, [], None)
    with pytest.raises(CheckpointError, match=r"cannot save x as torch\.int64"):
        save_folder(tmp_path / "new", config, [("x", torch.arange(3))], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_ctrl_c_while_saving_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    def interrupted() -> Any:
        yield "model.norm.weight", torch.ones(48)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "new", resolve(folder).config(), interrupted(), None, max_shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


FULL_DISK = """
import resource, signal, sys, torch
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.write import save_folder
from gemcut.errors import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
config = resolve(sys.argv[1]).config()
tensors = [("a", torch.ones(10_000)), ("b", torch.ones(50_000))]
try:
    save_folder(sys.argv[2], config, tensors, None, max_shard_bytes=90_000)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "out" / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"cannot write {tmp_path / 'out' / 'new'}: ")
    assert done.stdout.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
