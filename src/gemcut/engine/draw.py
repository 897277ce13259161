"""Sampling without the host: ``sampler``'s draw of one token from one row of logits, with shapes that never change.

So it can stand in a CUDA graph behind the network's step. Filters keep a beginning of the tokens in order of their
probability, so nothing needs to be cut out: what lies behind the last one kept is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.sampler import SORT_FIRST
from gemcut.engine.sampling import SamplingParams

_EVERYTHING = 2.0  # a top_p that keeps all: 1 would not, sums of probabilities round


@dataclass(frozen=True)
class Kind:
    """What decides which operations a draw needs. ``filtered``: not every token may be drawn."""

    top_k: int
    filtered: bool

    @classmethod
    def of(cls, params: SamplingParams) -> Kind:
        """The kind of a request that draws."""
        return cls(params.top_k, bool(params.top_k or params.top_p < 1 or params.min_p > 0))


#: A row's numbers, fp64: 1 / temperature, top_p, min_p. The uniform number of the draw is the fourth.
NUMBERS = 4


def numbers(params: SamplingParams, uniform: float) -> tuple[float, float, float, float]:
    """A row of the table that ``draw`` reads. Dividing by a number is multiplying by its fp32 inverse on a GPU."""
    inverse = float(np.float32(1) / np.float32(params.temperature))  # at most 1 / sampling.LEAST
    return inverse, params.top_p if params.top_p < 1 else _EVERYTHING, params.min_p, uniform


def draw(row: Tensor, kind: Kind, values: Tensor) -> tuple[Tensor, Tensor]:
    """One token of fp32 logits [V], after the final soft-cap.

    Args:
        row: the logits.
        kind: of the request.
        values: fp64 [4] on the row's device, see ``numbers``.

    Returns:
        (token int64 [], sure bool []). Where ``sure`` is false more than the ``SORT_FIRST`` likeliest tokens were
        needed, and the token is to be drawn by ``sampler`` instead.
    """
    inverse, top_p, min_p, uniform = values.unbind()
    row = (row - row.max()) * inverse.float()
    sure = torch.ones((), dtype=torch.bool, device=row.device)
    if not kind.filtered:
        cumulative = row.softmax(dim=-1).double().cumsum(0)
        return _search(cumulative, uniform * cumulative[-1]).clamp_max(len(cumulative) - 1), sure
    if kind.top_k:
        best, ids = row.topk(min(kind.top_k, len(row)))
        probabilities = best.softmax(dim=-1)
    else:
        probabilities, ids = row.softmax(dim=-1).topk(min(SORT_FIRST, len(row)))
        by_mass = (top_p < 1) & (probabilities.sum(dtype=torch.float64) >= top_p)
        by_floor = (min_p > 0) & (probabilities[-1] < min_p.float() * probabilities[0])
        sure = by_mass | by_floor | (len(ids) == len(row))
    cumulative = probabilities.double().cumsum(0)
    kept = (cumulative - probabilities < top_p) & (probabilities >= min_p.float() * probabilities[0])
    last = kept.sum().clamp_min(1) - 1
    place = torch.minimum(_search(cumulative, uniform * cumulative.gather(0, last[None])[0]), last)
    return ids.gather(0, place[None])[0], sure


def _search(cumulative: Tensor, point: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, point[None], right=True)[0]


def same_kind(params: Many[SamplingParams]) -> Kind | None:
    """The kind all these requests share; None where they do not, or where one does not draw."""
    if any(p.greedy for p in params):
        return None
    kinds = {Kind.of(p) for p in params}
    return kinds.pop() if len(kinds) == 1 else None
