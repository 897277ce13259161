"""Guards of Gemma's Python methods and of gemcut chat. All texts are invented."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemcut import Gemma, SamplingParams
from gemcut.cli.chat_session import ChatSession
from gemcut.errors import ParameterError, RefusedError
from gemcut.safety.guard import Guard, plainer
from gemcut.safety.guard_file import GuardFile
from gemcut.server.state import ServerSettings, ServerState
from server.host import CHAT, NAME, new_gemma, serving

from ..cli.conftest import Cli, cli, tiny  # noqa: F401

LONG: dict[str, Any] = {"max_new_tokens": 40, "seed": 1, "ignore_eos": True}
REFUSAL = "Not here."


class Judge:
    """Flags answers of more than ``limit`` characters, and any text with a word; may take its time."""

    policies = ("hate",)

    def __init__(self, limit: int = 10**9, wait: float = 0.0) -> None:
        self.limit, self.wait = limit, wait
        self.seen: list[tuple[str, str | None]] = []

    def score(self, text: str, policy: str) -> float:
        raise AssertionError("score_all is asked")

    def score_all(self, text: str, policies: Any, prompt: str | None = None) -> dict[str, float]:
        time.sleep(self.wait)
        self.seen.append((text, prompt))
        return {"hate": float("zorble" in text or (prompt is not None and len(text) > self.limit))}


def guard_of(judge: Judge, **table: Any) -> Guard:
    spec = {"kind": "http", "url": "http://127.0.0.1:1", "policies": ["hate"]}
    return Guard(GuardFile.of({"judge": [spec], "refusal": REFUSAL, **table}, "guard.toml"), [(judge, ("hate",))])


@pytest.fixture(scope="module")
def model() -> Gemma:
    return new_gemma()


@pytest.fixture
def gemma(model: Gemma) -> Iterator[Gemma]:
    yield model
    model.guard = None


def test_answers_that_pass_are_the_unguarded_ones(gemma: Gemma) -> None:
    free = gemma.chat(CHAT, **LONG)
    judge = Judge()
    gemma.guard = guard_of(judge, piece_tokens=4)
    assert gemma.chat(CHAT, **LONG) == free
    assert judge.seen[0] == (CHAT[0]["content"], None)
    views = plainer(free)  # one look at the whole answer, as it is and without look-alike letters
    assert sorted(judge.seen[1:]) == sorted((view, CHAT[0]["content"]) for view in views)
    judge.seen.clear()
    with gemma.chat(CHAT, stream=True, **LONG) as stream:
        pieces = list(stream)
        result = stream.result
    assert "".join(pieces) == free == result.text
    assert (free, CHAT[0]["content"]) in judge.seen[-len(views) :]
    assert result.moderation is not None
    assert result.moderation["output"]["category_scores"] == {"hate": 0.0}
    assert result.refusal is None


def test_a_refused_answer(gemma: Gemma) -> None:
    free = gemma.generate("The sky is", **LONG)
    gemma.guard = guard_of(Judge(limit=30), piece_tokens=4)
    assert gemma.generate("The sky is", **LONG) == REFUSAL
    assert gemma.generate(["The sky is", "A"], n=2, **LONG) == [[REFUSAL] * 2] * 2
    assert gemma.generate([[gemma.bos_id, 7], [gemma.bos_id, 8]], **LONG) == [REFUSAL] * 2
    assert asyncio.run(gemma.agenerate("The sky is", **LONG)) == REFUSAL
    assert asyncio.run(gemma.achat(CHAT, **LONG)) == REFUSAL
    (whole,) = gemma.complete("The sky is", SamplingParams(**LONG, logprobs=1))
    assert (whole.finish_reason, whole.text, whole.token_ids, whole.logprobs) == ("content_filter", "", (), ())
    with gemma.stream("The sky is", **LONG, logprobs=1) as stream:
        pieces = list(stream)
        result = stream.result
    assert pieces[-1].strip() == REFUSAL
    out = "".join(pieces[:-1])
    assert 0 < len(out) <= 30
    assert free.startswith(out)
    assert (result.text, result.refusal, result.finish_reason) == (out, REFUSAL, "content_filter")
    assert len(gemma.tokenizer.decode(result.token_ids)) <= len(out)  # no token of what was held back
    assert len(result.logprobs or ()) == len(result.token_ids)
    events = list(gemma.stream("The sky is", **LONG).events())
    assert (events[-1].finish_reason, events[-1].text, events[-1].token_id) == ("content_filter", "", None)
    assert "".join(event.text for event in events) == out

    async def read() -> list[str]:
        return [piece async for piece in gemma.stream("The sky is", **LONG)]

    assert "".join(asyncio.run(read())[:-1]) == out


def test_a_refused_prompt(gemma: Gemma) -> None:
    gemma.guard = guard_of(Judge())
    zorble = [{"role": "user", "content": "a zorble"}]
    ids = gemma.encode("a zorble")
    params = SamplingParams(max_new_tokens=2)
    for call in (
        lambda: gemma.generate(["fine", "a zorble"]),
        lambda: gemma.generate(ids),
        lambda: gemma.stream("a zorble"),
        lambda: gemma.chat(zorble),
        lambda: gemma.chat(zorble, stream=True),
        lambda: gemma.complete(ids, params),
        lambda: gemma.stream_ids(ids, params),
        lambda: asyncio.run(gemma.achat(zorble)),
    ):
        with pytest.raises(RefusedError, match=r"^the prompt was refused \(hate\)$") as raised:
            call()
        assert raised.value.refusal == REFUSAL
    assert gemma.score("a zorble")  # gives numbers, no text: not judged
    gemma.guard = guard_of(Judge(), mode="score")
    (scored,) = gemma.complete(ids, params)
    assert scored.finish_reason == "length"
    assert scored.moderation is not None
    assert scored.moderation["input"]["flagged"]


@pytest.mark.parametrize("on_failure", ["block", "pass"])
def test_a_judge_that_is_late(gemma: Gemma, on_failure: str) -> None:
    free = gemma.generate("The sky is", **LONG)
    gemma.guard = guard_of(Judge(wait=0.3), timeout=0.05, on_failure=on_failure)
    if on_failure == "block":
        with pytest.raises(RefusedError, match=r"refused \(judge-failed\)"):
            gemma.generate("The sky is", **LONG)
        return
    (result,) = gemma.complete("The sky is", SamplingParams(**LONG))
    assert result.text == free
    assert result.moderation is not None
    assert "did not answer within" in result.moderation["output"]["failed"][0]


def test_a_slow_judge_holds_back_the_stream_and_not_other_tasks(gemma: Gemma) -> None:
    judge = Judge(wait=0.15)
    gemma.guard = guard_of(judge, piece_tokens=8)
    ticks = 0

    async def work() -> str:
        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        other = asyncio.create_task(tick())
        answer = await gemma.achat(CHAT, **LONG)
        other.cancel()
        return str(answer)

    answer = asyncio.run(work())
    assert ticks >= 15, "the loop stood still while the judge thought"
    read: list[str] = []
    for piece in gemma.chat(CHAT, stream=True, **LONG):
        read.append(piece)
        assert any(text.startswith("".join(read)) for text, _ in judge.seen), "a piece was read before it was judged"
    assert "".join(read) == answer


def test_cancelled_and_dropped(gemma: Gemma) -> None:
    gemma.guard = guard_of(Judge(), piece_tokens=2)
    stream = gemma.stream("The sky is", max_new_tokens=200, seed=1, ignore_eos=True)
    first = next(stream)
    stream.cancel()
    assert "".join([first, *stream]) == stream.result.text
    assert stream.result.finish_reason == "cancelled"
    threading.Event().wait(0.05)
    assert not gemma.engine.has_work


def test_a_server_of_a_guarded_model_is_guarded(gemma: Gemma) -> None:
    gemma.guard = guard_of(Judge())
    with serving(gemma, ServerState(ServerSettings(names=(NAME,)))) as served:
        assert served.chat(messages=[{"role": "user", "content": "a zorble"}]).status_code == 400
        assert served.chat().json()["moderation"]["mode"] == "block"
        assert len(served.state.judges.judges._judges[0][0].seen) == 3  # type: ignore[union-attr,attr-defined]


@pytest.fixture
def guard_file(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("zorble\n")
    path = tmp_path / "guard.toml"
    path.write_text(
        f'refusal = "{REFUSAL}"\n[[judge]]\nkind = "lexicon"\npath = "words.txt"\npolicy = "hate"\n'
        '[[judge]]\nkind = "self"\npolicies = ["harassment"]\n[thresholds]\nharassment = 1.0\n'
    )
    return path


def test_load_with_a_file(tiny: Path, guard_file: Path) -> None:  # noqa: F811
    gemma = Gemma.load(tiny, guard=guard_file, progress=False)
    (result,) = gemma.complete("Hello", SamplingParams(max_new_tokens=4, seed=1))
    assert result.moderation is not None
    assert 0 < result.moderation["output"]["category_scores"]["harassment"] < 1  # the model itself was asked
    with pytest.raises(RefusedError):
        gemma.generate("zorble")
    with pytest.raises(ParameterError, match=r"unknown key 'mood'"):
        Gemma.load(tiny, guard=GuardFile.of({"mood": 1}, "x.toml"), progress=False)
    with pytest.raises(ParameterError, match="no-such"):
        Gemma.load(tiny, guard="no-such.toml", progress=False)


def test_chat_once(tiny: Path, guard_file: Path, cli: Cli) -> None:  # noqa: F811
    asked = ("chat", tiny, "--guard", guard_file, "--seed", "7", "-n", "6", "--json")
    run = cli(*asked, "--once", "Hello")
    assert run.code == 0
    assert '"moderation"' in run.out
    run = cli(*asked, "--once", "zorble")
    assert (run.code, run.out) == (2, "")
    assert run.error == "error: the prompt was refused (hate)"
    assert cli("chat", tiny, "--guard", "none.toml", "--once", "Hello").code == 2


def test_chat_session(gemma: Gemma, capsys: pytest.CaptureFixture[str]) -> None:
    gemma.guard = guard_of(Judge(limit=30), piece_tokens=4)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        session = ChatSession(gemma, dict(LONG), markdown=False)
        pipe.send_text("a zorble\r\x03Hello\r\x04")
        session.run()
    shown = " ".join(capsys.readouterr().out.split())
    assert "the prompt was refused (hate)" in shown
    assert f"The guard ended this answer: {REFUSAL}" in shown
    said = [turn["content"] for turn in session.conversation.turns]
    assert said[0] == "Hello"
    assert len(said) == 2
    assert len(said[1]) <= 30
