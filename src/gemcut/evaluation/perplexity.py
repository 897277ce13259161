"""Perplexity of a text of any length, and what its tokens cost along the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemcut.errors import ParameterError
from gemcut.evaluation.asking import Asker
from gemcut.evaluation.requests import Rolling
from gemcut.gemma import Gemma


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of one text. Every token counts once; ``<bos>`` is context and not counted.

    Attributes:
        logprob: sum of the tokens' log-probabilities (natural logarithm).
        window: tokens of the network's context, ``<bos>`` included; ``stride`` of them are new in each window.
    """

    tokens: int
    bytes: int
    words: int
    logprob: float
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-probability of a token."""
        return _exp(-self.logprob / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """The same for a word (what stands between spaces): it can be compared between tokenizers."""
        return _exp(-self.logprob / max(1, self.words))

    @property
    def bits_per_byte(self) -> float:
        """Bits for a byte of the text in UTF-8."""
        return -self.logprob / math.log(2) / max(1, self.bytes)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def text_perplexity(gemma: Gemma, text: str, *, window: int = 0, stride: int = 0) -> Perplexity:
    """The perplexity of a text.

    Args:
        window: tokens that the network sees at once; 0: as many as the context holds.
        stride: new tokens in each window but the first, at most window - 1; 0: half of it.

    Raises:
        ParameterError: the text is empty, or window and stride are no such numbers.
    """
    most = gemma.engine.max_context
    if window and not 2 <= window <= most:
        raise ParameterError(f"window is {window}; expected 2 to {most}, the model's context")
    size = window or most
    if stride and not 1 <= stride <= size - 1:
        raise ParameterError(f"stride is {stride}; expected 1 to {size - 1}, the window without <bos>")
    if not text:
        raise ParameterError("the text is empty; expected at least one token")
    answer = Asker(gemma).answer(Rolling(text=text, window=size, stride=stride))
    return Perplexity(
        tokens=answer.tokens[0],
        bytes=len(text.encode()),
        words=len(text.split()),
        logprob=answer.logprobs[0],
        window=size,
        stride=stride or max(1, (size - 1) // 2),
    )
