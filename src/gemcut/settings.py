"""Settings: what a person has chosen once, in environment variables and in a configuration file.

For each value the first of these that names it decides: a command's option, the variable ``GEMCUT_…``, the file
``~/.config/gemcut/config.toml``, the checkpoint, what is built in. This module knows the variables and the file, and
every key they may have. Only the command line reads them: what Gemma gives in Python must not depend on a home folder.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemcut.errors import ParameterError

PREFIX = "GEMCUT_"
MAX_BYTES = 64 * 1024  # of the file; a real one has a few lines
MAX_STOPS = 64
_ELSEWHERE = ("GEMCUT_CACHE",)  # variables that other modules read
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Kind = Literal["text", "whole", "number", "texts"]
Part = Literal["model", "sampling", "server"]


@dataclass(frozen=True)
class Key:
    """One setting: its type, its help, its bounds (``above``: larger than ``low``).

    ``default`` is the built-in value; where that is none or depends on the command, ``built_in`` says so in words.
    ``part`` says what it is about.
    """

    name: str
    kind: Kind
    help: str
    default: float | str | None = None
    built_in: str = ""
    part: Part = "sampling"
    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    @property
    def variable(self) -> str:
        """The environment variable of the same name."""
        return PREFIX + self.name.upper()

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind == "text":
            return "a text of one line that is not empty"
        if self.kind == "texts":
            return f"a text, or a list of at most {MAX_STOPS} texts, none of them empty"
        what = "a whole number" if self.kind == "whole" else "a number"
        if self.high == math.inf:
            return what if self.low == -math.inf else f"{what} of at least {self.low:g}"
        between = ("above", "up to") if self.above else ("from", "to")
        show = str if self.kind == "whole" else "{:g}".format
        return f"{what} {between[0]} {show(self.low)} {between[1]} {show(self.high)}"

    def check(self, value: object) -> Any:
        """``value`` as it is used; raises ValueError where it is of another type or out of bounds."""
        if self.kind == "text":
            if not isinstance(value, str) or not value.strip() or _CONTROL.search(value):
                raise ValueError
            value.encode()  # a variable's bytes that are no UTF-8 raise a ValueError here
            return value
        if self.kind == "texts":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not 0 < len(texts) <= MAX_STOPS:
                raise ValueError
            for text in texts:
                if not isinstance(text, str) or not text:
                    raise ValueError
                text.encode()  # as above
            return texts
        types = (int,) if self.kind == "whole" else (int, float)
        if isinstance(value, bool) or not isinstance(value, types) or value != value:
            raise ValueError
        if not self.low <= value <= self.high or abs(value) == math.inf or (self.above and value == self.low):
            raise ValueError
        return float(value) if self.kind == "number" else value

    def parse(self, text: str) -> Any:
        """The value that ``text`` spells, of a variable or of ``gemcut config set``; raises ValueError."""
        if self.kind == "whole":
            return self.check(int(text) if len(text) <= 40 else None)
        return self.check(float(text) if self.kind == "number" else text)


_EVERY = (
    Key("model", "text", "The model where a command names none.", built_in="none", part="model"),
    Key("max_new_tokens", "whole", "Most tokens to generate.", built_in="256, in a chat 1024", low=0),
    Key("temperature", "number", "0 takes the likeliest token.", 1.0, low=0, high=100),
    Key("top_k", "whole", "Keep the k likeliest tokens; 0 all.", 0, low=0),
    Key("top_p", "number", "Keep the likeliest up to probability p.", 1.0, low=0, high=1, above=True),
    Key("min_p", "number", "Drop below p × the likeliest.", 0.0, low=0, high=1),
    Key("repetition_penalty", "number", "> 1: repeat less of prompt and answer.", 1.0, low=0, high=10, above=True),
    Key("presence_penalty", "number", "From -2 to 2, once per token used.", 0.0, low=-2, high=2),
    Key("frequency_penalty", "number", "From -2 to 2, each time it was used.", 0.0, low=-2, high=2),
    Key("seed", "whole", "Makes a run repeatable.", built_in="another each time", low=-(2**63), high=2**64 - 1),
    Key("stop", "texts", "Text that ends the answer.", built_in="none"),
    Key("host", "text", "serve: the address to listen at.", "127.0.0.1", part="server"),
    Key("port", "whole", "serve: the port; 0 takes a free one.", 8000, part="server", low=0, high=65535),
    Key("api_key_file", "text", "serve: the file of API keys.", built_in="none", part="server"),
    Key("allow_host", "texts", "serve: more names of this server.", built_in="none", part="server"),
    Key("allow_origin", "texts", "serve: origins whose pages may use it.", built_in="none", part="server"),
    Key("max_requests", "whole", "serve: most answers computed or waiting.", 512, part="server", low=1, high=10**6),
    Key(
        "queue_timeout", "number", "serve: seconds to begin an answer.", 120, part="server", low=0, high=1e9, above=True
    ),
    Key("request_timeout", "number", "serve: seconds to finish it.", 3600, part="server", low=0, high=1e9, above=True),
    Key("drain_timeout", "number", "serve: seconds to end in.", 30, part="server", low=0, high=1e9, above=True),
)
#: Every setting by its name. Those of the part "sampling" are names of SamplingParams.
KEYS: Mapping[str, Key] = {key.name: key for key in _EVERY}


@dataclass(frozen=True)
class Setting:
    """A value and where it was found: the variable's name, or the file with the line."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Settings:
    """What variables and file say, by key; a key that neither names is absent. Variables come before the file."""

    variables: Mapping[str, Setting]
    file: Mapping[str, Setting]

    def get(self, name: str) -> Setting | None:
        """The setting that counts, or None where there is none."""
        return self.variables.get(name) or self.file.get(name)

    def value(self, name: str, given: Any = None) -> Any:
        """What counts: ``given`` by a command's option, else the setting, else what is built in (None: nothing).

        Raises ParameterError where ``given`` is bad; the message names the option.
        """
        if given is not None:
            return check(name, given, f"--{name.replace('_', '-')}")
        found = self.get(name)
        return KEYS[name].default if found is None else found.value


