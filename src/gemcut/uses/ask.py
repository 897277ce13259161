"""Answers from documents: passages are looked up, and each sentence of the answer rests on words of one of them."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut.engine import SamplingParams
from gemcut.engine.grammar import Grammar
from gemcut.engine.results import run_together
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.gemma import Gemma
from gemcut.uses.index import DocumentIndex, Passage
from gemcut.uses.templates import Template, read_template
from gemcut.uses.words import scripts

NOTHING = "not in these documents"
PLACES = ("passages", "question")
#: Sentences of an answer, and the fewest characters of a quote.
MOST = 6
LEAST_QUOTE = 8
_ITEM = re.compile(r"\[(\d+)\] ([^\n]*)\n([^\n]+)\n?")


@dataclass(frozen=True)
class Claim:
    """A sentence of an answer, the quote that it rests on, and where that stands.

    ``file`` and ``line`` are None where the quote is in none of the passages that the model was shown.
    """

    text: str
    quote: str
    file: str | None
    line: int | None


@dataclass(frozen=True)
class Answer:
    """What the documents say to a question.

    Attributes:
        found: whether they say anything.
        claims: sentences whose quotes were found where they are said to be.
        unsupported: sentences whose quotes were not; they are no part of the answer.
        passages: what the model was shown.
        reason: why nothing was found; "" where something was.
    """

    found: bool
    claims: list[Claim] = field(default_factory=list)
    unsupported: list[Claim] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    reason: str = ""

    @property
    def text(self) -> str:
        """Sentences with their citations, or that there is nothing."""
        if not self.found:
            return NOTHING
        return "\n".join(f"{claim.text} [{claim.file}:{claim.line}]" for claim in self.claims)


class Asker:
    """Answers questions with one model from one index."""

    def __init__(
        self, gemma: Gemma, index: DocumentIndex, *, passages: int = 8, prompt: Path | None = None, **sampling: Any
    ) -> None:
        """
        Args:
            passages: most that the model is shown.
            prompt: a file in the place of ``prompts/ask.txt``.
            sampling: fields of SamplingParams; temperature 0 and 512 new tokens where they are not given.

        Raises:
            ParameterError: a value is unknown.
        """
        if not 1 <= passages <= 100:
            raise ParameterError(f"passages is {passages}; expected 1 to 100")
        self.gemma, self.index, self.passages = gemma, index, passages
        self.template: Template = read_template("ask", PLACES, prompt)
        sampling = {"temperature": 0, "max_new_tokens": 512, **sampling}
        if "grammar" in sampling:
            raise ParameterError("an answer from documents has a grammar of its own; leave grammar out")
        self.params: SamplingParams = gemma.resolve_sampling(0, sampling, chat=True).params

    def __call__(self, question: str) -> Answer:
        """The answer to a question.

        Raises:
            ParameterError: the question has no word.
            ContextLengthError: the context holds not even one passage.
        """
        found = self.index.search(question, self.passages)
        if not found:
            return Answer(False, reason=why_nothing(question, self.index.some_text()))
        found, ids = self._fitting(question, found)
        values = {name: getattr(self.params, name) for name in SamplingParams.__dataclass_fields__}
        params = SamplingParams(**{**values, "grammar": grammar([_flat(each.text) for each in found])})
        (result,) = run_together([self.gemma.prepare_stream(ids, params)])
        claims = [check(*item, found) for item in read_items(result.checked().text)]
        good = [claim for claim in claims if claim.file is not None]
        bad = [claim for claim in claims if claim.file is None]
        reason = (
            "" if good else "the model found no answer in the passages" if not bad else "no quote could be verified"
        )
        return Answer(bool(good), good, bad, found, reason)

    def _fitting(self, question: str, found: list[Passage]) -> tuple[list[Passage], list[int]]:
        """As many of the best passages as fit, and the prompt with them."""
        room = self.gemma.engine.max_context - self.params.max_new_tokens
        for count in range(len(found), 0, -1):
            words = "\n\n".join(f"[{n}] {each.path}\n{_flat(each.text)}" for n, each in enumerate(found[:count], 1))
            content = self.template.fill({"passages": words, "question": question.strip()})
            ids = self.gemma.encode_messages([{"role": "user", "content": content}])
            if len(ids) <= room:
                return found[:count], ids
        raise ContextLengthError(
            f"a context of {self.gemma.engine.max_context} tokens leaves no room for the question and one passage "
            f"beside {self.params.max_new_tokens} new tokens; raise --max-context or ask for less"
        )


def grammar(texts: Sequence[str]) -> Grammar:
    """What an answer looks like: quotes are runs of whole words of the passage whose number stands before them."""
    quotes = " | ".join(f'"[{n}] " QUOTE_{n}' for n in range(1, len(texts) + 1))
    lines = [
        f"start: {json.dumps(NOTHING)} | item{{1,{MOST}}}",
        f'item: ({quotes}) "\\n" SENTENCE "\\n"',
        r"SENTENCE: /[^\s\[][^\n]*/",  # no bound: llguidance's masks let tokens pass one
    ]
    lines += [f"QUOTE_{n}: %regex {json.dumps({'substring_words': text})}" for n, text in enumerate(texts, 1)]
    return Grammar.lark("\n".join(lines))


def read_items(text: str) -> list[tuple[int, str, str]]:
    """(passage's number, quote, sentence) of each pair of lines in a model's answer."""
    return [(int(item[1]), item[2].strip(), item[3].strip()) for item in _ITEM.finditer(text)]


def check(number: int, quote: str, text: str, passages: Sequence[Passage]) -> Claim:
    """A sentence with the place where its quote stands: in the passage with that number, else in another one.

    A quote counts where a passage has it word for word, line breaks as spaces, and has 8 characters at least (or is
    the whole passage).
    """
    order = [*passages[number - 1 : number], *passages] if number >= 1 else list(passages)
    wanted = " ".join(quote.split())
    for passage in order:
        if len(wanted) < min(LEAST_QUOTE, len(_flat(passage.text))) or not wanted:
            continue
        if (line := _line_of(wanted, passage)) is not None:
            return Claim(text, quote, passage.path, line)
    return Claim(text, quote, None, None)


def _line_of(wanted: str, passage: Passage) -> int | None:
    """The line where a run of words begins in a passage."""
    starts, lines, place = [], [], 0
    for number, line in enumerate(passage.text.split("\n"), passage.line):
        for word in line.split():
            starts.append(place)
            lines.append(number)
            place += len(word) + 1
    at = _flat(passage.text).find(wanted)
    return None if at < 0 else lines[bisect_right(starts, at) - 1]


def _flat(text: str) -> str:
    return " ".join(text.split())


def why_nothing(question: str, text: str) -> str:
    """Why no passage fits a question; ``text`` is some of the documents' text."""
    if not text.strip():
        return "the folder has no documents with text"
    own, theirs = scripts(question), scripts(text)
    if own and not own & theirs:
        asked, there = ", ".join(sorted(own)), ", ".join(sorted(theirs)) or "none"
        return f"the question is written in {asked}, the documents in {there}; ask in the documents' language"
    return "no passage has the question's words; ask with words that the documents use"
