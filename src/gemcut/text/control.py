"""Whose a control token in a rendered dialogue is: the template's, or a person's who typed its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gemcut.errors import ChatTemplateError
from gemcut.text.template import Template
from gemcut.text.tokenizer import Tokenizer

#: Tags of HTML that are tokens in every Gemma vocabulary; people's text may hold them.
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>", re.ASCII
)
_WORD = re.compile(r"\w+")
_PRIVATE = range(0xE000, 0xF900)


class ControlTokens:
    """The control tokens of one tokenizer under one template.

    These are all special tokens, and of the other added tokens those that the template writes (``<|im_end|>`` that a
    fine-tune added as an ordinary token), without white space and HTML.

    Attributes:
        ids: their token ids.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._tokenizer = tokenizer
        special = [tokenizer.id_to_token(i) for i in tokenizer.special_ids]
        written = "\0".join(template.literals)
        added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if not token.special}
        # In an encoding without special tokens these are still found, so they are broken up by hand.
        self._ordinary = sorted(t for t in added if t in written and not t.isspace() and not _HTML.fullmatch(t))
        self._names = sorted({text for text in (*special, *self._ordinary) if text.strip()}, key=len, reverse=True)
        ids = (tokenizer.token_to_id(text) for text in self._names)
        self.ids = frozenset(i for i in ids if i is not None)
        self._edges = frozenset(c for text in self._names for c in (text.strip()[0], text.strip()[-1]))
        self._insides = "\0".join(text.strip()[1:-1] for text in self._names)
        self._longest = max(map(len, self._names), default=0)
        self._words = template.constants
        tests = [text for text in template.constants if len(text) > 1 and self._edges & set(text)]
        self._harmless = [text for text in tests if not any(_overlap(text, name) for name in self._names)]
        self._thoughts = [text for text in self._ordinary if text in template.looked_for]

    def named_in(self, role: str) -> bool:
        """Whether a role could complete a control token that a template builds from it (``<|`` role ``|>``)."""
        return role in self._insides

    def typed(self, text: str) -> str | None:
        """A control token whose name stands in a text, or None."""
        return next((name for name in self._names if name in text), None)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which no control token is read as one.

        Raises:
            ChatTemplateError: the tokenizer makes a control token of plain characters.
        """
        cuts = sorted({at + 1 for name in self._ordinary for at in _places(text, name)})
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [i for piece in pieces for i in self._tokenizer.encode(piece, add_bos=False, parse_special=False)]
        for token_id in ids:
            if token_id in self.ids:
                name = self._tokenizer.id_to_token(token_id)
                raise ChatTemplateError(f"the tokenizer makes the control token {name!r} of plain text; remove it")
        return ids

    def spans(self, places: list[tuple[int, int]], ids: list[int]) -> list[tuple[int, int, int]]:
        """(start, end, id) of the control tokens among an encoding's tokens."""
        return [(*place, i) for place, i in zip(places, ids, strict=True) if i in self.ids]

    def mask(self, taken: str) -> Mask:
        """A mask whose stand-ins do not occur in ``taken``."""
        return Mask(self, taken)


class Mask:
    """Writes people's text with stand-ins for the characters at which control tokens begin and end.

    Rendered with them, a control token in the dialogue is the template's own. Every stand-in is one character of
    Unicode's private area, so a template that strips or cuts texts does to them what it does to the text itself.

    Attributes:
        used: whether any character was replaced.
    """

    def __init__(self, tokens: ControlTokens, taken: str) -> None:
        self._tokens = tokens
        low = taken.lower()
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken and f"\\u{code:04x}" not in low)
        self._stand_ins: dict[str, str] = {}

    @property
    def used(self) -> bool:
        return bool(self._stand_ins)

    def message(self, message: Mapping[Any, Any]) -> dict[Any, Any]:
        """A message with its texts masked. The role stays, and so do the thinking tags of the model's own messages
        (tokens that the template takes its messages apart at)."""
        model = message.get("role") in ("assistant", "model")
        keep = self._pattern(model)
        return {k: v if k == "role" else self._value(k, v, keep) for k, v in message.items()}

    def value(self, value: Any) -> Any:
        """A copy of a value with all its texts masked."""
        return self._value(None, value, self._pattern(False))

    def restore(self, rendered: str) -> tuple[str, str]:
        """(the rendering with one stand-in a character, the same with the characters themselves)."""
        for stand_in in self._stand_ins.values():  # JSON in ASCII, and Python's repr
            rendered = rendered.replace(f"\\u{ord(stand_in):04x}", stand_in)
        return rendered, rendered.translate({ord(s): c for c, s in self._stand_ins.items()})

    def _pattern(self, model: bool) -> re.Pattern[str] | None:
        kept = [*self._tokens._harmless, *(self._tokens._thoughts if model else ())]
        return re.compile("|".join(map(re.escape, sorted(kept, key=len, reverse=True)))) if kept else None

    def _value(self, key: Any, value: Any, keep: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            return value if key == "type" and _WORD.fullmatch(value) else self._text(value, keep)
        if isinstance(value, Mapping):
            return {
                self._edges(k) if isinstance(k, str) else k: self._value(k, item, keep) for k, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(None, item, keep) for item in value)
        return value

    def _text(self, text: str, keep: re.Pattern[str] | None) -> str:
        tokens = self._tokens
        short = text.strip()
        # A name that a template sets between "<|" and "|>" is hidden whole.
        if short and len(short) <= tokens._longest and short in tokens._insides and short not in tokens._words:
            return "".join(c if c.isspace() else self._stand_in(c) for c in text)
        if keep is None:
            return self._edges(text)
        parts, at = [], 0
        for match in keep.finditer(text):
            parts += [self._edges(text[at : match.start()]), match.group()]
            at = match.end()
        return "".join([*parts, self._edges(text[at:])])

    def _edges(self, text: str) -> str:
        found = self._tokens._edges & set(text)
        return text.translate({ord(c): self._stand_in(c) for c in found}) if found else text

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_ins:
            free = next(self._free, None)
            if free is None:
                raise ChatTemplateError("the dialogue holds too many characters of Unicode's private area")
            self._stand_ins[character] = free
        return self._stand_ins[character]


def _places(text: str, name: str) -> Iterator[int]:
    at = text.find(name)
    while at >= 0:
        yield at
        at = text.find(name, at + 1)


def _overlap(text: str, name: str) -> bool:
    """Whether a control token could share characters with a text that stands as it is."""
    shorter = min(len(text), len(name))
    return (
        name in text
        or text in name
        or any(text.endswith(name[:n]) or text.startswith(name[-n:]) for n in range(1, shorter))
    )
