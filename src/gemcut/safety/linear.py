"""A linear model over hashed n-grams of words: trained in seconds, kept in one .npz file, scored with numpy.

Features are the words and pairs of words of a text, each hashed to one of 2^bits weights, counted once a text and
divided by the root of their number. A logistic function of their weighted sum is the score.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut.errors import ParameterError
from gemcut.safety.judge import check_policy
from gemcut.text.document import Document
from gemcut.text.measures import Batch, ngrams
from gemcut.text.split import HASH_VERSION

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "gemcut-linear-1"
SIZES = (1, 2)  # words of an n-gram
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Features:
    """Weights' numbers of some texts, one text after another; ``begin`` says where each begins."""

    index: NDArray[np.int64]
    begin: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.begin) - 1

    @property
    def scale(self) -> NDArray[np.float64]:
        """1 / root of each text's number of features."""
        found: NDArray[np.float64] = 1 / np.sqrt(np.maximum(np.diff(self.begin), 1))
        return found


def features(documents: Sequence[Document], bits: int) -> Features:
    """The features of each document, each once and sorted."""
    terms = Batch(documents).terms
    keys = []
    for size in SIZES:
        hashes, owner = ngrams(terms, size)
        keys.append((owner.astype(np.uint64) << np.uint64(bits)) | (hashes >> np.uint64(64 - bits)))
    every = np.unique(np.concatenate(keys))
    owner = (every >> np.uint64(bits)).astype(np.int64)
    begin = np.searchsorted(owner, np.arange(len(documents) + 1))
    return Features((every & np.uint64((1 << bits) - 1)).astype(np.int64), begin)


