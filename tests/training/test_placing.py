"""A folder onto a mesh of eight pretend devices and back, against the numbers that transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import AutoModelForCausalLM

from gemcut.config import GemmaConfig
from gemcut.training.export import export_folder
from gemcut.training.importing import HuggingFaceFolder
from gemcut.training.parameters import Tree, Weight, build, get, weights
from gemcut.training.placing import gathered, place
from support import hf_model, save_checkpoint, tiny_config

#: Over which axis of a mesh of 2 × 4 an axis of a weight is split.
SPLIT = {"embed": "data", "heads": "model", "mlp": "model", "vocab": "model", "layers": None}


def shardings(config: GemmaConfig, mesh: Mesh) -> Tree:
    def make(weight: Weight) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(SPLIT.get(axis) for axis in weight.leaf_axes)))

    return build(config, make)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices: tests/training/conftest.py came too late, run this folder by itself")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


@pytest.mark.parametrize("layers", [4, 5])  # five: the pattern of two leaves one over
def test_each_device_holds_its_part(tmp_path: Path, mesh: Mesh, layers: int) -> None:
    model: Any = hf_model(tiny_config(num_hidden_layers=layers))
    folder = HuggingFaceFolder(save_checkpoint(tmp_path / "theirs", model))
    config, reads = folder.config, []

    def read(name: str) -> np.ndarray[Any, Any]:
        reads.append(name)
        return folder.read(name)

    tree = place(config, read, shardings(config, mesh))
    assert sorted(reads) == sorted(folder.names)  # each once
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for weight in weights(config):
        leaf = get(tree, weight.path)
        assert leaf.shape == weight.leaf_shape
        assert leaf.sharding.spec == PartitionSpec(*(SPLIT.get(axis) for axis in weight.leaf_axes))
        for i, name in enumerate(weight.hf_names()):
            one = np.asarray(leaf[i] if weight.layers else leaf)
            matrix = theirs[name].T.reshape(one.shape) if theirs[name].ndim == 2 and weight.outputs else theirs[name]
            assert np.array_equal(one, matrix), name
    out = export_folder(tmp_path / "out", config, gathered(config, tree), dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    for (name, ours), (_, wanted) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, wanted), name


def test_stored_numbers_are_rounded_once(tmp_path: Path, mesh: Mesh) -> None:
    model: Any = hf_model(tiny_config())
    folder = HuggingFaceFolder(save_checkpoint(tmp_path / "theirs", model))
    tree = place(folder.config, folder.read, shardings(folder.config, mesh), ml_dtypes.bfloat16)
    table = model.get_parameter("model.embed_tokens.weight").detach().to(torch.bfloat16).float().numpy()
    assert np.array_equal(np.asarray(tree["embed_tokens"]).astype(np.float32), table)
