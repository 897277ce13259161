"""Requests through the engine: choices share their context's prefill, letters come from one pass, shots are shared.

Requests are kept in flight, so that the engine's batch stays full; answers come in the items' order.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemcut.engine import PromptLogprob, SamplingParams
from gemcut.engine.results import Completion, TextStream, start_together
from gemcut.errors import ContextLengthError
from gemcut.evaluation.prompts import Prompts
from gemcut.evaluation.requests import Answer, Choices, Generate, Letters, Pair, Request, Rolling
from gemcut.evaluation.row import Item
from gemcut.gemma import Gemma
from gemcut.scoring import Portion, score_texts

_SCORE = SamplingParams(max_new_tokens=0)
_LETTERS = SamplingParams(max_new_tokens=1, temperature=0, logprobs=0)


@dataclass
class Asked:
    """A request as token ids.

    Attributes:
        texts: of each text that goes through the network.
        starts: the place of each one's first token that is scored; of a prompt to continue its length.
        letters: the tokens whose log-probabilities are wanted.
        new_tokens: most tokens that are generated.
    """

    request: Request
    texts: list[NDArray[np.int32]]
    starts: list[int]
    letters: tuple[int, ...] = ()
    new_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens that the longest of them needs, its answer included."""
        return max(map(len, self.texts)) + self.new_tokens


@dataclass
class Counts:
    """Tokens that went through the network, and those that would have, each text for itself."""

    computed: int = 0
    alone: int = 0


