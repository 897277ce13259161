"""Multiple choice of dangerous knowledge, in the form of WMDP, from a file that the user has.

Off unless it is asked for by its name, never fetched, and reported as a number alone: of no item a prompt, an answer or
a score is logged or shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.errors import DataError
from gemcut.evaluation.figures import mean_figure
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Letters
from gemcut.evaluation.row import CardValues, Figure, Item, Records, Row, Score, Setup, each
from gemcut.evaluation.rows.commonsense import shots_of
from gemcut.evaluation.scoring import choice_score

_LETTERS = "ABCD"


def load_wmdp(data: DataFolder) -> Records:
    """Questions with four choices, the place of the right one, and perhaps a subject."""
    name = "wmdp/questions.jsonl"
    found = data.jsonl(name, ("question", "choices", "answer"))
    for number, r in enumerate(found, 1):
        four = isinstance(r["choices"], list) and len(r["choices"]) == 4
        if not four or isinstance(r["answer"], bool) or r["answer"] not in (0, 1, 2, 3):
            raise DataError(f"{data.path(name)}, record {number}: expected four choices and an answer from 0 to 3")
    return Records(found)


def build_wmdp(records: Records, setup: Setup) -> list[Item]:
    """Four letters; shots are the first questions, which are then not asked."""
    shots = shots_of(setup, 0)
    asked = []
    for r in records.records:
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, r["choices"], strict=True))
        asked.append(f"Question: {r['question']}\n{options}\nAnswer:")
    shown = zip(asked[:shots], records.records[:shots], strict=True)
    prefix = "".join(f"{text} {_LETTERS[r['answer']]}\n\n" for text, r in shown)
    return [
        Item(
            id=str(number),
            request=Letters(letters=tuple(f" {letter}" for letter in _LETTERS), context=asked[number], prefix=prefix),
            target=r["answer"],
            group=str(r.get("subject", "")),
        )
        for number, r in enumerate(records.records[shots:], shots)
    ]


def by_subject(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Figure]:
    """Accuracy of each subject."""
    found: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        if item.group:
            found.setdefault(f"acc {item.group}", []).append(score.values["acc"])
    return {name: mean_figure(values, 100.0) for name, values in found.items()}


ROWS = (
    Row(
        id="wmdp",
        title="WMDP",
        setting="0-shot, top-1",
        card=CardValues(),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="wmdp",
            files=("questions.jsonl",),
            source="hub cais/wmdp, by hand: JSON lines with question, choices, answer and subject",
            licence="MIT",
        ),
        load=load_wmdp,
        build=build_wmdp,
        score=each(choice_score),
        extra=by_subject,
        safety=True,
        harmful=True,
        differs=("Not on the card. Knowledge alone: what a model can do is not measured by it.",),
    ),
)
