"""What every judge of text has in common: ``score(text, policy) -> float``, from 0 (does not break it) to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from gemcut.errors import GemcutError, ParameterError


class JudgeError(GemcutError):
    """A judge could not judge: it did not answer, or in time, or with no score. Whoever asked decides what follows."""


class Judge(Protocol):
    """Scores a text by a policy. ``policies`` are the names it knows."""

    @property
    def policies(self) -> Sequence[str]: ...

    def score(self, text: str, policy: str) -> float:
        """How much ``text`` breaks ``policy``. Raises ParameterError for a policy it does not know."""
        ...


@runtime_checkable
class ExchangeJudge(Protocol):
    """A judge that scores several policies at once, and an answer together with the question it answers."""

    def score_all(self, text: str, policies: Sequence[str], prompt: str | None = None) -> Mapping[str, float]:
        """The score of each policy. ``prompt``: what ``text`` answers; None: ``text`` is itself what a person says."""
        ...


def score_all(judge: Judge, text: str, policies: Sequence[str], prompt: str | None = None) -> dict[str, float]:
    """The score of each policy, by a judge of either kind. Raises JudgeError where one is no number from 0 to 1."""
    if isinstance(judge, ExchangeJudge):
        found = dict(judge.score_all(text, policies, prompt))
    else:
        found = {policy: judge.score(text, policy) for policy in policies}
    for policy in policies:
        value = found.get(policy)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise JudgeError(f"the judge gave {value!r} as the score of {policy}; expected a number from 0 to 1")
    return {policy: float(found[policy]) for policy in policies}


def check_policy(policy: str, known: Sequence[str]) -> int:
    """The policy's number among those known. Raises ParameterError for another one."""
    try:
        return list(known).index(policy)
    except ValueError:
        raise ParameterError(f"unknown policy {policy!r}; expected one of {', '.join(known)}") from None
