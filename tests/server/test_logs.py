"""Logs: lines of JSON that hold no text of anybody."""

from __future__ import annotations

import io
import json
import logging
import threading
from typing import Any

import pytest

from gemcut.errors import ParameterError, RequestError
from gemcut.server.errors import scrub
from gemcut.server.logs import JsonHandler, Log


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – ü 漢 🙂", "plain – ü 漢 🙂"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        ("right\u202eleft\u2066", "right\\u202eleft\\u2066"),
        ("\u2028\ufeff\u200b\udc80", "\\u2028\\ufeff\\u200b\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_what_could_forge_a_line_or_move_a_cursor_is_shown_as_what_it_is(text: str, shown: str) -> None:
    assert scrub(text) == shown


def test_a_line_is_one_json_object() -> None:
    stream = io.StringIO()
    log = Log(stream)
    log.write("info", "start", device="cpu", none=None, many=["a\nb", {"c": "\x1b"}], number=1.5)
    log.close()
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "start",
        "device": "cpu",
        "many": ["a\\nb", {"c": "\\x1b"}],
        "number": 1.5,
    }


def test_a_reader_that_stands_still_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines behind the limit are dropped, and the next one says how many."""
    monkeypatch.setattr("gemcut.server.logs.MOST_WAITING", 3)
    go, stood = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            stood.set()
            go.wait(10)
            return super().write(text)

    stream = Slow()
    log = Log(stream)
    log.write("info", "first")
    assert stood.wait(10)
    for n in range(8):
        log.write("info", "more", n=n)
    go.set()
    log.close()
    log.write("info", "last")
    log.close()
    found = lines(stream)
    assert [line.get("n") for line in found] == [None, 0, 1, 2, None]
    assert found[-1]["dropped_lines"] == 5


def test_a_reader_that_left_stops_nothing() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log = Log(Broken())
    log.write("info", "one")
    log.write("info", "two")
    log.close()


def test_asking_for_prompts_is_said_at_every_start() -> None:
    stream = io.StringIO()
    Log(stream, prompts=True).close()
    (line,) = lines(stream)
    assert (line["level"], line["event"]) == ("warning", "log_prompts")


def test_what_libraries_log_comes_as_lines() -> None:
    stream = io.StringIO()
    log = Log(stream)
    logger = logging.Logger("uvicorn.error")
    logger.addHandler(JsonHandler(log))
    logger.warning("it is %s\n", "odd")
    try:
        raise ValueError("a text of somebody")
    except ValueError:
        logger.exception("failed")
    log.close()
    first, second = lines(stream)
    assert (first["level"], first["name"], first["message"]) == ("warning", "uvicorn.error", "it is odd\\n")
    assert (second["kind"], second["message"]) == ("ValueError", "failed")
    assert "somebody" not in stream.getvalue()


class FakeRequest:
    id = "r1"


def failed(error: Exception, *, prompts: bool = False) -> dict[str, Any]:
    stream = io.StringIO()
    log = Log(stream, prompts=prompts)
    try:
        raise error
    except Exception as caught:
        log.failure(FakeRequest(), caught)  # type: ignore[arg-type]
    log.close()
    return lines(stream)[-1]


def test_a_failure_is_told_without_texts() -> None:
    line = failed(KeyError("what somebody wrote"))
    assert (line["kind"], line["id"]) == ("KeyError", "r1")
    assert "message" not in line
    assert any("test_logs.py" in place and place.endswith(" failed") for place in line["at"])
    assert failed(ParameterError("top_k is -1"))["message"] == "top_k is -1"
    wrapped = RequestError("KeyError: what somebody wrote")
    wrapped.__cause__ = KeyError("what somebody wrote")
    line = failed(wrapped)
    assert (line["kind"], line["cause"]) == ("RequestError", "KeyError")
    assert "somebody" not in json.dumps(line)
    assert failed(KeyError("what somebody wrote"), prompts=True)["message"] == "'what somebody wrote'"
