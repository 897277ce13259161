"""Answer: what goes back to a client, whole as JSON or in chunks as server-sent events. Chat and completions differ in
their JSON alone."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from gemcut.engine.request import Sequence, TokenEvent
from gemcut.engine.results import TextStream
from gemcut.gemma import Gemma
from gemcut.safety.watch import HeldEvents
from gemcut.server.answers import Waiting, checked, usage
from gemcut.server.asgi import DONE, ClientLeftError, EventStream, Request, Send, event, respond_json
from gemcut.server.errors import api_error
from gemcut.server.fields import Sampling
from gemcut.server.guards import CheckedText, Guard, RequestGuard
from gemcut.server.private import Private
from gemcut.server.state import ServerState

Body = TypeVar("Body", bound=Sampling)
_json = msgspec.json.Encoder().encode


class Answer(Generic[Body]):
    """The answers to one request, on their way to the client. A subclass says how their JSON looks."""

    #: What ids begin with, and the "object" of an answer and of a chunk.
    PREFIX: ClassVar[str]
    KIND: ClassVar[str]
    CHUNK: ClassVar[str]
    #: Around the JSON of new text in a chunk's choice; and what stands there in the last chunk.
    TEXT: ClassVar[tuple[bytes, bytes]]
    LAST: ClassVar[bytes]

    def __init__(
        self,
        state: ServerState,
        request: Request,
        gemma: Gemma,
        body: Body,
        streams: list[TextStream],
        *,
        prompts: int = 1,
        guards: Many[Guard] = (),
        judge: RequestGuard | None = None,
    ) -> None:
        """``streams``: those of the first prompt, then those of the next one, to ``prompts`` prompts.

        ``guards`` look at the answers; ``judge`` is the one of them that has something to report.
        """
        self.state, self.request, self.gemma, self.body = state, request, gemma, body
        self.id, self.created = f"{self.PREFIX}{request.id}", int(time.time())
        self.waiting = Waiting(state, request, streams, each=bool(body.stream))
        private: Private | None = request.notes.get("pii")
        looked = bool(guards) or (private is not None and private.mode == "redact")
        self.texts = (
            [CheckedText(guards, None if private is None else private.shown()) for _ in streams] if looked else None
        )
        self._private = private
        self._judge = judge
        self.prompts = prompts
        #: What goes with the answer: headers, and members of a whole one's JSON.
        self.headers = ignored_header(request)
        self.extra: dict[str, Any] = {}

    # ---- what a subclass says ------------------------------------------------------------------------------------

    def opening(self, index: int) -> bytes:
        """The inside of a choice that comes before its first text, ``logprobs`` included; b"" for none."""
        return b""

    def choice(self, index: int, text: str, sequence: Sequence) -> dict[str, Any]:
        """A whole choice, but for its finish reason."""
        raise NotImplementedError

    def parts(self, index: int, text: str, *, last: bool) -> Many[bytes] | None:
        """What new text becomes, where that is not a text: the insides of its chunks' choices. None: it is a text."""
        return None

    def ending(self, index: int, reason: str | None) -> str | None:
        """The finish reason that a client is told."""
        return reason

    def logprobs(self, index: int, events: Many[TokenEvent]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens of a choice; None where nobody asked for them."""
        raise NotImplementedError

    def refused_choice(self, index: int, refusal: str) -> dict[str, Any]:
        """A whole choice whose text a guard refused; nothing of the text, its tokens or their scores is in it."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": "content_filter", "stop_reason": None}

    def refused_part(self, refusal: str) -> bytes:
        """The inside of the chunk's choice that tells a stream so; b"" for none."""
        return b""

    # ---- the way out ---------------------------------------------------------------------------------------------

    async def send(self, send: Send) -> None:
        """Compute and answer, as it was asked for."""
        if self.body.stream:
            await self._stream(send)
        else:
            await self._whole(send)

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.state.name,
            "system_fingerprint": self.state.fingerprint,
        }

    async def _whole(self, send: Send) -> None:
        with self.waiting as waiting:
            while not waiting.box.finished:
                await waiting.news()
            sequences = waiting.box.sequences
            choices = [await self._choice(index) for index in range(len(sequences))]
            value = self.head(self.KIND) | {"choices": choices, "usage": usage(sequences, prompts=self.prompts)}
        if self._judge is not None:
            value["moderation"] = self._judge.report()
        if self._private is not None:
            value["personal_data"] = self._private.report()
        await respond_json(send, value | self.extra, headers=self.headers)

    async def _choice(self, index: int) -> dict[str, Any]:
        sequence = self.waiting.box.sequences[index]
        end = checked(sequence.events[-1], sequence)
        text = "".join(each.text for each in sequence.events)
        reason: str | None = end.finish_reason
        if self.texts is not None:
            text = await self.texts[index].push(text, last=True)
            if self.texts[index].refused is not None:
                return self.refused_choice(index, self.texts[index].refusal)
        choice = self.choice(index, text, sequence)
        return choice | {"finish_reason": self.ending(index, reason), "stop_reason": end.stop_reason}

    async def _stream(self, send: Send) -> None:
        """An error behind the first event is an event, too."""
        out = EventStream(send)
        send.headers += self.headers
        try:
            with self.waiting as waiting:
                box = waiting.box
                chunks = Chunks(self)
                checks = None if self.texts is None else CheckedChunks(self, self.texts)
                while chunks.left if checks is None else checks.left:
                    await waiting.news()
                    found = chunks.take() if checks is None else await checks.take_checked()
                    if found:
                        await out.write(found)
                    elif waiting.silent:
                        await out.write(waiting.ping())
                last = b""
                if self._judge is not None and self.body.moderation is not None:
                    last = event(self.head(self.CHUNK) | {"choices": [], "moderation": self._judge.report()})
                if self.body.stream_options is not None and self.body.stream_options.include_usage:
                    numbers = usage(box.sequences, prompts=self.prompts)
                    last += event(self.head(self.CHUNK) | {"choices": [], "usage": numbers})
            await out.end(last + DONE)
        except ClientLeftError:
            raise
        except Exception as error:
            if not out.started:
                raise
            failure = api_error(error, request_id=self.request.id)
            self.request.notes["failure"] = failure
            await out.end(event(failure.body) + DONE)


