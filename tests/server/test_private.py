"""Personal data at serving. All of it is invented, and valid by its checksum alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.safety.private import HELD, Shown, Vault
from gemcut.server.logs import Log
from gemcut.server.private import PiiDoor
from gemcut.server.state import ServerSettings, ServerState

from .host import NAME, error_of, events, new_gemma, serving

MAIL, CARD, IBAN = "zora.quill@quillmail.de", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00"
OTHER = "blorp@quillmail.de"
ASK = f"Write to {MAIL}, and to {MAIL} again; my card is {CARD}."


def test_placeholders_are_consistent_and_come_back() -> None:
    vault = Vault((ASK, "[EMAIL-1] is mine"))
    hidden = vault.hide(ASK)
    assert hidden == "Write to [EMAIL-2], and to [EMAIL-2] again; my card is [CARD-1]."
    assert vault.hide(f"{MAIL} {OTHER}") == "[EMAIL-2] [EMAIL-3]"
    assert vault.restore(f"{hidden} [EMAIL-1] [EMAIL-9]") == f"{ASK} [EMAIL-1] [EMAIL-9]"
    assert vault.found == {"email": 4, "card": 1}


@pytest.mark.parametrize("size", [1, 3, 7, 50, 10_000])
def test_an_answer_in_pieces(size: int) -> None:
    vault = Vault()
    vault.hide(ASK)
    key = "-----BEGIN PRIVATE KEY-----\n" + "abc9\n" * 60 + "-----END PRIVATE KEY-----"
    said = f"To [EMAIL-1] or {OTHER}: {IBAN}, [CARD-1]. {'Some words. ' * 20}{key} [EMAIL-2] [not one] {OTHER}"
    wanted = said.replace("[EMAIL-1]", MAIL).replace("[CARD-1]", CARD)
    wanted = wanted.replace(OTHER, "[EMAIL]").replace(IBAN, "[IBAN]").replace(key, "[SECRET]")
    shown, out = Shown(vault), ""
    for start in range(0, len(said), size):
        out += shown.push(said[start : start + size])
        assert wanted.startswith(out)
    assert out + shown.push("", last=True) == wanted
    assert vault.taken == {"email": 2, "iban": 1, "secret": 1}
    plain = Shown(Vault())
    assert len(plain.push("word " * 100)) == 500 - HELD


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma()


def served_with(gemma: Gemma, mode: str, **more: Any) -> Any:
    return serving(gemma, ServerState(ServerSettings(names=(NAME,)), pii=PiiDoor(mode), **more))


@pytest.fixture
def repeats(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Answers are what this list says, a piece a token; the tokens are the network's own."""
    from gemcut.text import Detokenizer

    said: list[str] = []
    places: dict[int, int] = {}

    def push(self: Any, token_id: int) -> str:
        place = places.get(id(self), 0)
        places[id(self)] = place + 1
        return said[place] if place < len(said) else ""

    monkeypatch.setattr(Detokenizer, "push", push)
    monkeypatch.setattr(Detokenizer, "finish", lambda self: "")
    yield said
    places.clear()


def test_redact(gemma: Gemma, repeats: list[str]) -> None:
    repeats += ["Dear [EMA", "IL-1], or ", "blorp@quill", "mail.de, your [CARD-1", "]."]
    stream = io.StringIO()
    with served_with(gemma, "redact", log=Log(stream, prompts=True)) as served:
        ask = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 8, "ignore_eos": True}
        answer = served.chat(**ask).json()
        wanted = f"Dear {MAIL}, or [EMAIL], your {CARD}."
        assert answer["choices"][0]["message"]["content"] == wanted
        assert answer["personal_data"] == {
            "mode": "redact",
            "input": {"email": 2, "card": 1},
            "output": {"email": 1},
        }
        chunks = events(served.chat(**ask, stream=True))
        texts = [c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1] if c["choices"]]
        assert "".join(texts) == wanted
        assert error_of(served.chat(**ask, logprobs=True))["param"] == "logprobs"
        done = served.complete(prompt=ASK, max_tokens=8, echo=True, ignore_eos=True).json()["choices"][0]
        assert done["text"] == ASK + wanted
        ids = gemma.tokenizer.encode(ASK, add_bos=False)
        assert "send a text" in error_of(served.complete(prompt=ids))["message"]
        served.nothing_held()
    served.state.log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    prompts = "".join(text for line in lines for text in line.get("prompts", ()))
    assert "Write to [EMAIL-1], and to [EMAIL-1] again; my card is [CARD-1]." in prompts
    for value in (MAIL, CARD, OTHER):
        assert value not in stream.getvalue()


def test_refuse(gemma: Gemma, repeats: list[str]) -> None:
    repeats += ["Well. ", "It is ", OTHER, " as ", "you know."]
    with served_with(gemma, "refuse") as served:
        bad = served.chat(messages=[{"role": "user", "content": ASK}])
        assert (bad.status_code, error_of(bad)["code"]) == (400, "content_filter")
        assert error_of(bad)["message"] == "the request holds personal data (card, email)"
        ids = gemma.tokenizer.encode(ASK, add_bos=False)
        assert served.complete(prompt=ids).status_code == 400
        choice = served.chat(max_tokens=8, ignore_eos=True).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["refusal"] == "The answer held personal data."
        text = served.chat(max_tokens=8, ignore_eos=True, stream=True).text
        assert OTHER not in text
        assert "content_filter" in text


def test_report(gemma: Gemma, repeats: list[str]) -> None:
    repeats += [MAIL, " and ", OTHER]
    with served_with(gemma, "report") as served:
        ask = [{"role": "user", "content": ASK}]
        answer = served.chat(messages=ask, max_tokens=8, ignore_eos=True).json()
        assert answer["choices"][0]["message"]["content"] == f"{MAIL} and {OTHER}"
        assert answer["personal_data"]["input"] == {"email": 2, "card": 1}
        assert answer["personal_data"]["output"] == {"email": 1}  # the caller's own came back to the caller


def test_a_mode_that_there_is_not() -> None:
    with pytest.raises(ParameterError, match=r"--pii is 'hide'; expected one of redact, refuse, report"):
        PiiDoor("hide")