class Asker:
    """Asks one model."""

    def __init__(self, gemma: Gemma, *, seed: int = 0) -> None:
        self.gemma, self.seed = gemma, seed
        self.prompts = Prompts(gemma)
        self.counts = Counts()
        self._most = 2 * (gemma.engine.config.max_batch_size or 64)

    # ---- from requests to ids ------------------------------------------------------------------------------------

    def tokenize(self, request: Request) -> Asked:
        """A request as token ids. Raises ChatTemplateError where it needs a chat template and there is none."""
        if isinstance(request, Rolling):
            return self._rolling(request)
        if isinstance(request, Pair):
            return _asked(request, [(self.prompts.text(text), 1) for text in request.texts])
        if isinstance(request, Generate):
            ids = self._prompt(request)
            return replace(_asked(request, [(ids, len(ids))]), new_tokens=request.max_new_tokens)
        if isinstance(request, Letters):
            found = self._letters(request)
            if found is not None:
                ids = self._prompt(request)
                return replace(_asked(request, [(ids, len(ids))]), letters=tuple(found), new_tokens=1)
            request_ = Choices(
                continuations=request.letters,
                context=request.context,
                prefix=request.prefix,
                dialogue=request.dialogue,
            )
            return replace(self.tokenize(request_), request=request)
        return _asked(request, [*self._choices(request), *self._unconditional(request)])

    def _prompt(self, request: Generate | Letters) -> list[int]:
        if request.dialogue:
            return self.prompts.dialogue(request.dialogue)
        return self.prompts.text(request.context, request.prefix)

    def _letters(self, request: Letters) -> list[int] | None:
        if request.dialogue:
            found = [self.prompts.bare(text) for text in request.letters]
            return [ids[0] for ids in found] if all(len(ids) == 1 for ids in found) else None
        return self.prompts.single(request.letters, request.context)

    def _choices(self, request: Choices) -> list[tuple[list[int], int]]:
        if request.dialogue:
            before = self.prompts.dialogue(request.dialogue)
            return [([*before, *self.prompts.bare(text)], len(before)) for text in request.continuations]
        if request.contexts:
            last = request.continuations[0]
            return [self.prompts.continuation(context, last, request.prefix) for context in request.contexts]
        return [self.prompts.continuation(request.context, text, request.prefix) for text in request.continuations]

    def _unconditional(self, request: Choices) -> list[tuple[list[int], int]]:
        if request.unconditional is None:
            return []
        return [self.prompts.continuation(request.unconditional, text) for text in request.continuations]

    def _rolling(self, request: Rolling) -> Asked:
        """Windows: bos, what went before as far as there is room, then tokens that no window before has scored.

        window 1   [bos t1 t2 t3 t4 t5]            scores t1 to t5
        window 2   [bos t3 t4 t5 t6 t7]            scores t6 and t7 (stride 2)
        """
        ids = self.prompts.text(request.text)
        bos, body = ids[:1], ids[1:]
        room = min(request.window or self.gemma.engine.max_context, self.gemma.engine.max_context) - 1
        stride = min(request.stride or max(1, room // 2), room)
        found, done = [([*bos, *body[:room]], 1)], room
        while done < len(body):
            end = min(done + stride, len(body))
            window = body[max(0, end - room) : end]
            found.append(([*bos, *window], 1 + len(window) - (end - done)))
            done = end
        return _asked(request, found)

    # ---- answers -------------------------------------------------------------------------------------------------

    def check_lengths(self, asked: Sequence[Asked], items: Sequence[Item]) -> None:
        """Raise ContextLengthError where one needs more tokens than the context holds, with both numbers."""
        most = self.gemma.engine.max_context
        long = [(each.length, item.id) for each, item in zip(asked, items, strict=True) if each.length > most]
        if long:
            length, name = max(long)
            raise ContextLengthError(
                f"{len(long):,} of {len(asked):,} prompts need more tokens than the context of {most:,} holds, "
                f"{name} the most with {length:,}"
            )

    def answers(
        self, asked: Sequence[Asked], names: Sequence[str], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Answer]:
        """Answers in order. ``stopped`` is asked between answers: once it says so, no more come.

        Whatever ends the iteration, no request is left running.
        """
        waiting: deque[_Job] = deque()
        running = 0
        left = iter(zip(asked, names, strict=True))
        try:
            more = True
            while not stopped():
                while more and running < self._most:
                    if (following := next(left, None)) is None:
                        more = False
                        break
                    job = _Job(self, *following)
                    waiting.append(job)
                    running += len(job.streams)
                    start_together(job.streams)
                if not waiting:
                    return
                job = waiting.popleft()
                running -= len(job.streams)
                yield job.answer()
        finally:
            for job in waiting:
                for stream in job.streams:
                    stream.cancel()

    def answer(self, request: Request, name: str = "") -> Answer:
        """One answer."""
        return next(self.answers([self.tokenize(request)], [name]))

    def seed_of(self, name: str, number: int) -> int:
        """The seed of an item's answer: of the run's seed, the item and which of its answers it is, alone."""
        digest = hashlib.sha256(f"{self.seed}\0{name}\0{number}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


class _Job:
    """A request's streams, and how its answer is made of them."""

    def __init__(self, asker: Asker, asked: Asked, name: str) -> None:
        self.asker, self.asked = asker, asked
        texts = [text.tolist() for text in asked.texts]
        prepare = asker.gemma.prepare_stream
        request = asked.request
        self.streams: list[TextStream] = []
        if isinstance(request, Generate):
            sampling: dict[str, Any] = {"temperature": 0, **request.sampling}
            for number in range(request.n):
                params = SamplingParams(
                    max_new_tokens=request.max_new_tokens,
                    stop=request.stop,
                    seed=asker.seed_of(name, number),
                    **sampling,
                )
                self.streams.append(prepare(texts[0], params))
        elif asked.letters:
            self.streams.append(prepare(texts[0], _LETTERS, logprobs_of=asked.letters))
        else:
            # Which places to compute is known before anything is; what is not needed is asked for by no stream.
            self._parts: list[Portion] = []
            score_texts(texts, asked.starts, self._note)
            self.streams = [prepare(texts[part.text], _SCORE, prompt_logprobs_from=part.start) for part in self._parts]
        self._texts = texts

    def _note(self, parts: list[Portion]) -> list[list[PromptLogprob]]:
        self._parts = parts
        nothing = PromptLogprob(0, 0.0, 1, 0, 0.0)
        return [[nothing] * (len(self.asked.texts[part.text]) - part.start) for part in parts]

    def answer(self) -> Answer:
        done = [stream.result.checked() for stream in self.streams]
        counts = self.asker.counts
        counts.computed += sum(each.stats.prefill_tokens + each.stats.generated_tokens for each in done)
        counts.alone += self._alone(done)
        if isinstance(self.asked.request, Generate):
            return Answer(
                texts=tuple(each.text for each in done),
                tokens=tuple(len(each.token_ids) for each in done),
                finish=tuple(str(each.finish_reason) for each in done),
            )
        if self.asked.letters:
            logprobs = done[0].logprobs
            assert logprobs is not None
            greedy = tuple(letter == done[0].token_ids[0] for letter in self.asked.letters)
            return Answer(logprobs=logprobs[0].asked, tokens=(1,) * len(greedy), greedy=greedy)
        scores = score_texts(self._texts, self.asked.starts, lambda parts: [each.prompt_scores or () for each in done])
        sums = tuple(sum(score.logprob for score in own) for own in scores)
        greedy = tuple(all(score.token_id == score.greedy_id for score in own) for own in scores)
        tokens = tuple(map(len, scores))
        if isinstance(self.asked.request, Rolling):
            return Answer(logprobs=(sum(sums),), tokens=(sum(tokens),), greedy=(all(greedy),))
        request = self.asked.request
        count = len(sums) // 2 if isinstance(request, Choices) and request.unconditional is not None else len(sums)
        return Answer(logprobs=sums[:count], tokens=tokens[:count], greedy=greedy[:count], unconditional=sums[count:])

    def _alone(self, done: list[Completion]) -> int:
        """Tokens of the same request where every choice, letter too, is a request that computes its whole text."""
        generated = sum(each.stats.generated_tokens for each in done)
        if isinstance(self.asked.request, Generate):
            return len(self._texts[0]) * len(done) + generated
        if self.asked.letters:
            return (len(self._texts[0]) + 1) * len(self.asked.letters)
        return sum(map(len, self._texts))


def _asked(request: Request, found: list[tuple[list[int], int]]) -> Asked:
    return Asked(request, [np.array(ids, np.int32) for ids, _ in found], [start for _, start in found])
