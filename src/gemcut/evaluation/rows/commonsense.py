"""HellaSwag, PIQA, SocialIQA, BoolQ, WinoGrande, ARC: which continuation is likeliest."""

from __future__ import annotations

import re
from typing import Any

from gemcut.errors import DataError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Choices, Letters
from gemcut.evaluation.row import CardValues, Item, Records, Row, Setup, each
from gemcut.evaluation.scoring import choice_score

_UNKNOWN = "Google published neither its prompts nor how it normalises choices."


def shots_of(setup: Setup, standard: int) -> int:
    """How many shots a prompt has."""
    return standard if setup.shots is None else setup.shots


# ---- HellaSwag ---------------------------------------------------------------------------------------------------


def load_hellaswag(data: DataFolder) -> Records:
    """Six lines an item: context, place of the right ending, four endings."""
    name = "hellaswag/hellaswag_val_full.txt.bz2"
    lines = data.lines(name)
    if len(lines) % 6:
        raise DataError(f"{data.path(name)} has {len(lines):,} lines; expected six an item")
    found = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        if label not in ("0", "1", "2", "3"):
            raise DataError(f"{data.path(name)}, line {start + 2}, is {label[:30]!r}; expected 0, 1, 2 or 3")
        found.append({"number": start // 6, "context": context, "label": int(label), "endings": endings})
    data.used[name].records = len(found)
    return Records(found)


def build_hellaswag(records: Records, setup: Setup) -> list[Item]:
    """The first items are the shots, and are not asked."""
    shots = shots_of(setup, 10)
    prefix = "".join(f"{r['context']} {r['endings'][r['label']]}\n\n" for r in records.records[:shots])
    return [
        Item(
            id=str(r["number"]),
            request=Choices(continuations=tuple(f" {e}" for e in r["endings"]), context=r["context"], prefix=prefix),
            target=r["label"],
        )
        for r in records.records[shots:]
    ]


# ---- PIQA --------------------------------------------------------------------------------------------------------


def load_piqa(data: DataFolder) -> Records:
    """Questions and labels stand in two files, line by line."""
    records = data.jsonl("piqa/valid.jsonl", ("goal", "sol1", "sol2"))
    labels = data.lines("piqa/valid-labels.lst")
    if len(labels) != len(records) or set(labels) - {"0", "1"}:
        raise DataError(
            f"{data.path('piqa')}: {len(records):,} questions and {len(labels):,} labels; expected a 0 or 1 for each"
        )
    return Records([{**record, "label": int(label)} for record, label in zip(records, labels, strict=True)])


def build_piqa(records: Records, setup: Setup) -> list[Item]:
    """Question and answer; shots are the first items, which are then not asked."""
    shots = shots_of(setup, 0)
    prefix = "".join(
        f"Question: {r['goal']}\nAnswer: {r['sol2' if r['label'] else 'sol1']}\n\n" for r in records.records[:shots]
    )
    return [
        Item(
            id=str(number),
            request=Choices(
                continuations=(f" {r['sol1']}", f" {r['sol2']}"),
                context=f"Question: {r['goal']}\nAnswer:",
                prefix=prefix,
            ),
            target=r["label"],
        )
        for number, r in enumerate(records.records[shots:], shots)
    ]


# ---- SocialIQA ---------------------------------------------------------------------------------------------------


def load_social_iqa(data: DataFolder) -> Records:
    """Either of two forms: the records of the hub's data set, or instructions as LLM-Adapters has them."""
    if (data.root / "social_iqa" / "validation.jsonl").exists():
        columns = ("context", "question", "answerA", "answerB", "answerC", "label")
        found = data.jsonl("social_iqa/validation.jsonl", columns)
        return Records(
            [
                {
                    "question": f"{r['context']} {r['question']}",
                    "choices": [r["answerA"], r["answerB"], r["answerC"]],
                    "label": int(r["label"]) - 1,
                }
                for r in found
            ]
        )
    return Records(_instructions(data, "social_iqa/test.json", "Answer"))


def build_social_iqa(records: Records, setup: Setup) -> list[Item]:
    """Q and A; shots are the first items, which are then not asked."""
    shots = shots_of(setup, 0)
    prefix = "".join(f"Q: {r['question']}\nA: {r['choices'][r['label']]}\n\n" for r in records.records[:shots])
    return [
        Item(
            id=str(number),
            request=Choices(
                continuations=tuple(f" {choice}" for choice in r["choices"]),
                context=f"Q: {r['question']}\nA:",
                prefix=prefix,
            ),
            target=r["label"],
        )
        for number, r in enumerate(records.records[shots:], shots)
    ]


# ---- BoolQ -------------------------------------------------------------------------------------------------------


def load_boolq(data: DataFolder) -> Records:
    """Passages and questions without a question mark."""
    return Records(data.jsonl("boolq/dev.jsonl.gz", ("question", "passage", "answer")))


def build_boolq(records: Records, setup: Setup) -> list[Item]:
    """Passage, question, yes or no."""
    shots = shots_of(setup, 0)
    prefix = "".join(f"{_boolq(r)} {'yes' if r['answer'] else 'no'}\n\n" for r in records.records[:shots])
    return [
        Item(
            id=str(number),
            request=Letters(letters=(" no", " yes"), context=_boolq(r), prefix=prefix),
            target=int(r["answer"]),
        )
        for number, r in enumerate(records.records[shots:], shots)
    ]


def _boolq(record: dict[str, Any]) -> str:
    return f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"


# ---- WinoGrande --------------------------------------------------------------------------------------------------


def load_winogrande(data: DataFolder) -> Records:
    """Sentences with a blank, and two options for it."""
    name = "winogrande/validation.json"
    found = []
    for number, record in enumerate(data.records(name, ("instruction", "answer")), 1):
        match = re.fullmatch(
            r".*?the given sentence: (.*)\n\nOption1: (.*) Option2: (.*?) Answer format:.*", record["instruction"], re.S
        )
        if match is None or match[1].count("_") != 1 or record["answer"] not in ("option1", "option2"):
            raise DataError(f"{data.path(name)}, record {number}: no sentence with one blank and two options")
        found.append({"sentence": match[1], "options": [match[2], match[3]], "label": int(record["answer"][-1]) - 1})
    return Records(found)


def build_winogrande(records: Records, setup: Setup) -> list[Item]:
    """Partial scoring: what follows the blank, behind each way to fill it."""
    shots = shots_of(setup, 0)
    prefix = "".join(f"{r['sentence'].replace('_', r['options'][r['label']])}\n\n" for r in records.records[:shots])
    items = []
    for number, r in enumerate(records.records[shots:], shots):
        before, _, after = r["sentence"].partition("_")
        request = Choices(
            contexts=tuple(before + option for option in r["options"]),
            continuations=(f" {after.strip()}",),
            prefix=prefix,
        )
        items.append(Item(id=str(number), request=request, target=r["label"]))
    return items


# ---- ARC ---------------------------------------------------------------------------------------------------------


def load_arc_easy(data: DataFolder) -> Records:
    """The test questions of the easy set; their first ones serve as shots where such are wanted."""
    return Records(_instructions(data, "arc/ARC-Easy.test.json", "Answer"))


def load_arc_challenge(data: DataFolder) -> Records:
    """The test questions of the challenge set, and its training set for shots."""
    found = Records(_instructions(data, "arc/ARC-Challenge.test.json", "Answer"))
    found.shots[""] = _instructions(data, "arc/ARC-Challenge.train.json", "Answer")
    return found


def build_arc_easy(records: Records, setup: Setup) -> list[Item]:
    """Shots are the first items, which are then not asked."""
    shots = shots_of(setup, 0)
    return _arc(records.records[:shots], records.records[shots:], shots)


def build_arc_challenge(records: Records, setup: Setup) -> list[Item]:
    """Shots are the first of the training set."""
    return _arc(records.shots[""][: shots_of(setup, 25)], records.records, 0)


def _arc(shots: list[dict[str, Any]], asked: list[dict[str, Any]], first: int) -> list[Item]:
    prefix = "".join(f"Question: {r['question']}\nAnswer: {r['choices'][r['label']]}\n\n" for r in shots)
    return [
        Item(
            id=str(number),
            request=Choices(
                continuations=tuple(f" {choice}" for choice in r["choices"]),
                context=f"Question: {r['question']}\nAnswer:",
                prefix=prefix,
            ),
            target=r["label"],
        )
        for number, r in enumerate(asked, first)
    ]


def _instructions(data: DataFolder, name: str, mark: str) -> list[dict[str, Any]]:
    """Questions that were re-formatted as instructions, in three paragraphs: question, choices, format."""
    form = re.compile(rf".*?to the question: (.*)\n\n{mark}1: (.*?)\n\nAnswer format:.*", re.S)
    found = []
    for number, record in enumerate(data.records(name, ("instruction", "answer")), 1):
        match = form.fullmatch(str(record["instruction"]))
        label = re.fullmatch(rf"{mark.lower()}(\d)", str(record["answer"]))
        choices = re.split(rf"\s+{mark}\d: ", match[2]) if match is not None else []
        if match is None or label is None or not 1 <= int(label[1]) <= len(choices):
            raise DataError(f"{data.path(name)}, record {number}: no question with choices {mark}1, {mark}2, …")
        choices = [choice.strip() for choice in choices]
        found.append({"question": match[1].strip(), "choices": choices, "label": int(label[1]) - 1})
    return found


_ADAPTERS = "github.com/AGI-Edgerunners/LLM-Adapters, dataset/"
ROWS = (
    Row(
        id="hellaswag",
        title="HellaSwag",
        setting="10-shot",
        card=CardValues(pt_9b=81.9, pt_27b=86.4),
        shots=10,
        metric="acc_norm",
        data=SetOfData(
            name="hellaswag",
            files=("hellaswag_val_full.txt.bz2",),
            source="github.com/klosax/hellaswag_text_data",
            licence="MIT",
            count=10_032,
        ),
        load=load_hellaswag,
        build=build_hellaswag,
        score=each(choice_score),
        differs=(
            "The shots are the first ten of the validation split, which are not asked.",
            "The texts were prepared by another hand: small differences in spaces and capitals.",
            _UNKNOWN,
        ),
    ),
    Row(
        id="piqa",
        title="PIQA",
        setting="0-shot",
        card=CardValues(pt_9b=81.7, pt_27b=83.2),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="piqa",
            files=("valid.jsonl", "valid-labels.lst"),
            source="github.com/ybisk/ybisk.github.io, piqa/data/",
            licence="AFL-3.0",
            count=1838,
        ),
        load=load_piqa,
        build=build_piqa,
        score=each(choice_score),
        differs=(_UNKNOWN,),
    ),
    Row(
        id="social_iqa",
        title="SocialIQA",
        setting="0-shot",
        card=CardValues(pt_9b=53.4, pt_27b=53.7),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="social_iqa",
            files=("test.json|validation.jsonl",),
            source=f"{_ADAPTERS}social_i_qa/test.json, as social_iqa/test.json",
            licence="the source states none",
            count=1954,
            fetch=(("lighteval/siqa", "*validation*.parquet", "validation.jsonl"),),
        ),
        load=load_social_iqa,
        build=build_social_iqa,
        score=each(choice_score),
        differs=(_UNKNOWN,),
    ),
    Row(
        id="boolq",
        title="BoolQ",
        setting="0-shot",
        card=CardValues(pt_9b=84.2, pt_27b=84.8),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="boolq",
            files=("dev.jsonl.gz",),
            source="github.com/google-research-datasets/boolean-questions (dev.jsonl, packed with gzip)",
            licence="CC BY-SA 3.0",
            count=3270,
        ),
        load=load_boolq,
        build=build_boolq,
        score=each(choice_score),
        differs=(_UNKNOWN,),
    ),
    Row(
        id="winogrande",
        title="WinoGrande",
        setting="partial score",
        card=CardValues(pt_9b=80.6, pt_27b=83.7),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="winogrande",
            files=("validation.json",),
            source=f"{_ADAPTERS}winogrande/test.json, as winogrande/validation.json",
            licence="CC BY",
            count=1267,
        ),
        load=load_winogrande,
        build=build_winogrande,
        score=each(choice_score),
        differs=("The card names no number of shots; none are used.",),
    ),
    Row(
        id="arc_easy",
        title="ARC-e",
        setting="0-shot",
        card=CardValues(pt_9b=88.0, pt_27b=88.6),
        shots=0,
        metric="acc",
        data=SetOfData(
            name="arc",
            files=("ARC-Easy.test.json",),
            source=f"{_ADAPTERS}ARC-Easy/test.json, as arc/ARC-Easy.test.json",
            licence="CC BY-SA 4.0",
            count=2376,
        ),
        load=load_arc_easy,
        build=build_arc_easy,
        score=each(choice_score),
        differs=(_UNKNOWN,),
    ),
    Row(
        id="arc_challenge",
        title="ARC-c",
        setting="25-shot",
        card=CardValues(pt_9b=68.4, pt_27b=71.4),
        shots=25,
        metric="acc_norm",
        data=SetOfData(
            name="arc",
            files=("ARC-Challenge.test.json", "ARC-Challenge.train.json"),
            source=f"{_ADAPTERS}ARC-Challenge/{{test,train}}.json, as arc/ARC-Challenge.test.json and .train.json",
            licence="CC BY-SA 4.0",
            count=1172,
        ),
        load=load_arc_challenge,
        build=build_arc_challenge,
        score=each(choice_score),
        differs=("The shots are the first 25 of the training set; Google's are not known.",),
    ),
)
