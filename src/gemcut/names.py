"""What can be known of a model from its name alone: the published shapes, and whether it was tuned to chat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gemcut.config import FAMILY, GemmaConfig

if TYPE_CHECKING:
    from gemcut.checkpoint.source import Source
    from gemcut.text import Tokenizer
    from gemcut.text.special import SpecialTokens

_TUNED = {"it", "instruct", "chat"}


def family_member(name: str) -> tuple[str, GemmaConfig] | None:
    """(short name, published shape) of 2b, 27b-it, gemma-2-9b, google/gemma-2-27b-it, gemma-3-270m and the like."""
    short = name.lower().removeprefix("google/").removesuffix("-it").removesuffix("-pt")
    for candidate in (short, f"gemma-2-{short}"):
        if candidate in FAMILY:
            return candidate, FAMILY[candidate]
    return None


def tuned(source: Source, tokenizer: Tokenizer | SpecialTokens | None) -> bool:
    """Whether the checkpoint was tuned to answer; False for a base model, which continues text.

    An instruction-tuned checkpoint brings a chat template, or its name says so: a word of its last part is "it",
    "instruct" or "chat" (gemma-2-2b-it, gemma-2-2b-it-Q4_K_M.gguf). Base checkpoints have neither.
    """
    words = re.split(r"[-_.\s]+", Path(source.name).name.lower())
    return (tokenizer is not None and tokenizer.chat_template is not None) or not _TUNED.isdisjoint(words)
