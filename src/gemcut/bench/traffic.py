"""What is sent when: requests made at random, or read from a trace that other engines can be given too."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import ParameterError
from gemcut.files import UnreadableError, read_bounded

MAX_REQUESTS = 1_000_000
MAX_TRACE = 1 << 30
MAX_TOKENS = 1 << 20
#: Random prompts take token ids from here: all of Gemma's vocabulary but what is special or a single byte.
TOKENS = (1000, 200_000)
_BOS = 2
#: Short common words; each is one token of most vocabularies, Gemma's included.
# fmt: off
_WORDS = (
    *(
        "time",
        "year",
        "people",
        "way",
        "day",
        "man",
        "thing",
        "woman",
        "life",
        "child",
        "world",
        "school",
        "state",
        "family",
        "student",
        "group",
        "country",
        "problem",
        "hand",
        "part",
        "place",
        "case",
        "week",
        "company",
        "system",
        "program",
        "question",
        "work",
        "night",
        "point",
        "home",
        "water",
        "room",
        "mother",
        "area",
        "money",
        "story",
        "fact",
        "month",
        "lot",
        "right",
        "study",
        "book",
        "eye",
        "job",
        "word",
        "business",
        "issue",
        "side",
        "kind",
        "head",
        "house",
        "service",
        "friend",
        "father",
        "power",
        "hour",
    ),
)


@dataclass(frozen=True)
class Row:
    """One request.

    Attributes:
        at: when it is due, in seconds from the beginning.
        prompt: token ids.
        new: tokens of the answer.
        temperature, seed: as in a request.
    """

    at: float
    prompt: tuple[int, ...]
    new: int
    temperature: float = 0.0
    seed: int = 0


def make_trace(
    rate: float, count: int, prompt: tuple[int, int], new: tuple[int, int], seed: int, number: int = 0
) -> list[Row]:
    """``count`` requests of a Poisson process.

    Args:
        rate: requests a second; infinity: all at once.
        count: how many.
        prompt, new: least and most tokens of prompts and answers; lengths are even on a logarithmic scale.
        seed, number: the same two give the same requests. Another ``number`` gives other prompts, so that a server's
            prefix cache finds nothing of a round before.
    """
    chance, at, rows = random.Random(f"{seed} {number}"), 0.0, []

    def length(bounds: tuple[int, int]) -> int:
        return round(math.exp(chance.uniform(math.log(bounds[0]), math.log(bounds[1]))))

    for i in range(count):
        at += 0.0 if rate == math.inf else chance.expovariate(rate)
        ids = (_BOS, *(chance.randrange(*TOKENS) for _ in range(length(prompt) - 1)))
        rows.append(Row(round(at, 4), ids, length(new), 0.0, i))
    return rows


def as_text(row: Row) -> str:
    """Words in the place of the prompt's tokens, about as many: for servers that take text alone."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in row.prompt[1:]) or _WORDS[0]


def read_trace(path: Path) -> list[Row]:
    """The requests of a trace, one JSON object a line: ``at``, ``prompt``, ``new``, ``temperature``, ``seed``.

    Raises ParameterError that names the line.
    """
    try:
        text = read_bounded(path, MAX_TRACE).decode()
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not UTF-8; expected a trace, one JSON object a line") from None
    except UnreadableError as error:
        raise ParameterError(f"{path} {error}") from None
    except (OSError, ValueError) as error:
        raise ParameterError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(_row(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                said = f"no {error}" if isinstance(error, KeyError) else str(error)[:100]
                raise ParameterError(f"{path}, line {number}: {said}; expected at, prompt (token ids), new") from None
    if not rows or len(rows) > MAX_REQUESTS:
        raise ParameterError(f"{path} has {len(rows):,} requests; expected 1 to {MAX_REQUESTS:,}")
    return sorted(rows, key=lambda row: row.at)


def write_trace(path: Path, rows: list[Row]) -> None:
    """Write a trace that `read_trace` and benchmarks/serving_engine.py read."""
    lines = (
        {"at": row.at, "prompt": list(row.prompt), "new": row.new, "seed": row.seed, "temperature": row.temperature}
        for row in rows
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _row(data: dict[str, Any]) -> Row:
    at, prompt, new = data["at"], data["prompt"], data["new"]
    temperature, seed = data.get("temperature", 0.0), data.get("seed", 0)
    if not _number(at) or not 0 <= at < 1e6:
        raise ValueError("at is no number of seconds")
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_TOKENS:
        raise ValueError(f"prompt is no list of 1 to {MAX_TOKENS:,} token ids")
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in prompt):
        raise ValueError("prompt has something that is no token id")
    if not isinstance(new, int) or isinstance(new, bool) or not 0 < new <= MAX_TOKENS:
        raise ValueError(f"new is no whole number from 1 to {MAX_TOKENS:,}")
    if not _number(temperature) or not 0 <= temperature <= 2:
        raise ValueError("temperature is no number from 0 to 2")
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
        raise ValueError("seed is no whole number")
    return Row(float(at), tuple(prompt), new, float(temperature), seed)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
