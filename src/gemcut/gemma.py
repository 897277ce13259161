"""Gemma: load a model and use it. The path of a request is

    load -> encode -> prefill -> decode -> sample -> detokenise

where the middle three are the engine's steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, overload

import torch

from gemcut import process
from gemcut.checkpoint.resolve import resolve
from gemcut.checkpoint.source import Source
from gemcut.engine import EngineConfig, PromptLogprob, SamplingParams
from gemcut.engine.pace import step_budget
from gemcut.engine.results import TextStream, run_together, run_together_async, texts_of
from gemcut.errors import MissingTokenizerError, ParameterError
from gemcut.loading import effective_quantization, load_network
from gemcut.parallel.load import load_team
from gemcut.parallel.shape import check_split
from gemcut.placement.devices import parse_device, parse_dtype
from gemcut.placement.gpus import check_gpus
from gemcut.placement.memory import cache_bytes, check_memory
from gemcut.placement.plan import CHUNK
from gemcut.progress import LoadProgress, Report
from gemcut.prompts import (
    Prompt,
    check_n,
    refuse_logprobs,
    refuse_pickle,
    several,
    split_prompts,
)
from gemcut.quantization.parse import parse_quantization
from gemcut.quantization.spec import Quantization
from gemcut.safety.guard_file import GuardFile
from gemcut.safety.watch import said
from gemcut.scoring import Portion, check_starts, score_texts
from gemcut.text import ChatOptions, ChatWriter, Tokenizer
from gemcut.token_model import TokenModel

Messages = Sequence[Mapping[str, Any]]


class Gemma(TokenModel):
    """A Gemma model, ready to use. ``Gemma.load`` makes one."""

    # ---- load ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | int | torch.device | None = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        quantization: str | Quantization | None = None,
        attn_implementation: str = "auto",
        kernels: str = "auto",
        max_context: int | None = None,
        max_batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        step_seconds: float | Literal["auto"] | None = None,
        kv_memory: int | None = None,
        gpus: int | None = None,
        guard: str | Path | GuardFile | None = None,
        progress: bool | Report = True,
    ) -> Gemma:
        """Load a checkpoint. One without tokenizer files takes token ids alone; see `tokenizer`.

        Args:
            name: a Hugging Face folder, a ``.gguf`` file, a hub id, or a short name such as "27b-it".
            dtype: compute dtype; "auto" takes the checkpoint's own (bfloat16 for a quantized GGUF).
            device: "auto", "cpu", "cuda", "cuda:N".
            revision: branch, tag or commit of a hub repository.
            token: hub token; None uses the one you logged in with or HF_TOKEN.
            cache_dir: where hub files are kept.
            local_files_only: never ask the network.
            quantization: cut the weights while loading: "nf4", "fp4", "int8", or a Quantization that says more (a
                BitsAndBytesConfig works too). None keeps what the checkpoint holds, cut or whole.
            attn_implementation: "auto", or the name of an attention implementation.
            kernels: "auto" takes the fastest there is for each layer; "plain" is plain PyTorch everywhere.
            max_context: most tokens of one request; the model's limit if None.
            max_batch_size: most requests in one step; None: 256 on a GPU, 64 on a CPU.
            max_batch_tokens: most tokens in one step.
            step_seconds: how long a step may take in which answers get their next tokens, by cutting the prompts beside
                them smaller; "auto": 0.5 on a CPU, no bound on a GPU; None or 0: no bound. With a bound an answer's
                last bits depend on the time that steps took.
            kv_memory: bytes for keys and values, on each GPU; None decides from the memory there is.
            gpus: split every layer over so many GPUs, the first ones (with device="cpu": over so many processes). None
                and 1: one device.
            guard: a guard file (docs/responsible-use.md), or one that was read: its judges look at every prompt and
                answer. A prompt that they refuse raises RefusedError; an answer has the file's refusal in its place.
            progress: show a bar (on a terminal), or a function called with (bytes done, bytes in all).

        Raises:
            GemcutError: of the kind that fits; the message says what to do.
        """
        process.enter()
        started = time.perf_counter()
        where = parse_device(device)
        guard_file = guard if guard is None or isinstance(guard, GuardFile) else GuardFile.read(Path(guard))
        step_budget(step_seconds, where)  # what is wrong is said before gigabytes are read
        count = check_gpus(gpus, device, where)
        find = partial(resolve, name, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        # Configuration first: what cannot fit is refused before gigabytes are downloaded.
        with LoadProgress(progress, f"downloading {name}") as report:
            config_source = find(revision=revision, weights=False, progress=report)
        config = config_source.config()
        compute = parse_dtype(dtype, parse_dtype(config.torch_dtype, torch.bfloat16))
        chunk = max_batch_tokens or CHUNK[where.type]
        spec = effective_quantization(config_source, parse_quantization(quantization))
        check_split(config, count, spec, compute)
        check_memory(config_source, compute, where, spec, devices=count)
        source = config_source  # a GGUF file here is whole, and its header of 500,000 texts is read once
        if source.kind == "folder" or not source.has_weights:
            with LoadProgress(progress, f"downloading {source.name}") as report:
                source = find(revision=source.revision or revision, progress=report)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as beside:
            # While the weights are read, which needs Python's lock little.
            tokenizer = beside.submit(_tokenizer_of, source)
            with LoadProgress(progress, f"loading {source.name}") as report:
                load = partial(
                    load_network,
                    source,
                    dtype=compute,
                    device=where,
                    quantization=spec,
                    attention=attn_implementation,
                    kernels=kernels,
                    progress=report,
                )
                model, team, free = load_team(source, count, load) if count > 1 else (load(), None, None)
        engine = EngineConfig(
            max_context=max_context,
            max_batch_size=max_batch_size,
            max_batch_tokens=chunk,
            step_seconds=step_seconds,
            kv_memory=kv_memory
            if kv_memory is not None
            else cache_bytes(model, where, max_context, chunk, devices=count, others=free),
        )
        try:
            gemma = cls(
                model,
                tokenizer.result(),
                where,
                engine=engine,
                generation_config=source.generation_config(),
                source=source,
                team=team,
            )
            if guard_file is not None:
                _ = gemma.tokenizer  # judges read texts
                gemma.guard = guard_file.build(gemma)
        except BaseException:
            if team is not None:  # a cache too small, a tokenizer that is damaged: the workers must not wait on
                team.close()
            raise
        gemma.load_seconds = time.perf_counter() - started
        return gemma

    def __repr__(self) -> str:
        name = self.source.name if self.source is not None else self.config.model_type
        spec = self.model.quantization
        kind = str(self.dtype).removeprefix("torch.") + ("" if spec is None else f", {spec.format}")
        size = f"{self.config.num_parameters() / 1e9:.2f}B parameters"
        return f"Gemma({name!r}, {size}, {kind}, {self.device}, context {self.engine.max_context})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_pickle("a Gemma", "its engine and cache belong to this process; call Gemma.load in each process")

    @cached_property
    def _chat(self) -> ChatWriter:
        return ChatWriter(self.tokenizer)

    # ---- generate ------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, *, stream: Literal[False] = False, n: None = None, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: str, *, stream: Literal[False] = False, n: int, **sampling: Any) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, stream: Literal[False] = False, n: None = None, **sampling: Any
    ) -> list[str]: ...
    @overload
    def generate(self, prompts: Prompt, *, stream: Literal[True], n: None = None, **sampling: Any) -> TextStream: ...
    @overload
    def generate(self, prompts: Any, *, stream: bool = False, n: int | None = None, **sampling: Any) -> Any: ...
    def generate(self, prompts: Any, *, stream: bool = False, n: int | None = None, **sampling: Any) -> Any:
        """Continue texts. A list of prompts is computed together; the answers are the continuations alone.

        Args:
            prompts: one prompt (a text, a list of token ids, an integer array of one dimension), or several (a list
                of these, an array of two dimensions). ``<bos>`` is added to texts, ids are taken as they are.
            stream: give a TextStream instead (one prompt only).
            n: answers for each prompt. Their seeds are derived from ``seed``, so that each differs and the call can
                be repeated; the first is the answer that ``seed`` gives without ``n``. The prompt is computed once.
            sampling: fields of SamplingParams; where one is not given the checkpoint's generation_config.json decides,
                then what is built in (see resolve_sampling).

        Returns:
            One prompt: its text, or with ``n`` a list of n texts. Several: a list with an entry a prompt, which is a
            text, or with ``n`` (1 too) a list of n texts.

        Raises:
            ParameterError: something in ``prompts`` is no prompt, or a sampling parameter is wrong.
            ContextLengthError: a prompt and its answer do not fit the context.
        """
        many, one = split_prompts(prompts, pad_id=self.pad_id)
        if stream:
            if not one or n is not None:
                raise ParameterError("stream=True gives one answer to one prompt; call stream() once for each")
            return self.stream(many[0], **sampling)
        streams = self._answer_streams(many, n, sampling)
        return texts_of(run_together(streams), n, one=one)

    async def agenerate(self, prompts: Any, *, n: int | None = None, **sampling: Any) -> Any:
        """`generate` for asyncio: other tasks run while the answers are computed.

        (For pieces, ``async for piece in gemma.stream(prompt)``.) A task that is cancelled ends its requests.
        """
        many, one = split_prompts(prompts, pad_id=self.pad_id)
        streams = await self._beside(self._answer_streams, many, n, sampling)
        return texts_of(await run_together_async(streams), n, one=one)

    def stream(self, prompt: Prompt, **sampling: Any) -> TextStream:
        """Continue one text piece by piece."""
        _ = self.tokenizer  # which makes the pieces
        ids = self.encode(prompt)
        watch = self.watch(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids))
        return self.stream_ids(ids, self._params(ids, sampling), watch=watch or False)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        n: None = None,
        system: Literal["fold", "error"] = "fold",
        **sampling: Any,
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        n: int,
        system: Literal["fold", "error"] = "fold",
        **sampling: Any,
    ) -> list[str]: ...
    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], system: Literal["fold", "error"] = "fold", **sampling: Any
    ) -> TextStream: ...
    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        n: int | None = None,
        system: Literal["fold", "error"] = "fold",
        **sampling: Any,
    ) -> str | list[str] | TextStream:
        """Answer a dialogue: ``[{"role": "user", "content": "..."}, ...]``, roles alternating.

        Args:
            messages: the dialogue so far; it ends with the user's turn.
            stream: give a TextStream instead of the whole answer.
            n: give a list of so many answers, as in `generate`.
            system: what to do with a system message, which Gemma has no turn for: "fold" puts it in front of the
                first user turn, "error" refuses.
            sampling: fields of SamplingParams.
        """
        if stream and n is not None:
            raise ParameterError("stream=True gives one answer; leave n out")
        ids = self.encode_messages(messages, system=system)
        if stream:
            return self.stream_ids(
                ids, self._params(ids, sampling, chat=True), watch=self.watch(said(messages)) or False
            )
        answers = run_together(self._answer_streams([ids], n, sampling, messages=messages))
        return cast("str | list[str]", texts_of(answers, n, one=True))

    async def achat(
        self,
        messages: Messages,
        *,
        n: int | None = None,
        system: Literal["fold", "error"] = "fold",
        **sampling: Any,
    ) -> Any:
        """`chat` for asyncio: other tasks run while the answer is computed. See `agenerate`."""
        ids = self.encode_messages(messages, system=system)
        streams = await self._beside(partial(self._answer_streams, [ids], n, sampling, messages=messages))
        return texts_of(await run_together_async(streams), n, one=True)

    @overload
    def score(
        self, texts: Any, *, start: int | Sequence[int] = 1, ranks: Literal[False] = False
    ) -> list[list[float]]: ...
    @overload
    def score(
        self, texts: Any, *, start: int | Sequence[int] = 1, ranks: Literal[True]
    ) -> list[list[PromptLogprob]]: ...
    def score(self, texts: Any, *, start: int | Sequence[int] = 1, ranks: bool = False) -> Any:
        """Log-probabilities: for each text, one number for each token after the first (natural logarithm).

        What several texts begin with is computed once, and its places are scored once: n continuations of one context
        cost one prefill of it.

        Args:
            texts: prompts as in `generate`: a text's first token is ``<bos>``, ids are taken as they are.
            start: the place of the first token that is scored, in all texts or in each; 1 is the second token. The
                length of its context where only a continuation is wanted.
            ranks: give for each token a PromptLogprob instead, which also has its rank and the greedy token.

        Returns:
            An entry a prompt, also where there is one alone; each from ``start`` on.

        Raises:
            ParameterError: something in ``texts`` is no prompt, or ``start`` no place in it.
        """
        many, _ = split_prompts(texts, pad_id=self.pad_id)
        ids = [self.encode(text) for text in many]
        scores = score_texts(ids, check_starts(start, ids), partial(self._scores, ids))
        return scores if ranks else [[each.logprob for each in own] for own in scores]

    def _scores(self, texts: list[list[int]], parts: list[Portion]) -> list[tuple[PromptLogprob, ...]]:
        params = SamplingParams(max_new_tokens=0)
        streams = [self.prepare_stream(texts[part.text], params, prompt_logprobs_from=part.start) for part in parts]
        return [result.checked().prompt_scores or () for result in run_together(streams)]

    # ---- from words to requests ----------------------------------------------------------------------------------

    def encode_messages(self, messages: Messages, *, system: Literal["fold", "error"] = "fold") -> list[int]:
        """Token ids of a dialogue, ready for the model's answer, with exactly one ``<bos>``.

        No text of a message becomes a control token, in Gemma's format and in a checkpoint's own template alike.
        """
        return self.chat_ids(messages, ChatOptions(system=system))

    def chat_ids(self, messages: Messages, options: ChatOptions) -> list[int]:
        """The same with all options that there are."""
        return self._chat.prompt(messages, options)

    def _answer_streams(
        self, prompts: Sequence[Prompt], n: int | None, sampling: Mapping[str, Any], *, messages: Messages | None = None
    ) -> list[TextStream]:
        """For each prompt its answer's stream, or ``n`` of them, one after the other; none of them is started.

        ``messages``: the dialogue whose ids the only prompt is. A guard judges each prompt once.
        """
        refuse_logprobs(sampling)
        _ = self.tokenizer  # which makes texts of the answers
        ids = [self.encode(prompt) for prompt in prompts]
        params = [self._params(own, sampling, chat=messages is not None) for own in ids]
        count = None if n is None else check_n(n)
        each = [[own] if count is None else several(own, count) for own in params]
        streams: list[TextStream] = []
        for prompt, own, row in zip(prompts, ids, each, strict=True):
            watch = None
            if self.guard is not None:
                text = said(messages) if messages is not None else prompt
                watch = self.watch(text if isinstance(text, str) else self.tokenizer.decode(own))
            for one in row:
                streams.append(self.prepare_stream(own, one, watch=watch.sibling() if watch else False))
        return streams

    async def _beside(self, work: Callable[..., list[TextStream]], *args: Any) -> list[TextStream]:
        """What ``work`` gives; in a thread where it waits for judges, so that other tasks go on."""
        if self.guard is None or self.guard.quick:
            return work(*args)
        return await asyncio.to_thread(work, *args)


def _tokenizer_of(source: Source) -> Tokenizer | None:
    try:
        return source.tokenizer()
    except MissingTokenizerError:  # weights alone: as in transformers, ids go in and come out
        return None
