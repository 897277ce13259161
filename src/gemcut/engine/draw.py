"""Drawing tokens from rows of logits with shapes that never change, so that it can stand in a CUDA graph.

Filters keep a beginning of the tokens in order of their probability, so nothing needs to be cut out: what lies behind
the last one kept is not looked at. ``sampler`` draws with the same functions, all rows of a mode at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.sampling import SamplingParams

# Nucleus sampling sorts this many of the likeliest tokens first, and the whole vocabulary only if they do not suffice.
SORT_FIRST = 1024
_EVERYTHING = 2.0  # a top_p that keeps all: 1 would not, sums of probabilities round


@dataclass(frozen=True)
class DrawMode:
    """What decides which operations a draw needs. ``filtered``: not every token may be drawn."""

    top_k: int
    filtered: bool

    @classmethod
    def of(cls, params: SamplingParams) -> DrawMode:
        """That of a request that draws."""
        return cls(params.top_k, bool(params.top_k or params.top_p < 1 or params.min_p > 0))


class DrawParams(NamedTuple):
    """A row of the fp64 table that draws read; ``uniform`` is the draw's random number.

    ``draw`` does not look at ``top_k``, which its ``DrawMode`` has for all rows.
    """

    inverse_temperature: float
    top_p: float
    min_p: float
    uniform: float
    top_k: float

    @classmethod
    def of(cls, params: SamplingParams, uniform: float) -> DrawParams:
        """Those of a request. Dividing by a temperature is multiplying by its fp32 inverse on a GPU."""
        if params.greedy:
            return cls(1.0, _EVERYTHING, 0.0, 0.0, 1)  # of the one likeliest token
        inverse = float(np.float32(1) / np.float32(params.temperature))  # at most 1 / sampling.LEAST
        top_p = params.top_p if params.top_p < 1 else _EVERYTHING
        return cls(inverse, top_p, params.min_p, uniform, params.top_k)


@dataclass(frozen=True)
class Shortlist:
    """The tokens of each row that a draw looks at, likeliest first.

    Attributes:
        ids: int64 [..., m]; None: all tokens in the order of their ids, each of which may be drawn.
        probabilities: theirs, fp32 [..., m], not renormalised behind filters.
        cumulative: sums of them up to each, fp64 [..., m].
        last: int64 [..., 1], the place of the last one that may be drawn.
        enough: bool [...]: whether the m tokens hold all that may be drawn.
    """

    ids: Tensor | None
    probabilities: Tensor
    cumulative: Tensor
    last: Tensor
    enough: Tensor


def shortlist(scaled: Tensor, mode: DrawMode, top_p: Tensor, min_p: Tensor, *, everything: bool = False) -> Shortlist:
    """The tokens that may be drawn.

    Args:
        scaled: fp32 [..., V]: logits less their largest, divided by the temperature.
        mode: of all rows.
        top_p: fp64 [...]; above 1 it keeps all.
        min_p: fp64 [...]; 0 keeps all.
        everything: look at all tokens, where ``SORT_FIRST`` were not enough.
    """
    vocabulary, device = scaled.shape[-1], scaled.device
    enough = torch.ones(scaled.shape[:-1], dtype=torch.bool, device=device)
    if not mode.filtered:
        probabilities = scaled.softmax(dim=-1)
        cumulative = probabilities.double().cumsum(-1)
        last = torch.full((*scaled.shape[:-1], 1), vocabulary - 1, dtype=torch.long, device=device)
        return Shortlist(None, probabilities, cumulative, last, enough)
    least = min_p.float().unsqueeze(-1)
    if mode.top_k:
        best, ids = top(scaled, min(mode.top_k, vocabulary))
        probabilities = best.softmax(dim=-1)
    elif everything:
        probabilities, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
    else:
        probabilities, ids = top(scaled.softmax(dim=-1), min(SORT_FIRST, vocabulary))
        by_mass = (top_p < 1) & (probabilities.sum(dim=-1, dtype=torch.float64) >= top_p)
        by_floor = (min_p > 0) & (probabilities[..., -1:] < least * probabilities[..., :1]).squeeze(-1)
        enough = by_mass | by_floor
    cumulative = probabilities.double().cumsum(-1)
    kept = (cumulative - probabilities < top_p.unsqueeze(-1)) & (probabilities >= least * probabilities[..., :1])
    last = kept.sum(-1, keepdim=True).clamp_min(1) - 1
    return Shortlist(ids, probabilities, cumulative, last, enough)


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values.topk(count)`` of fp32 [..., V]: the largest with their places, largest first.

    On a CPU in less time where there are many more: the largest of every few values are looked at first, and
    then those few alone of which one may be among the ``count``. Where equal values leave the order open it is torch's.
    """
    size = values.shape[-1]
    few = next((n for n in (128, 32, 16) if size % n == 0 and size // n > 4 * count), None)
    if values.is_cuda or few is None:
        return tuple(values.topk(count, dim=-1))  # type: ignore[return-value]
    groups = values.reshape(
        *values.shape[:-1], few, size // few
    )  # those of a column, so that they are compared side by side
    largest, columns = groups.amax(dim=-2).topk(count + 1, dim=-1)
    columns = columns[..., None, :count].expand(*groups.shape[:-1], count)
    best, at = groups.gather(-1, columns).flatten(-2).topk(count, dim=-1)
    alike = (best[..., 1:] == best[..., :-1]).any() | (best[..., -1] <= largest[..., -1]).any()
    alike |= (largest[..., 1:] == largest[..., :-1]).any()
    if alike:
        return tuple(values.topk(count, dim=-1))  # type: ignore[return-value]
    row = at.div(count, rounding_mode="floor")
    return best, row * (size // few) + columns[..., 0, :].gather(-1, at % count)


def choose(among: Shortlist, uniform: Tensor) -> Tensor:
    """The token, int64 [...], at which the probabilities pass ``uniform``, fp64 [...], of what may be drawn."""
    # Less than the whole sum, whatever is rounded: so a token at the end without a probability is never drawn.
    point = uniform.unsqueeze(-1) * among.cumulative.gather(-1, among.last)
    place = torch.minimum(torch.searchsorted(among.cumulative, point, right=True), among.last)
    return (place if among.ids is None else among.ids.gather(-1, place)).squeeze(-1)


def draw(row: Tensor, mode: DrawMode, values: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row of fp32 logits [..., V], after the final soft-cap.

    Args:
        row: the logits.
        mode: of the requests.
        values: fp64 [..., 5] on the rows' device, a ``DrawParams`` each.

    Returns:
        (token int64 [...], exact bool [...]). Where ``exact`` is false more than the ``SORT_FIRST`` likeliest tokens
        were needed, and the token is to be drawn by ``sampler`` instead.
    """
    inverse, top_p, min_p, uniform, _ = values.unbind(-1)
    scaled = (row - row.amax(dim=-1, keepdim=True)) * inverse.float().unsqueeze(-1)
    among = shortlist(scaled, mode, top_p, min_p)
    all_there = among.ids is None or among.ids.shape[-1] == row.shape[-1]
    return choose(among, uniform), torch.ones_like(among.enough) if all_there else among.enough


def common_mode(params: Many[SamplingParams]) -> DrawMode | None:
    """The mode all these requests share; None where they do not, or where one does not draw."""
    if any(p.greedy for p in params):
        return None
    modes = {DrawMode.of(p) for p in params}
    return modes.pop() if len(modes) == 1 else None
