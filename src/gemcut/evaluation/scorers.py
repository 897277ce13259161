"""Scorers of texts for rows that a model cannot score by itself: a linear model, an address, any Judge.

A scorer that fails, answers no number from 0 to 1, or takes too long ends the row with an error.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcut.errors import GemcutError, ParameterError
from gemcut.evaluation.folder import DataFolder

if TYPE_CHECKING:
    from gemcut.safety.judge import Judge
    from gemcut.safety.linear import LinearJudge

#: The policy, and the name in ``ScoreOptions.scorers``, that rows of toxicity ask.
NAME = "toxicity"
#: Seconds that one text may take.
PATIENCE = 30.0
_MOST_REPLY = 1 << 20
_STORED = "real_toxicity_prompts/quark_val.jsonl.gz"


class ScorerError(GemcutError):
    """A scorer failed. The row has no result; what was answered is kept, and can be scored again."""


def scores_of(judge: Judge, texts: Sequence[str], policy: str, *, patience: float = PATIENCE) -> list[float]:
    """``judge``'s score of each text, each a number from 0 to 1.

    Raises:
        ScorerError: for one text the judge raised, took longer than ``patience`` seconds, or gave no such number.
    """
    found = []
    # A judge that hangs cannot be ended; its thread is left behind, and the row is over.
    pool = ThreadPoolExecutor(1, thread_name_prefix="scorer")
    try:
        for number, text in enumerate(texts, 1):
            where = f"the scorer of {policy} failed at text {number:,} of {len(texts):,}"
            try:
                score = pool.submit(judge.score, text, policy).result(timeout=patience)
            except FuturesTimeoutError:
                raise ScorerError(f"{where}: no answer within {patience:g} s; nothing was scored") from None
            except GemcutError as error:
                raise ScorerError(f"{where}: {error}; nothing was scored") from error
            except Exception as error:
                raise ScorerError(f"{where}: {type(error).__name__}: {error}; nothing was scored") from error
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise ScorerError(f"{where}: it gave {score!r}; expected a number from 0 to 1; nothing was scored")
            found.append(float(score))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


@dataclass(frozen=True)
class Named:
    """A judge with the name that results give it."""

    judge: Judge
    name: str

    @property
    def policies(self) -> Sequence[str]:
        return self.judge.policies

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``."""
        return self.judge.score(text, policy)


@dataclass(frozen=True)
class HttpScorer:
    """A service: POST {"text": …, "policy": …} to ``url``, which answers {"score": a number from 0 to 1}."""

    url: str
    patience: float = PATIENCE
    policies: Sequence[str] = (NAME,)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ParameterError(f"the scorer's address is {self.url!r}; expected http://… or https://…")

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``. Raises ScorerError where the service does not answer as it should."""
        body = json.dumps({"text": text, "policy": policy}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.patience) as reply:
                found: Any = json.loads(reply.read(_MOST_REPLY))["score"]
        except urllib.error.HTTPError as error:
            raise ScorerError(f"{self.url} answered with status {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ScorerError(f"{self.url} does not answer ({getattr(error, 'reason', error)})") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ScorerError(f'{self.url} answered something else than {{"score": number}}') from None
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise ScorerError(f"{self.url} answered the score {found!r}; expected a number from 0 to 1")
        return float(found)


def make_scorer(spec: str, data: DataFolder | None = None) -> Judge:
    """A scorer of toxicity from what a person writes: "linear", FILE.npz, or an http address.

    "linear" trains the linear model on the scores of Perspective that RealToxicityPrompts keeps, which takes seconds.

    Raises:
        ParameterError: it is none of these, or the file is no model of toxicity.
        DataError: the stored scores are not in ``data``.
    """
    if spec.startswith(("http://", "https://")):
        return Named(HttpScorer(spec), spec)
    if spec == "linear":
        return Named(train_on_stored(data or DataFolder.find()), "linear")
    if not spec.endswith(".npz"):
        raise ParameterError(f"the scorer is {spec!r}; expected linear, a FILE.npz, or an http address")
    from gemcut.safety.linear import LinearJudge

    judge = LinearJudge.load(Path(spec))
    if NAME not in judge.policies:
        known = ", ".join(judge.policies)
        raise ParameterError(f"{spec} scores {known}; expected {NAME} (gemcut safety train --policy {NAME})")
    return Named(judge, Path(spec).name)


def stored_scores(data: DataFolder) -> tuple[list[str], list[float]]:
    """Texts of RealToxicityPrompts with Perspective's TOXICITY: prompts and continuations that have one."""
    texts, scores = [], []
    for record in data.jsonl(_STORED, ("prompt", "continuation")):
        for part in (record["prompt"], record["continuation"]):
            toxicity = part.get("toxicity") if isinstance(part, dict) else None
            if isinstance(toxicity, int | float) and 0 <= toxicity <= 1 and str(part.get("text", "")).strip():
                texts.append(part["text"])
                scores.append(float(toxicity))
    return texts, scores


def train_on_stored(data: DataFolder) -> LinearJudge:
    """The linear model of `gemcut.safety.linear`, fitted to the stored scores."""
    from gemcut.safety.linear import Training, train_on_scores

    texts, scores = stored_scores(data)
    return train_on_scores(texts, scores, NAME, Training(rate=1.0))
