"""What can be known of a model from its name alone: the published shapes, and whether it was tuned to chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemcut.config import FAMILY, GemmaConfig

if TYPE_CHECKING:
    from gemcut.checkpoint.source import Source
    from gemcut.text import Tokenizer


def family_member(name: str) -> tuple[str, GemmaConfig] | None:
    """(short name, published shape) of 2b, 27b-it, gemma-2-9b, google/gemma-2-27b-it, gemma-3-270m and the like."""
    short = name.lower().removeprefix("google/").removesuffix("-it").removesuffix("-pt")
    for candidate in (short, f"gemma-2-{short}"):
        if candidate in FAMILY:
            return candidate, FAMILY[candidate]
    return None


def tuned(source: Source, tokenizer: Tokenizer) -> bool | None:
    """Whether the checkpoint was tuned to follow instructions; None where nothing tells.

    Google's instruction-tuned checkpoints end in -it and bring a chat template, its base ones do neither.
    """
    if tokenizer.chat_template is not None or source.name.lower().endswith("-it"):
        return True
    return False if family_member(source.name) is not None else None
