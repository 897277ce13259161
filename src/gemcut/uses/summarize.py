"""Summaries of texts of any length: chunks that fit are summarized together, then their summaries."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut import files
from gemcut.engine import SamplingParams
from gemcut.engine.results import run_together
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.gemma import Gemma
from gemcut.uses.chunks import split_text
from gemcut.uses.templates import Template, read_template

#: What a length asks for, and the most tokens it may take.
LENGTHS = {
    "short": ("Write two sentences.", 96),
    "medium": ("Write one paragraph of at most 150 words.", 256),
    "long": ("Write at most 400 words.", 640),
}
STYLES = {"prose": "Write plain prose.", "bullets": "Write bullet points.", "headline": "Write a single headline."}
PLACES = ("text", "style", "length")
_QUOTE = re.compile('"([^"\n]{2,})"|“([^”\n]{2,})”|«([^»\n]{2,})»|„([^“\n]{2,})“')
#: Chunks that go to the engine together; between two such groups what is done is kept.
_TOGETHER = 64


@dataclass(frozen=True)
class Quote:
    """What a summary has in quotation marks; ``line`` is the source's where it stands so, None where it does not."""

    text: str
    line: int | None


@dataclass(frozen=True)
class Summary:
    """A text's summary: behind a quote that is not in the text stands that it is not.

    Attributes:
        text: the summary.
        quotes: what it quotes.
        chunks: parts that the text was cut into.
        rounds: times that summaries were summarized.
        cut: whether a length's bound ended an answer.
    """

    text: str
    quotes: list[Quote] = field(default_factory=list)
    chunks: int = 1
    rounds: int = 0
    cut: bool = False


