"""The sampler that chose one row at a time: slow, with no operation over several rows. What the engine's must equal.

Its own functions were held against float64 and transformers (test_sampler.py has those tests for the engine's).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.request import RowError, Sequence, TokenLogprob

# Nucleus sampling sorts this many of the likeliest tokens first, and the whole vocabulary only if they do not suffice.
SORT_FIRST = 1024
_MASK = 2**64 - 1
NOT_FINITE = "the logits of this request hold NaN or infinity"


def uniform(seed: int, place: int) -> float:
    """SplitMix64's number in [0, 1). Written out again: the same seed must give the same text for ever."""
    x = ((seed & _MASK) * 0xD1342543DE82EF95 + (place + 1) * 0x9E3779B97F4A7C15) & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


def sample(
    logits: Tensor, sequences: Many[Sequence], explain: Callable[[], str] = lambda: NOT_FINITE
) -> tuple[list[int | RowError], list[TokenLogprob | None]]:
    """Choose the next token of each sequence.

    Args:
        logits: fp32 [n, V] after the final soft-cap, one row a sequence.
        sequences: the n sequences; their parameters and tokens so far decide.
        explain: says in one line why logits are no finite numbers; asked only where some are not.

    Returns:
        n token ids, and for those that asked for it the log-probability of the choice with its alternatives. Where a
        row's own parameters fail, or its logits are not finite, a RowError stands in its place, and the others are
        what they would be without it.
    """
    errors: dict[int, RowError] = {}
    raw = logits
    for index, sequence in enumerate(sequences):
        try:
            if changes_logits(sequence):
                if logits is raw:
                    logits = raw.clone()
                change_logits(logits[index], sequence)
        except Exception as error:  # whatever it is, it is this request's own
            errors[index] = RowError.of(error)
    places, finite = _likeliest(logits, raw)
    tokens: list[int | RowError] = [*places]
    for index, good in enumerate(finite):
        if index not in errors and not good:
            errors[index] = RowError(explain())
    wanted: list[int | None] = [None] * len(sequences)
    for index, sequence in enumerate(sequences):
        try:
            if index not in errors and not sequence.request.params.greedy:
                tokens[index] = _draw(logits[index], sequence)
            wanted[index] = sequence.request.params.logprobs
        except Exception as error:
            errors[index] = RowError.of(error)
    for index, failure in errors.items():
        tokens[index], wanted[index] = failure, None
    return tokens, token_logprobs(raw, tokens, wanted)


def _likeliest(logits: Tensor, raw: Tensor) -> tuple[list[int], list[bool]]:
    """The place of each row's largest value, and whether that is a number and ``raw`` holds finite numbers alone.

    ``raw``: ``logits`` [n, V], or what they were before they were changed, where the -inf of a token that may not come
    is no fault.
    """
    if logits.is_cuda:
        best, ends = logits.max(dim=-1), raw.amin(dim=-1).double()
        if raw is not logits:
            ends += raw.amax(dim=-1)
        places, finite = torch.stack((best.indices, (ends + best.values).isfinite())).tolist()  # one wait for the GPU
        return places, [bool(each) for each in finite]
    # On one processor: PyTorch's threads would go on spinning while the next step's products want theirs.
    array, before = logits.numpy(), raw.numpy()
    indices = array.argmax(axis=-1)
    numbers = np.isfinite(array[np.arange(len(array)), indices]) & np.isfinite(before.min(axis=-1))
    if raw is not logits:
        numbers &= np.isfinite(before.max(axis=-1))
    return indices.tolist(), numbers.tolist()


def changes_logits(sequence: Sequence) -> bool:
    """Whether penalties, a bias or a least length come between the network's logits and the choice."""
    p = sequence.request.params
    return bool(
        p.logit_bias
        or p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or sequence.output_length < p.min_new_tokens
    )


def change_logits(row: Tensor, sequence: Sequence) -> None:
    """Apply penalties and bias to one row of logits [V] in place.

    Repetition penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied
    (Keskar et al. 2019). Presence and frequency penalties: OpenAI's formula, on generated tokens.
    """
    p = sequence.request.params
    if p.repetition_penalty != 1:
        seen = torch.tensor(sequence.seen, device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.output_counts:
        generated = torch.tensor(list(sequence.output_counts), device=row.device)
        counts = torch.tensor(list(sequence.output_counts.values()), dtype=row.dtype, device=row.device)
        row[generated] -= p.presence_penalty + p.frequency_penalty * counts
    if p.logit_bias:
        biased = torch.tensor(list(p.logit_bias), device=row.device)
        row[biased] += torch.tensor(list(p.logit_bias.values()), dtype=row.dtype, device=row.device)
    if sequence.output_length < p.min_new_tokens:
        stops = [i for i in sequence.request.stop_ids if 0 <= i < len(row)]  # a tokenizer may know more ids
        row[torch.tensor(stops, dtype=torch.long, device=row.device)] = float("-inf")


def _draw(row: Tensor, sequence: Sequence) -> int:
    p = sequence.request.params
    probabilities, ids = candidates(row, p.temperature, p.top_k, p.top_p, p.min_p)
    cumulative = probabilities.double().cumsum(0)
    point = uniform(sequence.seed, sequence.output_length) * cumulative[-1]
    place = torch.searchsorted(cumulative, point, right=True).clamp_max(len(cumulative) - 1)
    return int(place if ids is None else ids[place])


def candidates(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn from one row of logits [V] and their probabilities (not renormalised).

    Returns (probabilities [m], ids [m]), likeliest first; or ids None when nothing is filtered and token i has
    probability i.
    """
    vocabulary = row.shape[0]
    row = (row - row.max()) / temperature  # the difference first: a tiny temperature must not make two infinities
    if top_k == 0 and top_p == 1 and min_p == 0:
        return row.softmax(dim=-1), None
    count = min(top_k or vocabulary, vocabulary)
    if top_k:
        values, ids = row.topk(count)
        probabilities = values.softmax(dim=-1)
    else:
        everything = row.softmax(dim=-1)
        probabilities, ids = everything.topk(min(SORT_FIRST, vocabulary))
        by_mass = top_p < 1 and bool(probabilities.sum(dtype=torch.float64) >= top_p)
        by_floor = min_p > 0 and bool(probabilities[-1] < min_p * probabilities[0])
        if not (by_mass or by_floor):
            probabilities, ids = everything.sort(descending=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if top_p < 1:
        before = probabilities.double().cumsum(0) - probabilities
        keep &= before < top_p
    if min_p > 0:
        keep &= probabilities >= min_p * probabilities[0]
    keep[0] = True
    return probabilities[keep], ids[keep]


def token_logprobs(logits: Tensor, tokens: Many[int | RowError], wanted: Many[int | None]) -> list[TokenLogprob | None]:
    """Log-probability of each row's token under softmax of ``logits`` [n, V], with its likeliest alternatives.

    ``wanted[i]`` is how many alternatives row i asks for; None asks for nothing, as a row without a token must.
    """
    results: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return results
    logprobs = logits[rows].log_softmax(dim=-1)
    most = max(wanted[i] or 0 for i in rows)
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1) if most else (None, None)
    for place, i in enumerate(rows):
        top: tuple[tuple[int, float], ...] = ()
        if values is not None and ids is not None and (count := wanted[i]):
            top = tuple(zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True))
        token = tokens[i]
        assert not isinstance(token, RowError)
        results[i] = TokenLogprob(token, float(logprobs[place, token]), top)
    return results
