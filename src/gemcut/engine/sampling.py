"""SamplingParams: how the next token is chosen. Words as in transformers' GenerationConfig and OpenAI's API."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gemcut.engine.grammar import Grammar
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    import numpy as np

    from gemcut.safety.watermark import Watermark

MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_BIAS = 1e9  # far beyond any logit, and fp32 stays finite
LEAST = 1e-30  # of what logits are divided by: fp32 stays finite, and 1 / it is a number on a GPU too


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request samples. Every field is checked here, once; a bad one raises ParameterError naming it.

    Attributes:
        max_new_tokens: most tokens to generate.
        min_new_tokens: no end-of-sequence token before this many.
        temperature: logits are divided by it; 0 is greedy, other numbers are at least 1e-30.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p.
        min_p: drop tokens less likely than min_p times the likeliest.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (Keskar et al. 2019).
        presence_penalty: subtracted from the logit of each token already generated.
        frequency_penalty: subtracted for each time a token was generated.
        logit_bias: added to the logits of single token ids.
        seed: makes the request repeatable, whatever runs beside it; None draws a fresh one.
        stop: texts that end the answer and are not part of it.
        ignore_eos: go on past end-of-sequence tokens (for benchmarks).
        logprobs: give each token's log-probability and this many likeliest alternatives; None gives none.
        do_sample: transformers' switch; False means greedy. None: decided by ``temperature``.
        watermark: marks the draws by a key (`gemcut.safety.watermark.Watermark`); None: no mark. It needs a draw.
        grammar: what the answer must match: a Grammar, or a JSON schema as a dict. None: anything.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    do_sample: bool | None = None
    grammar: Grammar | None = None
    watermark: Watermark | None = None

    def __post_init__(self) -> None:
        _whole(self, "max_new_tokens", 0, None)
        _whole(self, "min_new_tokens", 0, None)
        _whole(self, "top_k", 0, None)
        if self.temperature != 0 or isinstance(self.temperature, bool):
            _range(self, "temperature", LEAST, 100.0, "0 or ")
        _range(self, "top_p", 0.0, 1.0, above=True)
        _range(self, "min_p", 0.0, 1.0)
        _range(self, "repetition_penalty", LEAST, 10.0)
        _range(self, "presence_penalty", -2.0, 2.0)
        _range(self, "frequency_penalty", -2.0, 2.0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ParameterError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, which is {self.max_new_tokens}"
            )
        if self.seed is not None:
            _whole(self, "seed", -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _whole(self, "logprobs", 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise ParameterError(f"ignore_eos is {self.ignore_eos!r}; expected True or False")
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ParameterError(f"do_sample is {self.do_sample!r}; expected True or False")
        if self.do_sample and self.temperature == 0:
            raise ParameterError("do_sample=True contradicts temperature=0; raise the temperature or drop do_sample")
        if self.grammar is not None:
            object.__setattr__(self, "grammar", Grammar.of(self.grammar))
            for name in ("ignore_eos", "min_new_tokens"):
                if getattr(self, name):
                    raise ParameterError(f"{name} contradicts grammar: an answer ends where its grammar does; drop one")
        if self.watermark is not None:
            from gemcut.safety.watermark import Watermark

            if not isinstance(self.watermark, Watermark):
                raise ParameterError(f"watermark is {type(self.watermark).__name__}; expected a Watermark")
            if self.greedy:
                raise ParameterError(
                    "watermark contradicts temperature 0, do_sample=False and top_k=1: draws alone are marked; drop one"
                )
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0 or self.do_sample is False or self.top_k == 1

    @cached_property
    def bias_arrays(self) -> tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]:
        """``logit_bias`` as (token ids int64 [m], numbers fp32 [m])."""
        import numpy as np

        count = len(self.logit_bias)
        return (
            np.fromiter(self.logit_bias, np.int64, count),
            np.fromiter(self.logit_bias.values(), np.float32, count),
        )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> SamplingParams:
        """Build from keyword arguments of a front door; an unknown one raises naming it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ParameterError(
                f"unknown sampling parameter {unknown[0]!r}; known are: {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**kwargs)


def _whole(params: SamplingParams, name: str, low: int, high: int | None) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
        raise ParameterError(f"{name} is {value!r}; expected {expected}")


def _range(
    params: SamplingParams, name: str, low: float, high: float, besides: str = "", *, above: bool = False
) -> None:
    value = getattr(params, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (above and value == low):
        span = f"above {low:g} up to {high:g}" if above else f"from {low:g} to {high:g}"
        raise ParameterError(f"{name} is {value!r}; expected {besides}a number {span}")


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, (list, tuple)) or any(not isinstance(s, str) or not s for s in stops):
        raise ParameterError(f"stop is {value!r}; expected a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise ParameterError(f"stop has {len(stops)} texts; at most {MAX_STOPS} are allowed")
    return tuple(stops)


def _bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ParameterError(f"logit_bias is {value!r}; expected a mapping from token id to number")
    bias: dict[int, float] = {}
    for token, amount in value.items():
        try:
            key = int(token) if isinstance(token, str) else operator.index(token)  # JSON knows only text keys
            bias[key] = float(amount)
        except (TypeError, ValueError):
            raise ParameterError(f"logit_bias maps {token!r} to {amount!r}; expected a token id and a number") from None
        if not abs(bias[key]) <= MAX_BIAS:
            raise ParameterError(
                f"logit_bias of token {token} is {amount!r}; expected a number from {-MAX_BIAS:g} to {MAX_BIAS:g}"
            )
    return bias
