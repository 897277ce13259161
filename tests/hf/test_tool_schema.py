"""Functions as tools have the JSON schemas that transformers makes of them, and prompts with them are its prompts."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import transformers
from transformers.utils import get_json_schema

import support
from gemcut import hf
from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.hf.tool_schema import function_schema


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> float:
    """Tell the temperature of a place.

    Args:
        city: Name of the city,
            with its country
        unit: In which unit

    Returns:
        The temperature, in
        the unit.

    Raises:
        ValueError: there is no such city
    """
    return 0.0


def multiply(x: float, y: float):  # type: ignore[no-untyped-def]
    """
    Multiply two numbers.

    It takes several lines to say so.

    Args:

        x: The first: a number
        y:
            The second
    """
    return x * y


def nothing() -> None:
    """Do nothing"""


def lists(a: list[int], b: list, c: tuple[int, str], d: tuple, e: dict[str, float], f: dict, g: list[list[str]]) -> Any:  # type: ignore[type-arg]
    """Take lists.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
        f: six
        g: seven
    """


def unions(
    a: int | None,
    b: Optional[str],  # noqa: UP045
    c: Union[int, str],  # noqa: UP007
    d: list[int] | str,
    e: list | tuple | None,  # type: ignore[type-arg]
    f: Any,
    g: int | Any | None = None,
) -> int | None:
    """Take unions.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
        f: six
        g: seven
    Returns:
        A number
    """


def enums(a: Colour, b: Level, c: Literal[1, "two", None, True], d: Colour | None = None) -> Path:
    """Choose.

    Args:
        a: A colour
        b: A level
        c: Something
        d: Perhaps a colour
    """
    return Path()


def choices(drink: str, size: int = 1) -> str:
    """Order a drink.

    Args:
        drink: What to drink (choices: ["tea", " coffee "])
        size: How much (Choices: [1, 2, 3])
    """
    return drink


def annotated(x: Annotated[int, "a number"], *args: int, **kwargs: str) -> bool:
    """Take everything.

    Args:
        x: A number
        args: More
        kwargs: And more
    """
    return True


def bare_return(x: int):  # type: ignore[no-untyped-def]
    """Return: nothing is said of it.

    Returns:
        Something
    Args:
        x: A number, and
          - a list
          - note: with a colon
        y (int): which is no entry
    """


class Tools:
    def method(self, text: str = "a") -> str:
        """Echo.

        Args:
            text: What to say
        """
        return text

    @classmethod
    def made(cls, n: "int") -> "Tools":  # noqa: UP037
        """Make one.

        Args:
            n: A number
        """
        return cls()


FUNCTIONS: list[Callable[..., Any]] = [
    *(weather, multiply, nothing, lists, unions, enums, choices, annotated, bare_return),
    *(Tools().method, Tools.made, Tools.method),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_schemas_are_transformers(function: Callable[..., Any]) -> None:
    theirs = get_json_schema(function)
    ours = function_schema(function)
    assert ours == theirs
    # A template writes keys in their order.
    assert list(ours["function"]["parameters"]["properties"]) == list(theirs["function"]["parameters"]["properties"])
    assert list(ours["function"]) == list(theirs["function"])


TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<end_of_turn>\n"
    "{% endfor %}"
)
CHAT = [{"role": "user", "content": "How warm is it?"}]


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    folder = support.tokenizer_dir()
    return hf.AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_prompts_with_functions_are_transformers(tokenizers: tuple[Any, Any]) -> None:
    schema = {"type": "function", "function": {"name": "given"}}
    texts, ids = (
        [
            t.apply_chat_template(
                CHAT,
                tools=[weather, schema, Tools().method],
                chat_template=TEMPLATE,
                tokenize=tokenize,
                return_dict=False,
            )
            for t in tokenizers
        ]
        for tokenize in (False, True)
    )
    assert texts[0] == texts[1]
    assert "Name of the city, with its country" in texts[0]
    assert ids[0] == ids[1]


def untyped(x):  # type: ignore[no-untyped-def]
    """Take one.

    Args:
        x: A number
    """


def undescribed(x: int) -> None:
    """Take one."""


def own(x: Path) -> None:
    """Take one.

    Args:
        x: A path
    """


def single(x: tuple[int]) -> None:
    """Take one.

    Args:
        x: A tuple
    """


def lost(x: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Take one.

    Args:
        x: Who knows
    """


def odd_choices(x: str) -> None:
    """Take one.

    Args:
        x: A text (choices: tea or coffee)
    """


def undocumented(x: int) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (untyped, "x has no type hint"),
        (undescribed, "does not describe x under Args:"),
        (own, "Path is neither a basic type"),
        (single, r"tuple\[int\] is of one entry"),
        (lost, "hints cannot be read .*Nowhere"),
        (odd_choices, "choices of x are no JSON list"),
        (undocumented, "no docstring"),
    ],
)
def test_what_transformers_refuses_too(function: Any, words: str, tokenizers: tuple[Any, Any]) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # each of another class
        get_json_schema(function)
    with pytest.raises(ParameterError, match=rf"function {function.__name__}: .*{words}.*give the schema") as caught:
        tokenizers[0].apply_chat_template(CHAT, tools=[function], chat_template=TEMPLATE)
    assert "\n" not in str(caught.value)


def test_what_is_no_function(tokenizers: tuple[Any, Any]) -> None:
    for tool in (len, Tools, "f", 3):
        with pytest.raises(ParameterError, match=r"tools\[0\] is of type .*a documented function"):
            tokenizers[0].apply_chat_template(CHAT, tools=[tool], chat_template=TEMPLATE)


OPEN = [*CHAT, {"role": "assistant", "content": "It is ", "reasoning_content": "The user asks "}]


@pytest.mark.parametrize("field", [True, "content", "reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_any_field_of_the_last_message_is_continued_as_in_transformers(
    field: Any, key: str, tokenizers: tuple[Any, Any]
) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "It is ", key: "The user asks "}]
    for tokenize in (False, True):
        try:
            theirs = tokenizers[1].apply_chat_template(
                chat, chat_template=TEMPLATE, continue_final_message=field, tokenize=tokenize, return_dict=False
            )
        except ValueError:
            with pytest.raises(ChatTemplateError, match="continue_final_message"):
                tokenizers[0].apply_chat_template(
                    chat, chat_template=TEMPLATE, continue_final_message=field, tokenize=tokenize
                )
            continue
        ours = tokenizers[0].apply_chat_template(
            chat, chat_template=TEMPLATE, continue_final_message=field, tokenize=tokenize, return_dict=False
        )
        assert ours == theirs


def test_fields_that_cannot_be_continued(tokenizers: tuple[Any, Any]) -> None:
    for options, error, words in (
        ({"continue_final_message": "mood"}, ChatTemplateError, "the last message has no mood"),
        ({"continue_final_message": "reasoning_content", "chat_template": None}, ChatTemplateError, "no.* reasoning"),
        ({"continue_final_message": 3}, ParameterError, "continue_final_message is 3"),
        ({"continue_final_message": ""}, ParameterError, "continue_final_message is ''"),
    ):
        with pytest.raises(error, match=words):
            tokenizers[0].apply_chat_template(OPEN, **{"chat_template": TEMPLATE, **options})
