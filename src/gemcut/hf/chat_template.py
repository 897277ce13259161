"""The dialogue part of the tokenizer: Gemma's own format built from ids, or a Jinja template in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.text import Message, Tokenizer, encode_chat, render_chat, render_template, uses_gemma_format


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a dialogue is written. ``template`` None means the tokenizer's own; ``variables`` go to a Jinja template."""

    add_generation_prompt: bool
    continue_final_message: bool
    system: Literal["fold", "error"]
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise ParameterError(
                "add_generation_prompt and continue_final_message exclude each other: "
                "the first opens a new turn, the second leaves the last one open"
            )


class ChatWriter:
    """Writes dialogues for one tokenizer. Whether its own template is Gemma's format is found out once a template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._checked: tuple[str | None, bool] | None = None

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The dialogue as a string."""
        if not self.built_in(options):
            return self._render_template(messages, options)
        return render_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            system=options.system,
        )

    def encode(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """The dialogue as token ids. In Gemma's own format special tokens typed by a user stay plain text."""
        if not self.built_in(options):
            return self.tokenizer.encode(self._render_template(messages, options), add_bos=False)
        return encode_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            system=options.system,
        )

    def built_in(self, options: ChatOptions) -> bool:
        """Whether these options ask for Gemma's own format, which needs no template."""
        own = self.tokenizer.chat_template
        if options.template is not None and options.template != own:
            return False
        if self._checked is None or self._checked[0] != own:
            self._checked = own, uses_gemma_format(self.tokenizer)
        if self._checked[1] and options.variables:
            name = next(iter(options.variables))
            raise ParameterError(f"apply_chat_template has no argument {name!r}, and Gemma's template no such variable")
        return self._checked[1]

    def _render_template(self, messages: Sequence[Message], options: ChatOptions) -> str:
        tokenizer = self.tokenizer
        template = options.template if options.template is not None else tokenizer.chat_template
        assert template is not None  # without one the format is built in
        text = render_template(
            template,
            messages,
            bos_token=tokenizer.id_to_token(tokenizer.bos_id),
            eos_token=tokenizer.id_to_token(tokenizer.eos_id),
            add_generation_prompt=options.add_generation_prompt,
            **options.variables,
        )
        if not options.continue_final_message:
            return text
        last = messages[-1].get("content") if messages else None
        if not isinstance(last, str):
            raise ChatTemplateError("continue_final_message needs a last message whose content is a text")
        place = text.rfind(last.strip())
        if place < 0:
            raise ChatTemplateError(
                "continue_final_message: the chat template does not write the last message as it is"
            )
        return text[: place + len(last.strip())]
