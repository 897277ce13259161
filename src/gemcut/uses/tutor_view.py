"""A correction as one text: what goes and what comes, word by word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemcut.uses.tutor import Correction


def marked(correction: Correction, styled: Callable[[str, str], str], *, plain: bool) -> str:
    """The text with its edits: ``[-gone-]{+new+}``; not plain, what is gone is red and what is new green."""
    parts, place = [], 0
    for edit in correction.edits:
        parts.append(styled(correction.text[place : edit.start], ""))
        if edit.before:
            parts.append(f"[-{edit.before}-]" if plain else styled(edit.before, "gone"))
        if edit.after:
            parts.append(f"{{+{edit.after}+}}" if plain else styled(edit.after, "new"))
        place = edit.start + len(edit.before)
    return "".join([*parts, styled(correction.text[place:], "")])
