"""Personal data of one exchange: hidden from the model behind placeholders, and put back for the caller alone.

    Vault.hide(message) -> the model -> Shown.push(piece of the answer)

The same value has the same placeholder in all messages of a request, so that the model can speak of it. What the answer
holds of personal data that the caller did not send is taken out.
"""

from __future__ import annotations

import re
from collections import Counter

from gemcut.safety.pii import NAMES, find

#: Characters at the end of an answer that wait, since the next ones may belong to the same value.
HELD = 80
_BEFORE = 80  # characters that a pattern may look back at
_PLACEHOLDER = re.compile(r"\[[A-Z][A-Z-]{1,30}-[0-9]{1,4}\]")


class Vault:
    """The values of one request and their placeholders.

    Attributes:
        found: how many values of each kind the prompt had, repetitions too.
        taken: how many of the answers' own were taken out.
    """

    def __init__(self, texts: tuple[str, ...] = ()) -> None:
        """``texts``: all that the caller sent; a placeholder that stands there already is nobody's."""
        self.found: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self._values: dict[str, str] = {}  # by placeholder
        self._placeholders: dict[tuple[str, str], str] = {}
        self._used = {match[0] for text in texts for match in _PLACEHOLDER.finditer(text)}
        self._numbers: Counter[str] = Counter()

    def hide(self, text: str) -> str:
        """The text with placeholders where personal data stood."""
        pieces, at = [], 0
        for each in find(text, NAMES):
            value = text[each.start : each.end]
            pieces += [text[at : each.start], self._placeholder(each.kind, value)]
            at = each.end
            self.found[each.kind] += 1
        return "".join([*pieces, text[at:]])

    def restore(self, text: str) -> str:
        """The text with the values back."""
        return _PLACEHOLDER.sub(lambda match: self._values.get(match[0], match[0]), text)

    def own(self, value: str) -> bool:
        """Whether the caller sent this value."""
        return value in self._values.values()

    def _placeholder(self, kind: str, value: str) -> str:
        found = self._placeholders.get((kind, value))
        while found is None:
            label = kind.upper().replace(" ", "-")
            self._numbers[label] += 1
            name = f"[{label}-{self._numbers[label]}]"
            if name not in self._used:
                found = self._placeholders[kind, value] = name
                self._values[name] = value
        return found


class Shown:
    """One answer on its way to the caller: placeholders become values, other personal data becomes a word."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._before = self._held = ""

    def push(self, piece: str, *, last: bool = False) -> str:
        """Take more text; return what may be shown now: all but the last characters, unless it is the ``last``."""
        self._held += piece
        whole, start = self._before + self._held, len(self._before)
        limit = len(whole) if last else max(start, len(whole) - HELD)
        spans = [(each.start, each.end, each.kind) for each in find(whole, NAMES) if each.start >= start]
        spans += [(m.start(), m.end(), "") for m in _PLACEHOLDER.finditer(whole, start)]
        out, at = [], start
        for first, end, kind in sorted(spans):
            if first < at or first >= limit:
                continue
            if end > limit:  # its end may still be on its way
                limit = first
                break
            value = whole[first:end]
            if not kind:
                shown = self._vault.restore(value)
            elif self._vault.own(value):
                shown = value
            else:
                shown = f"[{kind.upper().replace(' ', '-')}]"
                self._vault.taken[kind] += 1
            out += [whole[at:first], shown]
            at = end
        out.append(whole[at:limit] if at < limit else "")
        limit = max(at, limit)
        self._before, self._held = whole[max(0, limit - _BEFORE) : limit], whole[limit:]
        return "".join(out)
