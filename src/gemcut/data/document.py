"""A document on its way through the steps."""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.text.document import Document

__all__ = ["Document", "Dropped"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a step gives in the place of a document that it drops, with the reason in a few words."""

    document: Document
    reason: str
