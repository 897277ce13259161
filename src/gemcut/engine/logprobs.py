"""Log-probabilities: of tokens just chosen, and of tokens that a prompt has."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from gemcut.engine.request import RowError, TokenLogprob
from gemcut.engine.tensors import indices, rows_at_once


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
