"""gemcut batch: answers are those of the model and of the server, in order, once each, whatever ended a run."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli, cli, environment, tiny  # noqa: F401
from gemcut import Gemma
from gemcut.cli.options import LoadOptions
from gemcut.engine import SamplingParams
from gemcut.errors import ParameterError
from gemcut.uses.batch import Totals, run_batch
from server.host import NAME, new_gemma, serving

PROMPTS = ["The sky is", "Der Himmel ist", "空は", "One two three", "The sky is blue and", "x"]


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return new_gemma()


def request(custom_id: Any, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": NAME, **body}})


def completion(place: int, **more: Any) -> str:
    fields = {"prompt": PROMPTS[place % len(PROMPTS)], "max_tokens": 1 + place * 7 % 11, "temperature": 0}
    return request(f"r{place}", **{**fields, **more})


def run(gemma: Gemma, folder: Path, lines: list[str], **more: Any) -> tuple[Totals, list[dict[str, Any]]]:
    """The answers to ``lines``, gone on from what the folder holds."""
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    totals = asyncio.run(run_batch(gemma, folder / "in.jsonl", folder / "out.jsonl", names=(NAME,), **more))
    return totals, answers(folder)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]


def texts(found: list[dict[str, Any]]) -> list[str]:
    return [entry["response"]["body"]["choices"][0]["text"] for entry in found]


def test_answers_are_the_models_in_the_order_of_the_requests(gemma: Gemma, tmp_path: Path) -> None:
    lines = [completion(place) for place in range(40)]
    totals, found = run(gemma, tmp_path, lines)
    params = [SamplingParams(temperature=0, max_new_tokens=1 + place * 7 % 11) for place in range(40)]
    right = gemma.complete([PROMPTS[place % len(PROMPTS)] for place in range(40)], params)
    assert [entry["custom_id"] for entry in found] == [f"r{place}" for place in range(40)]
    assert texts(found) == [each.text for each in right]
    assert (totals.lines, totals.kept, totals.failed) == (40, 0, 0)
    assert totals.tokens == sum(len(each.token_ids) for each in right)


def test_chat_and_embeddings(gemma: Gemma, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    chat = request("c", "/v1/chat/completions", messages=messages, max_tokens=5, temperature=0)
    embedding = request("e", "/v1/embeddings", input="The sky")
    _, (first, second) = run(gemma, tmp_path, [chat, embedding])
    right = gemma.chat(messages, max_new_tokens=5, temperature=0)
    assert first["response"]["body"]["choices"][0]["message"]["content"] == right
    vector = gemma.embed(["The sky"])[0].tolist()
    assert second["response"]["body"]["data"][0]["embedding"] == pytest.approx(vector, abs=1e-4)


BAD_BODIES = [
    {"temperature": 3},
    {"prompt": []},
    {"nonsense": 1},
    {"max_tokens": 0},
    {"model": "gpt-4"},
    {"max_tokens": 100_000, "prompt": "a " * 1000},
    {"logit_bias": {"999999999": 1}},
]


def test_a_bad_body_has_the_error_that_the_server_gives(gemma: Gemma, tmp_path: Path) -> None:
    lines = [completion(place, **body) for place, body in enumerate(BAD_BODIES)]
    totals, found = run(gemma, tmp_path, [*lines, completion(50)])
    with serving(gemma) as served:
        for line, entry in zip(lines, found, strict=False):
            right = served.http.post("/v1/completions", json=json.loads(line)["body"])
            assert right.status_code >= 400
            assert entry["response"]["status_code"] == right.status_code
            assert entry["response"]["body"] == right.json()
    assert found[-1]["response"]["status_code"] == 200
    assert totals.failed == len(BAD_BODIES)


BROKEN = [
    ("{", "invalid_json", None),
    ('"text"', "invalid_value", None),
    ("\x00\x01", "invalid_json", None),
    (json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions"}), "missing_field", "a"),
    (json.dumps({"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}}), "invalid_method", "b"),
    (request("c", "/v1/files"), "invalid_url", "c"),
    (request(""), "invalid_value", ""),
    (request(7), "invalid_value", None),
    (request("r0", prompt="x"), "duplicate_custom_id", "r0"),
    (request("d", prompt="x", stream=True), "stream", "d"),
    (request("e").removesuffix("}") + ', "x": 1}', "unknown_field", "e"),
    ("[" * 100_000, "invalid_value", None),
    ('{"custom_id": "f", "body": ' + "[" * 100_000, "invalid_json", None),
]  # fmt: skip


def test_a_broken_line_is_reported_and_the_rest_done(gemma: Gemma, tmp_path: Path) -> None:
    lines = [completion(0), *(line for line, _, _ in BROKEN), completion(1)]
    totals, found = run(gemma, tmp_path, lines)
    assert texts([found[0], found[-1]]) == [
        each.text
        for each in gemma.complete(PROMPTS[:2], [SamplingParams(temperature=0, max_new_tokens=n) for n in (1, 8)])
    ]
    for (_, code, custom_id), entry in zip(BROKEN, found[1:-1], strict=True):
        assert entry["response"] is None
        assert entry["error"]["code"] == code
        assert entry["custom_id"] == custom_id
        assert "\n" not in entry["error"]["message"]
    assert totals.failed == len(BROKEN)
    assert totals.first_error is not None
    assert totals.first_error[0] == 2


def test_wherever_a_run_was_killed_the_next_one_goes_on(gemma: Gemma, tmp_path: Path) -> None:
    lines = [completion(place) if place != 3 else "{broken" for place in range(12)]
    _, right = run(gemma, tmp_path, lines)
    data = (tmp_path / "out.jsonl").read_bytes()
    draw = random.Random(0)
    for _ in range(8):
        cut = draw.randrange(len(data))
        (tmp_path / "out.jsonl").write_bytes(data[:cut])
        totals, found = run(gemma, tmp_path, lines)
        assert totals.kept == data[:cut].count(b"\n")
        assert (tmp_path / "out.jsonl").read_bytes().startswith(data[: data.rfind(b"\n", 0, cut) + 1])
        assert [entry["id"] for entry in found] == [entry["id"] for entry in right]
        good = [place for place in range(12) if place != 3]
        assert texts([found[place] for place in good]) == texts([right[place] for place in good])


def test_duplicates_are_known_after_a_resume(gemma: Gemma, tmp_path: Path) -> None:
    run(gemma, tmp_path, [completion(0)])
    _, found = run(gemma, tmp_path, [completion(0), completion(0)])
    assert found[1]["error"]["code"] == "duplicate_custom_id"


def test_answers_to_other_requests_are_left_alone(gemma: Gemma, tmp_path: Path) -> None:
    run(gemma, tmp_path, [completion(0), completion(1)])
    before = (tmp_path / "out.jsonl").read_bytes()
    for lines in ([completion(0), completion(2)], [completion(0)]):
        with pytest.raises(ParameterError, match="line 2 is no answer"):
            run(gemma, tmp_path, lines)
    (tmp_path / "in.jsonl").write_text(f"{completion(0)}\n{completion(1)}\n")
    with pytest.raises(ParameterError, match="model 'other'"):
        asyncio.run(run_batch(gemma, tmp_path / "in.jsonl", tmp_path / "out.jsonl", names=("other",)))
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_cancelled_run_keeps_a_whole_beginning(gemma: Gemma, tmp_path: Path) -> None:
    lines = [completion(place) for place in range(60)]

    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None

        def heard(totals: Totals) -> None:
            if totals.lines == 5:
                task.cancel()

        await run_batch(gemma, tmp_path / "in.jsonl", tmp_path / "out.jsonl", names=(NAME,), heard=heard)

    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert [entry["custom_id"] for entry in answers(tmp_path)] == [f"r{place}" for place in range(5)]
    for _ in range(1000):  # the engine ends what was cancelled at its next step
        if not gemma.engine.has_work:
            break
        time.sleep(0.01)
    assert not gemma.engine.has_work
    totals, _ = run(gemma, tmp_path, lines)
    assert (totals.kept, totals.lines) == (5, 60)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_an_empty_file(gemma: Gemma, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    with pytest.raises(ParameterError, match="holds no requests"):
        asyncio.run(run_batch(gemma, tmp_path / "in.jsonl", tmp_path / "out.jsonl", names=(NAME,)))


def test_one_file_for_both(gemma: Gemma, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(completion(0))
    with pytest.raises(ParameterError, match="both the requests and the answers"):
        asyncio.run(run_batch(gemma, tmp_path / "in.jsonl", tmp_path / "in.jsonl", names=(NAME,)))


def test_the_command(cli: Cli, gemma: Gemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(LoadOptions, "load", lambda self, name, **_: gemma)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{completion(0)}\nbroken\n{completion(1)}\n")
    done = cli("batch", source, target, "-m", NAME)
    assert done.code == 0
    assert done.out == ""
    assert "3 answered" in done.err
    assert "1 failed: line 2: the line is not JSON" in done.err
    assert texts([answers(tmp_path)[0]])
    again = cli("batch", source, target, "-m", NAME)
    assert "0 answered" in again.err
    assert "(3 were there)" in again.err
    assert cli("batch", tmp_path / "no.jsonl", target, "-m", NAME).error.endswith("no such file")
    assert cli("batch", tmp_path, target, "-m", NAME).error.endswith("it is a folder")
    assert "there is no folder" in cli("batch", source, tmp_path / "no" / "out", "-m", NAME).error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:  # noqa: F811
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [completion(place, model="checkpoint", max_tokens=1 + 2 * place) for place in range(30)]
    source.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    command = [sys.executable, "-m", "gemcut", "batch", str(source), str(target), "-m", str(tiny)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (target.exists() and target.read_bytes().count(b"\n") > 2):
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    kept = target.read_bytes().count(b"\n")
    assert 2 < kept < 30
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"({kept:,} were there)" in done.stderr
    assert [entry["custom_id"] for entry in answers(tmp_path)] == [f"r{place}" for place in range(30)]
