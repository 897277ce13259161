"""A checkpoint so narrow that its 256,000 words cost nothing, with the real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

import support

NARROW = {"vocab_size": 256_000, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    model = support.hf_model(support.tiny_config(**NARROW, max_position_embeddings=512), seed=5)
    return support.save_checkpoint(tmp_path_factory.mktemp("narrow"), model, tokenizer=True)
