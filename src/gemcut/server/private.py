"""Personal data at serving: redacted, refused, or counted; in prompts, answers and logs.

PiiDoor (of the server) -> PiiDoor.of(texts) -> Private (of one request) -> Shown (of each answer)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from gemcut.errors import ParameterError
from gemcut.safety.pii import find, replace
from gemcut.safety.private import Shown, Vault
from gemcut.server.errors import ApiError
from gemcut.server.guards import Verdict

if TYPE_CHECKING:
    from gemcut.server.asgi import Request

PiiMode = Literal["redact", "refuse", "report"]
MODES: tuple[PiiMode, ...] = ("redact", "refuse", "report")
REFUSAL = "The answer held personal data."


class Private:
    """The personal data of one request. In the modes "refuse" and "report" it is one of the request's guards."""

    refusal = REFUSAL

    def __init__(self, mode: PiiMode, texts: Sequence[str]) -> None:
        """``texts``: what the caller sent."""
        self.mode = mode
        self.vault = Vault(tuple(texts))
        self._sent = {text[each.start : each.end] for text in texts for each in find(text)} if mode != "redact" else ()
        self.input: Counter[str] = Counter()
        self.output: Counter[str] = Counter()

    def hide(self, text: str) -> str:
        """What the model is given of a text."""
        return self.vault.hide(text) if self.mode == "redact" else text

    def check_ids(self, text: str) -> None:
        """Raise ApiError 400 where a prompt of token ids, whose text this is, would have to be redacted."""
        if self.mode == "redact" and find(text):
            raise ApiError(
                400, "the prompt's token ids hold personal data, which this server redacts; send a text", param="prompt"
            )

    def check_fields(self, logprobs: object) -> None:
        """Raise ApiError 400 for log-probabilities, whose tokens would show what the text does not."""
        if self.mode == "redact" and logprobs not in (None, False):
            raise ApiError(
                400, "this server redacts personal data, and has no log-probabilities then; drop them", param="logprobs"
            )

    async def check(self, kind: Literal["input", "output"], text: str) -> Verdict:
        """See ``guards.Guard``: an answer may repeat what the caller sent."""
        found = [each for each in find(text) if kind == "input" or text[each.start : each.end] not in self._sent]
        counted = Counter(each.kind for each in found)
        if kind == "input":
            self.input += counted
        else:
            self.output |= counted
        if self.mode != "refuse" or not found:
            return Verdict()
        what = "request" if kind == "input" else "answer"
        return Verdict(False, "personal-data", f"the {what} holds personal data ({', '.join(sorted(counted))})")

    def shown(self) -> Shown | None:
        """What an answer goes through; None where nothing of it changes."""
        return Shown(self.vault) if self.mode == "redact" else None

    def report(self) -> dict[str, Any]:
        """How many values of each kind there were."""
        redacts = self.mode == "redact"
        found, output = (self.vault.found, self.vault.taken) if redacts else (self.input, self.output)
        return {"mode": self.mode, "input": dict(found), "output": dict(output)}


class PiiDoor:
    """What a server does with personal data."""

    def __init__(self, mode: str) -> None:
        """Raises ParameterError for a mode that there is not."""
        if mode not in MODES:
            raise ParameterError(f"--pii is {mode[:40]!r}; expected one of {', '.join(MODES)}")
        self.mode = mode

    def of(self, request: Request, texts: Sequence[str]) -> Private:
        """The personal data of one request, whose ``texts`` are what the caller sent."""
        found = Private(self.mode, texts)
        request.notes["pii"] = found
        return found


def without(texts: Sequence[str]) -> list[str]:
    """Texts as a log may have them."""
    return [replace(text)[0] for text in texts]
