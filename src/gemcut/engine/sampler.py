"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, a draw; all in fp32 or better.

The order is transformers': penalties and bias change logits, then temperature, then each filter sees what the one
before it left, renormalised. A draw uses one uniform number that depends on the request's seed and the token's place
alone, so neighbours, batch size, chunking and preemption do not change it, nor does the device.

Rows are drawn together, whatever their parameters are: those that need the same operations (``draw.DrawMode``) at once,
with their temperatures, top_p, min_p and random numbers as tensors. A GPU is waited for once for the likeliest tokens,
once for all draws, once more where a nucleus is wider than ``SORT_FIRST`` tokens, and once for log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.draw import DrawMode, DrawParams, choose, shortlist, top
from gemcut.engine.edits import change_logits, changes_logits
from gemcut.engine.logprobs import token_logprobs
from gemcut.engine.request import RowError, Sequence, TokenLogprob
from gemcut.engine.sampling import SamplingParams
from gemcut.engine.tensors import indices, rows_at_once, upload
from gemcut.safety.watermark import MARKED, Contexts

_MASK = 2**64 - 1
NOT_FINITE = "the logits of this request hold NaN or infinity"
NO_TOKEN_LEFT = (
    "every token is forbidden: the request's mask, bias and min_new_tokens leave none; they must allow at least one"
)
CHANGED_NOT_FINITE = "the request's own bias makes logits NaN or infinite; expected finite numbers, or -inf to forbid"


