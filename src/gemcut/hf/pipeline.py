"""``gemcut.pipeline("text-generation")``: transformers' pipeline, for programs that are written for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.auto import AutoModelForCausalLM, AutoTokenizer
from gemcut.hf.model import GemmaForCausalLM
from gemcut.hf.tokenizer import GemmaTokenizer

TASK = "text-generation"
_SHAPES = "expected a text, a chat (a list of messages), or a list of such"


def pipeline(
    task: str | None = None,
    model: str | Path | GemmaForCausalLM | None = None,
    *,
    tokenizer: str | Path | GemmaTokenizer | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **generate: Any,
) -> TextGeneration:
    """A callable that continues texts and answers chats, as transformers' ``pipeline`` gives it.

    Args:
        task: "text-generation"; there is no other one.
        model: a checkpoint, as `AutoModelForCausalLM.from_pretrained` takes it, or a model. It must be given.
        tokenizer: a checkpoint's, or one; else the model's.
        device, device_map: where the model goes; one of them.
        dtype, torch_dtype: the compute dtype; the checkpoint's own if none is given, as in transformers.
        model_kwargs: more for ``from_pretrained``.
        revision, token: for the hub.
        generate: defaults of the calls.

    Raises:
        UnsupportedError: another task.
        ParameterError: no model, or arguments that contradict each other.
        GemcutError: the checkpoint cannot be found or read.
    """
    if task not in (None, TASK):
        raise UnsupportedError(f"pipeline({task!r}): gemcut's networks continue texts; the one task is {TASK!r}")
    if model is None:
        raise ParameterError(f'pipeline needs a model: pipeline("{TASK}", model="2b-it")')
    if device is not None and device_map is not None:
        raise ParameterError("pipeline was given device and device_map; they are the same, give one")
    hub: dict[str, Any] = {
        name: value for name, value in (("revision", revision), ("token", token)) if value is not None
    }
    if isinstance(model, GemmaForCausalLM):
        given = {"device_map": device_map, "dtype": dtype, "torch_dtype": torch_dtype, **(model_kwargs or {}), **hub}
        if wrong := next((name for name, value in given.items() if value is not None), None):
            raise ParameterError(f"pipeline: {wrong} is for a checkpoint's name; the model here is loaded already")
        network = model if device is None else model.to(device)
        if tokenizer is None:
            raise ParameterError("pipeline needs a tokenizer beside a model that is loaded already")
    else:
        where = "cpu" if device == -1 else device if device is not None else device_map
        kind: dict[str, Any] = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
        kind |= {"dtype": dtype} if dtype is not None else {} if kind else {"dtype": "auto"}
        network = AutoModelForCausalLM.from_pretrained(
            model, device_map=where, **kind, **hub, **dict(model_kwargs or {})
        )
        tokenizer = model if tokenizer is None else tokenizer
    words = tokenizer if isinstance(tokenizer, GemmaTokenizer) else AutoTokenizer.from_pretrained(tokenizer, **hub)
    return TextGeneration(network, words, generate)


class TextGeneration:
    """Continues texts and answers chats; `pipeline` makes one.

    Attributes:
        task: "text-generation".
        model, tokenizer: what it computes with.
    """

    task = TASK

    def __init__(self, model: GemmaForCausalLM, tokenizer: GemmaTokenizer, defaults: Mapping[str, Any]) -> None:
        self.model, self.tokenizer, self._defaults = model, tokenizer, dict(defaults)

    def __call__(
        self, text_inputs: Any, *, return_full_text: bool | None = None, batch_size: int | None = None, **generate: Any
    ) -> list[Any]:
        """Answers.

        Args:
            text_inputs: a text, a chat (a list of messages with role and content), or a list of such.
            return_full_text: put the prompt in front of a text's answer, as transformers does; a chat's answer has
                the dialogue's messages in front. True where it is None.
            batch_size: most prompts in one call of ``generate``; None: all of them together.
            generate: options of ``generate``; each is honoured or refused by name, beams too.

        Returns:
            For one prompt a list of ``{"generated_text": …}``, one for each of ``num_return_sequences``; for a list of
            prompts a list of such lists. A chat's generated_text is the list of its messages with the answer.

        Raises:
            ParameterError: something is no prompt, or an option is wrong.
            UnsupportedError: an option that gemcut does not have.
        """
        options = {**self._defaults, **generate}
        full = options.pop("return_full_text", None) if return_full_text is None else return_full_text
        for name in (
            "return_text",
            "return_tensors",
            "clean_up_tokenization_spaces",
            "prefix",
            "handle_long_generation",
        ):
            if options.pop(name, None) not in (None, name == "return_text"):
                raise UnsupportedError(f"pipeline: {name} is not in this version; leave it out")
        for name in ("streamer", "return_dict_in_generate"):
            if options.get(name):
                raise UnsupportedError(f"pipeline: {name} is for model.generate; a pipeline gives texts")
        if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
            raise ParameterError(f"batch_size is {batch_size!r}; expected at least 1")
        one = isinstance(text_inputs, str) or _is_chat(text_inputs)
        prompts = [text_inputs] if one else text_inputs
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) or _is_chat(p) for p in prompts):
            raise ParameterError(f"text_inputs is of type {type(text_inputs).__name__}; {_SHAPES}")
        found: list[Any] = []
        step = len(prompts) if batch_size is None else batch_size
        for start in range(0, len(prompts), max(1, step)):
            found += self._run(prompts[start : start + step], options, True if full is None else full)
        return found[0] if one and found else found

    def _run(self, prompts: Sequence[Any], options: Mapping[str, Any], full: bool) -> list[list[dict[str, Any]]]:
        ids = [
            self.tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        ]
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left")
        sequences = self.model.generate(**batch, **options)
        count, width = len(sequences) // len(prompts), batch["input_ids"].shape[1]
        texts = self.tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
        return [
            [{"generated_text": _joined(prompt, text, full)} for text in texts[place * count : (place + 1) * count]]
            for place, prompt in enumerate(prompts)
        ]


def _joined(prompt: Any, text: str, full: bool) -> Any:
    if not full:
        return text
    return prompt + text if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": text}]


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Mapping) for each in value)
