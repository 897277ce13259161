"""Whether two answers in LaTeX are equal: as texts after normalising, or in value.

An answer is read by a small parser of its own (a computer algebra system would evaluate a text that a model wrote as
Python, and may never end) into numbers, symbols and operations. Two expressions are equal where they are at random
points: an identity that holds at five of them holds everywhere, but for a chance below any rounding.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

_UNITS = (
    r"square|units|cubic|degrees|degree|dollars|dollar|cents|cent|mph|inches|inch|feet|foot|ft|hours|hour|"
    r"minutes|minute|seconds|second|meters|meter|cm|km|mm|gm|grams|pounds|unit|points|ways|integers|"
    r"students|meals|edges|digits|multiples|radians|miles|years|days"
)
_POINTS = 5
_CLOSE = 1e-9
Value: TypeAlias = Callable[[Mapping[str, complex]], complex]


class _UnreadableError(Exception):
    """This is no expression that the parser knows."""


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` or ``\\fbox{…}`` holds, braces matched; None where there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[text.index("x", start + 3) + 1 :] if text.startswith("\\fbox", start) else text[start + 6 :]
    if rest.startswith(" "):
        return rest[1:].split("$")[0].strip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place]
    return None


def final_answer(text: str) -> str | None:
    """The answer of a worked solution: behind "The final answer is", else the last box; None where there is neither."""
    said = re.findall(r"[Ff]inal answer is:?\s*(.*?)(?:\.\s*I hope|\.?\s*(?:\n|$))", text)
    if said and said[-1].strip():
        answer = str(said[-1]).strip()
        return last_boxed(answer) or answer
    return last_boxed(text)


def normal(answer: str) -> str:
    """An answer without what does not change its value: dollars, units, spacing commands, the left side of "x = 2"."""
    text = answer.strip().strip(".").replace("\\$", "")
    if (inner := re.fullmatch(r"\$(.*)\$", text)) is not None:
        text = inner[1]
    text = text.replace("$", "").replace("\\!", "").replace("\\,", "").replace("\\;", "")
    text = re.sub(r"(?<!\\)\\ ", " ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\cfrac", "\\frac")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", text).replace("\\%", "").replace("%", "").replace("\\degree", "")
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm|textrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(rf"(?<![a-zA-Z\\])(?:{_UNITS})(?![a-zA-Z])(?:\^\{{?\d\}}?)?", " ", text)
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text) if _grouped(text) else text.replace("{,}", "")
    if parts := re.fullmatch(r"\s*(?:[a-zA-Z](?:\([a-zA-Z]\))?|[a-zA-Z]_\{?\w+\}?)\s*(?:=|\\in)\s*([^=]*)", text):
        text = parts[1]
    return " ".join(text.split())


def _grouped(text: str) -> bool:
    """Whether every comma of the text stands in one number as a mark of thousands."""
    return re.fullmatch(r"[^\d,]*-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?[^\d,]*", text) is not None


def equal(one: str, other: str) -> bool:
    """Whether two answers are the same."""
    first, second = normal(one), normal(other)
    if first.replace(" ", "") == second.replace(" ", ""):
        return bool(first)
    return _same(_tidy(first), _tidy(second))


def _tidy(text: str) -> str:
    return text.replace("\\{", "{").replace("\\}", "}") if text.startswith("\\{") and text.endswith("\\}") else text


def _same(one: str, other: str) -> bool:
    pairs = [_elements(one), _elements(other)]
    if pairs[0] is not None or pairs[1] is not None:
        if pairs[0] is None or pairs[1] is None or pairs[0][0] != pairs[1][0]:
            return False
        first, second = pairs[0][1], pairs[1][1]
        if len(first) != len(second):
            return False
        if pairs[0][0] in ("", "{}"):  # an order that nobody asked for
            left = list(second)
            for element in first:
                match = next((each for each in left if equal(element, each)), None)
                if match is None:
                    return False
                left.remove(match)
            return True
        return all(equal(a, b) for a, b in zip(first, second, strict=True))
    try:
        values = [_Parser(text).whole() for text in (one, other)]
    except (_UnreadableError, RecursionError):
        return one.lower() == other.lower()
    return _equal_at_points(*values)


def _equal_at_points(one: tuple[Value, set[str]], other: tuple[Value, set[str]]) -> bool:
    names = sorted(one[1] | other[1])
    chance, seen = random.Random(0), 0
    for _ in range(8 * _POINTS):
        point = {name: complex(chance.uniform(0.3, 2.9), 0) for name in names}
        try:
            first, second = one[0](point), other[0](point)
        except (ArithmeticError, ValueError):
            if not names:
                return False
            continue
        if not (cmath.isfinite(first) and cmath.isfinite(second)):
            return False
        if abs(first - second) > _CLOSE * max(1.0, abs(first), abs(second)):
            return False
        seen += 1
        if not names or seen == _POINTS:
            return True
    return False


def _elements(text: str) -> tuple[str, list[str]] | None:
    """(brackets, elements) of a tuple, an interval, a set, a list or a matrix; None for anything else."""
    matrix = re.fullmatch(r"\\begin\{([pbv]?matrix)\}(.*?)\\end\{\1\}", text, re.S)
    if matrix is not None:
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        shape = "x".join(str(len(row.split("&"))) for row in rows)
        return f"matrix {shape}", [each for row in rows for each in row.split("&")]
    ends = text[:1] + text[-1:]
    if len(text) > 2 and ends in ("()", "[]", "{}", "(]", "[)") and _closes_last(text):
        parts = _split(text[1:-1])
        return (ends, parts) if len(parts) > 1 or ends == "{}" else None
    parts = _split(text)
    return ("", parts) if len(parts) > 1 else None


def _closes_last(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """Parts between commas (and "or", "and") outside of brackets."""
    text = re.sub(r"(?:,\s*)?\s(?:and|or)\s", ",", text).replace("\\cup", ",")
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part]


_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(\\[a-zA-Z]+)|([a-zA-Z])|(.))", re.S)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    **{f"\\{name}": getattr(cmath, name) for name in ("sin", "cos", "tan", "exp", "sinh", "cosh", "tanh")},
    **{"\\arcsin": cmath.asin, "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\ln": cmath.log, "\\log": cmath.log10},
    **{"\\cot": lambda z: 1 / cmath.tan(z), "\\sec": lambda z: 1 / cmath.cos(z), "\\csc": lambda z: 1 / cmath.sin(z)},
}
_CONSTANTS: dict[str, complex] = {"\\pi": math.pi, "π": math.pi, "i": 1j, "e": math.e, "\\infty": complex(1e300)}


class _Parser:
    """Recursive descent over the tokens of one expression; ``whole`` gives its value as a function of its symbols."""

    def __init__(self, text: str) -> None:
        self.tokens = [match[0].strip() for match in _TOKEN.finditer(text) if match[0].strip()]
        self.place, self.names = 0, set[str]()
        if len(self.tokens) > 400:
            raise _UnreadableError

    def whole(self) -> tuple[Value, set[str]]:
        """(value, names of its symbols). Raises _UnreadableError."""
        value = self.sum()
        if self.place != len(self.tokens):
            raise _UnreadableError
        return value, self.names

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise _UnreadableError
        self.place += 1
        return token

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in ("+", "-", "−"):
            sign = 1 if self.take() == "+" else -1
            value = _plus(value, self.product(), sign)
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times", "×"):
                self.take()
                value = _times(value, self.signed())
            elif token in ("/", "\\div", "÷"):
                self.take()
                value = _over(value, self.signed())
            elif token and token not in "+-−)]}|,=<>&!^_" and not token.startswith(("\\le", "\\ge", "\\in")):
                value = _times(value, self.power())
            else:
                return value

    def signed(self) -> Value:
        if self.peek() in ("-", "−", "+", "\\pm"):
            token = self.take()
            if token == "\\pm":
                raise _UnreadableError
            value = self.signed()
            return value if token == "+" else _times(_constant(-1), value)
        return self.power()

    def power(self) -> Value:
        value = self.atom()
        while self.peek() in ("^", "!"):
            if self.take() == "!":
                value = _factorial(value)
            else:
                value = _raised(value, self.signed() if self.peek() == "-" else self.atom())
        return value

    def group(self, opened: str, closed: str) -> Value:
        self.take(opened)
        value = self.sum()
        self.take(closed)
        return value

    def argument(self) -> Value:
        """What a command takes: a group in braces, or the next digit or letter."""
        if self.peek() == "{":
            return self.group("{", "}")
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1:  # \frac12: one digit
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self.atom()

    def atom(self) -> Value:
        token = self.peek()
        if token in ("(", "[", "{"):
            return self.group(token, {"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            self.take()
            value = self.sum()
            self.take("|")
            return lambda point: abs(value(point))
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return _constant(float(token))
        if token == "\\frac":
            return _over(self.argument(), self.argument())
        if token == "\\sqrt":
            index = self.group("[", "]") if self.peek() == "[" else _constant(2)
            return _raised(self.argument(), _over(_constant(1), index))
        if token in _FUNCTIONS:
            return self.function(_FUNCTIONS[token], token)
        if token in _CONSTANTS:
            return _constant(_CONSTANTS[token])
        if (len(token) == 1 and token.isalpha()) or re.fullmatch(r"\\[a-zA-Z]+", token):
            if self.peek() == "_":
                self.take()
                token += "_" + self.take() if self.peek() != "{" else self.subscript()
            self.names.add(token)
            return lambda point: point[token]
        raise _UnreadableError

    def subscript(self) -> str:
        start = self.place
        while self.take() != "}":
            pass
        return "_" + "".join(self.tokens[start : self.place])

    def function(self, function: Callable[[complex], complex], name: str) -> Value:
        base: Value | None = None
        exponent: Value | None = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                exponent = self.argument()
        argument = self.power()
        value: Value
        if base is not None and name == "\\log":
            own = base
            value = lambda point: cmath.log(argument(point)) / cmath.log(own(point))  # noqa: E731
        else:
            value = lambda point: function(argument(point))  # noqa: E731
        return value if exponent is None else _raised(value, exponent)


def _constant(number: complex) -> Value:
    return lambda point: number


def _plus(one: Value, other: Value, sign: int) -> Value:
    return lambda point: one(point) + sign * other(point)


def _times(one: Value, other: Value) -> Value:
    return lambda point: one(point) * other(point)


def _over(one: Value, other: Value) -> Value:
    return lambda point: one(point) / other(point)


def _raised(one: Value, other: Value) -> Value:
    return lambda point: complex(one(point)) ** other(point)


def _factorial(one: Value) -> Value:
    def value(point: Mapping[str, complex]) -> complex:
        number = one(point)
        if number.imag or number.real != int(number.real) or not 0 <= number.real <= 100:
            raise ValueError("no factorial")
        return float(math.factorial(int(number.real)))

    return value
