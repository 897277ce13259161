"""Models, tokens, embeddings and the description of the API, through OpenAI's client and by hand."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openai
import pytest
import torch

from gemcut.model.dense import DenseKeyValues
from gemcut.safety.audit import AuditLog
from gemcut.safety.guard import Guard
from gemcut.safety.guard_file import GuardFile
from gemcut.safety.lexicon import Lexicon
from gemcut.server import openapi
from gemcut.server.app import all_routes
from gemcut.server.audit import Audit
from gemcut.server.guards import JudgeDoor
from gemcut.server.state import ServerState
from server.host import CHAT, NAME, Served, new_gemma, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(new_gemma()) as found:
        yield found
        found.nothing_held()


# ---- models --------------------------------------------------------------------------------------------------------


def test_models(served: Served) -> None:
    (model,) = served.client().models.list().data
    assert model == served.client().models.retrieve(NAME)
    found = model.model_dump()
    assert (found["id"], found["object"], found["owned_by"], found["parent"]) == (NAME, "model", "google", None)
    assert found["created"] == served.state.created
    assert found["max_model_len"] == 512
    assert found["sampling_defaults"]["temperature"] == 1.0
    assert {"chat", "completions", "embeddings"} <= set(found["capabilities"])
    assert found["instruction_tuned"] is None  # a network made here, of which nothing is known


def test_an_unknown_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here; this server has tiny"):
        served.client().models.retrieve("gpt-5")
    assert served.http.get("/v1/models/a%2Fb").status_code == 404


def test_each_name_is_a_model() -> None:
    from gemcut.server.state import ServerSettings

    state = ServerState(ServerSettings(names=("one", "org/two")))
    with serving(new_gemma(), state) as found:
        assert [model.id for model in found.client().models.list().data] == ["one", "org/two"]
        assert found.http.get("/v1/models/org/two").json()["id"] == "org/two"


# ---- tokens --------------------------------------------------------------------------------------------------------


def tokenized(served: Served, **body: Any) -> dict[str, Any]:
    response = served.http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", ["The sky is", "", " ü漢🙂\n", "<bos>a<end_of_turn>", "\0"])
def test_there_and_back(served: Served, text: str) -> None:
    found = tokenized(served, prompt=text, model=NAME, add_special_tokens=False)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512
    assert found["token_strs"] is None
    back = served.http.post("/detokenize", json={"model": NAME, "tokens": found["tokens"]})
    assert back.json() == {"prompt": text}


def test_tokens_are_those_of_generate(served: Served) -> None:
    found = tokenized(served, prompt="The sky is", return_token_strs=True)
    assert found["tokens"] == served.gemma.encode("The sky is")
    assert found["token_strs"] == ["<bos>", "The", "▁sky", "▁is"]


def test_a_dialogue_has_the_tokens_that_chat_counts(served: Served) -> None:
    found = tokenized(served, messages=CHAT)
    assert found["tokens"] == served.gemma.encode_messages(CHAT)
    assert found["count"] == served.chat().json()["usage"]["prompt_tokens"]
    shorter = tokenized(served, messages=CHAT, add_generation_prompt=False)
    assert found["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < found["count"]
    goes_on = [*CHAT, {"role": "assistant", "content": "Blue"}]
    assert tokenized(served, messages=goes_on, continue_final_message=True)["tokens"][
        -1:
    ] == served.gemma.tokenizer.encode("Blue", add_bos=False)


def test_what_lm_evaluation_harness_asks(served: Served) -> None:
    """Its remote tokenizer: names of special tokens, then their ids."""
    info = served.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    tokens = tokenized(served, prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert tokens == [served.gemma.tokenizer.eos_id]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "expected either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "expected either prompt or messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt is for messages"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": False}, "a dialogue always has its special tokens"),
        ("/tokenize", {"prompt": "a", "max_tokens": 4}, 'unknown field "max_tokens"'),
        ("/tokenize", {"prompt": "a" * 30_000}, "prompt has 30,000 characters"),
        ("/tokenize", {"prompt": "a", "model": "b"}, "there is no model 'b' here"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": [1, 256_000]}, "tokens[1] is 256000; this model's ids go from 0 to 255999"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]: expected int >= 0"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]: expected int, got float"),
        ("/detokenize", {"tokens": [0] * 100_001}, "tokens: expected array of length <= 100000"),
    ],
)
def test_bad_tokens(served: Served, path: str, body: dict[str, Any], said: str) -> None:
    response = served.http.post(path, json=body)
    assert response.status_code == (404 if "no model" in said else 400)
    assert said in response.json()["error"]["message"]


# ---- embeddings ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def expected(served: Served, ids: list[int]) -> np.ndarray[Any, Any]:
    """The whole prompt at once without engine and cache, and the mean in numpy."""
    model = served.gemma.model
    hidden = model.norm(model(torch.tensor(ids), torch.arange(len(ids)), DenseKeyValues(len(ids))))
    return hidden[1:].double().numpy().mean(0)  # type: ignore[no-any-return]


def test_embeddings_by_openais_client(served: Served) -> None:
    """It asks for base64 where nobody says otherwise."""
    texts = ["The sky is blue.", "a", "Wide " * 60]
    ids = [served.gemma.encode(text) for text in texts]
    client = served.client()
    answers = [
        client.embeddings.create(model=NAME, input=texts),
        client.embeddings.create(model=NAME, input=texts, encoding_format="float"),
        client.embeddings.create(model=NAME, input=ids),
    ]
    for answer in answers:
        assert [each.index for each in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        for each, own in zip(answer.data, ids, strict=True):
            assert np.abs(np.array(each.embedding) - expected(served, own)).max() < 1e-4
    for one in (texts[0], ids[0]):
        (found,) = client.embeddings.create(model=NAME, input=one).data
        assert np.allclose(found.embedding, answers[0].data[0].embedding, atol=1e-5)


def test_base64_is_little_endian_fp32(served: Served) -> None:
    body = {"input": "a", "encoding_format": "base64", "dimensions": 16, "user": "u"}
    data = served.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    floats = served.http.post("/v1/embeddings", json={"input": "a"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(data), "<f4").tolist() == pytest.approx(floats, abs=1e-7)
    assert len(floats) == 16


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"dimensions": 8}, "dimensions", "dimensions is 8; this model's vectors have 16 and cannot be shortened"),
        ({"dimensions": 0}, "dimensions", "dimensions: expected int >= 1"),
        ({"encoding_format": "int8"}, "encoding_format", "encoding_format: invalid enum value 'int8'"),
        ({"input": ""}, "input", "input is empty; expected at least one token"),
        ({"input": []}, "input", "input: expected array of length >= 1"),
        ({"input": ["a", ""]}, "input[1]", "input[1] is empty"),
        ({"input": ["a", 1]}, "input[1]", "input[1] is neither a text nor a list of token ids"),
        ({"input": [[1], [1.5]]}, "input[1]", "input[1] is neither a text nor a list of token ids"),
        ({"input": [[2]]}, "input", "input: text 0 is empty; expected at least one token besides <bos>"),
        ({"input": [256_000]}, "input", "prompt has token id 256000; this model's ids go from 0 to 255999"),
        ({"input": ["a"] * 257}, "input", "input has 257 texts; 256 is the most of one request"),
        ({"input": ["a b"] * 2 + ["a b " * 300]}, None, "the context holds 512"),
        ({"input": {"text": "a"}}, "input", "input: expected "),
        ({"truncate": True}, "truncate", 'unknown field "truncate"'),
    ],
)
def test_bad_embeddings(served: Served, fields: dict[str, Any], param: str | None, said: str) -> None:
    response = served.http.post("/v1/embeddings", json={"input": "a", "model": NAME, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert error["param"] == param


# ---- the description -----------------------------------------------------------------------------------------------


def test_every_route_is_described(served: Served) -> None:
    found = served.http.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, each in found["paths"].items() for method in each}
    assert described == {(method, path.replace("/*", "/{name}")) for method, path in all_routes()}
    names = [operation["operationId"] for each in found["paths"].values() for operation in each.values()]
    assert len(set(names)) == len(names)
    assert set(openapi.SHAPES) <= {path for _, path in all_routes()} | {"/v1/completions"}


def test_a_body_is_read_with_the_class_that_is_described(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the description cannot say what is no longer so."""
    read: list[Any] = []
    inner = ServerState.read

    def spy(self: ServerState, request: Any, kind: Any) -> Any:
        read.append(kind)
        return inner(self, request, kind)

    monkeypatch.setattr(ServerState, "read", spy)
    for method, path in sorted(all_routes()):
        if method == "POST":
            read.clear()
            served.http.post(path, json={})
            assert read == [openapi.SHAPES[path].body], path


