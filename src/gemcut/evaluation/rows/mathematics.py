"""GSM8K and MATH: worked solutions, of which the last number or the boxed expression is the answer."""

from __future__ import annotations

import re
from typing import Any

from gemcut.errors import DataError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.latex import equal, final_answer, last_boxed
from gemcut.evaluation.requests import Answer, Generate
from gemcut.evaluation.row import CardValues, Item, Records, Row, Score, Setup, each

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_ANY = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def load_gsm8k(data: DataFolder) -> Records:
    """The test questions, and the training set's for shots."""
    columns = ("question", "answer")
    found = Records(data.jsonl("gsm8k/test.jsonl.gz", columns), {"": data.jsonl("gsm8k/train.jsonl.gz", columns)})
    for r in found.records:
        if "#### " not in r["answer"]:
            raise DataError(f"{data.path('gsm8k/test.jsonl.gz')}: an answer does not end with #### and a number")
    return found


def build_gsm8k(records: Records, setup: Setup) -> list[Item]:
    """Shots are the first of the training set, with their solutions as they are."""
    shots = 5 if setup.shots is None else setup.shots
    prefix = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in records.shots[""][:shots])
    return [
        Item(
            id=str(number),
            request=Generate(
                max_new_tokens=400,
                stop=("Question:",),
                context=f"Question: {r['question']}\nAnswer:",
                prefix=prefix,
            ),
            target=_number(r["answer"].split("#### ")[-1]),
        )
        for number, r in enumerate(records.records)
    ]


def score_gsm8k(item: Item, answer: Answer) -> Score:
    """``strict``: the number behind the first ####; ``flexible``: the last number of the text."""
    text = answer.texts[0]
    strict, numbers = _STRICT.search(text), _ANY.findall(text)
    found = {"strict": strict[1] if strict else "", "flexible": numbers[-1] if numbers else ""}
    values = {name: float(bool(said) and _number(said) == item.target) for name, said in found.items()}
    return Score(values=values, extracted=found["strict"] or found["flexible"], failed=strict is None)


def _number(text: str) -> str:
    """A number without commas, dollars and a point at its end; of equal numbers the same text."""
    text = text.strip().replace(",", "").replace("$", "").removesuffix(".")
    try:
        return f"{float(text):.15g}"
    except ValueError:
        return text


def load_math(data: DataFolder) -> Records:
    """The user's file; shots from shots.jsonl, else its own first items."""
    columns = ("problem", "solution")
    found = data.jsonl("math/test.json", columns)
    for number, r in enumerate(found, 1):
        if last_boxed(r["solution"]) is None:
            raise DataError(f"{data.path('math/test.json')}, record {number}: its solution has no \\boxed answer")
    own = data.jsonl("math/shots.jsonl", columns) if data.path("math/shots.jsonl").exists() else []
    return Records(found, {"": own})


def build_math(records: Records, setup: Setup) -> list[Item]:
    """Problem, solution, and the sentence with the answer; without own shots the first items, which are not asked."""
    count = 4 if setup.shots is None else setup.shots
    own = records.shots[""]
    shots, asked = (own[:count], records.records) if own else (records.records[:count], records.records[count:])
    prefix = "".join(f"{_problem(r)} {_solution(r)}\n\n" for r in shots)
    return [
        Item(
            id=str(r.get("idx", number)),
            group=str(r.get("type", "")),
            request=Generate(max_new_tokens=768, stop=("Problem:",), context=_problem(r), prefix=prefix),
            target=last_boxed(r["solution"]),
        )
        for number, r in enumerate(asked)
    ]


def _problem(record: dict[str, Any]) -> str:
    return f"Problem:\n{record['problem']}\n\nSolution:"


def _solution(record: dict[str, Any]) -> str:
    said = f"Final Answer: The final answer is ${last_boxed(record['solution'])}$. I hope it is correct."
    return record["solution"] if "Final Answer:" in record["solution"] else f"{record['solution']}\n{said}"


def score_math(item: Item, answer: Answer) -> Score:
    """Whether the final answer is equal in value to the boxed one."""
    said = final_answer(answer.texts[0])
    right = said is not None and equal(said, item.target)
    return Score(values={"equal": float(right)}, extracted=said or "", failed=said is None)


ROWS = (
    Row(
        id="gsm8k",
        title="GSM8K",
        setting="5-shot, maj@1",
        card=CardValues(pt_9b=68.6, pt_27b=74.0),
        shots=5,
        metric="strict",
        data=SetOfData(
            name="gsm8k",
            files=("test.jsonl.gz", "train.jsonl.gz"),
            source="github.com/openai/grade-school-math, grade_school_math/data/ (packed with gzip)",
            licence="MIT",
            count=1319,
        ),
        load=load_gsm8k,
        build=build_gsm8k,
        score=each(score_gsm8k),
        differs=("The shots are the first five of the training set; Google's are not known.",),
    ),
    Row(
        id="math",
        title="MATH",
        setting="4-shot",
        card=CardValues(pt_9b=36.6, pt_27b=42.3),
        shots=4,
        metric="equal",
        data=SetOfData(
            name="math",
            files=("test.json",),
            source="github.com/deepseek-ai/DeepSeek-Coder, Evaluation/PAL-Math/datasets/math/test.json; put Minerva's "
            "four shots (problem, solution) into math/shots.jsonl",
            licence="disputed: the publisher of the problems had the data set taken down",
            count=5000,
        ),
        load=load_math,
        build=build_math,
        score=each(score_math),
        differs=("Without math/shots.jsonl the shots are the first four items, which are not asked.",),
    ),
)