class Summarizer:
    """Summarizes with one model and one prompt."""

    def __init__(
        self,
        gemma: Gemma,
        *,
        length: str = "medium",
        style: str = "prose",
        prompt: Path | None = None,
        cache: Path | None = None,
        heard: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> None:
        """
        Args:
            length: one of LENGTHS.
            style: one of STYLES.
            prompt: a file in the place of ``prompts/summarize.txt``.
            cache: a folder for the chunks' summaries; None keeps none. Drawn answers without a seed are not kept.
            heard: called with (chunks done, chunks known).
            sampling: fields of SamplingParams; temperature 0 where none is given.

        Raises:
            ParameterError: a value is unknown.
        """
        for what, value, known in (("length", length, LENGTHS), ("style", style, STYLES)):
            if value not in known:
                raise ParameterError(f"{what} is {value!r}; expected one of {', '.join(known)}")
        self.gemma, self.cache, self.heard = gemma, cache, heard
        self.template: Template = read_template("summarize", PLACES, prompt)
        words, most = LENGTHS[length]
        self._values = {"length": words, "style": STYLES[style]}
        sampling = {"temperature": 0, "max_new_tokens": most, **sampling}
        self.params: SamplingParams = gemma.resolve_sampling(0, sampling, chat=True).params
        self.done = self.known = 0
        if not self._fits("word " * 32):
            raise ContextLengthError(
                f"a context of {gemma.engine.max_context} tokens leaves no room for a text beside the prompt and "
                f"{self.params.max_new_tokens} new tokens; raise --max-context or ask for less"
            )

    def __call__(self, texts: Sequence[str]) -> list[Summary]:
        """A summary a text; the chunks of all texts are computed together. Raises ParameterError for an empty one."""
        if place := next((place for place, text in enumerate(texts, 1) if not text.strip()), None):
            raise ParameterError(f"text {place} holds no text")
        parts = [[chunk for chunk in split_text(text, self._fits) if chunk.strip()] for text in texts]
        counts, rounds, cut = [len(own) for own in parts], [0] * len(parts), [False] * len(parts)
        open_ = list(range(len(parts)))
        while open_:
            answers = iter(self._answers([part for place in open_ for part in parts[place]]))
            for place in open_:
                found = [next(answers) for _ in parts[place]]
                cut[place] |= any(ended for _, ended in found)
                parts[place] = [text.strip() for text, _ in found]
            open_ = [place for place in open_ if len(parts[place]) > 1]
            for place in open_:
                before = len(parts[place])
                parts[place] = [part for part in split_text("\n\n".join(parts[place]), self._fits) if part.strip()]
                rounds[place] += 1
                if len(parts[place]) >= before:
                    raise ParameterError(
                        f"{before} summaries are not shorter together than {before} chunks; ask for a shorter length"
                    )
        return [
            _checked(parts[place][0] if parts[place] else "", text, counts[place], rounds[place], cut[place])
            for place, text in enumerate(texts)
        ]

    def _ids(self, text: str) -> list[int]:
        content = self.template.fill({**self._values, "text": text})
        return self.gemma.encode_messages([{"role": "user", "content": content}])

    def _fits(self, text: str) -> bool:
        room = self.gemma.engine.max_context - self.params.max_new_tokens
        # No token has more than 48 characters: what is far too long need not be tokenized to be known so.
        return len(text) <= 48 * room and len(self._ids(text)) <= room

    def _answers(self, parts: list[str]) -> list[tuple[str, bool]]:
        """(summary, whether its bound ended it) of each part, all of them computed together."""
        self.known += len(parts)
        ids = [self._ids(part) for part in parts]
        files_ = [self._file(own) for own in ids]
        found = [None if path is None else _read(path) for path in files_]
        left = [place for place, answer in enumerate(found) if answer is None]
        self._tell(len(parts) - len(left))
        for start in range(0, len(left), _TOGETHER):
            group = left[start : start + _TOGETHER]
            streams = [self.gemma.prepare_stream(ids[place], self.params) for place in group]
            for place, result in zip(group, run_together(streams), strict=True):
                answer = result.checked()
                found[place] = (answer.text, answer.finish_reason == "length")
                if (path := files_[place]) is not None:
                    _write(path, found[place])
            self._tell(len(group))
        return [answer for answer in found if answer is not None]

    def _tell(self, count: int) -> None:
        self.done += count
        if self.heard is not None:
            self.heard(self.done, self.known)

    def _file(self, ids: list[int]) -> Path | None:
        if self.cache is None or not (self.params.greedy or self.params.seed is not None):
            return None
        source = self.gemma.source
        model = [repr(self.gemma), None if source is None else [str(source.path), source.revision]]
        key = json.dumps([model, repr(self.params), ids])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def check_quotes(summary: str, source: str) -> list[Quote]:
    """What a summary has in quotation marks, each looked for in the source: word for word, white space alike."""
    starts, lines, words = [], [], []
    place = line = seen = 0
    for found in re.finditer(r"\S+", source):
        line += source.count("\n", seen, found.start())
        seen = found.start()
        starts.append(place)
        lines.append(line + 1)
        words.append(found[0])
        place += len(found[0]) + 1
    flat = " ".join(words)
    quotes = []
    for quote in _QUOTE.finditer(summary):
        text = next(group for group in quote.groups() if group is not None)
        at = flat.find(wanted) if (wanted := " ".join(text.split())) else -1
        quotes.append(Quote(text, None if at < 0 else lines[bisect_right(starts, at) - 1]))
    return quotes


def _checked(text: str, source: str, chunks: int, rounds: int, cut: bool) -> Summary:
    quotes = check_quotes(text, source)
    marked, place = [], 0
    for quote, found in zip(quotes, _QUOTE.finditer(text), strict=True):
        marked += [text[place : found.end()], "" if quote.line is not None else " [not in the text]"]
        place = found.end()
    return Summary("".join([*marked, text[place:]]), quotes, chunks, rounds, cut)


def _read(path: Path) -> tuple[str, bool] | None:
    """A kept answer; None where there is none that can be read."""
    with contextlib.suppress(OSError, files.UnreadableError):
        found = files.read_json(path)
        if isinstance(found, list) and len(found) == 2 and isinstance(found[0], str):
            return found[0], bool(found[1])
    return None


def _write(path: Path, answer: Any) -> None:
    """Keep an answer, whole or not at all; where that fails it is computed again one day."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.part")
        half.write_text(json.dumps(answer), "utf-8")
        half.replace(path)