class Chunks:
    """Chunks of one stream, as bytes: what does not change from chunk to chunk is made once."""

    def __init__(self, answer: Answer[Any]) -> None:
        self.answer, self.box = answer, answer.waiting.box
        options = answer.body.stream_options
        head = _json(answer.head(answer.CHUNK))[:-1]
        count = len(self.box.sequences)
        self._starts = [b"data: " + head + b',"choices":[{"index":%d,' % index for index in range(count)]
        self._end = b'}],"usage":null}\n\n' if options is not None and options.include_usage else b"}]}\n\n"
        before, after = answer.TEXT
        self._text_starts = [start + before for start in self._starts]
        self._text_end = after + b',"logprobs":null,"finish_reason":null' + self._end
        self._opened = [False] * count
        self._indices = range(count)
        #: Answers that have not had their last chunk.
        self.left = count
        self._logprobs = answer.logprobs(0, ()) is not None
        self._text_alone = not self._logprobs and answer.parts(0, "", last=False) is None

    def take(self) -> bytes:
        """What is new, b"" if nothing is."""
        found = b""
        for index in self._indices:
            events = self.box.take(index)
            if not events:
                continue
            last = events[-1]
            text = last.text if len(events) == 1 else "".join([each.text for each in events])
            if self._text_alone and last.finish_reason is None and self._opened[index]:
                if text:  # what nearly every chunk is
                    found += self._text_starts[index] + _json(text) + self._text_end
                continue
            if last.finish_reason is not None:
                checked(last, self.box.sequences[index])
            found += self.chunks(index, events, text, last.finish_reason, last.stop_reason)
        return found

    def chunks(
        self, index: int, events: Many[TokenEvent], text: str, reason: str | None, stop: int | str | None
    ) -> bytes:
        """The chunks of new text, and the last one where there is a finish reason."""
        found = b""
        if not self._opened[index]:
            self._opened[index] = True
            if opening := self.answer.opening(index):
                found = self._starts[index] + opening + b',"finish_reason":null' + self._end
        parts = self.answer.parts(index, text, last=reason is not None)
        if parts is not None:
            found += self._parts(index, events, parts)
        elif self._logprobs and events and (text or events[-1].logprob is not None):
            before, after = self.answer.TEXT
            logprobs = _json(self.answer.logprobs(index, events))
            found += self._starts[index] + before + _json(text) + after + b',"logprobs":' + logprobs
            found += b',"finish_reason":null' + self._end
        elif text:
            found += self._text_starts[index] + _json(text) + self._text_end
        if reason is not None:
            self.left -= 1
            ending = _json(self.answer.ending(index, reason))
            found += self._starts[index] + self.answer.LAST + b',"logprobs":null,"finish_reason":' + ending
            found += b',"stop_reason":' + _json(stop) + self._end
        return found

    def _parts(self, index: int, events: Many[TokenEvent], parts: Many[bytes]) -> bytes:
        """Chunks of what is not text alone; the tokens' log-probabilities are in the first of them."""
        found = b""
        if self._logprobs and events:
            parts = parts or (self.answer.LAST,)
            logprobs = _json(self.answer.logprobs(index, events))
            found = self._starts[index] + parts[0] + b',"logprobs":' + logprobs + b',"finish_reason":null' + self._end
            parts = parts[1:]
        for part in parts:
            found += self._starts[index] + part + b',"logprobs":null,"finish_reason":null' + self._end
        return found


