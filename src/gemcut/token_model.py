"""TokenModel: a model that takes token ids and gives them back, with its engine. Gemma adds texts and dialogues."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gemcut.checkpoint.source import Source
from gemcut.engine import Engine, EngineConfig, EngineLoop, LogitsEdit, Request, SamplingParams
from gemcut.engine.constrain import Grammars, Vocabulary, make_vocabulary
from gemcut.engine.results import Completion, TextStream, run_together
from gemcut.errors import MissingTokenizerError, ParameterError
from gemcut.guarded import GuardedStream
from gemcut.model import Model
from gemcut.parallel.team import Team
from gemcut.prompts import Prompt, sampling_for_each, split_prompts, token_ids
from gemcut.safety.guard import Guard
from gemcut.safety.watch import Watch
from gemcut.sampling_defaults import GIVEN, Level, ResolvedSampling, checkpoint_level, left_out, resolve_sampling
from gemcut.text import Detokenizer, Tokenizer, stop_ids

#: New tokens where the caller names no number, as far as the context has room for them.
DEFAULT_NEW_TOKENS = 256
DEFAULT_CHAT_TOKENS = 1024


class TokenModel:
    """A loaded model, its engine, and the requests of token ids that every front door makes."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        device: torch.device,
        *,
        engine: EngineConfig | None = None,
        generation_config: Mapping[str, Any] | None = None,
        source: Source | None = None,
        team: Team | None = None,
    ) -> None:
        """``tokenizer`` None: the model takes token ids alone, and whatever needs texts raises TokenizerError.

        ``team``: the processes that hold the rest of a network of which ``model`` is one device's part.
        """
        self.model, self._tokenizer, self.device, self.team = model, tokenizer, device, team
        self.config, self.dtype = model.config if team is None else team.config, model.dtype
        self.generation_config = dict(generation_config or {})
        self.source = source
        #: Where a call's sampling parameters come from beside the call itself, from the highest level to the lowest.
        #: A front door may put levels of its own in front of the checkpoint's.
        self.sampling_levels: list[Level] = [checkpoint_level(self.generation_config)]
        #: Judges every prompt and answer of this model's Python methods; None: no guard. See `Gemma.load`.
        self.guard: Guard | None = None
        self._told_left_out = False
        self.stop_ids = stop_ids(model.config, self.generation_config, tokenizer)
        self.loop = EngineLoop(Engine(model, device, engine, team))
        self.load_seconds = 0.0

    @property
    def engine(self) -> Engine:
        """The engine, which the thread of ``loop`` steps."""
        return self.loop.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises TokenizerError where it has none."""
        if self._tokenizer is None:
            where = "" if self.source is None else f" in {self.source.path}"
            raise MissingTokenizerError(
                f"there is no tokenizer.json{where}, so this model takes no texts: put the checkpoint's tokenizer "
                "files there and load it again (token ids alone work in Python: complete, score, stream_ids, and "
                "generate of AutoModelForCausalLM)"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        for made in ("_chat", "grammars"):
            self.__dict__.pop(made, None)

    @property
    def config_hash(self) -> str:
        """A hash of what this model is: its configuration, dtype, quantization and revision. Not of its weights."""
        source = self.source
        said = {
            "config": self.config.to_dict(),
            "dtype": str(self.dtype),
            "quantization": None if self.model.quantization is None else repr(self.model.quantization),
            "revision": None if source is None else source.revision,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def bos_id(self) -> int:
        """The id that begins a text: the tokenizer's, or config.json's where there is none."""
        return self.config.bos_token_id if self._tokenizer is None else self._tokenizer.bos_id

    @property
    def pad_id(self) -> int:
        """The id that pads: the tokenizer's, or config.json's where there is none."""
        return self.config.pad_token_id if self._tokenizer is None else self._tokenizer.pad_id

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what ``SamplingParams.grammar`` asks for. Its set-up takes seconds, at the first such request or by
        ``grammars.prepare()``."""
        return Grammars(partial(_vocabulary, self.tokenizer, self.config.vocab_size, self.stop_ids))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a text gets exactly one ``<bos>``, ids (an array's too) are taken as they are.

        Raises:
            ParameterError: ``prompt`` is neither a text nor the token ids of one prompt.
        """
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)

    def complete(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        prompt_logprobs: bool = False,
    ) -> list[Completion]:
        """Run prompts together to their ends; whole results, in the prompts' order, a list for one prompt too.

        ``prompts`` are those of `generate`; ``params`` hold for all of them, or are a sequence, one a prompt.
        """
        many = [self.encode(prompt) for prompt in split_prompts(prompts, pad_id=self.pad_id)[0]]
        each = sampling_for_each(params, len(many))
        streams = [
            self.prepare_stream(ids, own, prompt_logprobs_from=1 if prompt_logprobs else None)
            for ids, own in zip(many, each, strict=True)
        ]
        return run_together(streams)

    def stream_ids(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        stop_ids: frozenset[int] | None = None,
        prompt_logprobs_from: int | None = None,
        edit: LogitsEdit | None = None,
        watch: Watch | bool = True,
    ) -> TextStream:
        """Start one request of token ids; it ends at ``stop_ids``, the model's own if None.

        ``prompt_logprobs_from``: score the prompt's tokens from this place on; 1 is the second token.
        ``edit``: asked before each token what to change of its logits: which tokens may come, what is added
        (`gemcut.engine.LogitsEdit`). ``watch``: see `prepare_stream`.
        Without a tokenizer all texts are "", and stop texts raise TokenizerError.
        """
        stream = self.prepare_stream(
            ids, params, stop_ids=stop_ids, prompt_logprobs_from=prompt_logprobs_from, edit=edit, watch=watch
        )
        stream.start()
        return stream

    def prepare_stream(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        stop_ids: frozenset[int] | None = None,
        prompt_logprobs_from: int | None = None,
        edit: LogitsEdit | None = None,
        embed_from: int | None = None,
        logprobs_of: tuple[int, ...] = (),
        cache_salt: bytes = b"",
        watch: Watch | bool = True,
    ) -> TextStream:
        """A request that is checked and not started (`start_together` starts several). Every front door ends here.

        ``edit``, ``embed_from``, ``logprobs_of`` and ``cache_salt`` are those of `gemcut.engine.Request`.
        ``watch``: the guard of this request, which has judged its prompt already. True: the model's ``guard`` judges
        the prompt here, which waits for the judges; False: none, for whoever judges the events himself.

        Raises:
            RefusedError: the guard refused the prompt.
        """
        ids = token_ids(ids)
        if not isinstance(params, SamplingParams):
            raise ParameterError(f"params is of type {type(params).__name__}; expected SamplingParams")
        if edit is not None and not callable(edit):
            raise ParameterError(f"edit is of type {type(edit).__name__}; expected a LogitsEdit, which is called")
        text = None
        if (self._tokenizer is not None and params.max_new_tokens) or params.stop:
            text = partial(Detokenizer, self.tokenizer, prompt_ids=tuple(ids), stop=params.stop)
        ends = self.stop_ids if stop_ids is None else stop_ids
        if params.grammar is not None and params.max_new_tokens:
            if edit is not None:
                raise ParameterError("a request takes a grammar or an edit of its own; drop one")
            edit = self.grammars.edit(params.grammar, ends, params.max_new_tokens)
        request = Request(
            prompt_ids=tuple(ids),
            params=params,
            stop_ids=ends,
            text=text,
            prompt_logprobs_from=prompt_logprobs_from,
            edit=edit,
            embed_from=embed_from,
            logprobs_of=logprobs_of,
            cache_salt=cache_salt,
        )
        if watch is True and self.guard is not None and params.max_new_tokens:
            watch = self.watch(self.tokenizer.decode(ids)) or False
        if isinstance(watch, Watch) and watch.mode != "off":
            return GuardedStream(self.loop, self.loop.prepare(request), watch)
        return TextStream(self.loop, self.loop.prepare(request))

    def watch(self, prompt: str) -> Watch | None:
        """The guard of one request, which judges its prompt now; None where this model has no guard.

        Raises RefusedError where the prompt may not pass.
        """
        return None if self.guard is None else Watch(self.guard).checked_input(prompt)

    def embed(self, texts: Any) -> Tensor:
        """Embeddings: for each text the mean of its tokens' hidden states behind the final norm.

        ``<bos>`` is not counted among the tokens. The vectors are not normalised, and no model of this family was
        trained to make them. One prefill a text, all of them together.

        Args:
            texts: prompts as in `generate`.

        Returns:
            fp32 [texts, hidden size], on the CPU; a row also where there is one text alone.

        Raises:
            ParameterError: something in ``texts`` is no prompt, or has no token but ``<bos>``.
            ContextLengthError: one is longer than the context.
        """
        results = run_together(self.embed_streams(texts))
        rows = [result.checked().embedding for result in results]
        return (
            torch.stack([row for row in rows if row is not None]) if rows else torch.empty(0, self.config.hidden_size)
        )

    def embed_streams(self, texts: Any, *, cache_salt: bytes = b"") -> list[TextStream]:
        """The requests of `embed`, checked and not started; each one's result has an ``embedding``."""
        many, _ = split_prompts(texts, pad_id=self.pad_id)
        params, streams = SamplingParams(max_new_tokens=0), []
        for place, ids in enumerate(self.encode(text) for text in many):
            start = int(bool(ids) and ids[0] == self.bos_id)
            if start == len(ids):
                raise ParameterError(f"text {place} is empty; expected at least one token besides <bos>")
            streams.append(self.prepare_stream(ids, params, embed_from=start, cache_salt=cache_salt))
        return streams

    def resolve_sampling(
        self, prompt_tokens: int, sampling: Mapping[str, Any], *, chat: bool = False
    ) -> ResolvedSampling:
        """What a call with these keyword arguments samples with, and where each value comes from.

        What is given decides, then ``sampling_levels`` (the checkpoint's generation_config.json), then what is built
        in; ``gemcut.sampling_defaults.resolve_sampling`` has the rules. Without any length, an answer has up to 256
        tokens (1024 in a chat), as far as the context has room.

        Args:
            prompt_tokens: tokens of the prompt.
            sampling: fields of SamplingParams.
            chat: whether it answers a dialogue.

        Raises:
            ParameterError: a value is out of range or unknown.
        """
        if not self._told_left_out and (names := left_out(self.generation_config)):
            self._told_left_out = True
            warnings.warn(
                f"the checkpoint's generation_config.json sets {', '.join(names)}: gemcut does not have it, left out",
                stacklevel=4,
            )
        return resolve_sampling(
            [(GIVEN, sampling), *self.sampling_levels],
            prompt_tokens=prompt_tokens,
            room=self.engine.max_context - prompt_tokens,
            new_tokens=DEFAULT_CHAT_TOKENS if chat else DEFAULT_NEW_TOKENS,
        )

    def _params(self, ids: Sequence[int], sampling: Mapping[str, Any], *, chat: bool = False) -> SamplingParams:
        return self.resolve_sampling(len(ids), sampling, chat=chat).params


def _vocabulary(tokenizer: Tokenizer, size: int, ends: frozenset[int]) -> Vocabulary:
    """A tokenizer's vocabulary as grammars need it, for a model of ``size`` tokens. Takes a second."""
    encode = partial(tokenizer.encode, add_bos=False, parse_special=False)
    return make_vocabulary(tokenizer.all_token_bytes(), size, tokenizer.special_ids, tokenizer.bos_id, ends, encode)
