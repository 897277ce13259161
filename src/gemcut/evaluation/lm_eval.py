"""lm-evaluation-harness on gemcut's engine: ``lm_eval``'s tasks asked of a model in this process (extra ``eval``).

    python -m gemcut.evaluation.lm_eval run --model gemcut --model_args pretrained=gemma-3-270m --tasks piqa

is the harness's own command with the model ``gemcut`` in it; the harness finds no models of other packages by itself.
In Python: ``lm_eval.simple_evaluate(model=GemcutLM("gemma-3-270m"), tasks=[…])``.

Every prompt begins with exactly one ``<bos>``. A system message (a task's description in a chat) is put in front of the
first user turn. The harness gives texts alone, so control tokens in them are read as such, as in its own backends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as missing:
    from gemcut.errors import UnsupportedError

    raise UnsupportedError(
        f"lm-evaluation-harness cannot be imported ({missing}): pip install -e '.[eval]' in the clone"
    ) from None
from tqdm import tqdm  # type: ignore[import-untyped]

from gemcut.engine import SamplingParams
from gemcut.engine.results import run_together
from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.gemma import Gemma
from gemcut.text import ChatOptions, ChatWriter

#: Texts that are scored together, in the order of their tokens, so that those which begin alike are neighbours.
_TOGETHER = 1024
#: gen_kwargs that are fields of SamplingParams by the same name.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "do_sample")
#: The harness's words for the number of new tokens, the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("gemcut")
class GemcutLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness.

    Args:
        pretrained: a loaded Gemma, or what ``Gemma.load`` takes as a name.
        batch_size: most requests in one step; "auto", None and the harness's own default 1: the engine's number, which
            keeps its batch full by itself.
        max_batch_size: the same, where ``batch_size`` says nothing.
        max_length: most tokens of a prompt with its answer; the model's own limit if None.
        max_gen_toks: most tokens of an answer where a task says nothing.
        load: further arguments of ``Gemma.load`` (dtype, device, quantization, revision, …).

    Raises:
        ParameterError: an argument that ``Gemma.load`` has not.
    """

    def __init__(
        self,
        pretrained: str | Gemma,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **load: Any,
    ) -> None:
        super().__init__()
        most = _batch_size(batch_size) or max_batch_size
        if isinstance(pretrained, Gemma):
            given = {"max_length": max_length, "batch_size": most, **load}
            if wrong := next((name for name, value in given.items() if value is not None), None):
                raise ParameterError(f"{wrong} says how to load a model, and pretrained is a loaded one; drop {wrong}")
            self.gemma = pretrained
        else:
            load = {name: value for name, value in load.items() if value is not None}
            known = Gemma.load.__kwdefaults__ or {}
            if wrong := next((name for name in load if name not in known), None):
                raise ParameterError(f"unknown model argument {wrong!r}; known are: pretrained, {', '.join(known)}")
            self.gemma = Gemma.load(pretrained, max_context=max_length, max_batch_size=most, **load)
        self.max_length = self.gemma.engine.max_context
        self.max_gen_toks = max_gen_toks
        #: Prompts that were longer than the context: <bos> and their ends were kept.
        self.shortened = 0
        self._chat = ChatWriter(self.gemma.tokenizer)
        self._chosen: str | None = None

    # ---- texts and ids -------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.gemma.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """``<bos>``: what stands before a text without context."""
        return self.gemma.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with exactly one ``<bos>`` in front unless ``add_special_tokens`` is False."""
        ids = self.gemma.tokenizer.encode(string, add_bos=False, parse_special=True)
        return ids if add_special_tokens is False else self._with_bos(ids)

    def _with_bos(self, ids: Sequence[int]) -> list[int]:
        start = next((at for at, token in enumerate(ids) if token != self.gemma.bos_id), len(ids))
        return [self.gemma.bos_id, *ids[start:]]

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts calls the tokenizer."""
        source = self.gemma.source
        return (source.name if source is not None else self.gemma.config.model_type).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, for the harness's records; None where none is wanted."""
        if chat_template is False:
            return None
        return self._template(None if chat_template is True else chat_template)

    def _template(self, name: str | None) -> str:
        tokenizer = self.gemma.tokenizer
        named = tokenizer.chat_templates
        if name is not None and name not in named:
            known = ", ".join(sorted(named)) or "one without a name"
            raise ChatTemplateError(f"there is no chat template {name!r}; {self.tokenizer_name} has: {known}")
        found = named[name] if name is not None else tokenizer.chat_template or named.get("default")
        if found is None:
            raise ChatTemplateError(
                f"{self.tokenizer_name} has no chat template (a base model?); leave --apply_chat_template out, "
                "or take an instruction-tuned checkpoint"
            )
        self._chosen = name
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as the model's template writes it, its system message in front of the first user turn.

        Raises:
            ChatTemplateError: the checkpoint has no template, or the template cannot express the dialogue.
        """
        template = self._template(self._chosen)
        options = ChatOptions(
            template=template,
            system="fold",
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return self._chat.render(chat_history, options)

    # ---- requests ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each continuation."""
        texts, starts = [], []
        for _pair, context, continuation in requests:
            texts.append(self._fit([*self._with_bos(context), *continuation], len(continuation)))
            starts.append(len(texts[-1]) - len(continuation))
        scores = self._scored(texts, starts, "scoring", disable_tqdm)
        results = [(sum(s.logprob for s in own), all(s.rank == 1 for s in own)) for own in scores]
        for (pair, _before, _after), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token once.

        A text that the context does not hold is cut into windows: ``<bos>``, then as much as there is room for. The
        last window is full and scores what those before it have not.

            window 1   [bos t1 t2 t3]    scores t1 t2 t3
            window 2   [bos t3 t4 t5]    scores t4 t5         (five tokens, a context of four)
        """
        windows: list[list[int]] = []
        starts: list[int] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])[1:]
            room = self.max_length - 1
            for done in range(0, len(ids), room):
                end = min(done + room, len(ids))
                first = max(0, end - room)
                windows.append([self.gemma.bos_id, *ids[first:end]])
                starts.append(1 + done - first)
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, own in zip(owner, self._scored(windows, starts, "scoring", disable_tqdm), strict=True):
            totals[number] += sum(s.logprob for s in own)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop text, each as its ``gen_kwargs`` say.

        Raises ParameterError for one of ``gen_kwargs`` that gemcut has not.
        """
        prepare = self.gemma.prepare_stream
        streams = []
        for request in requests:
            context, kwargs = request.args
            params = self._params(kwargs)
            ids = self.tok_encode(context)
            room = self.max_length - params.max_new_tokens
            if room < 2:
                raise ParameterError(
                    f"max_gen_toks is {params.max_new_tokens}, and the context holds {self.max_length} tokens in all; "
                    "lower it, or raise max_length"
                )
            streams.append(partial(prepare, self._fit(ids, room=room), params))
        texts = []
        most = 2 * (self.gemma.engine.config.max_batch_size or 64)
        for start in tqdm(range(0, len(streams), most), desc="generating", disable=disable_tqdm):
            running = [make() for make in streams[start : start + most]]
            texts += [result.checked().text for result in run_together(running)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, kwargs: Mapping[str, Any]) -> SamplingParams:
        """gen_kwargs of the harness as SamplingParams; without ``do_sample`` and ``temperature`` greedy."""
        left = dict(kwargs)
        until = left.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [left.pop(name, None) for name in _LENGTHS]
        length = next((int(each) for each in lengths if each is not None), self.max_gen_toks)
        sampling = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
        if wrong := next((name for name, value in left.items() if value is not None), None):
            known = ", ".join(("until", *_LENGTHS, *_SAMPLING))
            raise ParameterError(f"gen_kwargs has {wrong!r}, which gemcut does not know; known are: {known}")
        if not sampling.setdefault("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0
        return SamplingParams(max_new_tokens=length, stop=tuple(text for text in until if text), **sampling)

    def _fit(self, ids: list[int], scored: int = 0, *, room: int | None = None) -> list[int]:
        """``ids``, or where they are too long ``<bos>`` and as many of the last ones as fit."""
        room = self.max_length if room is None else room
        if len(ids) <= room:
            return ids
        if scored > room - 1:
            raise ParameterError(
                f"a continuation has {scored} tokens, and the context holds {room} with <bos>; raise max_length"
            )
        if not self.shortened:
            print(
                f"warning: prompts longer than the context of {room} tokens lose their beginnings (<bos> stays)",
                file=sys.stderr,
            )
        self.shortened += 1
        return [ids[0], *ids[len(ids) - room + 1 :]]

    def _scored(self, texts: list[list[int]], starts: list[int], name: str, quiet: bool) -> list[Sequence[Any]]:
        """Scores of each text's tokens from its start on: blocks of neighbours in the order of their tokens."""
        order = sorted(range(len(texts)), key=lambda i: texts[i])
        found: list[Sequence[Any]] = [()] * len(texts)
        with tqdm(total=len(texts), desc=name, disable=quiet) as bar:
            for start in range(0, len(order), _TOGETHER):
                block = order[start : start + _TOGETHER]
                some = self.gemma.score([texts[i] for i in block], start=[starts[i] for i in block], ranks=True)
                for i, scores in zip(block, some, strict=True):
                    found[i] = scores
                bar.update(len(block))
        return found


def _batch_size(given: int | str | None) -> int | None:
    """None where the engine decides. Raises ParameterError for what is no number of requests."""
    text = str(given)
    if given is None or text in ("1", "auto") or text.startswith("auto:"):
        return None
    if not text.isdigit() or text == "0":
        raise ParameterError(f"batch_size is {given!r}; expected auto or a whole number of at least 1")
    return int(text)


def main(arguments: Iterable[str] | None = None) -> None:
    """The harness's own command line, which knows the model ``gemcut`` here."""
    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main()
