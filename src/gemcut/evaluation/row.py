"""A row of the model card as data: where its items come from, how they are asked, how answers are scored."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Protocol

from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Answer, Request


@dataclass(frozen=True, kw_only=True)
class CardValues:
    """What Google's card says, in per cent; None where it says nothing."""

    pt_9b: float | None = None
    pt_27b: float | None = None
    it_9b: float | None = None
    it_27b: float | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        id: unique in its row and the same in every run ("anatomy/17").
        request: what the model is asked.
        target: what scoring needs to know, as JSON: the right choice's place, accepted answers, tests.
        group: subject, category, condition; "" where there is none. Figures are also given by group.
        meta: what else scoring needs, as JSON.
    """

    id: str
    request: Request
    target: Any
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an item's answer is worth.

    Attributes:
        values: by metric; the row's own must be among them (1.0 right, 0.0 wrong, or any number).
        extracted: what was taken for the answer, for people who look at it.
        failed: no answer could be extracted, which counts as wrong.
    """

    values: Mapping[str, float]
    extracted: str = ""
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a row is run: what may differ between two runs of it.

    Attributes:
        shots: examples in the prompt; None: the row's own number.
        seed: of sampled answers and of which items are taken.
        chat: ask in the model's chat format; None: as the row is defined.
    """

    shots: int | None = None
    seed: int = 0
    chat: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What scoring may use beside the answers.

    Attributes:
        allow_code: whether answers that are programs may be run (in a sandbox).
        scorers: judges of texts by name, as the caller made them.
        workers: processes that may run at once.
    """

    allow_code: bool = False
    scorers: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1


@dataclass
class Records:
    """What a loader read: the records to be asked, and those for shots (``shots`` by group, "" for all)."""

    records: list[dict[str, Any]]
    shots: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row's result in one metric, in per cent where ``values`` of items are 0 and 1.

    Attributes:
        value: the mean, or what the row's own aggregation says.
        error: its standard error; None where it has none.
        count: of items.
    """

    value: float
    error: float | None
    count: int


class Scorer(Protocol):
    """Scores of all answers of a row, in their order."""

    def __call__(self, items: Sequence[Item], answers: Sequence[Answer], options: ScoreOptions, /) -> list[Score]: ...


def each(one: Callable[[Item, Answer], Score]) -> Scorer:
    """A Scorer that scores one item after the other."""

    def score(items: Sequence[Item], answers: Sequence[Answer], options: ScoreOptions, /) -> list[Score]:
        return [one(item, answer) for item, answer in zip(items, answers, strict=True)]

    return functools.wraps(one)(score)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        id: short name ("mmlu").
        title: as the card writes it ("MMLU").
        setting: the card's words for shots and metric ("5-shot, top-1").
        card: the card's values.
        shots: examples in a prompt.
        metric: the one that stands beside the card's value; a key of ``Score.values`` or of ``extra``'s figures.
        data: the set that it reads, by name and files.
        load: reads the data; the folder counts and hashes what it read.
        build: makes items of the records, in plain Python and fast.
        score: values of the answers.
        version: raise it with every change of prompts or scoring that the functions below do not show.
        extra: figures of the whole row beside the means (a gap between groups), from items and scores.
        chat: whether the row is asked in the chat format (the card's instruction-tuned rows).
        code: whether scoring runs what the model wrote.
        safety: whether it stands in the card's second table.
        harmful: nothing of single items may be logged or shown.
        scorer: the name in ``ScoreOptions.scorers`` that scoring needs; "" where it needs none.
        differs: how it differs from what the card measured, one sentence each; empty where nothing is known to.
        scale: what a mean is multiplied by: 100 for shares.
    """

    id: str
    title: str
    setting: str
    card: CardValues
    shots: int
    metric: str
    data: SetOfData
    load: Callable[[DataFolder], Records]
    build: Callable[[Records, Setup], list[Item]]
    score: Scorer
    version: int = 1
    extra: Callable[[Sequence[Item], Sequence[Score]], dict[str, Figure]] | None = None
    chat: bool = False
    code: bool = False
    safety: bool = False
    harmful: bool = False
    scorer: str = ""
    differs: tuple[str, ...] = ()
    scale: float = 100.0

    def recipe(self, setup: Setup) -> str:
        """12 hexadecimal digits of how this row is asked and scored: its values, its functions' code, its setup.

        Comments and documentation do not count. Two runs of one recipe asked the same of the same data.
        """
        shots = self.shots if setup.shots is None else setup.shots
        chat = self.chat if setup.chat is None else setup.chat
        said = [self.id, self.version, self.metric, shots, chat, self.data.name, list(self.data.files)]
        code = [_code(f) for f in (self.load, self.build, self.score, self.extra) if f is not None]
        return hashlib.sha256(json.dumps([said, code]).encode()).hexdigest()[:12]


def _code(function: Any, seen: set[Any] | None = None) -> str:
    """A function's code without comments and documentation, and that of the package's functions that it calls.

    Constants that it names count by value; of a partial and of a closure what they hold.
    """
    seen = set() if seen is None else seen
    if isinstance(function, functools.partial):
        return f"{_code(function.func, seen)} {function.args!r} {sorted(function.keywords.items())!r}"
    function = inspect.unwrap(function)
    if function in seen:
        return ""
    seen.add(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    parts = [ast.unparse(tree)]
    if not inspect.isfunction(function):
        return parts[0]
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    named = [function.__globals__.get(name) for name in sorted(_names(function.__code__))]
    for value in (*held, *named):
        if inspect.isfunction(value) and value.__module__.startswith(__package__ or ""):
            parts.append(_code(value, seen))
        elif isinstance(value, str | int | float | tuple | re.Pattern):
            parts.append(repr(value))
    return "\n".join(parts)


def _names(code: CodeType) -> set[str]:
    """Global names that a function uses, those of functions within it too."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
