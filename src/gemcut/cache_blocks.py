"""How many blocks of the key-value cache a request holds: what a plan promises and what the engine keeps."""

from __future__ import annotations

from gemcut.config import GemmaConfig

#: Tokens a block holds, where nobody says otherwise.
BLOCK_SIZE = 16


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def sliding_blocks_needed(config: GemmaConfig, tokens: int, chunk: int, block_size: int) -> int:
    """Most sliding blocks a sequence of ``tokens`` holds at once, with at most ``chunk`` new tokens a step.

    Its queries see ``window - 1`` earlier tokens; the range may begin and end inside a block.
    """
    return min(ceil_div(tokens, block_size), ceil_div(config.sliding_window - 1 + chunk, block_size) + 1)
