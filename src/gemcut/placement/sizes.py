"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes of "24GB", "22.5 GiB", "800M" or "7" (K is 1000 bytes, Ki 1024).

    None where ``text`` is no size, or one beyond 63 bits.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        return None
    unit = 1024 if match[3] else 1000
    size = float(match[1]) * unit ** " KMGT".index(match[2].upper() or " ")
    return int(size) if size < 2**63 else None
