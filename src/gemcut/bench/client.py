"""One request to an OpenAI address, timed: what came when, or what kind of failure it was."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gemcut.bench.http import Answer, BrokenAnswerError, Client, ConnectionFailedError
from gemcut.bench.traffic import Row, as_text

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass
class Outcome:
    """What happened to one request. Times are seconds from the round's beginning.

    Attributes:
        due: when it should be sent; latencies count from here, so that a late client does not flatter the server.
        sent: when it was.
        times: when each piece of text came; a piece may be several tokens.
        end: when the answer was whole, or failed.
        prompt_tokens, completion_tokens, cached_tokens: as the server counted; ``completion_tokens`` is the number of
            pieces where it says nothing.
        error: "" or what kind of failure it was.
        message: the failure in words.
    """

    due: float
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    message: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.times[0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds to the answer's end."""
        return self.end - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there is one alone."""
        more = self.completion_tokens - 1
        return (self.times[-1] - self.times[0]) / more if more > 0 else None


class _FailedError(Exception):
    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


@dataclass(frozen=True)
class Asker:
    """Sends requests of one shape.

    Attributes:
        client: the connections.
        model: the model's name.
        endpoint: which of the two APIs.
        extra: fields that every request has besides.
        timeout: seconds a request may take.
    """

    client: Client
    model: str
    endpoint: Endpoint
    extra: Mapping[str, Any]
    timeout: float

    def body(self, row: Row) -> bytes:
        """The request for ``row``."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": row.new,
            "temperature": row.temperature,
            "seed": row.seed,
        }
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": as_text(row)}]
        else:
            body["prompt"] = list(row.prompt)
        return json.dumps({**body, **self.extra}).encode()

    async def ask(self, row: Row, clock: Callable[[], float]) -> Outcome:
        """Send one request and read its answer; failures are in the outcome, never raised."""
        outcome = Outcome(row.at)
        body = self.body(row)
        outcome.sent = clock()
        try:
            async with asyncio.timeout(self.timeout):
                async with self.client.request("POST", PATHS[self.endpoint], body) as answer:
                    await self._read(answer, outcome, clock)
            if not outcome.times:
                raise _FailedError("no text", "the answer ended without any text")
            if not outcome.completion_tokens:
                outcome.completion_tokens = len(outcome.times)
        except TimeoutError:
            outcome.error, outcome.message = "timeout", f"no whole answer within {self.timeout:g} s"
        except ConnectionFailedError as error:
            outcome.error, outcome.message = "no connection", str(error)
        except BrokenAnswerError as error:
            outcome.error, outcome.message = "broken answer", str(error)
        except _FailedError as error:
            outcome.error, outcome.message = error.kind, str(error)
        outcome.end = clock()
        return outcome

    async def _read(self, answer: Answer, outcome: Outcome, clock: Callable[[], float]) -> None:
        if answer.status != 200:
            raise _FailedError(f"HTTP {answer.status}", said(answer.status, await answer.read()))
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            raise _FailedError("no stream", f"the answer is {kind[:60] or 'of no type'}, not an event stream")
        done = False  # some servers end with a finish reason alone
        async for line in answer.lines():
            now = clock()
            if not line.startswith(b"data:"):
                continue  # a comment that keeps the connection alive, an event's name, the line between two
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            done |= self._event(data, outcome, now)
        if not done:
            raise _FailedError("broken answer", "the stream ended before the answer did")

    def _event(self, data: bytes, outcome: Outcome, now: float) -> bool:
        """Take an event; whether it says that the answer is whole."""
        try:
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise _FailedError("broken answer", "an event of the stream is no JSON object") from None
        if event.get("error"):
            raise _FailedError("error in the stream", _words(event["error"]))
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        choice = choice if isinstance(choice, dict) else {}
        if _text(choice):
            outcome.times.append(now)
        usage = event.get("usage")
        if isinstance(usage, dict):
            outcome.prompt_tokens = _count(usage.get("prompt_tokens"))
            outcome.completion_tokens = _count(usage.get("completion_tokens"))
            details = usage.get("prompt_tokens_details")
            outcome.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
        return bool(choice.get("finish_reason"))


async def served_model(client: Client, timeout: float) -> str:
    """The name of the one model that a server lists. Raises ConnectionFailedError, BrokenAnswerError, ValueError."""
    async with asyncio.timeout(timeout):
        async with client.request("GET", "/v1/models") as answer:
            body = await answer.read()
    if answer.status != 200:
        raise ValueError(f"/v1/models: {said(answer.status, body)}")
    try:
        names = [entry["id"] for entry in json.loads(body)["data"]]
        assert all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, TypeError, RecursionError, AssertionError):
        raise ValueError("/v1/models is no list of models") from None
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} models ({', '.join(names[:8])[:200]}); choose one with --model")
    return str(names[0])


def timer() -> Callable[[], float]:
    """A clock that begins now, in seconds."""
    begin = time.perf_counter()
    return lambda: time.perf_counter() - begin


def said(status: int, body: bytes) -> str:
    """What an answer that is no success says, in one line."""
    try:
        text = _words(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = ""
    return f"HTTP {status}{f': {text}' if text else ''}"


def _words(error: Any) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    found = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return found if isinstance(found, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
