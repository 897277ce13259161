"""The token ids at which generation ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemcut.config import GemmaConfig, token_ids
from gemcut.text.special import SpecialTokens
from gemcut.text.tokenizer import Tokenizer


def stop_ids(
    config: GemmaConfig,
    generation_config: Mapping[str, Any] | None,
    tokenizer: Tokenizer | SpecialTokens | None,
) -> frozenset[int]:
    """Union of what config, generation_config and tokenizer say ends a text.

    The union matters: config.json of the 9B and 27B instruction models lists ``<eos>`` alone, yet they end a turn
    with ``<end_of_turn>``.

    Args:
        config: the network's configuration.
        generation_config: content of generation_config.json, or None.
        tokenizer: gives ``<eos>`` and, where its vocabulary has it, ``<end_of_turn>``; None where there is none.

    Raises:
        ConfigError: eos_token_id of generation_config is neither a token id nor a list of them.
    """
    found = set(config.eos_token_ids)
    given = (generation_config or {}).get("eos_token_id")
    if given is not None and not (type(given) is int and given < 0):  # -1 says "none"
        found.update(token_ids(given, "generation_config's eos_token_id"))
    if tokenizer is not None:
        found.add(tokenizer.eos_id)
        if tokenizer.end_of_turn_id is not None:
            found.add(tokenizer.end_of_turn_id)
    return frozenset(found)
