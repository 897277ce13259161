"""Policies: what judges are asked about, read from the package's policies.toml and from an operator's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError
from gemcut.settings import parse_toml, suggestion

_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_LONGEST = 4000  # characters of a definition

#: Where the rules stand that whoever uses Gemma has agreed to.
USE_POLICY = "https://ai.google.dev/gemma/prohibited_use_policy"


@dataclass(frozen=True)
class Policy:
    """One policy. ``heading``: of the Prohibited Use Policy; ``definition``: what a judging model is told."""

    name: str
    definition: str
    threshold: float = 0.5
    heading: str = ""


def check_threshold(value: Any, where: str) -> float:
    """A threshold, from 0 to 1. Raises ParameterError that begins with ``where``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ParameterError(f"{where} is {value!r}; expected a number from 0 to 1")
    return float(value)


@cache
def builtin_policies() -> dict[str, Policy]:
    """The package's own policies, by name."""
    source = files("gemcut.safety").joinpath("policies.toml")
    table = parse_toml(source.read_text("utf-8"), Path("policies.toml"))
    return policies_of(table, "policies.toml", {})


def policies_of(table: Mapping[str, Any], where: str, known: Mapping[str, Policy]) -> dict[str, Policy]:
    """``known`` with what a table of policies changes and adds. Raises ParameterError that names file and key."""
    found = dict(known)
    for name, fields in table.items():
        if not _NAME.fullmatch(name):
            raise ParameterError(
                f"{where}: policy {name[:80]!r}: expected a name of a-z, 0-9 and -, at most 64 of them"
            )
        if not isinstance(fields, dict):
            raise ParameterError(f"{where}: policy {name}: expected a table such as [policy.{name}]")
        for key in fields:
            if key not in ("definition", "threshold", "heading"):
                hint = suggestion(key, ("definition", "threshold", "heading"))
                raise ParameterError(f"{where}: policy {name} has an unknown key {key!r}; {hint}")
        old = found.get(name)
        definition = fields.get("definition", old.definition if old else None)
        heading = fields.get("heading", old.heading if old else "")
        if not isinstance(definition, str) or not 1 <= len(definition.strip()) <= _LONGEST:
            raise ParameterError(f"{where}: policy {name} needs a definition, a text of 1 to {_LONGEST:,} characters")
        if not isinstance(heading, str):
            raise ParameterError(f"{where}: policy {name}: heading is {heading!r}; expected a text")
        threshold = fields.get("threshold", old.threshold if old else 0.5)
        threshold = check_threshold(threshold, f"{where}: policy {name}: threshold")
        found[name] = Policy(name, definition.strip(), threshold, heading)
    return found
