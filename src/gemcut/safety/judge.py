"""What every judge of text has in common: ``score(text, policy) -> float``, from 0 (does not break it) to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gemcut.errors import ParameterError


class Judge(Protocol):
    """Scores a text by a policy. ``policies`` are the names it knows."""

    @property
    def policies(self) -> Sequence[str]: ...

    def score(self, text: str, policy: str) -> float:
        """How much ``text`` breaks ``policy``. Raises ParameterError for a policy it does not know."""
        ...


def check_policy(policy: str, known: Sequence[str]) -> int:
    """The policy's number among those known. Raises ParameterError for another one."""
    try:
        return list(known).index(policy)
    except ValueError:
        raise ParameterError(f"unknown policy {policy!r}; expected one of {', '.join(known)}") from None
