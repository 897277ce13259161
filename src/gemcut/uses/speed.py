"""How fast a model is here: prompts a second, answers a second, and what the memory's speed would allow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

from gemcut.engine import SamplingParams
from gemcut.engine.results import run_together
from gemcut.errors import ContextLengthError, ParameterError
from gemcut.gemma import Gemma
from gemcut.model.quantized import QuantizedOwner


@dataclass(frozen=True)
class Speed:
    """Figures of so many requests at once; each list has a value a repetition.

    Attributes:
        batch: requests at once.
        prefill: prompt tokens a second, of all requests together: from the call to the last first token.
        first: seconds until every request had its first token.
        decode: new tokens a second, of all together, from the first token on.
    """

    batch: int
    prefill: list[float]
    first: list[float]
    decode: list[float]


def weight_bytes(gemma: Gemma) -> int:
    """Bytes of the weights on this device, all of which a step of decoding reads: the embedding as the head."""
    network = gemma.model
    packed = sum(
        weight.nbytes for module in network.modules() if isinstance(module, QuantizedOwner) for weight in module.weights
    )
    return packed + sum(parameter.nbytes for parameter in network.parameters())


def read_bandwidth(device: torch.device, nbytes: int = 1 << 28, repetitions: int = 5) -> float:
    """Bytes a second that a sum over memory of this size reads; the fastest repetition."""
    data = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(repetitions + 1):  # the first one warms up
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def measure(
    gemma: Gemma,
    *,
    prompt: int = 512,
    new: int = 64,
    batch: int = 1,
    repetitions: int = 3,
    seed: int = 0,
    heard: Callable[[int, int], None] | None = None,
) -> Speed:
    """Measure one model with ``batch`` requests at once, greedily and to the last token.

    Each repetition has random prompts of its own, so that nothing is in the cache; they run once with one new token,
    which is the prefill, and once more, then from the cache, with all of them, which is the decoding. One repetition
    before does not count.

    Args:
        prompt, new: tokens of each prompt and answer; ``new`` is at least 2.
        heard: called with (repetitions done, in all).

    Raises:
        ParameterError: a number is out of range.
        ContextLengthError: prompt and answer do not fit the context.
    """
    for name, value, low in (
        ("prompt", prompt, 1),
        ("new", new, 2),
        ("batch", batch, 1),
        ("repetitions", repetitions, 1),
    ):
        if isinstance(value, bool) or not low <= value <= 1 << 20:
            raise ParameterError(f"{name} is {value}; expected {low} or more")
    limit = gemma.engine.max_context
    if prompt + new > limit:
        raise ContextLengthError(f"{prompt} and {new} tokens are asked for, the context holds {limit}")
    random, size = Random(seed), gemma.config.vocab_size
    found = Speed(batch, [], [], [])
    for place in range(repetitions + 1):
        ids = [[random.randrange(size) for _ in range(prompt)] for _ in range(batch)]
        seconds = _run(gemma, ids, 1)[0]
        _, decode = _run(gemma, ids, new)
        if place:
            found.prefill.append(batch * prompt / seconds)
            found.first.append(seconds)
            found.decode.append(batch * (new - 1) / decode)
        if heard is not None:
            heard(place, repetitions)
    return found


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def _run(gemma: Gemma, ids: list[list[int]], new: int) -> tuple[float, float]:
    """(seconds of the whole call, the longest time from a request's first token to its last)."""
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    results = [result.checked() for result in run_together([gemma.prepare_stream(own, params) for own in ids])]
    seconds = time.perf_counter() - started
    return seconds, max(result.stats.decode_seconds for result in results)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
