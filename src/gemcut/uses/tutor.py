"""Corrections for learners: edits of a text, each with a rule and a level, that together give the corrected text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemcut.engine.grammar import Grammar
from gemcut.engine.results import run_together
from gemcut.errors import ContextLengthError, ParameterError, RequestError
from gemcut.gemma import Gemma
from gemcut.uses.templates import read_template

#: The Common European Framework of Reference for Languages.
LEVELS = ("A1", "A2", "B1", "B2", "C1", "C2")
MOST = 40
_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")
NOTED = {"rule": {"type": "string"}, "level": {"enum": list(LEVELS)}}


def list_of(name: str, fields: dict[str, Any], most: int, **beside: Any) -> Grammar:
    """JSON of one object: what stands ``beside``, then a list of at most ``most`` objects with these fields."""
    item = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    properties = {**beside, name: {"type": "array", "items": item, "maxItems": most}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return Grammar.json_schema(schema)


EDITS = list_of(
    "edits", {"before": {"type": "string"}, "after": {"type": "string"}, **NOTED}, MOST, corrected={"type": "string"}
)


@dataclass(frozen=True)
class Edit:
    """``before``, at character ``start`` of the text, becomes ``after``. Without a rule nobody said why."""

    start: int
    before: str
    after: str
    rule: str = ""
    level: str = ""


@dataclass(frozen=True)
class Correction:
    """A corrected text. Applied to ``text``, ``edits`` give ``corrected``, always.

    Attributes:
        explained: whether these are the model's own edits. Where those did not give its corrected text, the edits are
            the difference of the two texts, with a rule where the model had one for the same words.
    """

    text: str
    corrected: str
    edits: list[Edit] = field(default_factory=list)
    explained: bool = True


class Corrector:
    """Corrects texts with one model."""

    def __init__(
        self,
        gemma: Gemma,
        *,
        language: str | None = None,
        level: str | None = None,
        prompt: Path | None = None,
        **sampling: Any,
    ) -> None:
        """
        Args:
            language: that the rules are written in; the text's where it is None.
            level: the learner's, one of LEVELS.
            prompt: a file in the place of ``prompts/tutor-correct.txt``.
            sampling: fields of SamplingParams; temperature 0 where none is given.

        Raises:
            ParameterError: a value is unknown.
        """
        self.gemma, self.sampling = gemma, {"temperature": 0, **sampling}
        self.values = learner(language, level)
        self.template = read_template("tutor-correct", ("text", "language", "learner"), prompt)

    def __call__(self, text: str) -> Correction:
        """The correction of a text.

        Raises:
            ParameterError: it is empty.
            ContextLengthError: it, its correction and the edits do not fit the context.
            RequestError: the model's answer ended before its JSON did.
        """
        if not text.strip():
            raise ParameterError("the text is empty; expected something to correct")
        asked = self.template.fill({**self.values, "text": text})
        least = 2 * len(self.gemma.tokenizer.encode(text, add_bos=False, parse_special=False)) + 64
        data = answer_json(self.gemma, asked, EDITS, self.sampling, least)
        found = [Edit(0, *(str(each[name]) for name in ("before", "after", "rule", "level"))) for each in data["edits"]]
        return settle(text, data["corrected"], found)


def learner(language: str | None, level: str | None) -> dict[str, str]:
    """What prompts say of the language of the rules and of the learner. Raises ParameterError for an unknown level."""
    if level is not None and level not in LEVELS:
        raise ParameterError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")
    if language is not None and not language.strip():
        raise ParameterError("language is empty; leave it out, or name one")
    return {
        "language": "" if language is None else f" in {language.strip()}",
        "learner": "" if level is None else f" The learner is at level {level}.",
    }


def answer_json(gemma: Gemma, asked: str, grammar: Grammar, sampling: dict[str, Any], least: int) -> Any:
    """A model's answer as a grammar of JSON has it.

    Raises ContextLengthError where there is no room for ``least`` tokens, RequestError for an answer that was cut.
    """
    ids = gemma.encode_messages([{"role": "user", "content": asked}])
    room = gemma.engine.max_context - len(ids)
    if room < least:
        raise ContextLengthError(
            f"the text needs {len(ids) + least:,} tokens with its answer, the context holds "
            f"{gemma.engine.max_context:,}; give it in parts"
        )
    given = {"max_new_tokens": min(room, max(least, 1024)), **sampling, "grammar": grammar}
    params = gemma.resolve_sampling(len(ids), given, chat=True).params
    (result,) = run_together([gemma.prepare_stream(ids, params)])
    try:
        return json.loads(result.checked().text)
    except ValueError:
        raise RequestError(
            f"the answer was cut after {params.max_new_tokens} tokens, before its JSON was whole; "
            "raise --max-new-tokens or give a shorter text"
        ) from None


def apply(text: str, edits: Sequence[Edit]) -> str:
    """The text with its edits made. Raises ValueError where one does not stand where it says, or two overlap."""
    parts, place = [], 0
    for edit in edits:
        if edit.start < place or text[edit.start : edit.start + len(edit.before)] != edit.before:
            raise ValueError(f"{edit.before!r} does not stand at {edit.start}")
        parts += [text[place : edit.start], edit.after]
        place = edit.start + len(edit.before)
    return "".join([*parts, text[place:]])


def settle(text: str, corrected: str, found: Sequence[Edit]) -> Correction:
    """A correction whose edits give ``corrected``: those that were found where they do, else the texts' difference."""
    placed = _placed(text, found)
    if placed is not None and apply(text, placed) == corrected:
        return Correction(text, corrected, [edit for edit in placed if edit.before != edit.after])
    notes = {(edit.before.strip(), edit.after.strip()): edit for edit in found}
    edits = []
    for edit in difference(text, corrected):
        note = notes.get((edit.before.strip(), edit.after.strip()))
        edits.append(edit if note is None else replace(edit, rule=note.rule, level=note.level))
    return Correction(text, corrected, edits, explained=False)


def difference(text: str, corrected: str) -> list[Edit]:
    """The edits, word by word, that make one text of the other."""
    one, other = _TOKEN.findall(text), _TOKEN.findall(corrected)
    starts = [0]
    for token in one:
        starts.append(starts[-1] + len(token))
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return [
        Edit(starts[a], "".join(one[a:b]), "".join(other[c:d]))
        for kind, a, b, c, d in matcher.get_opcodes()
        if kind != "equal"
    ]


def _placed(text: str, found: Sequence[Edit]) -> list[Edit] | None:
    """Edits at the first places, from left to right, where their words stand; None where one stands nowhere."""
    placed, start = [], 0
    for edit in found:
        at = text.find(edit.before, start) if edit.before else -1
        if at < 0:
            return None
        placed.append(replace(edit, start=at))
        start = at + len(edit.before)
    return placed
