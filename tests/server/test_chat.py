"""/v1/chat/completions: every value is what Gemma gives in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gemcut.engine import SamplingParams
from gemcut.engine.results import Completion
from gemcut.text import ChatOptions

from .host import CHAT, NAME, Served, error_of, events, new_gemma, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as found:
        yield found


@pytest.fixture(autouse=True)
def _clean(served: Served) -> Iterator[None]:
    yield
    served.nothing_held()


def expected(served: Served, messages: Any = CHAT, **params: Any) -> Completion:
    """The same answer, computed without HTTP."""
    ids = served.gemma.encode_messages(messages)
    (result,) = served.gemma.complete([ids], SamplingParams(**params))
    return result


def test_openai_client_gets_the_same_answer(served: Served) -> None:
    answer = served.client().chat.completions.create(model=NAME, messages=CHAT, max_tokens=12, seed=5, temperature=0.7)  # type: ignore[call-overload]
    right = expected(served, max_new_tokens=12, seed=5, temperature=0.7)
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == right.text
    assert choice.finish_reason == right.finish_reason
    assert answer.usage.prompt_tokens == right.prompt_tokens
    assert answer.usage.completion_tokens == len(right.token_ids)
    assert answer.usage.total_tokens == right.prompt_tokens + len(right.token_ids)
    assert set(answer.usage.model_extra["timings"]) == {
        "queue_ms", "prefill_ms", "decode_ms", "prompt_per_second", "predicted_per_second"
    }  # fmt: skip


def test_stream_joins_to_the_same_answer(served: Served) -> None:
    fields = {"max_tokens": 16, "seed": 9, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client().chat.completions.create(model=NAME, messages=CHAT, **fields))  # type: ignore[call-overload]
    right = expected(served, max_new_tokens=16, seed=9)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == right.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_ends_with_done(served: Served) -> None:
    found = events(served.chat(stream=True))
    assert found[-1] == "[DONE]"
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in found[:-1])
    assert "usage" not in found[0]


def test_n_answers_with_derived_seeds(served: Served) -> None:
    right = served.gemma.chat(CHAT, n=3, seed=4, max_new_tokens=6)
    answer = served.chat(n=3, seed=4, max_tokens=6).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == right
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 18
    texts = ["", "", ""]
    for chunk in events(served.chat(n=3, seed=4, max_tokens=6, stream=True))[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == right


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(served: Served, stream: bool) -> None:
    right = expected(served, max_new_tokens=5, seed=2, logprobs=3)
    response = served.chat(max_tokens=5, seed=2, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        content = [
            entry
            for chunk in events(response)[:-1]
            for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert right.logprobs is not None
    assert [entry["logprob"] for entry in content] == [entry.logprob for entry in right.logprobs]
    for entry, own in zip(content, right.logprobs, strict=True):
        assert bytes(entry["bytes"]) == served.gemma.tokenizer.token_bytes(own.token_id)
        assert [top["logprob"] for top in entry["top_logprobs"]] == [value for _, value in own.top]


def test_stop_text(served: Served) -> None:
    whole = expected(served, max_new_tokens=24, seed=3).text
    stop = whole[len(whole) // 2 :][:3]
    right = expected(served, max_new_tokens=24, seed=3, stop=(stop,))
    choice = served.chat(max_tokens=24, seed=3, stop=[stop]).json()["choices"][0]
    assert choice["message"]["content"] == right.text == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logit_bias(served: Served) -> None:
    token = served.gemma.tokenizer.encode("blue", add_bos=False)[0]
    answer = served.chat(logit_bias={str(token): 100}, temperature=0, max_tokens=3).json()
    assert answer["choices"][0]["message"]["content"] == "blue" * 3


def test_continue_final_message(served: Served) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "It is"}]
    ids = served.gemma.chat_ids(messages, ChatOptions(add_generation_prompt=False, continue_final_message=True))
    assert ids[-1] == served.gemma.tokenizer.encode("It is", add_bos=False)[-1]
    (right,) = served.gemma.complete([ids], SamplingParams(max_new_tokens=5, seed=1))
    answer = served.chat(messages=messages, continue_final_message=True, max_tokens=5, seed=1).json()
    assert answer["choices"][0]["message"]["content"] == right.text
    assert answer["usage"]["prompt_tokens"] == len(ids)
    refused = served.chat(continue_final_message=True)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "continue_final_message"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_message_is_folded(served: Served, role: str) -> None:
    asked = [{"role": role, "content": "Be brief."}, *CHAT]
    right = expected(served, [{"role": "system", "content": "Be brief."}, *CHAT], max_new_tokens=4, seed=1)
    answer = served.chat(messages=asked, seed=1).json()
    assert answer["choices"][0]["message"]["content"] == right.text
    assert answer["usage"]["prompt_tokens"] == right.prompt_tokens


def test_text_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    answer = served.chat(messages=[{"role": "user", "content": parts}], seed=1).json()
    assert answer["choices"][0]["message"]["content"] == expected(served, max_new_tokens=4, seed=1).text


def test_cached_tokens_are_counted(served: Served) -> None:
    long = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 3}]
    served.chat(messages=long)
    again = served.chat(messages=long).json()["usage"]
    right = expected(served, long, max_new_tokens=4).stats.cached_tokens
    assert again["prompt_tokens_details"]["cached_tokens"] == right > 0


def test_informational_fields_change_nothing(served: Served) -> None:
    plain = served.chat(seed=8).json()
    named = served.chat(seed=8, user="u", metadata={"a": "b"}, safety_identifier="s").json()
    assert named["choices"] == plain["choices"]
