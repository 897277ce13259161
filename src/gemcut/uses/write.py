"""Texts of a kind about something, in a tone: poems, scripts, emails, copy, code."""

from __future__ import annotations

import re
from pathlib import Path

from gemcut.errors import ParameterError
from gemcut.uses.templates import read_template

KINDS = ("poem", "script", "email", "copy", "code")
PLACES = ("about", "tone")
#: A fence of three or more backticks or tildes, and the one of the same kind that ends it, or the text's end.
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def write_messages(
    kind: str, about: str, *, tone: str | None = None, prompt: Path | None = None
) -> list[dict[str, str]]:
    """The dialogue that asks for a text; `Gemma.chat` answers it.

    Args:
        kind: one of KINDS.
        about: what the text is about, or what the code does.
        tone: how it sounds.
        prompt: a file in the place of ``prompts/write-KIND.txt``, with {about} and, if wanted, {tone} in it.

    Raises:
        ParameterError: ``kind`` is unknown, ``about`` is empty, or the prompt is wrong.
    """
    if kind not in KINDS:
        raise ParameterError(f"the kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if not about.strip():
        raise ParameterError("about is empty; say what the text is about")
    if tone is not None and not tone.strip():
        raise ParameterError("tone is empty; leave it out, or say how the text sounds")
    template = read_template(f"write-{kind}", PLACES, prompt)
    sounds = "" if tone is None else f"The tone is {tone.strip()}."
    content = template.fill({"about": about.strip(), "tone": sounds})
    return [{"role": "user", "content": content}]


def extract_code(text: str) -> str | None:
    """What stands in the first fenced block of a Markdown text, or None where there is none."""
    found = _FENCE.search(text)
    return None if found is None else found[2]
