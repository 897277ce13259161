"""A tiny random Gemma 2 with the real tokenizer, once for transformers and once for gemcut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gemcut.hf.common
import support
from gemcut import hf

CONTEXT = 64


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    """Every test sees the warnings that are given once a process."""
    gemcut.hf.common._warned.clear()
    yield
    gemcut.hf.common._warned.clear()


@pytest.fixture(scope="session")
def reference() -> Any:
    """transformers' model. A small embedding lets the layers decide, so that greedy text does not repeat one token."""
    config = support.tiny_config(
        vocab_size=256000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = support.hf_model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)
    return model


@pytest.fixture(scope="session")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.save_checkpoint(
        tmp_path_factory.mktemp("hf") / "tiny",
        reference,
        tokenizer=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        cache_implementation="hybrid",
    )


@pytest.fixture(scope="session")
def reference_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def loaded_tokenizer(folder: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer(loaded_tokenizer: Any) -> Iterator[Any]:
    yield loaded_tokenizer
    loaded_tokenizer.padding_side, loaded_tokenizer.truncation_side = "left", "right"
    loaded_tokenizer.pad_token = "<pad>"


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder)
