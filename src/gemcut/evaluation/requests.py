"""What a benchmark asks of a model, and what the model answers: five kinds of requests, free of any model.

Every prompt is a text, which the runner begins with ``<bos>``, or a dialogue, which it writes in the model's chat
format (a system message is folded into the first user turn, never dropped).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias


class Message(NamedTuple):
    """One turn of a dialogue. ``role``: "system", "user" or "assistant"."""

    role: str
    content: str


#: A dialogue, which ends with a user's turn.
Dialogue: TypeAlias = tuple[Message, ...]


def user(text: str, system: str = "") -> Dialogue:
    """The dialogue of one user turn, with a system message before it where there is one."""
    return (*((Message("system", system),) if system else ()), Message("user", text))


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which continuation is likeliest: the summed log-probability of each one behind its context.

    Attributes:
        continuations: of at least one text each, with the space that joins it to its context (" yes"); or, with
            several ``contexts``, one for all of them.
        context: what stands before every continuation, behind ``prefix``.
        contexts: where each choice has a context of its own (partial scoring: one continuation behind several).
        prefix: what begins the prompt and is shared with other items (a description, shots); its tokens are made once.
        dialogue: instead of ``prefix`` and ``context``: the turns before the model's, which the continuation begins.
        unconditional: also score each continuation behind this text alone ("Answer:"), for that normalisation.
    """

    continuations: tuple[str, ...]
    context: str = ""
    contexts: tuple[str, ...] = ()
    prefix: str = ""
    dialogue: Dialogue = ()
    unconditional: str | None = None


@dataclass(frozen=True, kw_only=True)
class Letters:
    """The log-probabilities of single tokens as the next one, all from one pass.

    Attributes:
        letters: texts that are one token each behind the context (" A", " B"); where one is not, the runner scores
            them as Choices, and says so once.
        context, prefix, dialogue: as in Choices.
    """

    letters: tuple[str, ...]
    context: str = ""
    prefix: str = ""
    dialogue: Dialogue = ()


@dataclass(frozen=True, kw_only=True)
class Generate:
    """An answer, or ``n`` of them, until a stop text.

    Attributes:
        max_new_tokens: most tokens of an answer.
        stop: texts that end an answer and are no part of it.
        sampling: further fields of SamplingParams; empty is greedy.
        n: answers; each has a seed of its own, made of the run's seed and the item.
        context, prefix, dialogue: as in Choices.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    context: str = ""
    prefix: str = ""
    dialogue: Dialogue = ()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Which of some whole texts is likelier: the log-probability of every token behind ``<bos>``, summed for each."""

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """The log-probability of every token of one text, of any length: each once, in windows of ``window`` tokens of
    which the first ``window - stride`` are context alone (0: the model's context, and half of it)."""

    text: str
    window: int = 0
    stride: int = 0


Request: TypeAlias = Choices | Letters | Generate | Pair | Rolling


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered to one request. Lists stand in the order of the request's choices, letters or texts.

    Attributes:
        logprobs: natural logarithms, summed over the tokens.
        tokens: how many tokens each of them sums over; of a generated answer how many it has.
        greedy: whether each one's tokens were the likeliest ones at their places.
        unconditional: ``logprobs`` behind the request's ``unconditional``.
        texts: generated answers, without stop text.
        finish: why each of them ended: "stop" or "length".
    """

    logprobs: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()
    unconditional: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
