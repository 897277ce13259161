"""Prompts of real items against lm-evaluation-harness' own task files, rendered from their templates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from evaluation.benchmarks import real_data
from gemcut.evaluation import Choices, DataFolder, Item, Letters, Setup, row

TASKS = Path(str(importlib.util.find_spec("lm_eval").submodule_search_locations[0])) / "tasks"  # type: ignore[union-attr]


class _Loader(yaml.SafeLoader):
    """Reads their ``!function`` as the name of what it names."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def task(path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((TASKS / path).read_text(), _Loader)
    return found


def render(template: str, doc: dict[str, Any]) -> str:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(**doc)


def module(path: str) -> Any:
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, TASKS / path)
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def items(name: str, data: DataFolder, shots: int | None = None) -> tuple[list[dict[str, Any]], list[Item]]:
    wanted = row(name)
    records = wanted.load(data)
    return records.records, wanted.build(records, Setup(shots=shots))


def prompt(item: Item) -> str:
    return item.request.prefix + item.request.context  # type: ignore[union-attr]


def test_multiple_choice() -> None:
    data = real_data()
    for name, path in (("piqa", "piqa/piqa.yaml"), ("arc_easy", "arc/arc_easy.yaml")):
        theirs = task(path)
        records, ours = items(name, data)
        for record, item in list(zip(records, ours, strict=True))[:50]:
            assert prompt(item) == render(theirs["doc_to_text"], record)
            assert isinstance(item.request, Choices)
            texts = [record["sol1"], record["sol2"]] if name == "piqa" else record["choices"]
            assert item.request.continuations == tuple(f" {text}" for text in texts)
            assert item.target == record["label"]
    theirs = task("super_glue/boolq/default.yaml")
    records, ours = items("boolq", data)
    for record, item in list(zip(records, ours, strict=True))[:50]:
        assert prompt(item) == render(theirs["doc_to_text"], record)
        assert isinstance(item.request, Letters)
        assert item.request.letters == tuple(f" {choice}" for choice in theirs["doc_to_choice"])
        assert theirs["doc_to_choice"][item.target] == ("yes" if record["answer"] else "no")


def test_shots_stand_before_the_question_as_theirs() -> None:
    """Template, delimiter, answer, an empty line: lm-eval's way to put shots together."""
    data = real_data()
    theirs = task("arc/arc_easy.yaml")["doc_to_text"]
    wanted = row("arc_challenge")
    records = wanted.load(data)
    shots = records.shots[""][:25]
    before = "".join(f"{render(theirs, shot)} {shot['choices'][shot['label']]}\n\n" for shot in shots)
    for record, item in list(zip(records.records, wanted.build(records, Setup()), strict=True))[:20]:
        assert prompt(item) == before + render(theirs, record)
    gsm8k = task("gsm8k/gsm8k.yaml")["doc_to_text"]
    wanted = row("gsm8k")
    records = wanted.load(data)
    before = "".join(f"{render(gsm8k, shot)} {shot['answer']}\n\n" for shot in records.shots[""][:5])
    assert prompt(wanted.build(records, Setup())[3]) == before + render(gsm8k, records.records[3])


def test_mmlu() -> None:
    data = real_data()
    theirs = task("mmlu/default/_default_template_yaml")["doc_to_text"]
    wanted = row("mmlu")
    records = wanted.load(data)
    ours = wanted.build(records, Setup())
    for place in (0, 100, 5000, 14_041):
        record, item = records.records[place], ours[place]
        subject = record["subject"]
        description = task(f"mmlu/default/mmlu_{subject}.yaml")["description"]
        docs = [
            {"question": r["question"], "choices": [r[f"choice{i}"] for i in range(4)], "answer": int(r["answer"])}
            for r in (*records.shots[subject], record)
        ]
        before = "".join(f"{render(theirs, doc)} {'ABCD'[doc['answer']]}\n\n" for doc in docs[:-1])
        assert prompt(item) == description + before + render(theirs, docs[-1])
        assert item.target == docs[-1]["answer"]


