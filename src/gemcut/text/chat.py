"""Gemma's chat format: dialogues to token ids, built from ids so that no text of a user can become a control token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.text.special import END_OF_TURN, START_OF_TURN, SpecialTokens
from gemcut.text.template import Message, compile_template
from gemcut.text.tokenizer import Tokenizer

System = Literal["fold", "error"]

_ROLE_NAMES = {"user": "user", "assistant": "model", "model": "model", "system": "system"}
#: Parts of OpenAI's messages that would be lost without a word.
_REFUSED = ("tool_calls", "function_call", "audio")


@dataclass(frozen=True)
class Turn:
    """One turn as the network sees it: role is "user" or "model", text is stripped of white space at both ends."""

    role: str
    text: str


def normalize_messages(messages: Sequence[Message], system: System = "fold") -> list[Turn]:
    """Check a dialogue and bring it to alternating turns, user first.

    Args:
        messages: mappings with "role" (user, assistant or its synonym model, system) and "content": a str, or parts
            ``{"type": "text", "text": …}``, which are joined as they are.
        system: Gemma has no system role. "fold" puts system messages, which may only stand at the start, before the
            first user's text: system text, blank line, user text. "error" refuses them.

    Raises:
        ChatTemplateError: no messages, an unknown role, content that is no text, roles that don't alternate. The
            message names the turn by its index.
        ParameterError: system is neither "fold" nor "error".
    """
    if system not in ("fold", "error"):
        raise ParameterError(f"system is {system!r}; expected 'fold' or 'error'")
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages is of type {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise ChatTemplateError("messages is empty; expected at least one message with role 'user'")
    folded: list[str] = []
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        role, text = _read(index, message)
        if role == "system":
            if system == "error":
                raise ChatTemplateError(
                    f"messages[{index}] has role 'system', which Gemma lacks; put it in a user turn"
                )
            if turns:
                raise ChatTemplateError(f"messages[{index}] has role 'system'; system messages may only come first")
            if text:
                folded.append(text)
            continue
        expected = "model" if len(turns) % 2 else "user"
        if role != expected:
            shown = "assistant" if expected == "model" else "user"
            raise ChatTemplateError(
                f"messages[{index}] has role {message['role']!r}; expected {shown!r}: "
                "roles must alternate user, assistant, user, …"
            )
        if folded and not turns:
            text = "\n\n".join([*folded, text]).strip()
        turns.append(Turn(role, text))
    if not turns:
        raise ChatTemplateError("messages holds system messages alone; expected a message with role 'user' after them")
    return turns


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    system: System = "fold",
) -> list[int]:
    """Token ids of a dialogue, beginning with exactly one ``<bos>``.

    The ids equal those of the checkpoint's rendered template as long as no text contains special tokens; such text is
    encoded as plain characters here.

    Args:
        tokenizer: must have the turn markers.
        messages: see `normalize_messages`.
        add_generation_prompt: end with the opening of the model's turn.
        continue_final_message: leave the last turn open, to be continued; add_generation_prompt then has no effect.
        system: see `normalize_messages`.

    Raises:
        ChatTemplateError: the dialogue cannot be expressed, or the tokenizer has no turn markers.
    """
    start, end = _markers(tokenizer)
    ids = [tokenizer.bos_id]
    for kind, text in _layout(normalize_messages(messages, system), add_generation_prompt, continue_final_message):
        if kind == "text":
            ids += tokenizer.encode(text, add_bos=False, parse_special=False)
        else:
            ids.append(start if kind == "start" else end)
    return ids


def render_chat(
    tokenizer: Tokenizer | SpecialTokens,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    system: System = "fold",
) -> str:
    """The dialogue as one string, ``<bos>`` included, as the checkpoint's template writes it. For people to read.

    To run it, use `encode_chat`: in a string, a marker typed by a user cannot be told from a real one.
    Arguments and errors are those of `encode_chat`.
    """
    _markers(tokenizer)
    spelled = {"start": START_OF_TURN, "end": END_OF_TURN}
    layout = _layout(normalize_messages(messages, system), add_generation_prompt, continue_final_message)
    return tokenizer.id_to_token(tokenizer.bos_id) + "".join(spelled.get(kind, text) for kind, text in layout)


def uses_gemma_format(tokenizer: Tokenizer | SpecialTokens, template: str | None = None) -> bool:
    """Whether a template (the checkpoint's own if None; True where it has none) writes dialogues as `render_chat` does.

    A model with another format needs `ChatWriter` instead of `encode_chat`.
    """
    source = tokenizer.chat_template if template is None else template
    if source is None:
        return not tokenizer.chat_templates
    probe = [
        {"role": "user", "content": " one "},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": "three"},
    ]
    try:
        return all(
            compile_template(source).render(probe, {**tokenizer.template_tokens, "add_generation_prompt": opened})
            == render_chat(tokenizer, probe, add_generation_prompt=opened)
            for opened in (False, True)
        )
    except ChatTemplateError:
        return False


def _read(index: int, message: object) -> tuple[str, str]:
    """(role as Gemma names it, stripped text) of one message."""
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f"messages[{index}] is of type {type(message).__name__}; expected a mapping with role and content"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLE_NAMES:
        raise ChatTemplateError(f"messages[{index}] has role {role!r}; expected one of {', '.join(_ROLE_NAMES)}")
    for name in _REFUSED:
        if message.get(name):
            raise ChatTemplateError(f"messages[{index}] has {name!r}, which Gemma's chat format cannot express")
    content = message.get("content")
    if isinstance(content, str):
        return _ROLE_NAMES[role], content.strip()
    expected = "expected a text or a list of text parts"
    if not isinstance(content, (list, tuple)):
        raise ChatTemplateError(f"messages[{index}] has content of type {type(content).__name__}; {expected}")
    if not content:
        raise ChatTemplateError(f"messages[{index}] has an empty list as content; {expected}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise ChatTemplateError(f"messages[{index}] has a content part of type {kind!r}; Gemma reads text alone")
        if not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"messages[{index}] has a text part without a str as text")
    return _ROLE_NAMES[role], "".join(part["text"] for part in content).strip()


def _layout(
    turns: Sequence[Turn], add_generation_prompt: bool, continue_final_message: bool
) -> Iterator[tuple[Literal["start", "end", "text"], str]]:
    """The format itself, once for ids and strings. Text between two markers is one piece, as it is tokenised whole."""
    for index, turn in enumerate(turns):
        yield "start", ""
        yield "text", f"{turn.role}\n{turn.text}"
        if continue_final_message and index == len(turns) - 1:
            return
        yield "end", ""
        yield "text", "\n"
    if add_generation_prompt:
        yield "start", ""
        yield "text", "model\n"


def _markers(tokenizer: Tokenizer | SpecialTokens) -> tuple[int, int]:
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        raise ChatTemplateError(
            f"this tokenizer has no {START_OF_TURN} and {END_OF_TURN}, so it cannot chat; "
            "use generate, or an instruction-tuned checkpoint"
        )
    return tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
