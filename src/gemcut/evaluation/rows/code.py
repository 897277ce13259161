"""HumanEval and MBPP: programs, which are run against their tests in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemcut.errors import ParameterError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Answer, Generate
from gemcut.evaluation.row import CardValues, Item, Records, Row, Score, ScoreOptions, Setup
from gemcut.evaluation.sandbox import SandboxError, run_programs

#: What begins something else than the function that was asked for.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
NEW_TOKENS = 512


def load_humaneval(data: DataFolder) -> Records:
    """Beginnings of programs and their tests."""
    return Records(data.jsonl("humaneval/HumanEval.jsonl.gz", ("task_id", "prompt", "test", "entry_point")))


def build_humaneval(records: Records, setup: Setup) -> list[Item]:
    """The beginning alone; this row has no shots."""
    if setup.shots:
        raise ParameterError("humaneval has no shots; leave --shots out")
    return [
        Item(
            id=r["task_id"],
            request=Generate(max_new_tokens=NEW_TOKENS, stop=STOPS, context=r["prompt"]),
            target=f"{r['test']}\ncheck({r['entry_point']})\n",
            meta={"before": r["prompt"]},
        )
        for r in records.records
    ]


def load_mbpp(data: DataFolder) -> Records:
    """Tasks 11 to 510 are asked; 2, 3 and 4 are the shots that the data set's paper names."""
    found = data.jsonl("mbpp/mbpp.jsonl", ("task_id", "text", "code", "test_list", "test_setup_code"))
    shots = [r for r in found if r["task_id"] in (2, 3, 4)]
    return Records([r for r in found if 11 <= r["task_id"] <= 510], {"": shots})


def build_mbpp(records: Records, setup: Setup) -> list[Item]:
    """The paper's words around task, tests and program."""
    shots = 3 if setup.shots is None else setup.shots
    prefix = "".join(f"{_mbpp(r)}{_lines(r['code'])}\n[DONE]\n\n" for r in records.shots[""][:shots])
    return [
        Item(
            id=str(r["task_id"]),
            request=Generate(max_new_tokens=NEW_TOKENS, stop=("[DONE]",), context=_mbpp(r), prefix=prefix),
            target="\n".join((_lines(r["test_setup_code"]), *map(_lines, r["test_list"]))),
            meta={"before": ""},
        )
        for r in records.records
    ]


def _mbpp(record: dict[str, Any]) -> str:
    tests = "\n".join(record["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def score_programs(items: Sequence[Item], answers: Sequence[Answer], options: ScoreOptions, /) -> list[Score]:
    """Whether each program passes its tests. Raises ParameterError where nothing may be run, or there is no sandbox."""
    if not options.allow_code:
        raise ParameterError("scoring runs programs that the model wrote, in a sandbox; say --allow-code to allow that")
    programs = [
        f"{item.meta['before']}{answer.texts[0]}\n\n{item.target}\n"
        for item, answer in zip(items, answers, strict=True)
    ]
    try:
        outcomes = run_programs(programs, options.workers)
    except SandboxError as error:
        raise ParameterError(f"programs are not run without a sandbox, and there is none here: {error}") from None
    return [
        Score(values={"pass@1": float(outcome.passed)}, extracted=outcome.said or "passed", failed=not answer.texts[0])
        for outcome, answer in zip(outcomes, answers, strict=True)
    ]


ROWS = (
    Row(
        id="humaneval",
        title="HumanEval",
        setting="pass@1",
        card=CardValues(pt_9b=40.2, pt_27b=51.8),
        shots=0,
        metric="pass@1",
        data=SetOfData(
            name="humaneval",
            files=("HumanEval.jsonl.gz",),
            source="github.com/openai/human-eval, data/",
            licence="MIT",
            count=164,
        ),
        load=load_humaneval,
        build=build_humaneval,
        score=score_programs,
        code=True,
        differs=("One greedy answer; Google does not say how it drew its answers.",),
    ),
    Row(
        id="mbpp",
        title="MBPP",
        setting="3-shot",
        card=CardValues(pt_9b=52.4, pt_27b=62.6),
        shots=3,
        metric="pass@1",
        data=SetOfData(
            name="mbpp",
            files=("mbpp.jsonl",),
            source="github.com/google-research/google-research, mbpp/mbpp.jsonl",
            licence="CC BY 4.0",
            count=500,
        ),
        load=load_mbpp,
        build=build_mbpp,
        score=score_programs,
        code=True,
        differs=("One greedy answer; Google does not say how it drew its answers.",),
    ),
)
