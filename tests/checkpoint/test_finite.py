"""NaN and infinity in a checkpoint's weights are found while it is loaded, and the tensor is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError
from gemcut.loading import load_network
from gemcut.quantization.spec import Quantization
from support import hf_model, save_checkpoint, tiny_config

CPU = torch.device("cpu")
#: transformers' names, and ours.
TENSORS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.scale",
    "model.layers.1.self_attn.k_proj.weight": "layers.1.attention.k_proj.weight",
    "model.layers.2.mlp.up_proj.weight": "layers.2.mlp.up_proj.weight",
    "model.layers.3.post_feedforward_layernorm.weight": "layers.3.post_feedforward_norm.scale",
}


def _save(folder: Path, name: str, value: float) -> Path:
    model = hf_model(tiny_config(hidden_size=64, intermediate_size=128))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return save_checkpoint(folder / "model", model)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_the_tensor_is_named(tmp_path: Path, name: str, value: float, quantization: Any) -> None:
    spec = None if quantization is None else Quantization(quantization)
    with pytest.raises(
        CheckpointError, match=f"tensor {TENSORS[name]} holds NaN or infinity: the checkpoint"
    ) as caught:
        load_network(resolve(_save(tmp_path, name, value)), dtype=torch.bfloat16, device=CPU, quantization=spec)
    assert "\n" not in str(caught.value)


def test_what_a_dtype_cannot_hold_is_said_to_be_that(tmp_path: Path) -> None:
    folder = _save(tmp_path, "model.layers.2.mlp.up_proj.weight", 1e5)
    words = r"tensor layers\.2\.mlp\.up_proj\.weight holds magnitudes that float16 does not; load it with dtype"
    with pytest.raises(CheckpointError, match=words):
        load_network(resolve(folder), dtype=torch.float16, device=CPU)
    for dtype in (torch.bfloat16, torch.float32):
        load_network(resolve(folder), dtype=dtype, device=CPU)