def config_file() -> Path | None:
    """The file's place, whether or not it exists: in the XDG configuration folder. None where there is no home."""
    own = os.environ.get("XDG_CONFIG_HOME", "")
    folder = own if os.path.isabs(own) else os.path.expanduser("~/.config")  # XDG: relative ones are to be ignored
    return Path(folder) / "gemcut" / "config.toml" if os.path.isabs(folder) else None


def read_settings() -> Settings:
    """Variables and file, checked. Costs a few milliseconds and imports no torch.

    A variable whose name is almost that of a setting brings a warning.

    Raises:
        ParameterError: an unknown key or a bad value; the message names the variable, or the file and its line.
    """
    path = config_file()
    return Settings(_variables(), {} if path is None else _file(path))


def check(name: str, value: object, origin: str) -> Any:
    """``value`` of the setting ``name``; raises ParameterError naming ``origin`` where it is bad."""
    try:
        return KEYS[name].check(value)
    except ValueError:
        raise ParameterError(f"{origin}: {name} is {_shown(value)}; expected {KEYS[name].expected}") from None


def parse(name: str, text: str, origin: str) -> Any:
    """The value that ``text`` spells for the setting ``name``; raises ParameterError naming ``origin``."""
    try:
        return KEYS[name].parse(text)
    except ValueError:
        raise ParameterError(f"{origin} is {_shown(text)}; expected {KEYS[name].expected}") from None


def suggestion(name: str, known: Collection[str] = KEYS) -> str:
    """What an error says beside an unknown name: the nearest one, or all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def known(name: str, among: Collection[str] = KEYS) -> str:
    """The setting that a person calls ``name`` (``top-k`` and ``--top-k`` will do); raises ParameterError."""
    plain = name.strip().removeprefix("--").replace("-", "_").lower()
    if plain not in among:
        raise ParameterError(f"unknown key {_shown(name)}; {suggestion(plain, among)}")
    return plain


def read_text(path: Path) -> str | None:
    """The file's text, None where there is none. Raises ParameterError where it cannot be read or is no such file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise ParameterError(f"{path} is not a file; expected TOML such as: temperature = 0.3")
        if found.st_size > MAX_BYTES:
            raise ParameterError(f"{path} has {found.st_size:,} bytes; a configuration file has at most {MAX_BYTES:,}")
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ParameterError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The file's keys and values as they stand there; raises ParameterError with the line that is no TOML."""
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason, _, place = str(error).rstrip(")").partition(" (at ")
        line = f"line {len(lines_of(text))}" if place == "end of document" else place.partition(",")[0]
        where = f"{path}, {line}" if line.startswith("line ") else str(path)
        reason = "too deeply nested" if isinstance(error, RecursionError) else reason
        raise ParameterError(f"{where}: {reason}; expected TOML such as: temperature = 0.3") from None


def lines_of(text: str) -> list[str]:
    """The text in lines as TOML counts them, each with its end."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def spans(text: str) -> dict[str, tuple[int, int]]:
    """For each key of a valid TOML text the lines that set it, (first, behind the last), counted from 0.

    tomllib tells no lines of values, so ever longer beginnings of the text are parsed until the key is there.
    """
    import tomllib

    found: dict[str, tuple[int, int]] = {}
    lines = lines_of(text)
    start = 0  # where the statement that is being read began
    for end in range(1, len(lines) + 1):
        try:
            keys = tomllib.loads("".join(lines[start:end]))
        except ValueError:  # within a value of several lines
            continue
        for key in keys:
            found.setdefault(key, (start, end))
        start = end
    return found


def _variables() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for key in KEYS.values():
        if text := os.environ.get(key.variable):  # set to nothing counts as not set
            found[key.name] = Setting(parse(key.name, text, key.variable), key.variable)
    known = [key.variable for key in KEYS.values()]
    for name in os.environ:
        if name.startswith(PREFIX) and name not in (*known, *_ELSEWHERE):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if near:
                warnings.warn(f"the variable {name} is not read by gemcut; did you mean {near[0]}?", stacklevel=3)
    return found


def _file(path: Path) -> dict[str, Setting]:
    text = read_text(path)
    if text is None:
        return {}
    data = parse_toml(text, path)
    where = spans(text) if data else {}
    found: dict[str, Setting] = {}
    for name, value in data.items():
        origin = f"{path}, line {where[name][0] + 1}" if name in where else str(path)
        if name not in KEYS:
            raise ParameterError(f"{origin}: unknown key {_shown(name)}; {suggestion(name)}")
        found[name] = Setting(check(name, value, origin), origin)
    return found


def _shown(value: object) -> str:
    """A bad value as an error shows it, not longer than a line."""
    if isinstance(value, dict):
        return "a table"
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}…"
