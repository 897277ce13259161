"""/v1/completions: texts are continued, or scored, as they are. The research door: token ids, echo, log-probabilities.

A prompt begins with exactly one ``<bos>``: one that is not there is added, and an echo does not show it, so that the
places of the client's own tokens stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gemcut.engine.request import Sequence, TokenEvent, TokenLogprob
from gemcut.engine.results import TextStream
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.server.answers import check_length, copies, resolve, sampling_fields
from gemcut.server.app import Routes
from gemcut.server.asgi import Request, Send
from gemcut.server.fields import MAX_PROMPTS, CompletionRequest
from gemcut.server.guards import Guard, RequestGuard, check_input, guards_of
from gemcut.server.state import ServerState
from gemcut.server.streaming import Answer
from gemcut.text import Tokenizer

_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, and how many of them the server put in front, and its text for an echo."""

    ids: list[int]
    added: int
    text: str


async def completions(state: ServerState, request: Request, send: Send) -> None:
    """Continue texts, whole or as a stream."""
    body = await state.read(request, CompletionRequest)
    gemma = state.model(body.model)
    _ = gemma.tokenizer
    fields = completion_sampling(body)
    given = split(body.prompt)
    characters = sum(len(prompt) for prompt in given)
    check_length(gemma, max(len(prompt) for prompt in given), "prompt")
    special = body.add_special_tokens is not False
    asked = None if body.moderation is None else body.moderation.mode
    guards, judge = guards_of(state.guards, state.judges, request.id, state.log, asked)
    request.notes |= {"judge": judge, "user": body.safety_identifier or body.user}
    private = None
    if state.pii is not None:
        private = state.pii.of(request, [text for text in given if isinstance(text, str)])
        private.check_fields(body.logprobs)
        given = [private.hide(text) if isinstance(text, str) else text for text in given]
        guards = guards if private.mode == "redact" else [private, *guards]
    wanted = bool(body.echo or guards or private)  # the text of token ids
    prompts = await state.encode(characters, lambda: [read_prompt(gemma, prompt, special, wanted) for prompt in given])
    for prompt in prompts if guards else ():
        await check_input(guards, prompt.text)
    if private is not None:
        for prompt, sent in zip(prompts, given, strict=True):
            if not isinstance(sent, str):
                private.check_ids(prompt.text)
        prompts = [replace(prompt, text=private.vault.restore(prompt.text)) for prompt in prompts]  # for an echo
    scored = 1 if body.echo and body.logprobs is not None else None
    streams: list[TextStream] = []
    salt = request.cache_salt
    for prompt in prompts:
        params = resolve(state, gemma, len(prompt.ids), fields)
        for own in copies(params, body.n or 1):
            streams.append(
                gemma.prepare_stream(prompt.ids, own, prompt_logprobs_from=scored, cache_salt=salt, watch=False)
            )
    await CompletionAnswer(state, request, gemma, body, streams, prompts, guards, judge).send(send)


ROUTES: Routes = {("POST", "/v1/completions"): completions}


def completion_sampling(body: CompletionRequest) -> dict[str, Any]:
    """The fields of SamplingParams that a body names. Raises ParameterError for what cannot be done."""
    if body.suffix:
        raise ParameterError("suffix is given, but Gemma continues texts and cannot fill gaps; leave it out")
    if body.max_tokens == 0 and not body.echo:
        raise ParameterError("max_tokens is 0, which is for scoring with echo alone; expected at least 1")
    if body.echo and (body.logprobs or 0) > 1:
        raise ParameterError(
            f"logprobs is {body.logprobs}; with echo it can be 0, or 1 for the likeliest token of each place"
        )
    fields = sampling_fields(body)
    # OpenAI's own default, 16 tokens: a client that wants more says so.
    fields["max_new_tokens"] = 16 if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
    return fields


