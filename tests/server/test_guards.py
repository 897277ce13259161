"""Guards at serving: modes, refusals, streams that wait for their judge, judges that fail. All texts are invented."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from gemcut.gemma import Gemma
from gemcut.safety.guard import Guard
from gemcut.safety.guard_file import GuardFile
from gemcut.safety.judge import JudgeError
from gemcut.server.guards import CheckedText, JudgeDoor, Verdict
from gemcut.server.state import ServerSettings, ServerState

from .host import CHAT, NAME, Served, error_of, events, new_gemma, serving

LONG = {"max_tokens": 40, "ignore_eos": True, "seed": 1}


class Lengths:
    """A judge that flags texts of more than ``limit`` characters, or with a word."""

    policies = ("hate",)

    def __init__(self) -> None:
        self.limit, self.wait, self.error, self.calls = 10**9, 0.0, False, 0
        self.seen: list[tuple[str, str | None]] = []
        self.fail_at = 10**9

    def score(self, text: str, policy: str) -> float:
        raise AssertionError("score_all is asked")

    def score_all(self, text: str, policies: Any, prompt: str | None = None) -> dict[str, float]:
        self.calls += 1
        self.seen.append((text, prompt))
        if self.calls >= self.fail_at:
            time.sleep(self.wait)
            if self.error:
                raise JudgeError("it is ill")
        return {"hate": float("zorble" in text or (prompt is not None and len(text) > self.limit))}


def door(judge: Lengths, **table: Any) -> JudgeDoor:
    spec = {"kind": "http", "url": "http://127.0.0.1:1", "policies": ["hate"]}
    return JudgeDoor(Guard(GuardFile.of({"judge": [spec], **table}, "guard.toml"), [(judge, ("hate",))]))


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma()


def guarded(gemma: Gemma, judge: Lengths, **table: Any) -> Any:
    return serving(gemma, ServerState(ServerSettings(names=(NAME,)), judges=door(judge, **table)))


def streamed(served: Served, **fields: Any) -> tuple[str, str, str, list[Any]]:
    """(text, refusal, finish reason, chunks) of a stream."""
    chunks = events(served.chat(**{**LONG, **fields}, stream=True))
    assert chunks[-1] == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"]]
    texts = "".join(choice["delta"].get("content") or "" for choice in choices)
    refusals = "".join(choice["delta"].get("refusal") or "" for choice in choices)
    return texts, refusals, choices[-1]["finish_reason"], chunks[:-1]


def test_blocked_answers(gemma: Gemma) -> None:
    judge = Lengths()
    with guarded(gemma, judge, refusal="Not here.") as served:
        free = served.chat(**LONG).json()
        whole = free["choices"][0]["message"]["content"]
        assert free["moderation"]["mode"] == "block"
        assert free["moderation"]["output"]["category_scores"] == {"hate": 0.0}
        assert streamed(served)[0] == whole
        assert (whole, CHAT[0]["content"]) in judge.seen  # all of it was judged, with its question
        judge.limit = 30
        choice = served.chat(**LONG, logprobs=True).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"] == {"role": "assistant", "content": "", "refusal": "Not here."}
        assert choice["logprobs"] is None
        text, refusal, reason, _ = streamed(served)
        assert (refusal, reason) == ("Not here.", "content_filter")
        assert len(text) <= 30
        assert whole.startswith(text)
        done = served.complete(**LONG).json()["choices"][0]
        assert (done["text"], done["finish_reason"], done["logprobs"]) == ("", "content_filter", None)
        bad = served.chat(messages=[{"role": "user", "content": "a zorble"}])
        assert (bad.status_code, error_of(bad)["code"]) == (400, "content_filter")
        ids = gemma.tokenizer.encode("a zorble", add_bos=False)  # token ids are judged as the text they stand for
        assert served.complete(prompt=ids).status_code == 400
        served.nothing_held()


def test_log_probabilities_come_with_their_text(gemma: Gemma) -> None:
    judge = Lengths()
    with guarded(gemma, judge) as served:
        free = served.chat(**LONG, logprobs=True).json()["choices"][0]
        tokens = [entry["token"] for entry in free["logprobs"]["content"]]
        for limit in (10**9, 60):
            judge.limit = limit
            text, _, reason, chunks = streamed(served, logprobs=True)
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            out = [entry["token"] for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert out == tokens[: len(out)]
            if reason == "content_filter":
                assert sum(map(len, out)) <= len(text) + 8, "tokens of a text that was held back"
            else:
                assert out == tokens


def test_pieces() -> None:
    class Sees:
        piece_tokens = 4
        seen: list[str] = []  # noqa: RUF012

        async def check(self, kind: str, text: str) -> Verdict:
            self.seen.append(text)
            return Verdict()

    async def work() -> None:
        guard = Sees()
        checks = CheckedText([guard])
        assert await checks.push("One", tokens=1) == ""
        assert await checks.push(" two. Th", tokens=1) == "One two."
        assert await checks.push("ree", tokens=1) == ""
        assert await checks.push(" a", tokens=3) == " Three a"  # four tokens since the last piece
        assert await checks.push(" b", tokens=1, last=True) == " b"
        assert guard.seen == ["One two.", "One two. Three a", "One two. Three a b"]

    import asyncio

    asyncio.run(work())


@pytest.mark.parametrize("on_failure", ["block", "pass"])
@pytest.mark.parametrize("slow", [True, False])
def test_a_judge_that_fails_in_the_middle_of_a_stream(gemma: Gemma, on_failure: str, slow: bool) -> None:
    judge = Lengths()
    judge.fail_at, judge.error, judge.wait = 3, not slow, 0.6 if slow else 0.0
    with guarded(gemma, judge, on_failure=on_failure, timeout=0.1, piece_tokens=4) as served:
        text, refusal, reason, chunks = streamed(served, moderation={"mode": "block"})
        (report,) = [chunk["moderation"] for chunk in chunks if "moderation" in chunk]
        assert ("did not answer within 0.1 seconds" if slow else "it is ill") in report["output"]["failed"][0]
        if on_failure == "block":
            assert (reason, bool(refusal)) == ("content_filter", True)
        else:
            assert (reason, refusal) == ("length", "")
            assert text
        assert served.state.judges is not None
        assert served.state.judges.judges.failures
        assert "with a failed judge, p95 of a check" in served.state.judges.words()
        served.nothing_held()


def test_a_slow_judge_holds_the_stream_back_and_others_go_on(gemma: Gemma) -> None:
    judge = Lengths()
    judge.fail_at, judge.wait = 2, 0.25  # every look at an answer takes so long
    with guarded(gemma, judge, piece_tokens=8) as served:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(streamed(served)))
        started = time.monotonic()
        thread.start()
        while judge.calls < 2:
            time.sleep(0.005)
        assert served.http.get("/live").status_code == 200
        assert time.monotonic() - started < 5
        thread.join()
        pieces = [t for t, _ in judge.seen[1:]]
        assert found[0][0] in pieces
        assert len(pieces) > 2  # in pieces, each of them judged; a slow judge gets more at a time


def test_a_request_cannot_lower_the_mode(gemma: Gemma) -> None:
    judge = Lengths()
    judge.limit = 10
    with guarded(gemma, judge, mode="score") as served:
        scored = served.chat(**LONG).json()
        assert scored["choices"][0]["message"]["content"]
        assert scored["moderation"]["output"]["flagged"] is True
        assert scored["moderation"]["output"]["categories"] == {"hate": True}
        raised = served.chat(**LONG, moderation={"mode": "block"}).json()
        assert raised["choices"][0]["finish_reason"] == "content_filter"
        lowered = served.chat(moderation={"mode": "off"})
        assert "below this server's 'score'" in error_of(lowered)["message"]
        assert served.chat(moderation={"mode": "loud"}).status_code == 400
    with serving(gemma) as served:
        assert error_of(served.chat(moderation={"mode": "score"}))["code"] == "no_guard"
        answer = served.http.post("/v1/moderations", json={"input": "x"})
        assert error_of(answer)["code"] == "no_guard"


def test_moderations(gemma: Gemma) -> None:
    with guarded(gemma, Lengths()) as served:
        client = served.client()
        found = client.moderations.create(input=["a fine day", "a zorble"])
        assert [result.flagged for result in found.results] == [False, True]
        body = served.http.post("/v1/moderations", json={"input": "zor\u200bble"}).json()
        assert body["results"][0]["categories"] == {"hate": True}
        assert served.http.post("/v1/moderations", json={"input": "x", "model": "omni"}).status_code == 404
        assert served.http.post("/v1/moderations", json={"input": "x" * 500_000}).status_code == 400
        assert "zorble" not in json.dumps(body)


def test_the_served_model_judges_beside_users_requests(gemma: Gemma) -> None:
    file = GuardFile.of({"mode": "score", "judge": [{"kind": "self", "policies": ["hate"]}]}, "guard.toml")
    state = ServerState(ServerSettings(names=(NAME,)), judges=JudgeDoor(file.build(gemma)))
    with serving(gemma, state) as served:
        body = served.chat(max_tokens=4).json()
        assert 0 < body["moderation"]["input"]["category_scores"]["hate"] < 1
        assert 0 < body["moderation"]["output"]["category_scores"]["hate"] < 1
        served.nothing_held()