class CheckedChunks(Chunks):
    """The same where guards look at the text first: it comes in pieces that they have seen, and a token's
    log-probability comes behind its text, never before."""

    def __init__(self, answer: Answer[Any], texts: list[CheckedText]) -> None:
        super().__init__(answer)
        self._texts = texts
        self._done = [False] * len(texts)
        self._held: list[HeldEvents[TokenEvent]] = [HeldEvents() for _ in texts]

    async def take_checked(self) -> bytes:
        """What is new and may be shown."""
        return b"".join([await self._take(index) for index in self._indices])

    async def _take(self, index: int) -> bytes:
        events = self.box.take(index)
        if not events or self._done[index]:
            return b""
        last = events[-1]
        checked(last, self.box.sequences[index])
        held = self._held[index]
        held.add(events)
        text = "".join([each.text for each in events])
        checks = self._texts[index]
        text = await checks.push(text, tokens=len(events), last=last.finish_reason is not None)
        if checks.refused is not None:
            self.box.streams[index].cancel()
            self._done[index] = True
            told = b""
            if inside := self.answer.refused_part(checks.refusal):
                told = self._starts[index] + inside + b',"logprobs":null,"finish_reason":null' + self._end
            first = b"" if self._opened[index] else self.chunks(index, (), "", None, None)
            return first + told + self.chunks(index, (), "", "content_filter", None)
        out = held.all() if last.finish_reason is not None else held.let_out(len(text))
        self._done[index] = last.finish_reason is not None
        return self.chunks(index, out, text, last.finish_reason, last.stop_reason)


def ignored_header(request: Request) -> list[tuple[bytes, bytes]]:
    """The header that names the fields which were left out."""
    names = request.notes.get("ignored")
    if not names:
        return []
    plain = ",".join(names).encode("ascii", "replace")[:1024]
    return [(b"x-gemcut-ignored", bytes(byte if 32 <= byte < 127 else 63 for byte in plain))]
