"""AGIEval and BIG-Bench Hard: tasks with shots of their own, averaged over tasks."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemcut.errors import DataError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Answer, Generate, Letters
from gemcut.evaluation.row import CardValues, Figure, Item, Records, Row, Score, Setup, each
from gemcut.evaluation.scoring import choice_score

AGIEVAL = (
    "aqua-rat",
    "gaokao-english",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en",
    "sat-en-without-passage",
    "sat-math",
)
BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def macro(name: str) -> Any:
    """A row's ``extra``: the mean over groups of the metric ``name``, each group counting the same."""

    def over_groups(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Figure]:
        groups: dict[str, list[float]] = {}
        for item, score in zip(items, scores, strict=True):
            groups.setdefault(item.group, []).append(100 * float(score.values[name]))
        means = [float(np.mean(own)) for own in groups.values()]
        errors = [float(np.var(own, ddof=1)) / len(own) if len(own) > 1 else math.nan for own in groups.values()]
        error = math.sqrt(sum(errors)) / len(errors)
        known = None if math.isnan(error) else error
        return {f"{name}_by_task": Figure(value=float(np.mean(means)), error=known, count=len(items))}

    return over_groups


# ---- AGIEval -----------------------------------------------------------------------------------------------------


def load_agieval(data: DataFolder) -> Records:
    """Eight English tasks, and the project's own shots."""
    found = Records([])
    table = data.csv("agieval/few_shot_prompts.csv", ("", "lsat-ar", "aqua-rat"))
    for task in AGIEVAL:
        column = "sat-en" if task == "sat-en-without-passage" else task
        found.shots[task] = []
        for row in table:
            if row[""].startswith("sample") and row.get(column):
                try:
                    shot = ast.literal_eval(row[column])
                    if task == "sat-en-without-passage":
                        shot["passage"] = None
                    _exam(0, shot)
                except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
                    raise DataError(
                        f"{data.path('agieval/few_shot_prompts.csv')}: a shot of {column} is no question with options"
                    ) from None
                found.shots[task].append(shot)
        columns = ("passage", "question", "options", "label")
        records = data.jsonl(f"agieval/{task}.jsonl.gz", columns)
        found.records += [{**r, "task": task, "number": number} for number, r in enumerate(records)]
    return found


def build_agieval(records: Records, setup: Setup) -> list[Item]:
    """The project's few-shot prompt without explanations, answered by a letter."""
    most = 5 if setup.shots is None else setup.shots
    prefixes, counts = {}, {}
    for task, shots in records.shots.items():
        used = shots[:most]
        prefixes[task] = "Here are the answers for the problems in the exam.\n" + "".join(
            f"{_exam(number, shot)}The answer is therefore {shot['label']}\n\n" for number, shot in enumerate(used, 1)
        )
        counts[task] = len(used)
    items = []
    for r in records.records:
        letters = tuple(f" {letter}" for letter in "ABCDEFGH"[: len(r["options"])])
        context = f"{_exam(counts[r['task']] + 1, r)}The answer is therefore"
        items.append(
            Item(
                id=f"{r['task']}/{r['number']}",
                group=r["task"],
                request=Letters(letters=letters, context=context, prefix=prefixes[r["task"]]),
                target=[place for place, letter in enumerate(letters) if letter.strip() in str(r["label"])],
            )
        )
    return items


def _exam(number: int, r: dict[str, Any]) -> str:
    passage = f"{r['passage']} " if r["passage"] else " "
    options = " ".join(r["options"])
    return f"Problem {number}.   {passage}{r['question']}\nChoose from the following options:    {options}\n"


# ---- BIG-Bench Hard ----------------------------------------------------------------------------------------------


