"""Whatever is wrong gets the right status, one sentence, and OpenAI's error object; the server stays up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from .host import CHAT, NAME, Served, error_of, new_gemma, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma(), max_body=100_000) as found:
        yield found


@pytest.fixture(autouse=True)
def _clean(served: Served) -> Iterator[None]:
    yield
    served.nothing_held()
    assert served.chat().status_code == 200


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "hot"}, "temperature", "expected"),
    ({"temperature": 2.5}, "temperature", "<= 2"),
    ({"temperature": -1}, "temperature", ">= 0"),
    ({"temperature": 1e-40}, "temperature", "1e-30"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"min_p": 1.5}, "min_p", "<= 1"),
    ({"n": 10_000}, "n", "<= 16"),
    ({"n": 0}, "n", ">= 1"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "give one"),
    ({"max_tokens": 10**10}, "max_tokens", "<= 1000000000"),
    ({"max_tokens": 2, "min_tokens": 30}, "min_tokens", "more than max_tokens"),
    ({"min_tokens": -1}, "min_tokens", ">= 0"),
    ({"ignore_eos": "yes"}, "ignore_eos", "expected"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", "grammar"),
    ({"stop": ["x"] * 1000}, "stop", "<= 16"),
    ({"stop": ""}, "stop", ">= 1"),
    ({"stop": ["a", ""]}, "stop[1]", ">= 1"),
    ({"logit_bias": {"1000000000": 1}}, "logit_bias", "255999"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
    ({"seed": 2**64}, "seed", "<= 9223372036854775807"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs to true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options.other", "unknown field"),
    ({"stream": "yes"}, "stream", "expected"),
    ({"frobnicate": 1}, "frobnicate", "unknown field"),
    ({"messages": []}, "messages", ">= 1"),
    ({"messages": "hi"}, "messages", "array"),
    ({"messages": None}, "messages", "missing"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages", "'king'"),
    ({"messages": CHAT * 2}, "messages", "alternate"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "'user'"),
    ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages[0].content", "'image_url'"),
    ({"messages": user([])}, "messages[0].content", "no content"),
    ({"messages": [*user("x"), {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "no call before it has"),
    ({"response_format": {"type": "nonsense"}}, "response_format", "nonsense"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_field(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"model": NAME, "messages": CHAT, "max_tokens": 2, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    response = served.http.post("/v1/chat/completions", json=body)
    error = error_of(response)
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert words in error["message"], error


SURROGATE = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'


def post(served: Served, content: bytes, content_type: str = "application/json") -> httpx.Response:
    return served.http.post("/v1/chat/completions", content=content, headers={"content-type": content_type})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a":1}x', b"\xff\xfe", SURROGATE, b"NaN", b"[" * 90_000],
    ids=["empty", "open", "more", "not utf-8", "lone surrogate", "nan", "deep"],
)  # fmt: skip
def test_bad_json(served: Served, content: bytes) -> None:
    response = post(served, content)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_nul_bytes_are_text(served: Served) -> None:
    assert served.chat(messages=user("a\0b")).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_wrong_content_type(served: Served, kind: str) -> None:
    response = post(served, json.dumps({"messages": CHAT}).encode(), kind)
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_body_too_large(served: Served) -> None:
    response = post(served, b'{"messages": "' + b"x" * 50_000_000 + b'"}')
    assert response.status_code == 413
    assert "100,000" in error_of(response)["message"]


def test_large_body_in_chunks_without_a_length(served: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    headers = {"content-type": "application/json"}
    response = served.http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert response.status_code == 413
    error_of(response)


def test_unknown_path_and_method(served: Served) -> None:
    missing = served.http.get("/nowhere")
    assert missing.status_code == 404
    assert "/nowhere" in error_of(missing)["message"]
    wrong = served.http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    error_of(wrong)


def test_wrong_model(served: Served) -> None:
    response = served.chat(model="gpt-9")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        served.client().chat.completions.create(model="gpt-9", messages=CHAT)  # type: ignore[arg-type]


def test_too_long_says_both_numbers(served: Served) -> None:
    prompt = served.gemma.encode_messages(CHAT)
    response = served.chat(max_tokens=10**9)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert str(len(prompt)) in error["message"]
    assert "512" in error["message"]
    error = error_of(served.chat(messages=user("word " * 600)))
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "512" in error_of(served.chat(messages=user("x" * 60_000)))["message"]


def test_a_bug_is_a_500_that_tells_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(served.gemma, "prepare_stream", broken)
        response = served.chat()
    assert response.status_code == 500
    error = error_of(response)
    assert "secret" not in error["message"]
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-should-retry"] == "false"
    served.state.log.close()
    log = capsys.readouterr().err
    assert '"kind":"ZeroDivisionError"' in log
    assert "test_errors.py" in log  # where it was raised
    assert "secret" not in log  # what an exception says may be a text of somebody


def test_unknown_fields_allowed() -> None:
    with serving(new_gemma(), allow_unknown=True) as served:
        response = served.chat(frobnicate=1, messages=[{**CHAT[0], "mood": "good"}])
        assert response.status_code == 200
        assert set(response.headers["x-gemcut-ignored"].split(",")) == {"frobnicate", "messages[0].mood"}
        assert served.chat(temperature="hot", frobnicate=1).status_code == 400
        assert "x-gemcut-ignored" not in served.chat().headers


def test_while_loading() -> None:
    with serving(None) as served:
        for path in ("/ready", "/health"):
            waiting = served.http.get(path)
            assert (waiting.status_code, waiting.json()["status"]) == (503, "loading")
        assert served.http.get("/live").status_code == 200
        assert served.http.get("/version").json().keys() == {"version"}
        refused = served.chat()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
        assert error_of(refused)["type"] == "unavailable"
        served.state.gemma = new_gemma()
        assert served.http.get("/ready").json() == {"status": "ready"}
        assert served.chat().status_code == 200
        served.state.draining = True
        assert served.http.get("/ready").json() == {"status": "draining"}
        assert error_of(served.chat())["code"] == "draining"
