"""The stop set is a union, found by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gemcut.config import FAMILY
from gemcut.errors import ConfigError
from gemcut.text import Tokenizer, stop_ids


def test_union_of_all_three_sources(gemma2: Tokenizer, gemma3: Tokenizer) -> None:
    config = dataclasses.replace(FAMILY["gemma-2-9b"], eos_token_ids=(1,))
    assert stop_ids(config, None, gemma2) == {1, 107}  # what config.json of 9b-it and 27b-it misses
    assert stop_ids(config, {}, gemma2) == {1, 107}
    assert stop_ids(config, {"eos_token_id": None}, gemma2) == {1, 107}
    assert stop_ids(config, {"eos_token_id": 50}, gemma2) == {1, 50, 107}
    assert stop_ids(config, {"eos_token_id": [50, 51]}, gemma2) == {1, 50, 51, 107}
    assert stop_ids(dataclasses.replace(config, eos_token_ids=(9, 1)), None, gemma2) == {1, 9, 107}
    assert stop_ids(FAMILY["gemma-3-270m"], None, gemma3) == {1, 106}


@pytest.mark.parametrize("value", ["1", [], [1, "2"], True, 1.0])
def test_nonsense_in_generation_config(small: Tokenizer, value: Any) -> None:
    with pytest.raises(ConfigError, match="generation_config's eos_token_id"):
        stop_ids(FAMILY["gemma-2-2b"], {"eos_token_id": value}, small)