def split(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of the four forms there are: a text, texts, token ids, lists of token ids. Raises ParameterError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ParameterError("prompt is an empty list; expected a text, token ids, or a list of these")
    if _are_ids(prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise ParameterError(f"prompt has {len(prompt)} entries; at most {MAX_PROMPTS} are possible")
    if not all(isinstance(each, str) for each in prompt) and not all(
        isinstance(each, list) and each and _are_ids(each) for each in prompt
    ):
        raise ParameterError("prompt is neither a text, nor texts, nor token ids, nor lists of token ids")
    return prompt


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def read_prompt(gemma: Gemma, prompt: str | list[int], special: bool, echo: bool) -> Prompt:
    """Token ids with one ``<bos>`` in front (where ``special``), and the text that an echo shows."""
    tokenizer = gemma.tokenizer
    text, ids = (prompt, tokenizer.encode(prompt, add_bos=False)) if isinstance(prompt, str) else ("", list(prompt))
    if echo and not isinstance(prompt, str):
        text = b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode(errors="replace")
    added = 0
    if special and ids[:1] != [tokenizer.bos_id]:
        ids, added = [tokenizer.bos_id, *ids], 1
    elif special and isinstance(prompt, str):  # a text has one, however many were typed
        first = next((place for place, token_id in enumerate(ids) if token_id != tokenizer.bos_id), len(ids))
        ids = ids[first - 1 :]
    return Prompt(ids, added, text)


class CompletionAnswer(Answer[CompletionRequest]):
    """The answers to one or several prompts on their way to the client."""

    PREFIX, KIND, CHUNK = "cmpl-", "text_completion", "text_completion"
    TEXT = (b'"text":', b"")
    LAST = b'"text":""'

    def __init__(
        self,
        state: ServerState,
        request: Request,
        gemma: Gemma,
        body: CompletionRequest,
        streams: list[TextStream],
        prompts: list[Prompt],
        guards: Many[Guard] = (),
        judge: RequestGuard | None = None,
    ) -> None:
        super().__init__(state, request, gemma, body, streams, prompts=len(prompts), guards=guards, judge=judge)
        each = len(streams) // len(prompts)
        self._prompt_of = [prompt for prompt in prompts for _ in range(each)]
        self._lists = [LogprobLists(gemma.tokenizer) for _ in streams]

    def opening(self, index: int) -> bytes:
        """The echo."""
        if not self.body.echo:
            return b""
        found = _json(self._echo(index)) if self.body.logprobs is not None else b"null"
        return b'"text":' + _json(self._prompt_of[index].text) + b',"logprobs":' + found

    def choice(self, index: int, text: str, sequence: Sequence) -> dict[str, Any]:
        found = None
        if self.body.logprobs is not None:
            found = self._echo(index) if self.body.echo else LogprobLists.empty()
            for name, values in (self.logprobs(index, sequence.events) or {}).items():
                found[name] += values
        if self.body.echo:
            text = self._prompt_of[index].text + text
        return {"index": index, "text": text, "logprobs": found}

    def logprobs(self, index: int, events: Many[TokenEvent]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return self._lists[index].of([each.logprob for each in events if each.logprob is not None])

    def _echo(self, index: int) -> dict[str, list[Any]]:
        """Log-probabilities of the prompt's tokens, without a ``<bos>`` that the client did not send. The very first
        token has none, as nothing stands before it."""
        prompt, sequence, lists = self._prompt_of[index], self.waiting.box.sequences[index], self._lists[index]
        found = lists.of([])
        if not prompt.added and prompt.ids:
            lists.add(found, prompt.ids[0], None, None)
        for score in sequence.prompt_scores:
            top = [(score.greedy_id, score.greedy_logprob)] if self.body.logprobs else []
            lists.add(found, score.token_id, score.logprob, top)
        return found


class LogprobLists:
    """OpenAI's four lists (tokens, token_logprobs, top_logprobs, text_offset), made token by token.

    ``text_offset`` counts characters of the answer's text; the bytes of one character have its place.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset, self._open = 0, b""

    @staticmethod
    def empty() -> dict[str, list[Any]]:
        """The lists of no token."""
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def of(self, entries: Many[TokenLogprob]) -> dict[str, list[Any]]:
        """The lists of the next tokens."""
        found = self.empty()
        for entry in entries:
            self.add(found, entry.token_id, entry.logprob, entry.top)
        return found

    def add(
        self,
        lists: dict[str, list[Any]],
        token_id: int,
        logprob: float | None,
        top: Many[tuple[int, float]] | None,
    ) -> None:
        """Add one token; ``logprob`` None: it has none."""
        lists["tokens"].append(self._name(token_id))
        lists["token_logprobs"].append(logprob)
        likeliest: dict[str, float] | None = None
        if logprob is not None and top is not None:
            likeliest = {}
            for other, value in [*top, (token_id, logprob)]:
                likeliest.setdefault(self._name(other), value)
        lists["top_logprobs"].append(likeliest)
        lists["text_offset"].append(self._offset)
        self._move(self._tokenizer.token_bytes(token_id))

    def _move(self, data: bytes) -> None:
        data = self._open + data
        try:
            self._offset += len(data.decode())
            self._open = b""
        except UnicodeDecodeError:
            self._open = data if len(data) < 4 else b""
            self._offset += 0 if self._open else len(data.decode(errors="replace"))

    def _name(self, token_id: int) -> str:
        """A token's text; of one that is a part of a character its bytes, as OpenAI writes them."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
