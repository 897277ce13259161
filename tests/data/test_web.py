"""The web rules beside a slow version, on texts that are made to break them."""

from __future__ import annotations

import random
import re

import pytest

from gemcut.data.document import Document, Dropped
from gemcut.data.filters.web import C4, FineWeb, GopherQuality, GopherRepetition
from gemcut.data.steps import Filter

from . import reference_web as slow
from .corpus import WORDS, sentences


def damaged(seed: int) -> str:
    """A text with some defect of some strength."""
    draw = random.Random(seed)
    lines = sentences(seed, draw.randint(1, 14)).split("\n")
    for _ in range(draw.randint(0, 4)):
        kind = draw.randrange(11)
        i = draw.randrange(len(lines))
        if kind == 0:
            lines += [lines[i]] * draw.randint(1, 5)
        elif kind == 1:
            phrase = " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 12)))
            lines[i] += f" {phrase}" * draw.randint(1, 6)
        elif kind == 2:
            lines = [draw.choice("•-*–") + " " + line for line in lines]
        elif kind == 3:
            lines = [line + draw.choice(["...", "…", "....", " .."]) for line in lines]
        elif kind == 4:
            lines[i] += " ## # ..." * draw.randint(1, 9)
        elif kind == 5:
            lines = [" ".join(draw.choice(["12", "3.4", word]) for word in line.split()) for line in lines]
        elif kind == 6:
            lines = [part for line in lines for part in re.findall(r".{1,25}(?: |$)", line)]
        elif kind == 7:
            lines.insert(i, "")
        elif kind == 8:
            lines[i] = draw.choice(["We use cookies here.", "Enable Javascript now!", "lorem Ipsum dolor.", "{ x }"])
        elif kind == 9:
            lines = [line.rstrip(".") for line in lines]
        else:
            lines[i] = draw.choice(
                ['He said "go." Then "stop!"', "中文 的 文本。", "Été — naïve? Oui!", "a b", "So.[3]"]
            )
    return draw.choice(["", "\n", "  "]) + "\n".join(lines) + draw.choice(["", "\n\n"])


TEXTS = [damaged(i) for i in range(400)] + ["", "x", "\n\n", "…", "a\n" * 60]
RULES = [(GopherQuality(), slow.quality), (GopherRepetition(), slow.repetition), (FineWeb(), slow.fineweb)]


@pytest.mark.parametrize(("rule", "reference"), RULES, ids=lambda x: getattr(x, "NAME", ""))
def test_verdicts(rule: Filter, reference: object) -> None:
    documents = [Document(str(i), "a", text) for i, text in enumerate(TEXTS)]
    expected = [reference(text) for text in TEXTS]  # type: ignore[operator]
    seen = set()
    for start in range(0, len(TEXTS), 57):  # batches of many documents, some split before, some not
        some = documents[start : start + 57]
        for reason, broken in zip(rule.judge(some), expected[start : start + 57], strict=True):
            assert (reason is None) == (not broken)
            assert reason is None or reason in broken
            seen.add(reason)
    everything = set().union(*expected)
    assert None in seen
    assert len(everything) >= {"gopher-quality": 6, "gopher-repetition": 9, "fineweb": 3}[rule.NAME]  # type: ignore[attr-defined]
    again = [rule.judge([document])[0] for document in documents[:80]]
    assert again == list(rule.judge(documents[:80]))


def test_c4() -> None:
    documents = [Document(str(i), "a", text) for i, text in enumerate(TEXTS)]
    found = list(C4()(iter(documents), 0, 1))
    reasons = set()
    for text, item in zip(TEXTS, found, strict=True):
        left, why = slow.c4(text)
        if why:
            assert isinstance(item, Dropped)
            assert item.reason == why
            reasons.add(why)
        else:
            assert isinstance(item, Document)
            assert slow.paragraphs_of(item.text) == slow.paragraphs_of(left)
    assert len(reasons) == 4


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("In 1900.[1] He died.[citation needed] Why? How! So it is.", "In 1900. He died. Why? How! So it is."),
        (
            "One two three. a. b. c. d.\n\n\nNo end here\n\nTwo is here. e.",
            "One two three. a. b. c. d.\n\nTwo is here. e.",
        ),
    ],
)
def test_c4_cuts_lines_and_citations(text: str, left: str) -> None:
    (item,) = C4()(iter([Document("1", "a", text)]), 0, 1)
    assert isinstance(item, Document)
    assert item.text == left


def test_c4_as_fineweb_takes_it() -> None:
    text = "no stop here { x }\nthree words there\n" + "Is it so? " * 5
    (item,) = C4(terminal_punctuation=False, curly=False)(iter([Document("1", "a", text)]), 0, 1)
    assert isinstance(item, Document)
    assert item.text == text


def test_a_chain_that_drops_and_changes_judges_as_each_rule_alone() -> None:
    """Splits that were made together are taken apart and put together again on the way."""

    def chain() -> list[str]:
        items = iter([Document(str(i), "a", text) for i, text in enumerate(TEXTS)])
        for step in (GopherQuality(), C4(), FineWeb(), GopherRepetition()):
            items = (item for item in step(items, 0, 1) if isinstance(item, Document))
        return [item.id for item in items]

    alone = []
    for i, text in enumerate(TEXTS):
        if not slow.quality(text):
            left, why = slow.c4(text)
            if not why and not slow.fineweb(left) and not slow.repetition(left):
                alone.append(str(i))
    assert chain() == alone
    assert 5 < len(alone) < len(TEXTS)
