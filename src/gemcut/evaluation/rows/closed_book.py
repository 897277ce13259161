"""TriviaQA and Natural Questions: short answers from memory, compared as the data sets' own programs do."""

from __future__ import annotations

import ast
import re
import string
from typing import Any

from gemcut.errors import DataError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Answer, Generate
from gemcut.evaluation.row import CardValues, Item, Records, Row, Score, Setup, each

NEW_TOKENS = 64
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = string.punctuation + "‘’´`"
_AS_SPACES = str.maketrans(dict.fromkeys(_MARKS, " "))
_AWAY = str.maketrans("", "", string.punctuation)


def normal_trivia(text: str) -> str:
    """TriviaQA's rule: lower case; underscores and punctuation become spaces; no articles; single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.replace("_", " ").lower().translate(_AS_SPACES)).split())


def normal_squad(text: str) -> str:
    """SQuAD's rule, which Natural Questions uses: lower case; punctuation goes; no articles; single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_AWAY)).split())


def load_triviaqa(data: DataFolder) -> Records:
    """Either of two forms: questions and lists of answers with a tab between, or the hub's records."""
    if (data.root / "triviaqa" / "validation.jsonl").exists():
        found = data.jsonl("triviaqa/validation.jsonl", ("question", "answer"))
        for number, r in enumerate(found, 1):
            if not isinstance(r["answer"], dict) or not r["answer"].get("aliases"):
                raise DataError(f'triviaqa/validation.jsonl, record {number}: "answer" has no list of "aliases"')
        return Records([{"question": r["question"], "answers": _first(r["answer"])} for r in found])
    name = "triviaqa/topics.dpr.trivia.test.txt"
    records = []
    for number, line in enumerate(data.lines(name), 1):
        question, tab, answers = line.partition("\t")
        try:
            accepted = ast.literal_eval(answers.strip().strip('"').replace('""', '"')) if tab else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            accepted = None
        if not isinstance(accepted, list) or not accepted or not all(isinstance(each_, str) for each_ in accepted):
            raise DataError(f"{data.path(name)}, line {number}: expected a question, a tab and a list of answers")
        records.append({"question": question, "answers": accepted})
    return Records(records)


def _first(answer: dict[str, Any]) -> list[str]:
    """All accepted answers, the one that a person would give first."""
    return list(dict.fromkeys([*([answer["value"]] if answer.get("value") else []), *answer["aliases"]]))


def build_triviaqa(records: Records, setup: Setup) -> list[Item]:
    """The first items are the shots, and are not asked."""
    shots = 5 if setup.shots is None else setup.shots
    prefix = "".join(f"{_trivia(r)} {r['answers'][0]}\n\n" for r in records.records[:shots])
    return _items(records.records[shots:], shots, prefix, _trivia)


def _trivia(record: dict[str, Any]) -> str:
    return f"Question: {record['question'].rstrip('? ')}?\nAnswer:"


def load_nq(data: DataFolder) -> Records:
    """Questions without a question mark, each with a list of answers."""
    found = data.jsonl("nq_open/NQ-open.dev.jsonl", ("question", "answer"))
    return Records([{"question": r["question"], "answers": r["answer"]} for r in found])


def build_nq(records: Records, setup: Setup) -> list[Item]:
    """An instruction; the first items are the shots, and are not asked."""
    shots = 5 if setup.shots is None else setup.shots
    prefix = "Answer these questions:\n\n"
    prefix += "".join(f"{_nq(r)} {r['answers'][0]}\n" for r in records.records[:shots])
    return _items(records.records[shots:], shots, prefix, _nq)


def _nq(record: dict[str, Any]) -> str:
    return f"Q: {record['question'].rstrip('? ')}?\nA:"


def _items(records: list[dict[str, Any]], first: int, prefix: str, ask: Any) -> list[Item]:
    return [
        Item(
            id=str(number),
            request=Generate(max_new_tokens=NEW_TOKENS, stop=("\n",), context=ask(r), prefix=prefix),
            target=r["answers"],
        )
        for number, r in enumerate(records, first)
    ]


def score_trivia(item: Item, answer: Answer) -> Score:
    """Whether the answer's line is one of the accepted answers, both by TriviaQA's rule."""
    return _score(item, answer, normal_trivia)


def score_nq(item: Item, answer: Answer) -> Score:
    """Whether the answer's line is one of the accepted answers, both by SQuAD's rule."""
    return _score(item, answer, normal_squad)


def _score(item: Item, answer: Answer, normal: Any) -> Score:
    said = next((line for line in answer.texts[0].split("\n") if line.strip()), "").strip()
    right = bool(normal(said)) and normal(said) in {normal(accepted) for accepted in item.target}
    return Score(values={"exact_match": float(right)}, extracted=said, failed=not said)


ROWS = (
    Row(
        id="triviaqa",
        title="TriviaQA",
        setting="5-shot",
        card=CardValues(pt_9b=76.6, pt_27b=83.7),
        shots=5,
        metric="exact_match",
        data=SetOfData(
            name="triviaqa",
            files=("topics.dpr.trivia.test.txt|validation.jsonl",),
            source="github.com/castorini/anserini-tools, topics/topics.dpr.trivia.test.txt",
            licence="not stated",
            count=11_308,
            fetch=(("mandarjoshi/trivia_qa", "rc.nocontext/validation*.parquet", "validation.jsonl"),),
        ),
        load=load_triviaqa,
        build=build_triviaqa,
        score=each(score_trivia),
        differs=("The shots are the first five of the evaluation split, which are not asked.",),
    ),
    Row(
        id="nq_open",
        title="Natural Questions",
        setting="5-shot",
        card=CardValues(pt_9b=29.2, pt_27b=34.5),
        shots=5,
        metric="exact_match",
        data=SetOfData(
            name="nq_open",
            files=("NQ-open.dev.jsonl",),
            source="github.com/google-research-datasets/natural-questions, nq_open/",
            licence="CC BY-SA 3.0",
            count=3605,
        ),
        load=load_nq,
        build=build_nq,
        score=each(score_nq),
        differs=("The shots are the first five of the evaluation split, which are not asked.",),
    ),
)
