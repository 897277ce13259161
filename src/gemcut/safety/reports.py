"""Reports of misuse: what a person says of an answer, for the audit log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemcut.errors import ParameterError
from gemcut.safety.policies import builtin_policies
from gemcut.settings import suggestion

#: Beside the policies: what a person may say is wrong with an answer.
OTHER = ("wrong-or-misleading", "privacy", "other")
LONGEST_COMMENT, LONGEST_TEXT = 4_000, 20_000  # characters
PREFIXES = ("chatcmpl-", "cmpl-")


def reasons() -> tuple[str, ...]:
    """The reasons that a report may have."""
    return (*builtin_policies(), *OTHER)


@dataclass(frozen=True)
class Report:
    """One report. ``text`` is what the reporter chose to include of the exchange, "" for nothing."""

    request_id: str
    reason: str
    comment: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if self.reason not in reasons():
            raise ParameterError(f"reason is {self.reason[:80]!r}; {suggestion(self.reason[:80], sorted(reasons()))}")
        for name, most in (("comment", LONGEST_COMMENT), ("text", LONGEST_TEXT)):
            size = len(getattr(self, name))
            if size > most:
                raise ParameterError(f"{name} has {size:,} characters; {most:,} is the most")

    def fields(self) -> dict[str, Any]:
        """As the log has it."""
        plain = self.request_id
        for prefix in PREFIXES:
            plain = plain.removeprefix(prefix)
        found = {"request": plain, "reason": self.reason, "comment": self.comment, "text": self.text}
        return {name: value for name, value in found.items() if value}
