"""Log-probabilities: of tokens just chosen, and of tokens that a prompt has."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from gemcut.engine.request import PromptLogprob, RowError, TokenLogprob
from gemcut.engine.tensors import indices, rows_at_once
from gemcut.model import Model
from gemcut.model.head import head_part

# Rows of logits that are made at a time to score a prompt: each reads the whole head's matrix; 64 rows of 256,000 fp32
# are 66 MB.
SCORED_ROWS = 64
# The same in tiles of the vocabulary, of so many logits (8 MB) and so many tokens at most.
TILED_ROWS, TILE, WIDEST = 512, 1 << 21, 8192


def token_logprobs(
    logits: Tensor,
    tokens: Many[int | RowError],
    wanted: Many[int | None],
    asked: Many[tuple[int, ...]] | None = None,
) -> list[TokenLogprob | None]:
    """Log-probability of each row's token under softmax of ``logits`` [n, V], with its likeliest alternatives.

    ``wanted[i]`` is how many alternatives row i asks for; None asks for nothing, as a row without a token must.
    ``asked[i]`` are tokens whose log-probabilities it wants beside them.
    """
    results: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return results
    most = min(max(wanted[i] or 0 for i in rows), logits.shape[-1])
    named = [asked[i] if asked is not None else () for i in rows]
    columns = max(map(len, named))
    filled = [(*ids, *[0] * (columns - len(ids))) for ids in named]
    chosen = [token for token in (tokens[i] for i in rows) if not isinstance(token, RowError)]
    found: list[Tensor] = []
    step = rows_at_once(logits)
    for first in range(0, len(rows), step):
        logprobs = logits[indices(rows[first : first + step], logits.device)].log_softmax(dim=-1)
        own = logprobs.gather(1, indices(chosen[first : first + step], logits.device)[:, None])
        values, ids = logprobs.topk(most, dim=-1)
        numbered = [own.double(), values.double(), ids.double()]
        if columns:
            flat = [id_ for each in filled[first : first + step] for id_ in each]
            numbered.append(logprobs.gather(1, indices(flat, logits.device).view(-1, columns)).double())
        found.append(torch.cat(numbered, dim=1))
    for i, token, ids_asked, numbers in zip(rows, chosen, named, torch.cat(found).tolist(), strict=True):
        count = min(wanted[i] or 0, most)
        ids_of_row = map(int, numbers[1 + most : 1 + most + count])
        top = tuple(zip(ids_of_row, numbers[1 : 1 + count], strict=True))
        results[i] = TokenLogprob(token, numbers[0], top, tuple(numbers[1 + 2 * most :][: len(ids_asked)]))
    return results


def prompt_scores(model: Model, hidden: Tensor, tokens: Many[int]) -> list[PromptLogprob | None]:
    """The score of each token behind its hidden state; None where the logits are not finite numbers.

    Args:
        model: its head makes the logits, after the final soft-cap.
        hidden: fp32 [n, d], before the final norm.
        tokens: n token ids.
    """
    results: list[PromptLogprob | None] = []
    large = model.config.vocab_size > WIDEST and not hidden.is_cuda
    in_tiles = large and head_part(model, slice(0, 1)) is not None
    step = TILED_ROWS if in_tiles else SCORED_ROWS
    for first in range(0, len(tokens), step):
        rows, own = hidden[first : first + step], tokens[first : first + step]
        found = _scores_in_tiles(model, rows, own) if in_tiles else scores_of(model.head(rows), own)
        for token, (logprob, greedy_logprob, rank, greedy) in zip(own, found.tolist(), strict=True):
            finite = math.isfinite(logprob) and math.isfinite(greedy_logprob)
            results.append(PromptLogprob(token, logprob, int(rank), int(greedy), greedy_logprob) if finite else None)
    return results


def _scores_in_tiles(model: Model, hidden: Tensor, tokens: Many[int]) -> Tensor:
    """``scores_of`` the head's logits, a part of the vocabulary at a time: each is read while a CPU's caches have it,
    and the head's matrix is read once for all rows."""
    own, vocabulary = indices(list(tokens), hidden.device), model.config.vocab_size
    x = model.norm(hidden).to(model.dtype)

    def logits_of(part: slice | Tensor) -> Tensor:
        product = head_part(model, part)
        assert product is not None
        return model.softcap(product(x))

    # Ranks are counted on the way, so the tokens' own logits are needed before their tiles come.
    chosen = logits_of(own).diagonal()[:, None].clone()
    width = max(1024, min(WIDEST, TILE // len(tokens)))
    best = torch.full_like(chosen, float("-inf"))
    total, rank, bad = (torch.zeros_like(chosen, dtype=torch.float64) for _ in range(3))
    greedy = torch.zeros_like(own)[:, None]
    known = torch.ones_like(greedy, dtype=torch.bool)
    likelier = torch.empty((len(tokens), min(width, vocabulary)), dtype=torch.float32)
    for first in range(0, vocabulary, width):
        logits = logits_of(slice(first, first + width))
        columns = logits.shape[1]
        at = (own - first)[:, None]
        known &= (at < 0) | (at >= columns) | (logits.gather(1, at.clamp(0, columns - 1)) == chosen)
        rank += torch.gt(logits, chosen, out=likelier[:, :columns]).sum(dim=-1, keepdim=True)
        place = torch.from_numpy(logits.numpy().argmax(axis=-1))[:, None]
        most, least = logits.gather(1, place), logits.amin(dim=-1, keepdim=True)
        # Infinity minus itself is NaN: one logit of minus infinity would not be seen in the sums.
        bad += (least - least) + (most - most)
        greedy = torch.where(most > best, place + first, greedy)
        before, best = best, torch.maximum(best, most)
        sums = logits.sub_(best).exp_().sum(dim=-1, keepdim=True)
        total = total * (before - best).double().exp() + sums
    normal = total.log() + bad
    found = torch.cat((chosen.double() - best - normal, -normal, 1 + rank, greedy.double()), dim=1)
    # Where a product with other rows beside it rounds a logit in another way, its rank was not counted exactly.
    for i in (~known[:, 0] & ~bad.isnan()[:, 0]).nonzero()[:, 0].tolist():
        found[i] = scores_of(model.head(hidden[i : i + 1]), tokens[i : i + 1])[0]
    return found


def scores_of(logits: Tensor, tokens: Many[int]) -> Tensor:
    """fp64 [n, 4]: of each row's token its log-probability, NaN where a logit is not finite; the likeliest token's; the
    token's rank; the likeliest token's id.

    Args:
        logits: fp32 [n, V].
        tokens: n ids.
    """
    found = []
    step = rows_at_once(logits)
    for part, own in zip(
        torch.split(logits, step), torch.split(indices(list(tokens), logits.device), step), strict=True
    ):
        chosen = part.gather(1, own[:, None])
        best, greedy = part.max(dim=-1, keepdim=True)
        least = part.amin(dim=-1, keepdim=True)
        rank = 1 + (part > chosen).sum(dim=-1, keepdim=True)
        # Infinity minus itself is NaN: one logit of minus infinity would not be seen in the sums.
        total = (part - best).exp_().sum(dim=-1, keepdim=True).double().log() + (least - least) + (best - best)
        numbers = (chosen.double() - best - total, -total, rank.double(), greedy.double())
        found.append(torch.cat(numbers, dim=1))
    return torch.cat(found)
