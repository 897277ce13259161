"""Canaries: random secrets that are put into training data a known number of times, to see what is remembered.

Exposure (Carlini et al. 2019) says how far a canary stands out among the secrets that might have been in its place:
log2 of how many there are, minus log2 of its rank by likelihood. It is estimated against other secrets drawn at random:
0 is the middle of nothing, and a canary that beats all N of them has an exposure of at least log2(N + 1).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import DataError, ParameterError
from gemcut.files import UnreadableError, read_json
from gemcut.gemma import Gemma

FORMAT = 1
_FORM = "The access code of vault {name} is "
_DIGITS = 9


@dataclass(frozen=True)
class Canary:
    """A secret: what stands before it, its digits, and how often it was planted."""

    context: str
    secret: str
    times: int

    @property
    def text(self) -> str:
        return f"{self.context}{self.secret}."


def make_canaries(times: Sequence[int], each: int, seed: int) -> list[Canary]:
    """``each`` canaries for every number of repetitions. Raises ParameterError for numbers out of range."""
    if not times or min(times) < 0 or not 1 <= each <= 1000 or max(times) * each > 1_000_000:
        raise ParameterError("expected repetitions of at least 0, 1 to 1000 canaries of each, a million lines at most")
    draw = random.Random(seed)
    found = []
    for count in times:
        for _ in range(each):
            name = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))
            found.append(Canary(_FORM.format(name=name), _secret(draw), count))
    return found


def plant(canaries: Sequence[Canary], documents: Path, key: Path, seed: int) -> int:
    """Write the lines to train on, shuffled, and the key that says what they are; how many lines.

    Raises ParameterError where a file is there already: a key that is lost makes its canaries useless.
    """
    for path in (documents, key):
        if path.exists():
            raise ParameterError(f"{path} exists already; choose another name, or remove it")
    lines = [
        json.dumps({"text": canary.text, "source": "canaries"}) for canary in canaries for _ in range(canary.times)
    ]
    random.Random(seed).shuffle(lines)
    about = {"format": FORMAT, "canaries": [asdict(canary) for canary in canaries]}
    key.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    documents.write_text("".join(line + "\n" for line in lines), "utf-8")
    return len(lines)


def read_key(path: Path) -> list[Canary]:
    """The canaries of a key that `plant` wrote. Raises DataError where it is none."""
    try:
        found = read_json(path)
        if found["format"] != FORMAT:
            raise DataError(f"{path} is of format {found['format']}; this gemcut reads {FORMAT}")
        canaries = [Canary(str(e["context"]), str(e["secret"]), int(e["times"])) for e in found["canaries"]]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnreadableError as error:
        raise DataError(f"{path} {error}") from None
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} is no key of canaries; gemcut eval canaries plant writes one") from None
    if not canaries:
        raise DataError(f"{path} holds no canary")
    return canaries


def exposures(
    gemma: Gemma, canaries: Sequence[Canary], *, references: int = 255, seed: int = 1
) -> list[dict[str, Any]]:
    """Of each canary its repetitions, its rank among ``references`` other secrets, and its exposure in bits.

    ``bounded``: it beat all of them, so that its exposure is at least what is said.
    """
    if not 1 <= references <= 100_000:
        raise ParameterError(f"references is {references}; expected 1 to 100000")
    draw = random.Random(seed)
    found = []
    for canary in canaries:
        others = {_secret(draw, len(canary.secret)) for _ in range(references)} - {canary.secret}
        secrets = [canary.secret, *sorted(others)]
        before = gemma.encode(canary.context.rstrip())
        texts = [gemma.encode(f"{canary.context}{secret}.") for secret in secrets]
        start = next((i for i, (a, b) in enumerate(zip(before, texts[0], strict=False)) if a != b), len(before))
        scores = [math.fsum(own) for own in gemma.score(texts, start=max(1, start))]
        rank = 1 + sum(score >= scores[0] for score in scores[1:])
        found.append(
            {
                "times": canary.times,
                "rank": rank,
                "references": len(others),
                "exposure": math.log2(len(secrets)) - math.log2(rank),
                "bounded": rank == 1,
            }
        )
    return found


def by_times(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean exposure for each number of repetitions."""
    out = {}
    for times in sorted({each["times"] for each in found}):
        own = [each for each in found if each["times"] == times]
        out[str(times)] = {
            "canaries": len(own),
            "mean_exposure": math.fsum(each["exposure"] for each in own) / len(own),
            "beat_all": sum(each["bounded"] for each in own),
        }
    return out


def _secret(draw: random.Random, digits: int = _DIGITS) -> str:
    return "".join(draw.choice("0123456789") for _ in range(digits))
