"""lm-evaluation-harness through our engine against the harness through transformers, on the same random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]'")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, Gemma2ForCausalLM

from gemcut import Gemma
from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.evaluation.lm_eval import GemcutLM
from gemcut.evaluation.lm_eval_tasks import TASKS, write_tasks

from .benchmarks import real_data

NOISE = 2e-4
CONTEXT = 96


@pytest.fixture(scope="module")
def pair(narrow: Path) -> tuple[GemcutLM, HFLM]:
    ours = get_model("gemcut").create_from_arg_obj(
        {"pretrained": str(narrow), "max_length": CONTEXT, "progress": False},
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )
    theirs = Gemma2ForCausalLM.from_pretrained(narrow, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(narrow)
    return ours, HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, max_length=CONTEXT, device="cpu")


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


QUESTIONS = [
    ("Question: What is a cat?\nAnswer:", " An animal."),
    ("Question: What is a cat?\nAnswer:", " A plant that grows"),
    ("Question: What is a cat?\nAnswer: ", "An animal."),  # the space goes to the continuation
    ("", "Zwei und zwei"),  # behind <bos> alone
    ("<bos>Once upon", " a time"),  # a <bos> that is there stays the only one
    ("def f(x):\n", "    return 日本"),
]


def test_log_likelihoods_are_those_of_transformers(pair: tuple[GemcutLM, HFLM]) -> None:
    ours, theirs = pair
    requests = [asked(*question) for question in QUESTIONS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for found, right in zip(ours.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        assert found[0] == pytest.approx(right[0], abs=NOISE)
        assert found[1] == right[1]


def test_whole_texts_are_those_of_transformers(pair: tuple[GemcutLM, HFLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the context both score the same; beyond it the harness's windows have no <bos>, which Gemma needs."""
    ours, theirs = pair
    requests = [asked("A short one."), asked("Ein Satz, der etwas länger ist.\n\nUnd noch einer.")]
    monkeypatch.setattr(theirs, "add_bos_token", False)  # else it scores a second <bos> behind its prefix, too
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=NOISE)
    long = "one two three four five six " * 40
    ids = ours.tok_encode(long)[1:]
    assert len(ids) > 2 * CONTEXT
    right = 0.0
    for done in range(0, len(ids), CONTEXT - 1):
        end = min(done + CONTEXT - 1, len(ids))
        first = max(0, end - CONTEXT + 1)
        (scores,) = ours.gemma.score([[2, *ids[first:end]]])
        right += sum(scores[done - first :])
    assert ours.loglikelihood_rolling([asked(long)], disable_tqdm=True)[0] == pytest.approx(right, abs=NOISE)


def test_generations_are_those_of_transformers(pair: tuple[GemcutLM, HFLM]) -> None:
    ours, theirs = pair
    kwargs = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [asked(context or "Hello", kwargs) for context, _ in QUESTIONS]
    # One by one: of several, transformers' backend lets the first decide whether all need a <bos>.
    right = [theirs.generate_until([each], disable_tqdm=True)[0] for each in requests]
    assert ours.generate_until(requests, disable_tqdm=True) == right


def test_a_long_prompt_keeps_bos_and_its_end(pair: tuple[GemcutLM, HFLM], capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = pair
    context = "word " * 200
    (found,) = ours.loglikelihood([asked(context, " end")], disable_tqdm=True)
    ids = ours.tok_encode(context + " end")
    scored = len(ids) - len(ours.tok_encode(context.rstrip()))
    (right,) = ours.gemma.score([[2, *ids[-CONTEXT + 1 :]]], start=CONTEXT - scored)
    assert found[0] == pytest.approx(sum(right), abs=NOISE)
    assert "lose their beginnings" in capsys.readouterr().err


def test_a_system_message_is_folded_never_dropped(pair: tuple[GemcutLM, HFLM], narrow: Path) -> None:
    ours, _ = pair
    tokenizer = AutoTokenizer.from_pretrained(narrow)
    chat = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Three and three?"},
    ]
    folded = [{"role": "user", "content": "Answer with one word.\n\nTwo and two?"}, *chat[2:]]
    text = ours.apply_chat_template(chat)
    assert text == tokenizer.apply_chat_template(folded, tokenize=False, add_generation_prompt=True)
    assert ours.tok_encode(text)[:2] == [2, tokenizer.convert_tokens_to_ids("<start_of_turn>")]
    begun = [*folded, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False).endswith("<start_of_turn>model\nThe answer is")
    assert ours.chat_template(True) == tokenizer.chat_template


