"""A watermark: draws that favour tokens by a secret key, without changing what any one draw's chances are.

Tournament sampling (SynthID-text; Dathathri et al., Nature 2024) over the tokens that may be drawn, after temperature,
top-k and top-p. Each of the layers holds a bit for each token, a keyed hash of the last H tokens and the token itself;
with p the chance of bit 1, a token's probability is multiplied by 1 + bit - p. Averaged over keys that changes nothing.
A context of H tokens that this text has had already is not marked again: repeated it would always favour the same.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYERS = 30
#: Tokens that play the tournament; beyond the 64 likeliest there is little to gain and time to lose.
MARKED = 64
CONTEXT = 4
LEAST_KEY, LONGEST_KEY = 16, 4096  # bytes
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_ONE = np.uint64(1)


@dataclass(frozen=True)
class Detection:
    """What a detector found.

    Attributes:
        p_value: how likely a text without this key's watermark would look as marked as this, or more so.
        mean: the mean of the bits; 1/2 without a watermark.
        tokens: tokens that count: each context of H tokens once.
        z: by how many standard deviations the mean lies above 1/2.
    """

    p_value: float
    mean: float
    tokens: int
    z: float


class Contexts:
    """The contexts of H tokens that one answer has had; it grows with the answer's tokens, which never change."""

    def __init__(self, context: int, prompt_length: int) -> None:
        self._length = context
        self._end = prompt_length + context  # behind the first context that was not noted yet
        self._seen: set[tuple[int, ...]] = set()

    def fresh(self, tokens: Sequence[int]) -> bool:
        """Whether the next token is marked: H generated tokens are there, and they did not stand there before. It may
        be asked again for the same place, and answers the same."""
        while self._end < len(tokens):
            self._seen.add(tuple(tokens[self._end - self._length : self._end]))
            self._end += 1
        return self._end == len(tokens) and tuple(tokens[self._end - self._length :]) not in self._seen


class Watermark:
    """One key's watermark. It holds no state of any text, so requests may share it, in any batch."""

    def __init__(self, key: bytes, *, context: int = CONTEXT, layers: int = LAYERS) -> None:
        """Raises ParameterError for a key that could be guessed, or numbers out of range."""
        if not LEAST_KEY <= len(key) <= LONGEST_KEY:
            raise ParameterError(
                f"the watermark's key has {len(key)} bytes; expected {LEAST_KEY} to {LONGEST_KEY:,}, such as "
                "`openssl rand -hex 24` prints"
            )
        if not 1 <= context <= 16 or not 1 <= layers <= 64:
            raise ParameterError(f"context is {context} and layers {layers}; expected 1 to 16, and 1 to 64")
        self.context, self.layers = context, layers
        self._key = hashlib.blake2b(key, digest_size=32, person=b"gemcut-watermark").digest()
        self._shifts = np.arange(layers, dtype=np.uint64)

    @classmethod
    def read(cls, path: str | Path, *, context: int = CONTEXT) -> Watermark:
        """With the key in a file. Raises ParameterError where it is missing."""
        try:
            with open(path, "rb") as file:
                key = file.read(LONGEST_KEY + 64).strip()
        except OSError as error:
            raise ParameterError(
                f"cannot read the watermark's key {path}: {error.strerror or error}; without the key that marked a "
                "text nothing can be detected"
            ) from None
        return cls(key, context=context)

    def __repr__(self) -> str:
        return "Watermark(…)"  # the key is a secret

    def bits(self, before: Sequence[int], candidates: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[layers, m]: the bits of candidate tokens behind the H tokens ``before``."""
        data = struct.pack(f"<{len(before)}q", *before)
        seed = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "little")
        mixed = _mixed(candidates.astype(np.uint64), seed)
        found: NDArray[np.uint8] = ((mixed[None, :] >> self._shifts[:, None]) & _ONE).astype(np.uint8)
        return found

    def reweighed(self, probabilities: NDArray[np.float64], bits: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The probabilities [m] after all rounds of the tournament, each of two players; their sum stays."""
        total = float(probabilities.sum())
        found = probabilities / total
        for row in bits.astype(np.float64):
            found *= row + (1.0 - float(row.dot(found)))
        found *= total / float(found.sum())
        return found

    def choose(
        self,
        probabilities: NDArray[np.float64],
        ids: NDArray[np.int64],
        tokens: Sequence[int],
        contexts: Contexts,
        uniform: float,
    ) -> int:
        """Draw a token of those that may be drawn, likeliest first.

        The ``MARKED`` likeliest play the tournament for the probability they have together, which no key changes; the
        others keep theirs. So the time does not depend on the vocabulary.
        """
        if contexts.fresh(tokens):
            bits = self.bits(tokens[len(tokens) - self.context :], ids[:MARKED])
            front = self.reweighed(probabilities[:MARKED], bits)
            probabilities = front if len(ids) <= MARKED else np.concatenate((front, probabilities[MARKED:]))
        sums = probabilities.cumsum()
        place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
        if place == len(sums):  # what is rounded must not draw a token beyond the last
            place = int(np.flatnonzero(probabilities)[-1])
        return int(ids[place])

    def detect(self, tokens: Sequence[int]) -> Detection:
        """Look for the watermark in token ids of a text. Each context counts once, so repetition proves nothing."""
        total, count = 0, 0
        seen: set[tuple[int, ...]] = set()
        for place in range(self.context, len(tokens)):
            before = tuple(tokens[place - self.context : place])
            if before in seen:
                continue
            seen.add(before)
            total += int(self.bits(before, np.array([tokens[place]], np.int64)).sum())
            count += 1
        bits = count * self.layers
        if not bits:
            return Detection(1.0, 0.5, 0, 0.0)
        z = (total - bits / 2) / math.sqrt(bits / 4)
        return Detection(_binomial_tail(total, bits), total / bits, count, z)


def _mixed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Each value with the seed, which a keyed hash made, as 64 bits that look random (SplitMix64's finish)."""
    x = values * _STEP + np.uint64(seed)
    x ^= x >> _SHIFTS[0]
    x *= _MIX[0]
    x ^= x >> _SHIFTS[1]
    x *= _MIX[1]
    x ^= x >> _SHIFTS[2]
    return x


def _binomial_tail(hits: int, total: int) -> float:
    """P(X >= hits) of a fair coin thrown ``total`` times, exactly, by logarithms of binomial coefficients."""
    if hits <= 0:
        return 1.0
    lengths = range(
        hits, min(total, max(hits, total // 2) + 20 * math.isqrt(total) + 100) + 1
    )  # beyond, nothing that a float holds
    logs = np.array([_log_choose(total, k) for k in lengths]) - total * math.log(2)
    return min(1.0, float(np.exp(logs).sum()))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
