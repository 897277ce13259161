"""GuardedStream: a TextStream whose text a guard has judged before anyone reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from operator import length_hint
from typing import TYPE_CHECKING

from gemcut.engine.request import Sequence, TokenEvent
from gemcut.engine.results import Completion, EventReader, TextStream
from gemcut.safety.watch import HeldEvents, Pieces, Watch

if TYPE_CHECKING:
    from gemcut.engine.loop import EngineLoop


@dataclass
class _Cut:
    """Events that were not judged yet, the text so far with them, and the piece of it that is to be judged."""

    events: list[TokenEvent]
    pieces: Pieces
    piece: str
    last: bool
    blocked: bool = False


class GuardedStream(TextStream):
    """Pieces of an answer, each judged with all that went before it: whole sentences, or ``piece_tokens`` tokens.

    Where the guard refuses one, the request ends. What was let out stays let out; for one who reads pieces the guard
    file's refusal is the last of them, and ``result`` has finish reason "content_filter", that ``refusal``, and the
    text and tokens that were let out. An answer of which nothing was read is judged as a whole.
    """

    def __init__(self, loop: EngineLoop, sequence: Sequence, watch: Watch) -> None:
        super().__init__(loop, sequence)
        self.watch = watch
        self._pieces = Pieces(watch.piece_tokens)
        self._held: HeldEvents[TokenEvent] = HeldEvents()
        self._ready: deque[TokenEvent] = deque()  # judged, and not read yet
        self._passed: list[TokenEvent] = []
        self._ended = self._refused = self._told = False

    # ---- reading -------------------------------------------------------------------------------------------------

    def __next__(self) -> str:
        while (event := self._next()) is not None:
            if event.text:
                return event.text
        if refusal := self._tell():
            return refusal
        raise StopIteration

    async def __anext__(self) -> str:
        while (event := await self._next_async()) is not None:
            if event.text:
                return event.text
        if refusal := self._tell():
            return refusal
        raise StopAsyncIteration

    def events(self) -> EventReader:
        """See `TextStream.events`. A refused answer ends with an event of finish reason "content_filter" alone."""
        return _GuardedEvents(self)

    @property
    def result(self) -> Completion:
        """See `TextStream.result`."""
        whole = super().result
        if not self._ended:
            self._commit(self._judge(self._cut(last=True)))
        return self._of(whole)

    async def finished(self) -> Completion:
        """See `TextStream.finished`."""
        whole = await super().finished()
        if not self._ended:
            self._commit(await self._judge_async(self._cut(last=True)))
        return self._of(whole)

    # ---- judging: cut, judge, commit. Whoever is interrupted while a judge thinks can read on. --------------------

    def _next(self) -> TokenEvent | None:
        while not self._ready and not self._ended:
            if self._peek() is None:
                self._ended = True
            else:
                self._commit(self._judge(self._cut()))
        return self._ready.popleft() if self._ready else None

    async def _next_async(self) -> TokenEvent | None:
        while not self._ready and not self._ended:
            if await self._peek_async() is None:
                self._ended = True
            else:
                self._commit(await self._judge_async(self._cut()))
        return self._ready.popleft() if self._ready else None

    def _cut(self, *, last: bool = False) -> _Cut:
        """What is there and was not judged; nothing is changed yet. ``last``: no more comes."""
        events = list(islice(copy(self._unread), length_hint(self._unread)))
        events = [event for event in events if event.error is None]
        last = last or any(event.finish_reason is not None for event in events)
        pieces = copy(self._pieces)
        piece = pieces.cut("".join([event.text for event in events]), tokens=len(events), last=last)
        return _Cut(events, pieces, piece, last)

    def _judge(self, cut: _Cut) -> _Cut:
        if cut.piece:
            cut.blocked = self.watch.output(cut.pieces.out + cut.piece).blocked
        return cut

    async def _judge_async(self, cut: _Cut) -> _Cut:
        return self._judge(cut) if self.watch.guard.quick else await asyncio.to_thread(self._judge, cut)

    def _commit(self, cut: _Cut) -> None:
        """Let out what passed: exactly the piece that was judged, whatever came meanwhile."""
        for _ in cut.events:
            next(self._unread)
        if cut.blocked:
            self._ended = self._refused = True
            self.cancel()
            self._ready.append(TokenEvent(self._sequence.id, None, finish_reason="content_filter"))
            return
        self._pieces = cut.pieces
        self._pieces.release(cut.piece)
        self._held.add(cut.events)
        out = self._held.all() if cut.last else self._held.let_out(len(cut.piece))
        self._passed += out
        self._ready += out

    def _tell(self) -> str:
        """The refusal where it is to be read now, which is once; set apart from what was let out."""
        if not self._refused or self._told:
            return ""
        self._told = True
        return f"\n\n{self.watch.refusal}" if self._pieces.out else self.watch.refusal

    def _of(self, whole: Completion) -> Completion:
        report = self.watch.report()
        if not self._refused:
            return replace(whole, moderation=report)
        ids = tuple(event.token_id for event in self._passed if event.token_id is not None)
        scores = tuple(event.logprob for event in self._passed if event.logprob is not None)
        return replace(
            whole,
            token_ids=ids,
            text=self._pieces.out,
            finish_reason="content_filter",
            stop_reason=None,
            logprobs=None if whole.logprobs is None else scores,
            error=None,
            cause=None,
            refusal=self.watch.refusal,
            moderation=report,
        )


class _GuardedEvents(EventReader):
    def __init__(self, stream: GuardedStream) -> None:
        self._stream = stream

    def __next__(self) -> TokenEvent:
        if (event := self._stream._next()) is None:
            raise StopIteration
        return event

    async def __anext__(self) -> TokenEvent:
        if (event := await self._stream._next_async()) is None:
            raise StopAsyncIteration
        return event