def test_winogrande_and_hellaswag() -> None:
    data = real_data()
    functions = module("winogrande/preprocess_winogrande.py")
    records, ours = items("winogrande", data)
    for record, item in list(zip(records, ours, strict=True))[:50]:
        option1, option2 = record["options"]
        doc = {
            "sentence": record["sentence"],
            "option1": option1,
            "option2": option2,
            "answer": str(record["label"] + 1),
        }
        assert isinstance(item.request, Choices)
        assert list(item.request.contexts) == functions.doc_to_choice(doc)
        assert item.request.continuations == (f" {functions.doc_to_target(doc)}",)
        assert item.target == functions.doc_to_text(doc)
    records, ours = items("hellaswag", data)
    first = {item.id for item in ours}
    assert not first & {str(i) for i in range(10)}
    shown = [f"{r['context']} {r['endings'][r['label']]}" for r in records[:10]]
    assert prompt(ours[0]) == "\n\n".join([*shown, records[10]["context"]])


def test_programs() -> None:
    data = real_data()
    theirs = task("mbpp/mbpp.yaml")
    wanted = row("mbpp")
    records = wanted.load(data)
    ours = wanted.build(records, Setup())
    before = ""
    for shot in records.shots[""]:
        doc = {**shot, "is_fewshot": True}
        shown = render(theirs["doc_to_text"], doc) + "\n" + render(theirs["doc_to_target"], doc)
        before += shown.replace("[BEGIN]\n\n", "[BEGIN]\n").replace("\r\n", "\n") + "\n\n"
    text = render(theirs["doc_to_text"], records.records[0])
    # Jinja drops the line break at a template's end, which lm-eval puts back.
    assert prompt(ours[0]) == before + text + ("" if text.endswith("\n") else "\n")
    humaneval = row("humaneval").build(row("humaneval").load(data), Setup())
    until = task("humaneval/humaneval.yaml")["generation_kwargs"]["until"]
    assert tuple(until) == humaneval[0].request.stop  # type: ignore[union-attr]


def test_natural_questions_and_bbh() -> None:
    data = real_data()
    theirs = task("nq_open/nq_open.yaml")
    records, ours = items("nq_open", data)
    shots = [f"{render(theirs['doc_to_text'], r)} {r['answers'][0]}" for r in records[:5]]
    asked = render(theirs["doc_to_text"], records[5])
    assert prompt(ours[0]) == theirs["description"] + theirs["fewshot_delimiter"].join([*shots, asked])
    assert "," not in ours[0].request.stop  # type: ignore[union-attr]
    assert "." not in ours[0].request.stop  # type: ignore[union-attr]
    bbh = task("bbh/cot_fewshot/navigate.yaml")
    ours = [item for item in row("bbh").build(row("bbh").load(data), Setup()) if item.group == "navigate"]
    assert "canary" not in prompt(ours[0]).lower()
    assert prompt(ours[0]).startswith(bbh["description"].rstrip("\n"))
    for shot in bbh["fewshot_config"]["samples"]:
        assert f"Q: {shot['input']}\nA: Let's think step by step.\n{shot['target']}" in prompt(ours[0])
    assert prompt(ours[0]).endswith("\nA: Let's think step by step.\n")


def test_every_row_has_the_count_that_it_states() -> None:
    """And distinct ids; what is missing is said with its source."""
    data = real_data()
    for name in ("piqa", "boolq", "winogrande", "arc_easy", "arc_challenge", "nq_open", "humaneval", "mbpp", "agieval"):
        wanted = row(name)
        found = wanted.build(wanted.load(data), Setup())
        assert len(found) == wanted.data.count == len({item.id for item in found})


@pytest.mark.parametrize("name", ["social_iqa", "triviaqa", "math"])
def test_what_is_not_shipped_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"is missing: get it .*by hand from github\.com/.* \(licence: "):
        DataFolder(tmp_path).require(row(name).data)
