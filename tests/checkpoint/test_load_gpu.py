"""Loading to a GPU goes through pinned buffers; the values must be those of a plain copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gemcut.checkpoint import load
from gemcut.checkpoint.resolve import resolve
from gemcut.model.gemma import Model
from support import hf_model, save_checkpoint, tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage_bytes", [64 << 20, 4096, 1000])  # one journey a tensor; many; not a divisor of anything
def test_a_gpu_gets_what_a_cpu_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stage_bytes: int
) -> None:
    monkeypatch.setattr(load, "_STAGE_BYTES", stage_bytes)
    source = resolve(save_checkpoint(tmp_path / "x", hf_model(tiny_config("gemma3_text"))))
    models = []
    for device in ("cpu", "cuda"):
        with torch.device("meta"):
            model = Model(source.config(), dtype=dtype)
        load.load_model_weights(model, source.tensors(), dtype=dtype, device=device)
        models.append(model)
    for (name, cpu), (_, gpu) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert gpu.is_cuda, name
        assert gpu.dtype == cpu.dtype
        assert torch.equal(gpu.cpu(), cpu), name


def test_large_tensors_are_not_overtaken_by_their_buffer() -> None:
    """600 MB through two 64 MB buffers: a buffer refilled too early would show."""
    wanted = torch.arange(150_000_000, dtype=torch.float32).view(-1, 1000)
    with torch.device("meta"):
        model = nn.Linear(1000, 150_000, bias=False)
    load.load_model_weights(model, [("weight", wanted)], dtype=torch.float32, device="cuda")
    assert torch.equal(model.weight.cpu(), wanted)
