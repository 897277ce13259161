"""Keys, names and origins over the wire; what is logged; ``gemcut serve``'s options for them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gemcut.cli.access_options import AccessOptions
from gemcut.errors import ParameterError
from gemcut.server.auth import HostGate, KeyGate
from gemcut.server.keys import ApiKey, Keys, Limits
from gemcut.server.logs import Log
from gemcut.server.state import ServerSettings, ServerState
from gemcut.settings import Settings
from server.host import CHAT, NAME, Served, error_of, new_gemma, serving
from server.test_command import Process, refused, running, tiny  # noqa: F401

ALICE, BOB, CAROL = (f"{name}-0123456789abcdef" for name in ("alice", "bob", "carol"))
NOTHING = Settings({}, {})


def state_with_keys(stream: Any = None, *, prompts: bool = False, share: bool = False) -> ServerState:
    limits = {ALICE: Limits(), BOB: Limits(), CAROL: Limits(requests_per_minute=2, tokens_per_minute=20)}
    keys = [ApiKey(key.split("-")[0], hashlib.sha256(key.encode()).digest(), own) for key, own in limits.items()]
    state = ServerState(ServerSettings(names=(NAME,)))
    gate = HostGate(loopback=True, origins=["https://chat.example.org"])
    state.gates = [gate, KeyGate(Keys(keys), share_cache=share)]
    state.log = Log(stream or io.StringIO(), prompts=prompts)
    return state


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma(), state_with_keys()) as found:
        yield found
        found.nothing_held()


def test_openais_client_with_keys(served: Served) -> None:
    assert served.client(api_key=ALICE).models.list().data[0].id == NAME
    for key in ("sk-wrong-0123456789abcdef", ALICE[:-1]):
        with pytest.raises(openai.AuthenticationError, match="the API key is not one of this server's"):
            served.client(api_key=key).models.list()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/version", "/v1/nothing", "/nothing"])
def test_nothing_is_told_without_a_key(served: Served, path: str) -> None:
    response = served.http.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "missing_api_key"


@pytest.mark.parametrize("path", ["/health", "/live", "/ready"])
def test_probes_need_none(served: Served, path: str) -> None:
    assert served.http.get(path).status_code == 200


def test_a_body_is_not_read_before_the_key_is_known(served: Served) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = served.raw(head + b"content-length: 8000000\r\nconnection: close\r\n\r\n" + b" " * 10)
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_limits_of_a_key(served: Served) -> None:
    body = {"messages": CHAT, "max_tokens": 4}
    headers = {"authorization": f"Bearer {CAROL}"}
    first = served.http.post("/v1/chat/completions", json=body, headers=headers)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-tokens"] == "20"
    used = first.json()["usage"]["total_tokens"]
    second = served.http.post("/v1/chat/completions", json=body, headers=headers)
    assert second.status_code == 200
    assert abs(int(second.headers["x-ratelimit-remaining-tokens"]) - (20 - used)) <= 1
    third = served.http.post("/v1/chat/completions", json=body, headers=headers)
    assert third.status_code == 429
    assert 25 <= int(third.headers["retry-after"]) <= 30
    assert error_of(third)["type"] == "rate_limit_error"
    others = served.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {ALICE}"})
    assert others.status_code == 200
    metrics = served.http.get("/metrics", headers=headers).text
    assert 'gemcut:admission_rejections_total{model_name="tiny",reason="rate_limit_exceeded"} 1.0' in metrics


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Wide " * 30}], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "Far " * 30, "max_tokens": 1}),
    ],
)
@pytest.mark.parametrize("share", [False, True])
def test_the_cache_is_each_keys_own_unless_it_is_shared(path: str, body: dict[str, Any], share: bool) -> None:
    with serving(new_gemma(), state_with_keys(share=share)) as found:

        def cached(key: str) -> int:
            answer = found.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[no-any-return]

        assert cached(ALICE) == 0
        own, other = cached(ALICE), cached(BOB)
        assert own > 20
        assert other == (own if share else 0)
        assert cached(BOB) == own


def test_a_page_of_an_allowed_origin(served: Served) -> None:
    """What a browser does: a preflight without key, then the request."""
    origin = {"origin": "https://chat.example.org", "sec-fetch-site": "cross-site"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = served.http.options("/v1/chat/completions", headers=origin | asked)
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    denied = served.http.post("/v1/chat/completions", json={}, headers=origin)
    assert denied.status_code == 401
    assert denied.headers["access-control-allow-origin"] == "https://chat.example.org"  # so that the page can read it
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    for response in (
        served.http.options("/v1/models", headers=foreign | asked),
        served.http.get("/health", headers=foreign),
        served.http.get("/health", headers={"host": "evil.example"}),
    ):
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def logged(*, prompts: bool) -> list[dict[str, Any]]:
    stream = io.StringIO()
    with serving(new_gemma(), state_with_keys(stream, prompts=prompts)) as found:
        headers = {"authorization": f"Bearer {ALICE}", "x-request-id": "mine-1"}
        body = {"messages": [{"role": "user", "content": "A secret\nword"}], "max_tokens": 4, "n": 2}
        assert found.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        wrong = {"messages": [{"role": "secret", "content": "secret"}], "secret": 1}
        assert found.http.post("/v1/chat/completions", json=wrong, headers=headers).status_code == 400
        assert found.http.get("/health").status_code == 200
        assert found.http.get("/v1/models").status_code == 401
        found.state.log.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_have_sizes_and_times_and_no_texts() -> None:
    lines = logged(prompts=False)
    assert "secret" not in json.dumps(lines).lower()
    answer, wrong, denied = lines  # a probe that went well is no line
    assert (answer["id"], answer["key"], answer["status"], answer["path"]) == (
        "mine-1",
        "alice",
        200,
        "/v1/chat/completions",
    )
    assert (answer["answers"], answer["finish_reason"]) == (2, "length")
    assert answer["completion_tokens"] == 8
    assert 0 < answer["first_token_seconds"] < answer["seconds"]
    assert (wrong["status"], wrong["error"]) == (400, "unknown_field")
    assert (denied["status"], denied["error"], denied.get("key")) == (401, "missing_api_key", None)


def test_prompts_are_logged_where_that_was_asked_for() -> None:
    warning, answer, *_ = logged(prompts=True)
    assert (warning["level"], warning["event"]) == ("warning", "log_prompts")
    assert "A secret\\nword" in answer["prompts"][0]
    assert len(answer["texts"]) == 2


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_that_contradict_or_are_wrong(tmp_path: Path) -> None:
    state = ServerState()
    for options, said in (
        ({"host": "0.0.0.0"}, "--host is 0.0.0.0, which others can reach; that needs API keys"),
        ({"share_prefix_cache": True}, "--share-prefix-cache needs --api-key-file"),
        ({"metrics_alias": ["sglang"]}, "--metrics-alias is 'sglang'; expected vllm"),
        ({"api_key_file": tmp_path / "none"}, "cannot read the API keys"),
        ({"allow_host": ["a:1"]}, "--allow-host is 'a:1'"),
        ({"allow_origin": ["a"]}, "--allow-origin is 'a'"),
        ({"port": 70_000}, "--port: port is 70000; expected a whole number from 0 to 65535"),
        ({"host": " "}, "--host: host is ' '; expected a text"),
    ):
        with pytest.raises(ParameterError, match=said):
            AccessOptions(**options).apply(state, NOTHING)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path, refused: Callable[..., str]) -> None:  # noqa: F811
    file = tmp_path / "keys.toml"
    file.write_text(f'alice = "{ALICE}"\n')
    file.chmod(0o600)
    options = ("--api-key-file", file, "--metrics-alias", "vllm", "--log-prompts", "--host", "localhost")
    with running(tiny, *options) as (process, client):
        process.said("log_prompts.*warning|warning.*log_prompts")
        process.said("^  API keys: alice$")
        process.said(r"rows a step, about [\d,]+ tok/s for one answer")
        assert client.get("/metrics").status_code == 401
        client.headers["authorization"] = f"Bearer {ALICE}"
        assert "vllm:num_requests_waiting" in client.get("/metrics").text
        assert client.get("/v1/models").json()["data"][0]["id"] == "checkpoint"
        process.said('"path":"/v1/models","status":200')
    assert not any(ALICE in line for line in process.lines)
    assert "others can reach" in refused(tiny, "--host", "0.0.0.0", "--port", "0")
    file.chmod(0o644)
    assert f"run chmod 600 {file}" in refused(tiny, "--api-key-file", file, "--port", "0")