@dataclass(frozen=True)
class _Drawn:
    """A row whose token is drawn; ``params`` are what ``draw`` reads."""

    index: int
    temperature: float
    params: DrawParams


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that is a pure function of both arguments (SplitMix64; Steele, Lea and Flood 2014)."""
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
    rows = _Rows(logits, sequences)
    errors = rows.errors
    places, sound, largest = _likeliest(rows)
    tokens: list[int | RowError] = [*places]
    for index, (finite, value) in enumerate(zip(sound, largest, strict=True)):
        if index not in errors and not (finite and math.isfinite(value)):
            changed = NO_TOKEN_LEFT if value == -math.inf else CHANGED_NOT_FINITE
            errors[index] = RowError(changed if finite else explain())
    drawn: dict[DrawMode, list[_Drawn]] = {}
    wanted: list[int | None] = [None] * len(sequences)
    for index, sequence in enumerate(sequences):
        p = sequence.request.params
        if index in errors:
            continue
        try:
            if p.watermark is not None:
                tokens[index] = _marked(rows, index, sequence)
            elif not p.greedy:
                own = DrawParams.of(p, uniform(sequence.seed, sequence.output_length))
                drawn.setdefault(DrawMode.of(p), []).append(_Drawn(index, p.temperature, own))
            wanted[index] = p.logprobs
        except Exception as error:
            errors[index] = RowError.of(error)
    for index, token in _draw(rows, drawn).items():
        tokens[index] = token
    for index, failure in errors.items():
        tokens[index], wanted[index] = failure, None
    asked = [sequence.request.logprobs_of for sequence in sequences]
    return tokens, token_logprobs(logits, tokens, wanted, asked)


def _marked(rows: _Rows, index: int, sequence: Sequence) -> int:
    """The token of a row whose draws carry a watermark, chosen on the CPU."""
    p = sequence.request.params
    assert p.watermark is not None
    if sequence.contexts is None:
        sequence.contexts = Contexts(p.watermark.context, sequence.prompt_length)
    (row,), _ = rows.take([index])
    found, ids = candidates(row, p.temperature, p.top_k, p.top_p, p.min_p)
    point = uniform(sequence.seed, sequence.output_length)
    if ids is None:  # all tokens: the likeliest play for what they have together, else one of the others is drawn
        found = found.double()
        total, everything = float(found.sum()), found
        found, ids = top(found, MARKED) if len(found) > MARKED else found.sort(descending=True)
        mass = float(found.sum())
        if len(everything) > MARKED and point * total >= mass:
            others = everything.index_fill(0, ids, 0.0).cumsum(0)
            wanted = torch.full((1,), point * total - mass, dtype=torch.float64, device=others.device)
            place = int(torch.searchsorted(others, wanted, right=True))
            return min(place, int(torch.searchsorted(others, others[-1:])))
        point = min(point * total / mass, 1 - 2.0**-53)
    return p.watermark.choose(
        found.double().cpu().numpy(), ids.cpu().numpy(), sequence.tokens, sequence.contexts, point
    )


class _Rows:
    """A step's rows of logits as tokens are chosen from them.

    Those that nothing changes stay where the network left them, the others are copies.
    """

    def __init__(self, raw: Tensor, sequences: Many[Sequence]) -> None:
        self.raw = raw
        self.errors: dict[int, RowError] = {}
        #: Of each row that was changed its place in ``changed``.
        self.place: dict[int, int] = {}
        for index, sequence in enumerate(sequences):
            try:
                if changes_logits(sequence):
                    self.place[index] = len(self.place)
            except Exception as error:
                self.errors[index] = RowError.of(error)
        self.changed: Tensor | None = None
        if self.place:
            own = list(self.place)
            self.changed = raw.index_select(0, indices(own, raw.device))
            failed = change_logits(self.changed, [sequences[index] for index in own])
            self.errors |= {own[place]: error for place, error in failed.items()}

    def take(self, wanted: list[int]) -> tuple[Tensor, list[int]]:
        """These rows, fp32 [k, V], and which is which. Not to be written to: one row is no copy."""
        plain = [index for index in wanted if index not in self.place]
        own = [index for index in wanted if index in self.place]
        if self.changed is None or not own:
            return self._copied(self.raw, plain), plain
        changed = self._copied(self.changed, [self.place[index] for index in own])
        return (torch.cat((self._copied(self.raw, plain), changed)) if plain else changed), plain + own

    def _copied(self, rows: Tensor, wanted: list[int]) -> Tensor:
        if len(wanted) == 1:
            return rows[wanted[0] : wanted[0] + 1]
        return rows.index_select(0, indices(wanted, rows.device))


def _likeliest(rows: _Rows) -> tuple[list[int], list[bool], list[float]]:
    """Of each row: the place of its largest value, whether the network's logits are all finite numbers, that value.

    The -inf of a token that may not come is no fault, so the network's own logits are looked at.
    """
    raw, changed = rows.raw, rows.changed
    if raw.is_cuda:
        best, least = raw.max(dim=-1), raw.amin(dim=-1).double()
        finite = (least + best.values).isfinite()
        found = torch.stack((best.indices.double(), finite.double(), best.values.double()))
        if changed is not None:
            own, where = changed.max(dim=-1), indices(list(rows.place), raw.device)
            found[0, where], found[2, where] = own.indices.double(), own.values.double()
        ids, sound, values = found.tolist()  # one wait for the GPU
        return [int(i) for i in ids], [bool(each) for each in sound], values
    places, largest = _ends(raw)
    least_of_all = [value for part in _parts(raw) for value in part.numpy().min(axis=-1).tolist()]
    numbers_alone = [math.isfinite(a) and math.isfinite(b) for a, b in zip(largest, least_of_all, strict=True)]
    if changed is not None:
        for index, place, value in zip(rows.place, *_ends(changed), strict=True):
            places[index], largest[index] = place, value
    return places, numbers_alone, largest


def _ends(rows: Tensor) -> tuple[list[int], list[float]]:
    """The place and value of the largest of each row on a CPU.

    On one processor: PyTorch's threads would go on spinning while the next step's products want theirs.
    """
    places: list[int] = []
    values: list[float] = []
    for part in _parts(rows):
        array = part.numpy()
        largest = array.argmax(axis=-1)
        places += largest.tolist()
        values += array[np.arange(len(array)), largest].tolist()
    return places, values


def _parts(rows: Tensor) -> Many[Tensor]:
    return torch.split(rows, rows_at_once(rows))


def _draw(rows: _Rows, drawn: dict[DrawMode, list[_Drawn]]) -> dict[int, int]:
    """The tokens of the rows that draw, by row."""
    most = rows_at_once(rows.raw)
    found = [
        _draw_part(rows, mode, members[start : start + most])
        for mode, members in drawn.items()
        for start in range(0, len(members), most)
    ]
    tokens = _together(found)
    few = [index for index, (_, enough) in tokens.items() if not enough]
    if few:
        again = {member.index: member for members in drawn.values() for member in members}
        mode = DrawMode(0, filtered=True)
        tokens |= _together(
            [
                _draw_part(rows, mode, [again[index] for index in few[start : start + most]], everything=True)
                for start in range(0, len(few), most)
            ]
        )
    return {index: token for index, (token, _) in tokens.items()}


def _draw_part(
    rows: _Rows, mode: DrawMode, members: list[_Drawn], *, everything: bool = False
) -> tuple[list[int], Tensor, Tensor]:
    """(rows, their tokens int64 [k], whether each is right bool [k]) of some rows of one mode."""
    logits, order = rows.take([member.index for member in members])
    by_index = {member.index: member for member in members}
    table = np.array([(by_index[index].temperature, *by_index[index].params) for index in order])
    temperature, inverse, top_p, min_p, point, _ = upload(table, logits.device).unbind(-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # first: a tiny temperature must not make two infinities
    if logits.is_cuda:
        logits *= inverse.float()[:, None]  # as the graphs' draws do
    else:
        logits /= temperature.float()[:, None]
    among = shortlist(logits, mode, top_p, min_p, everything=everything)
    return order, choose(among, point), among.enough


def _together(found: list[tuple[list[int], Tensor, Tensor]]) -> dict[int, tuple[int, bool]]:
    """Of each row its token and whether it is right; one wait for a GPU."""
    if not found:
        return {}
    order = [index for rows, _, _ in found for index in rows]
    both = torch.stack((torch.cat([each[1] for each in found]), torch.cat([each[2] for each in found]).long()))
    return {index: (token, bool(right)) for index, token, right in zip(order, *both.tolist(), strict=True)}


def candidates(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn from one row of logits [V] and their probabilities (not renormalised).

    Returns (probabilities [m], ids [m]), likeliest first; or ids None when nothing is filtered and token i has
    probability i.
    """
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mode = DrawMode.of(params)
    own = DrawParams.of(params, 0.0)
    bounds = torch.tensor((own.top_p, own.min_p), dtype=torch.float64, device=row.device)
    scaled = (row - row.max()) / temperature
    among = shortlist(scaled, mode, *bounds)
    if not among.enough:
        among = shortlist(scaled, mode, *bounds, everything=True)
    kept = slice(int(among.last) + 1)
    return among.probabilities[kept], None if among.ids is None else among.ids[kept]
