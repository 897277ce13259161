"""The three Gemma 2 at their full width on an NVIDIA GPU, two layers each, beside float64 and transformers' bf16."""

from __future__ import annotations

import pytest

from gpu_support import check_beside_theirs
from model.build import random_ids, their_wide_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-9b", "gemma-2-27b"])
def test_logits_at_full_width_are_as_near_float64_as_those_of_transformers(name: str) -> None:
    """A prompt and decoding that leave a window of 16; caps, heads and scales are the published ones."""
    theirs = their_wide_model(name, words=2048, window=16).cuda()
    check_beside_theirs(theirs, random_ids(70, vocab_size=2048).tolist(), 40)