class LinearJudge:
    """One set of weights for each policy: ``weights`` (policies, 2^bits) and ``bias`` (policies)."""

    def __init__(self, policies: Sequence[str], weights: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        self.policies, self._weights, self._bias = tuple(policies), weights, bias
        self._bits = int(weights.shape[1]).bit_length() - 1

    def scores(self, documents: Sequence[Document], policy: str) -> NDArray[np.float64]:
        """The score of each document. Raises ParameterError for an unknown policy."""
        at = check_policy(policy, self.policies)
        found = features(documents, self._bits)
        return _probability(_sums(self._weights[at], found) * found.scale + float(self._bias[at]))

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``."""
        return float(self.scores([Document("", "", text)], policy)[0])

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all."""
        about = json.dumps({"format": FORMAT, "hash": HASH_VERSION, "policies": self.policies}).encode()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, about=np.frombuffer(about, np.uint8), weights=self._weights, bias=self._bias)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> LinearJudge:
        """Read what ``save`` wrote; nothing in it is ever run. Raises ParameterError where it is something else."""
        try:
            with zipfile.ZipFile(path) as packed:
                if sum(entry.file_size for entry in packed.infolist()) > MOST_BYTES:
                    raise ParameterError(f"{path} would take more than {MOST_BYTES >> 30} GB; no model is so large")
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(data["about"].tobytes())
                weights, bias = data["weights"], data["bias"]
            policies = about["policies"]
            size = weights.shape[1]
            good = (
                about["format"] == FORMAT
                and weights.dtype == bias.dtype == np.float32
                and weights.shape == (len(policies), size)
                and bias.shape == (len(policies),)
                and size & (size - 1) == 0
                and all(isinstance(policy, str) for policy in policies)
                and np.isfinite(weights).all()
                and np.isfinite(bias).all()
            )
        except OSError as error:
            raise ParameterError(f"cannot read the model {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, zipfile.BadZipFile):
            good = False
        if not good:
            raise ParameterError(f"{path} is no linear model; `gemcut safety train` writes one")
        if about["hash"] != HASH_VERSION:
            raise ParameterError(f"{path} was trained with other hashes ({about['hash']}); train it again")
        return cls(policies, weights, bias)


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdaGrad on the logistic loss, ``decay`` pulling weights to 0."""

    bits: int = 18
    epochs: int = 5
    rate: float = 0.5
    decay: float = 1e-6
    batch: int = 64
    seed: int = 1

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 24 or not 1 <= self.epochs <= 1000:
            raise ParameterError("bits must be 8 to 24 and epochs 1 to 1000")


def train(
    positive: Sequence[str],
    negative: Sequence[str],
    policy: str,
    options: Training | None = None,
    report: Callable[[int, float], None] | None = None,
) -> LinearJudge:
    """A model that tells ``positive`` texts (score near 1) from ``negative`` ones (near 0).

    Both sets weigh the same, however many texts they hold. ``report`` hears (epoch, mean loss). Raises ParameterError
    where a set is empty.
    """
    options = options or Training()
    if not positive or not negative:
        raise ParameterError(f"{'positive' if not positive else 'negative'} texts are missing; a model needs both")
    documents = [Document("", "", text) for text in (*positive, *negative)]
    found = features(documents, options.bits)
    target = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    weight = np.repeat([0.5 / len(positive), 0.5 / len(negative)], [len(positive), len(negative)]) * len(documents)
    weights, bias = _fit(found, target, weight, options, report)
    return LinearJudge([policy], weights[None].astype(np.float32), np.array([bias], np.float32))


def train_on_scores(
    texts: Sequence[str], scores: Sequence[float], policy: str, options: Training | None = None
) -> LinearJudge:
    """A model that gives each text about the score that somebody else gave it, 0 to 1.

    Raises ParameterError where there is no text, or a score is no such number.
    """
    options = options or Training()
    target = np.asarray(scores, np.float64)
    if not texts or len(texts) != len(target):
        raise ParameterError(f"{len(texts)} texts and {len(target)} scores; expected some, a score for each text")
    if not ((target >= 0) & (target <= 1)).all():
        raise ParameterError("a score is no number from 0 to 1")
    found = features([Document("", "", text) for text in texts], options.bits)
    weights, bias = _fit(found, target, np.ones(len(target)), options, None)
    return LinearJudge([policy], weights[None].astype(np.float32), np.array([bias], np.float32))


def _fit(
    found: Features,
    target: NDArray[np.float64],
    weight: NDArray[np.float64],
    options: Training,
    report: Callable[[int, float], None] | None,
) -> tuple[NDArray[np.float64], float]:
    size = 1 << options.bits
    weights, squares = np.zeros(size), np.full(size, 1e-6)
    bias, bias_squares = 0.0, 1e-6
    draw = np.random.Generator(np.random.PCG64(options.seed))
    scale = found.scale
    for epoch in range(options.epochs):
        loss = 0.0
        order = draw.permutation(len(found))
        for start in range(0, len(order), options.batch):
            rows = order[start : start + options.batch]
            some = _rows(found, rows)
            score = _probability(_sums(weights, some) * scale[rows] + bias)
            logs = target[rows] * np.log(score + 1e-12) + (1 - target[rows]) * np.log(1 - score + 1e-12)
            loss -= float((weight[rows] * logs).sum())
            error = weight[rows] * (score - target[rows])
            each = np.repeat(error * scale[rows], np.diff(some.begin)) / len(rows)
            touched, inverse = np.unique(some.index, return_inverse=True)
            gradient = np.bincount(inverse, each, len(touched)) + options.decay * weights[touched]
            squares[touched] += gradient**2
            weights[touched] -= options.rate * gradient / np.sqrt(squares[touched])
            step = float(error.mean())
            bias_squares += step**2
            bias -= options.rate * step / bias_squares**0.5
        if report is not None:
            report(epoch, loss / len(order))
    return weights, bias


def _rows(found: Features, rows: NDArray[np.int64]) -> Features:
    sizes = np.diff(found.begin)[rows]
    begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    places = np.arange(begin[-1]) - np.repeat(begin[:-1] - found.begin[rows], sizes)
    return Features(found.index[places], begin)


def _sums(weights: NDArray[np.floating], found: Features) -> NDArray[np.float64]:
    total = np.concatenate([[0.0], np.cumsum(weights[found.index], dtype=np.float64)])
    out: NDArray[np.float64] = total[found.begin[1:]] - total[found.begin[:-1]]
    return out


def _probability(value: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(value, -30, 30)))
    return out
