"""Log-probabilities: of tokens just chosen, and of tokens that a prompt has."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from gemcut.engine.request import PromptLogprob, RowError, TokenLogprob
from gemcut.engine.tensors import indices, rows_at_once
from gemcut.model import Model

# Rows of logits that are made at a time to score a prompt: each reads the whole head's matrix; 64 rows of 256,000 fp32
# are 66 MB.
SCORED_ROWS = 64


def token_logprobs(logits: Tensor, tokens: Many[int | RowError], wanted: Many[int | None]) -> list[TokenLogprob | None]:
    """Log-probability of each row's token under softmax of ``logits`` [n, V], with its likeliest alternatives.

    ``wanted[i]`` is how many alternatives row i asks for; None asks for nothing, as a row without a token must.
    """
    results: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return results
    most = min(max(wanted[i] or 0 for i in rows), logits.shape[-1])
    chosen = [token for token in (tokens[i] for i in rows) if not isinstance(token, RowError)]
    found: list[Tensor] = []
    step = rows_at_once(logits)
    for first in range(0, len(rows), step):
        logprobs = logits[indices(rows[first : first + step], logits.device)].log_softmax(dim=-1)
        own = logprobs.gather(1, indices(chosen[first : first + step], logits.device)[:, None])
        values, ids = logprobs.topk(most, dim=-1)
        found.append(torch.cat((own.double(), values.double(), ids.double()), dim=1))
    for i, token, numbers in zip(rows, chosen, torch.cat(found).tolist(), strict=True):
        count = min(wanted[i] or 0, most)
        ids_of_row = map(int, numbers[1 + most : 1 + most + count])
        results[i] = TokenLogprob(token, numbers[0], tuple(zip(ids_of_row, numbers[1 : 1 + count], strict=True)))
    return results


def prompt_scores(model: Model, hidden: Tensor, tokens: Many[int]) -> list[PromptLogprob | None]:
    """The score of each token behind its hidden state; None where the logits are not finite numbers.

    Args:
        model: its head makes the logits, after the final soft-cap.
        hidden: fp32 [n, d], before the final norm.
        tokens: n token ids.
    """
    results: list[PromptLogprob | None] = []
    for first in range(0, len(tokens), SCORED_ROWS):
        logits = model.head(hidden[first : first + SCORED_ROWS])
        part = tokens[first : first + SCORED_ROWS]
        for row in scores_of(logits, part).tolist():
            *numbers, rank, greedy = row
            logprob, greedy_logprob = numbers
            finite = math.isfinite(logprob) and math.isfinite(greedy_logprob)
            token = part[len(results) - first]
            results.append(PromptLogprob(token, logprob, int(rank), int(greedy), greedy_logprob) if finite else None)
    return results


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
