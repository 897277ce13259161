"""Personas: who a model is to be in a chat, as a TOML file with instructions, examples and sampling."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcut import files
from gemcut.errors import ParameterError
from gemcut.settings import KEYS, suggestion

MAX_BYTES = 256 * 1024
_KEYS = ("system", "examples", "sampling")
_SAMPLING = tuple(name for name, key in KEYS.items() if key.part == "sampling")


@dataclass(frozen=True)
class Persona:
    """What a persona's file says.

    Attributes:
        system: instructions; "" for none.
        examples: messages with role "user" and "assistant" in turn, which stand before the conversation.
        sampling: fields of SamplingParams.
    """

    system: str = ""
    examples: tuple[dict[str, str], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def read_persona(path: Path) -> Persona:
    """The persona in a TOML file.

    Raises ParameterError where it cannot be read, is no TOML, has an unknown key or a value that cannot be.
    """
    try:
        data = tomllib.loads(files.read_bounded(path, MAX_BYTES).decode("utf-8-sig"))
    except files.UnreadableError as error:
        raise ParameterError(f"cannot read {path}: it {error}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not UTF-8; convert it first") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ParameterError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    _known(data, _KEYS, f"{path} has")
    if not data:
        raise ParameterError(f"{path} says nothing; expected {', '.join(_KEYS)}")
    examples = data.get("examples", [])
    if not isinstance(examples, list) or not all(isinstance(each, dict) for each in examples):
        raise ParameterError(f"{path}: examples is no list of tables; write [[examples]] above each")
    turns: list[dict[str, str]] = []
    for place, example in enumerate(examples, 1):
        _known(example, ("user", "assistant"), f"{path}: example {place} has")
        for role in ("user", "assistant"):
            turns.append({"role": role, "content": _text(example, role, f"{path}: example {place}")})
    system = _text(data, "system", str(path)) if "system" in data else ""
    return Persona(system, tuple(turns), _sampling(data.get("sampling", {}), str(path)))


def _sampling(values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ParameterError(f"{where}: sampling is no table; write [sampling] above its values")
    _known(values, _SAMPLING, f"{where}: sampling has")
    found = {}
    for name, value in values.items():
        try:
            found[name] = KEYS[name].check(value)
        except ValueError:
            what = f"{name} is {files.shown(value)}; expected {KEYS[name].expected}"
            raise ParameterError(f"{where}: {what}") from None
    return found


def _known(values: Collection[str], known: Collection[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise ParameterError(f"{where} an unknown key {files.shown(name)}; {suggestion(name, known)}")


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ParameterError(f"{where}: {name} is {files.shown(value)}; expected a text that is not empty")
    return value