def test_answers_have_the_shapes_that_are_described(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = {"kind": "http", "url": "http://127.0.0.1:1", "policies": ["hate"]}  # /v1/moderations needs a guard
    judges = Guard(GuardFile.of({"judge": [spec]}, "guard.toml"), [(Lexicon(["zorble"], "hate"), ["hate"])])
    monkeypatch.setattr(served.state, "judges", JudgeDoor(judges))
    monkeypatch.setattr(served.state, "audit", Audit(AuditLog(tmp_path / "audit.jsonl")))  # /v1/reports needs a log
    routes = {path for _, path in all_routes()}
    for path, shape in openapi.SHAPES.items():
        if shape.answer is None or path not in routes:
            continue
        real = path.replace("*", NAME)
        response = served.http.post(real, json=shape.example) if shape.body else served.http.get(real)
        assert response.status_code == 200, (path, response.text)
        msgspec.json.decode(response.content, type=shape.answer)
        known = {field.encode_name for field in msgspec.structs.fields(shape.answer)}
        assert set(response.json()) <= known, path


# ---- metrics and logs ----------------------------------------------------------------------------------------------


def test_metrics_of_a_request(served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def counted() -> dict[str, float]:
        text = served.http.get("/metrics").text
        return {
            s.name: s.value
            for f in text_string_to_metric_families(text)
            for s in f.samples
            if s.labels == {"model_name": NAME}
        }

    before = counted()
    usage = served.chat(n=2, temperature=1.0, max_tokens=5, logit_bias={"1": -100, "107": -100}).json()["usage"]
    list(served.client().chat.completions.create(model=NAME, messages=CHAT, max_tokens=3, stream=True))  # type: ignore[call-overload]
    after = counted()
    grown = {name: after[name] - before[name] for name in after}
    assert usage["completion_tokens"] == 10
    assert 11 <= grown["gemcut:generation_tokens_total"] <= 13
    assert grown["gemcut:time_to_first_token_seconds_count"] == 3
    assert grown["gemcut:request_prompt_tokens_count"] == 3
    assert after["gemcut:num_requests_running"] == 0
    assert after["gemcut:kv_cache_usage_perc"] == 0


def test_while_it_loads() -> None:
    """Metrics and the description are there; everything that needs the model is 503."""
    with serving(None) as found:
        assert found.http.get("/metrics").status_code == 200
        assert found.http.get("/openapi.json").status_code == 200
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("GET", "/tokenizer_info", None),
            ("POST", "/tokenize", {"prompt": "a"}),
            ("POST", "/detokenize", {"tokens": [1]}),
            ("POST", "/v1/embeddings", {"input": "a"}),
        ):
            response = found.http.request(method, path, json=body)
            assert response.status_code == 503, path
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "loading"


def test_an_embedding_whose_client_leaves_is_not_computed_to_its_end(served: Served) -> None:
    import httpx

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.url, trust_env=False) as client:
            body = {"input": ["Wide " * 400] * 64}
            with pytest.raises((httpx.ReadTimeout, asyncio.TimeoutError)):
                await client.post("/v1/embeddings", json=body, timeout=0.15)

    asyncio.run(leave())
    served.nothing_held()