def load_bbh(data: DataFolder) -> Records:
    """27 tasks, each with a prompt of three worked examples."""
    found = Records([])
    for task in BBH_TASKS:
        text = data.text(f"bbh/cot-prompts/{task}.txt")
        _, line, prompt = text.partition("-----\n")  # what stands before it is no part of the prompt
        if not line or "Let's think step by step." not in prompt:
            raise DataError(f"{data.path(f'bbh/cot-prompts/{task}.txt')} holds no prompt behind a line of dashes")
        found.shots[task] = [{"prompt": prompt.strip()}]
        records = data.records(f"bbh/{task}.json", ("input", "target"), below="examples")
        found.records += [{**r, "task": task, "number": number} for number, r in enumerate(records)]
    return found


def build_bbh(records: Records, setup: Setup) -> list[Item]:
    """The authors' prompts; with fewer shots their first examples."""
    most = 3 if setup.shots is None else setup.shots
    prefixes = {}
    for task, (shot,) in records.shots.items():
        head, *examples = re.split(r"\n\nQ: ", shot["prompt"])
        prefixes[task] = "\n\nQ: ".join((head, *examples[:most])) + "\n\n"
    return [
        Item(
            id=f"{r['task']}/{r['number']}",
            group=r["task"],
            request=Generate(
                max_new_tokens=512,
                stop=("\nQ:",),
                context=f"Q: {r['input']}\nA: Let's think step by step.\n",
                prefix=prefixes[r["task"]],
            ),
            target=r["target"],
        )
        for r in records.records
    ]


_SAID = re.compile(r"answer is:?\s+", re.I)


def score_bbh(item: Item, answer: Answer) -> Score:
    """What stands behind the last "answer is" of the first answer, compared without case, quotes and spacing."""
    _, *said = _SAID.split(answer.texts[0])
    found = said[-1].split("\n")[0].strip().removesuffix(".") if said else ""
    right = bool(found) and _tidy(found, item.target) == _tidy(item.target, item.target)
    return Score(values={"exact_match": float(right)}, extracted=found, failed=not found)


def _tidy(text: str, target: str) -> str:
    text = text.strip().rstrip(".").strip("\"'* $`").strip()
    if re.fullmatch(r"\([A-R]\)", target.strip()):  # a lettered option, which may be followed by its text
        letter = re.match(r"\(?([A-Ra-r])(?:\)|$)", text)
        return letter[1].upper() if letter else text
    if re.fullmatch(r"-?[\d,.]+", text):
        return text.replace(",", "")
    return " ".join(text.lower().split())


ROWS = (
    Row(
        id="agieval",
        title="AGIEval",
        setting="3-5-shot",
        card=CardValues(pt_9b=52.8, pt_27b=55.1),
        shots=5,
        metric="acc_by_task",
        data=SetOfData(
            name="agieval",
            files=("few_shot_prompts.csv", *(f"{task}.jsonl.gz" for task in AGIEVAL)),
            source="github.com/ruixiangcui/AGIEval, data/v1/ (packed with gzip) and data/few_shot_prompts.csv",
            licence="MIT and Apache-2.0",
            count=2201,
        ),
        load=load_agieval,
        build=build_agieval,
        score=each(choice_score),
        extra=macro("acc"),
        differs=(
            "Eight English tasks: LogiQA (not for commercial use) and MATH (disputed) are left out.",
            "Without explanations; the mean over tasks. Google says neither.",
        ),
    ),
    Row(
        id="bbh",
        title="BIG-Bench",
        setting="3-shot, CoT",
        card=CardValues(pt_9b=68.2, pt_27b=74.9),
        shots=3,
        metric="exact_match_by_task",
        data=SetOfData(
            name="bbh",
            files=tuple(name for task in BBH_TASKS for name in (f"{task}.json", f"cot-prompts/{task}.txt")),
            source="github.com/suzgunmirac/BIG-Bench-Hard, bbh/ and cot-prompts/",
            licence="MIT",
            count=6511,
        ),
        load=load_bbh,
        build=build_bbh,
        score=each(score_bbh),
        extra=macro("exact_match"),
        differs=("BIG-Bench Hard, as in Google's report; the mean over its 27 tasks.",),
    ),
)
