"""Chat templates of checkpoints: Jinja in a sandbox, with the names, filters and tags that transformers gives them."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from gemcut.errors import ChatTemplateError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

#: Other names of a message's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
#: Longest text or list that ``*`` may make inside a template. Real ones repeat a dash or a space.
_LONGEST = 1_000_000
# Stands where an open last message ends. The blank shows whether the template strips its messages.
_OPEN_END = "\N{SYMBOL FOR END OF TEXT}END OF THE OPEN MESSAGE\N{SYMBOL FOR END OF TEXT} "


class Template:
    """A compiled chat template.

    Attributes:
        source: the Jinja text.
        variables: names that it reads and does not set itself.
        constants: texts within its expressions.
        literals: all texts it can write: those between its tags, and `constants`.
        looked_for: constants that it searches for or cuts at (``'</think>' in text``, ``text.split('</think>')``).
    """

    def __init__(self, source: str) -> None:
        """Compile.

        Raises:
            ChatTemplateError: the source is no text, or not valid Jinja.
        """
        if not isinstance(source, str):
            raise ChatTemplateError(f"the chat template is of type {type(source).__name__}; expected a text")
        from jinja2 import meta, nodes

        self.source = source
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
        except Exception as error:  # the parser fails in several ways: syntax, recursion, a value it cannot fold
            raise ChatTemplateError(f"the chat template is damaged: {_reason(error)}") from error
        self.constants = frozenset(n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str))
        self.literals = self.constants | {node.data for node in tree.find_all(nodes.TemplateData)}
        searched: set[str] = set()
        for compare in tree.find_all(nodes.Compare):
            if any(operand.op in ("in", "notin") for operand in compare.ops):
                searched |= _texts_of(compare.expr)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Getattr):  # a method of a text: split, startswith, replace
                searched |= {text for argument in call.args for text in _texts_of(argument)}
        self.looked_for = frozenset(searched)

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        now: datetime.datetime | None = None,
        continue_final_message: bool | str = False,
    ) -> str:
        """The dialogue as one text.

        Args:
            messages: the dialogue; entries that are None are left out, as transformers does.
            variables: what the template may read besides ``messages``; ``tools`` and ``documents`` are None unless
                given, ``add_generation_prompt`` is False.
            now: the time ``strftime_now`` tells; the clock's if None.
            continue_final_message: end within the last message, behind its content or the field of that name.

        Raises:
            ChatTemplateError: the template is forbidden something by the sandbox, or raises for these messages.
        """
        try:
            chat = [
                _with_reasoning({key: value for key, value in message.items() if value is not None})
                if isinstance(message, dict)
                else message
                for message in plain_data(list(messages))
            ]
            values = {"tools": None, "documents": None, "add_generation_prompt": False} | plain_data(variables)
        except RecursionError:
            raise ChatTemplateError("messages or variables of the chat template are nested too deeply") from None
        field = "content" if continue_final_message is True else continue_final_message
        last = self._open_last(chat, field) if field else None
        clock = now or datetime.datetime.now()
        try:
            text = self._compiled.render({"strftime_now": clock.strftime} | values | {"messages": chat})
        except Exception as error:  # a template can fail in any way its expressions can
            raise ChatTemplateError(f"the chat template refuses these messages: {_reason(error)}") from error
        return text if last is None else _cut_open(text, last)

    def _open_last(self, chat: list[Any], field: str) -> str:
        """Mark the end of a field of the last message, in place; give its text."""
        message = chat[-1] if chat and isinstance(chat[-1], dict) else {}
        value = message.get(field)
        if value is None:
            raise ChatTemplateError(f"continue_final_message: the last message has no {field}")
        # A message's reasoning stands under several names, of which the template reads one.
        names = [name for name in _REASONING if message.get(name) == value] if field in _REASONING else [field]
        if not any(name in self.source for name in names):
            raise ChatTemplateError(f"continue_final_message: the chat template writes no {field}")
        if isinstance(value, str):
            for name in names:
                message[name] = value + _OPEN_END
            return value
        for part in reversed(value) if isinstance(value, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = str(part["text"])
                part["text"] = text + _OPEN_END
                return text
        raise ChatTemplateError(f"continue_final_message needs a last message whose {field} is a text")


@lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """The compiled template; the same source is compiled once. Raises ChatTemplateError."""
    return Template(source)


def render_template(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str = "<bos>",
    eos_token: str = "<eos>",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Render a Jinja chat template, a checkpoint's own or a custom one, in a sandbox.

    For people to read: in the text, a control token typed by a user cannot be told from the template's own. To run a
    dialogue use `gemcut.text.ChatWriter`.

    Args:
        template: the Jinja source.
        messages: handed to the template as they are.
        bos_token, eos_token, add_generation_prompt: the template's usual variables.
        continue_final_message: end within the last message, behind its content.
        variables: more of them.

    Raises:
        ChatTemplateError: the template is malformed, forbidden by the sandbox, or raises for these messages.
    """
    return compile_template(template).render(
        messages,
        {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        },
        continue_final_message=continue_final_message,
    )


def plain_data(value: Any) -> Any:
    """A copy of plain types alone: a template must not reach methods of what callers put into their messages.

    Mappings become dicts, dataclasses and pydantic models too, NumPy's numbers Python's; anything else becomes its
    type's name in angle brackets.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump())
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain_data(value.item())
    return f"<{type(value).__name__}>"


@cache
def _environment() -> jinja2.Environment:
    """The sandbox all templates share."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's, and repetition is bounded: ``'x' * 10 ** 10`` would take the machine's memory."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
                raise SecurityError("a power is too large")
            for many, times in ((left, right), (right, left)):
                if operator == "*" and hasattr(many, "__len__") and len(many) * times > _LONGEST:
                    raise SecurityError(f"a text or list of more than {_LONGEST} entries")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """``{% generation %}`` marks what the model wrote, for training's masks; here its inside counts alone."""

        tags = frozenset(["generation"])  # type: ignore[assignment]

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block as in transformers, so that what is set inside stays inside in both.
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    class Variables(Namespace):
        """Jinja's namespace without names that lead into Python."""

        def __init__(*args: Any, **names: Any) -> None:  # a template may call a name "self"
            given = dict(*args[1:], **names)
            for name in given:
                Variables._check(name)
            Namespace.__init__(args[0], given)

        def __setitem__(self, name: str, value: Any) -> None:
            Variables._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"the namespace's name {name!r} begins with an underscore")

    class Dictionaries:
        """``dict(...)`` without the type behind it."""

        def __call__(self, *args: Any, **names: Any) -> dict[Any, Any]:
            return dict(*args, **names)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # Blocks are trimmed and loop controls allowed because published templates are written for that.
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"] = Dictionaries()
    environment.globals["namespace"] = Variables
    # Each rendering brings its own clock; here the name is known, so that it does not count as a variable.
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _texts_of(node: Any) -> set[str]:
    """Texts that stand in one argument."""
    from jinja2 import nodes

    found = [node, *node.find_all(nodes.Const)]
    return {const.value for const in found if isinstance(const, nodes.Const) and isinstance(const.value, str)}


def _with_reasoning(message: dict[Any, Any]) -> dict[Any, Any]:
    """A message's reasoning under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _cut_open(text: str, last: str) -> str:
    """A rendered dialogue up to the end of its open message."""
    place = text.rfind(_OPEN_END.strip())
    if place < 0 or last.strip() not in text:
        raise ChatTemplateError("continue_final_message: the chat template does not write the last message as it is")
    return text[:place] if text.startswith(_OPEN_END, place) else text[:place].rstrip()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