def test_wrong_arguments_are_refused_by_name(pair: tuple[GemcutLM, HFLM], narrow: Path) -> None:
    ours, _ = pair
    with pytest.raises(ParameterError, match="unknown model argument 'parallelize'"):
        GemcutLM(str(narrow), parallelize=True)
    with pytest.raises(ParameterError, match="batch_size is 'many'"):
        GemcutLM(str(narrow), batch_size="many")
    with pytest.raises(ParameterError, match="drop dtype"):
        GemcutLM(ours.gemma, dtype="float32")
    with pytest.raises(ParameterError, match="gen_kwargs has 'num_beams'"):
        ours.generate_until([asked("Hello", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(ParameterError, match="max_gen_toks is 500"):
        ours.generate_until([asked("Hello", {"max_gen_toks": 500})], disable_tqdm=True)
    with pytest.raises(ChatTemplateError, match="no chat template 'rag'"):
        ours.chat_template("rag")
    ours.gemma.tokenizer.chat_template, kept = None, ours.gemma.tokenizer.chat_template
    try:
        with pytest.raises(ChatTemplateError, match="has no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "Hello"}])
    finally:
        ours.gemma.tokenizer.chat_template = kept


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("tasks")
    return path, write_tasks(real_data(), path)


def test_the_tasks_are_the_harness_s_own(tasks: tuple[Path, list[str]]) -> None:
    """Prompt, choices and target of each set's first record, written out by hand after the harness's own task files."""
    path, names = tasks
    assert names == [f"local_{name}" for name in TASKS]
    records = {name: json.loads((path / f"{name}.jsonl").open(encoding="utf-8").readline()) for name in TASKS}
    assert records["piqa"]["label"] == 0
    assert records["piqa"]["goal"].startswith("How do I ready a guinea pig cage")
    assert records["winogrande"]["contexts"] == [
        "Sarah was a much better surgeon than Maria so Sarah",
        "Sarah was a much better surgeon than Maria so Maria",
    ]
    assert (records["winogrande"]["rest"], records["winogrande"]["label"]) == ("always got the easier cases.", 1)
    assert records["hellaswag"]["label"] == 3
    assert records["arc_easy"]["choices"][0] == "Sunlight is the source of energy for nearly all ecosystems."
    assert records["boolq"]["label"] == 0


@pytest.mark.slow
def test_six_tasks_on_random_weights(
    pair: tuple[GemcutLM, HFLM], tasks: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request's log-likelihood, by both models: same prompts, same numbers. (Real weights: benchmarks/.)"""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    path, names = tasks
    manager = TaskManager(include_path=str(path), include_defaults=False)
    found = []
    for model in pair:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[name for name in names if name != "local_arc_challenge"],  # 25 shots are longer than this context
            limit=2,
            task_manager=manager,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        found.append(results["samples"])
    for name in found[0]:
        for ours, theirs in zip(found[0][name], found[1][name], strict=True):
            assert ours["arguments"] == theirs["arguments"]
            numbers = [[float(reply[0][0]) for reply in sample["resps"]] for sample in (ours, theirs)]
            if max(len(pair[0].tok_encode(context + rest)) for context, rest in ours["arguments"]) <= CONTEXT:
                assert numbers[0] == pytest.approx(numbers[1], abs=NOISE), name


def test_a_loaded_model_is_taken_as_it_is(pair: tuple[GemcutLM, HFLM]) -> None:
    gemma: Gemma = pair[0].gemma
    assert GemcutLM(gemma).gemma is gemma
