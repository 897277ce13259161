"""Thresholds from labelled texts, and what they do: F1, false positives, over-refusal, with 95 % intervals.

Half of the texts choose the threshold, the other half says how good it is, so that no number is of texts it was made
from. Which half a text is in follows from the text alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Interval = tuple[float, float]
Z = 1.959963984540054  # of 95 %
DRAWS = 1000
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Labelled:
    """A text, and of each policy that was looked at whether the text breaks it. ``prompt``: what it answers."""

    text: str
    labels: Mapping[str, bool]
    prompt: str | None = None


@dataclass(frozen=True)
class Fit:
    """One policy's threshold, and what it does on texts it was not chosen from. Rates with their intervals."""

    policy: str
    threshold: float
    texts: int
    broken: int
    f1: float
    f1_interval: Interval
    recall: float
    recall_interval: Interval
    false_positives: float
    false_positives_interval: Interval


def wilson(hits: int, total: int) -> Interval:
    """The 95 % interval of a share (Wilson 1927); (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    share, bend = hits / total, Z * Z / total
    middle = (share + bend / 2) / (1 + bend)
    half = Z / (1 + bend) * math.sqrt(share * (1 - share) / total + bend / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def f1_of(flagged: NDArray[np.bool_], broken: NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is flagged and nothing broken."""
    right = int((flagged & broken).sum())
    total = int(flagged.sum() + broken.sum())
    return 2 * right / total if total else 0.0


def best_threshold(scores: NDArray[np.float64], broken: NDArray[np.bool_], most_false: float) -> float:
    """The threshold with the highest F1 among those that flag at most this share of texts that break nothing.

    It lies midway between two scores, so that a score a little beside one of them falls on the right side.
    """
    levels = np.unique(scores)
    candidates = [*((levels[1:] + levels[:-1]) / 2).tolist(), min(1.0, float(levels[-1]) + 1e-6)]
    candidates.append(float(levels[0]) / 2)  # which flags all
    clean = max(1, int((~broken).sum()))
    best, found = (-1.0, 0.0), 1.0
    for candidate in candidates:
        flagged = scores >= candidate
        if (flagged & ~broken).sum() / clean <= most_false:
            worth = f1_of(flagged, broken), candidate  # of equals the highest: it flags the fewest
            if worth > best:
                best, found = worth, candidate
    return found


def fit(
    policy: str,
    texts: Sequence[Labelled],
    score: Callable[[Labelled], float],
    *,
    most_false: float = 0.05,
    seed: int = 1,
) -> Fit:
    """Choose one policy's threshold. Raises ParameterError where either half lacks texts of one kind."""
    own = [text for text in texts if policy in text.labels]
    scores = np.array([score(text) for text in own], np.float64)
    broken = np.array([text.labels[policy] for text in own], bool)
    held = np.array([hashlib.sha256(text.text.encode("utf-8", "replace")).digest()[0] % 2 == 1 for text in own], bool)
    for half, what in ((~held, "choose a threshold"), (held, "measure it")):
        for kind, word in ((broken, "break"), (~broken, "do not break")):
            if len(own) == 0 or int((half & kind).sum()) < 2:
                raise ParameterError(
                    f"{policy}: fewer than two texts that {word} it are left to {what}; label more (at least 20)"
                )
    threshold = best_threshold(scores[~held], broken[~held], most_false)
    flagged, truth = scores[held] >= threshold, broken[held]
    draw = np.random.Generator(np.random.PCG64(seed))
    rows = draw.integers(0, len(truth), (DRAWS, len(truth)))
    spread = np.quantile([f1_of(flagged[some], truth[some]) for some in rows], (0.025, 0.975))
    hits, wrong = int((flagged & truth).sum()), int((flagged & ~truth).sum())
    clean = int((~truth).sum())
    return Fit(
        policy=policy,
        threshold=threshold,
        texts=len(truth),
        broken=int(truth.sum()),
        f1=f1_of(flagged, truth),
        f1_interval=(float(spread[0]), float(spread[1])),
        recall=hits / int(truth.sum()),
        recall_interval=wilson(hits, int(truth.sum())),
        false_positives=wrong / clean,
        false_positives_interval=wilson(wrong, clean),
    )


def read_labelled(path: Path, policies: Sequence[str]) -> list[Labelled]:
    """JSON lines with "text", "labels" ({policy: true or false}) and perhaps "prompt". Raises ParameterError."""
    found: list[Labelled] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise ParameterError(f"{path}, line {number}: no JSON") from None
        labels: Any = row.get("labels") if isinstance(row, dict) else None
        good = isinstance(labels, dict) and all(isinstance(value, bool) for value in labels.values())
        if not good or not isinstance(row.get("text"), str) or not isinstance(row.get("prompt"), str | None):
            raise ParameterError(f'{path}, line {number}: expected {{"text": …, "labels": {{policy: true or false}}}}')
        for name in labels:
            if name not in policies:
                raise ParameterError(
                    f"{path}, line {number}: the policy {name[:64]!r} has no judge; known: {', '.join(policies)}"
                )
        found.append(Labelled(row["text"], labels, row.get("prompt")))
    if not found:
        raise ParameterError(f"{path} holds no labelled text")
    return found


def read_xstest(path: Path) -> tuple[list[str], list[str]]:
    """(prompts that are safe and look otherwise, prompts that are not) of XSTest's CSV. Raises ParameterError."""
    rows = list(csv.DictReader(io.StringIO(_text(path))))
    if not rows or not {"prompt", "type"} <= set(rows[0]):
        raise ParameterError(f"{path} is not XSTest's CSV; expected columns prompt and type")
    safe = [row["prompt"] for row in rows if not (row["type"] or "").startswith("contrast")]
    unsafe = [row["prompt"] for row in rows if (row["type"] or "").startswith("contrast")]
    if not safe or not unsafe:
        raise ParameterError(f"{path} holds no safe prompts, or no contrasts; expected XSTest's CSV")
    return safe, unsafe


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ParameterError(f"{path} has more than {MOST_BYTES >> 30} GB; no set of labelled texts is so large")
        return path.read_text("utf-8")
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not UTF-8") from None
