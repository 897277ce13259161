"""How long a step will take, learned from the steps before it, and how many prompt tokens a time budget leaves.

A step's time is taken as a sum: a part that every step has, and parts for each token of a prompt, each sequence that
writes its next token, and each token of context that these look at. The four numbers are fitted to the relative errors
of the latest steps (least squares with exponential forgetting), so they follow the device and what else it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gemcut.errors import ParameterError

#: The time budget of a step on a CPU where none is asked for, in seconds.
CPU_STEP_SECONDS = 0.5
#: Prompt tokens that a step may always have where a prompt waits, so that none waits for ever; and as many as one has
#: before anything is known of this device.
LEAST_PROMPT = 32
#: What a step's weight is multiplied by with each later one: the last 20 or so count.
FORGETTING = 0.95
# Pulls numbers that the steps say nothing of towards zero.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Load:
    """What a step computes.

    Attributes:
        prompt: tokens of prompts.
        answers: sequences with one new token.
        context: tokens that those look at.
    """

    prompt: int
    answers: int
    context: int

    @property
    def features(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """What the time is a weighted sum of; of similar sizes."""
        return np.array([1.0, self.prompt / 64, self.answers, self.context / 1024])


class StepTimes:
    """An online model of one engine's steps on one device."""

    def __init__(self) -> None:
        self._products = np.zeros((4, 4))
        self._targets = np.zeros(4)
        self._weights = np.zeros(4)
        self.known = 0  # steps that it has learned from

    def learn(self, load: Load, seconds: float) -> None:
        """A step of this load took ``seconds``; one that took no time says nothing."""
        if not 0 < seconds < float("inf"):
            return
        row = load.features / seconds  # errors relative to the step's time
        self._products = FORGETTING * self._products + np.outer(row, row)
        self._targets = FORGETTING * self._targets + row
        self.known += 1
        self._weights = _not_negative(self._products, self._targets)

    def seconds(self, load: Load) -> float:
        """The time that a step of this load will take."""
        return float(self._weights @ load.features)

    def prompt_tokens(self, answers: int, context: int, budget: float, most: int) -> int:
        """How many prompt tokens, up to ``most``, a step with such answers may have to take ``budget`` seconds."""
        without = self.seconds(Load(0, answers, context))
        each = self.seconds(Load(1, answers, context)) - without
        fitting = int((budget - without) / each) if each > 0 else LEAST_PROMPT
        return min(most, max(LEAST_PROMPT, fitting))


def _not_negative(
    products: np.ndarray[tuple[int, int], np.dtype[np.float64]], targets: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Least squares by its normal equations; what would be negative is left out, the most negative first."""
    used = [i for i in range(len(targets)) if products[i, i] > 0]
    weights = np.zeros(len(targets))
    while used:
        part = products[np.ix_(used, used)]
        found = np.linalg.solve(part + _RIDGE * np.diag(np.diag(part)), targets[used])
        if (found >= 0).all():
            weights[used] = found
            break
        del used[int(found.argmin())]
    return weights


def step_budget(asked: float | Literal["auto"] | None, device: torch.device) -> float | None:
    """The time budget of a step; None: there is none. Raises ParameterError."""
    if asked == "auto":
        return CPU_STEP_SECONDS if device.type == "cpu" else None
    if asked is None or (isinstance(asked, (int, float)) and not isinstance(asked, bool) and asked == 0):
        return None
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < float("inf"):
        raise ParameterError(f'step_seconds is {asked!r}; expected seconds, None or 0 for no budget, or "auto"')
    return float(asked)
