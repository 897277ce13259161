"""lm-evaluation-harness against our server: its numbers are those of Gemma.score and Gemma.generate in this process.

The first tests send what the harness (0.4.13) sends, and read it as it does; they always run. The last one runs the
harness itself where it is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .host import NAME, Served, new_gemma, serving

NOISE = 1e-4
QUESTIONS = [
    ("Question: What is a cat?\nAnswer:", [" An animal.", " A plant that grows"]),
    ("Question: Zwei und zwei?\nAnswer:", [" Vier", " 日本"]),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as found:
        yield found


def test_chat_completions_as_the_harness_asks(served: Served) -> None:
    """`local-chat-completions`: greedy, with the stop texts of the task, of which the answer has no part."""
    messages = [{"role": "user", "content": QUESTIONS[0][0]}]
    payload: dict[str, Any] = {"messages": messages, "model": NAME, "max_tokens": 8, "temperature": 0, "seed": 1234}
    payload["stop"] = ["\n\n", "Question:"]
    out = served.http.post("/v1/chat/completions", json=payload).json()
    texts = [None] * len(out["choices"])
    for choice in out["choices"]:
        texts[choice["index"]] = choice["message"]["content"]
    assert texts == [served.gemma.chat(messages, temperature=0, max_new_tokens=8, stop=["\n\n", "Question:"])]


def test_generations_as_the_harness_asks(served: Served) -> None:
    """`local-completions` sends token ids, several prompts at once, and sorts the answers by their index."""
    tokenizer = served.gemma.tokenizer
    prompts = [tokenizer.encode(context) for context, _ in QUESTIONS]
    payload: dict[str, Any] = {"prompt": prompts, "model": NAME, "max_tokens": 6, "temperature": 0, "seed": 1234}
    payload["stop"] = ["\n\n", "<eos>"]
    out = served.http.post("/v1/completions", json=payload).json()
    texts = [None] * len(out["choices"])
    for choice in out["choices"]:
        texts[choice["index"]] = choice["text"]
    right = served.gemma.generate([c for c, _ in QUESTIONS], temperature=0, max_new_tokens=6, stop=["\n\n", "<eos>"])
    assert texts == right


@pytest.mark.slow
def test_the_harness_itself(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of multiple choice and one of generation, through `local-completions` with the server's own tokenizer."""
    reason = "needs lm-evaluation-harness: pip install 'lm-eval[api]'"
    lm_eval = pytest.importorskip("lm_eval", reason=reason)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "questions.json"
    rows = [{"context": context, "choices": choices, "label": 0} for context, choices in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, rows)))
    task: dict[str, Any] = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{context}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "target_delimiter": "",  # the choices begin with their spaces
        "metric_list": [{"metric": "acc"}],
    }
    model = {"model": NAME, "base_url": f"{served.url}/v1/completions", "max_length": 512, "num_concurrent": 2}
    found = lm_eval.simple_evaluate("local-completions", model_args=model, tasks=[task], log_samples=True)
    for sample in found["samples"]["questions"]:
        context, choices = QUESTIONS[sample["doc_id"]]
        for choice, reply in zip(choices, sample["resps"], strict=True):
            start = len(served.gemma.encode(context))
            (right,) = served.gemma.score([context + choice], start=start)
            assert float(reply[0][0]) == pytest.approx(sum(right), abs=NOISE)
