"""Logits and scores of tokens already generated, for ``output_logits`` and ``output_scores``.

The engine keeps neither, so they come from a second pass over prompt and answer: the same network, the same function
that changes logits, the same filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemcut.engine.edits import change_logits
from gemcut.engine.request import Request, Sequence
from gemcut.engine.sampler import candidates
from gemcut.gemma import Gemma
from gemcut.hf.generation import SUPPRESSED, Job
from gemcut.model.dense import DenseKeyValues


def hidden_states(gemma: Gemma, ids: list[int], states: Tensor | None = None) -> Tensor:
    """fp32 [T, d] of one whole sequence, before the final norm.

    ``states`` [layers + 1, T, d], where given, gets what each layer was given, and the end after the final norm.
    """
    tokens = torch.tensor(ids, device=gemma.device)
    positions = torch.arange(len(ids), device=gemma.device)
    cache, model = DenseKeyValues(len(ids)), gemma.model
    before_layers = iter(() if states is None else states)
    watch = None if states is None else lambda residual: next(before_layers).copy_(residual)
    hidden: Tensor = model(tokens, positions, cache, watch=watch)
    if states is not None:
        states[-1].copy_(model.norm(hidden))
    return hidden


def empty_states(gemma: Gemma, rows: int, width: int) -> Tensor:
    """Zeros [layers + 1, B, T, d] in the model's dtype."""
    config = gemma.config
    shape = (config.num_hidden_layers + 1, rows, width, config.hidden_size)
    return torch.zeros(shape, dtype=gemma.dtype, device=gemma.device)


@torch.no_grad()
def step_logits(gemma: Gemma, job: Job, new: list[list[int]]) -> list[Tensor]:
    """For each row fp32 [its new tokens, V]: the network's logits each token was chosen from."""
    result = []
    for prompt, tokens in zip(job.inputs.rows, new, strict=True):
        if not tokens:
            result.append(torch.zeros(0, gemma.config.vocab_size, device=gemma.device))
            continue
        hidden = hidden_states(gemma, [*prompt, *tokens[:-1]])
        result.append(gemma.model.head(hidden[len(prompt) - 1 :]))
    return result


@torch.no_grad()
def step_scores(logits: list[Tensor], job: Job, new: list[list[int]], *, renormalize: bool) -> list[Tensor]:
    """The same after penalties, and where the row samples after temperature and filters (-inf: filtered out)."""
    result = []
    for i, (rows, tokens) in enumerate(zip(logits, new, strict=True)):
        params = job.params[i]
        sequence = Sequence(Request(prompt_ids=tuple(job.inputs.rows[i]), params=params, stop_ids=job.stop_ids))
        scores = rows.clone()
        for row, token in zip(scores, tokens, strict=True):
            change_logits(row[None], [sequence])
            row[row < SUPPRESSED / 2] = float("-inf")
            if not params.greedy:
                _, kept = candidates(row, params.temperature, params.top_k, params.top_p, params.min_p)
                row /= params.temperature
                if kept is not None:
                    values = row[kept]
                    row.fill_(float("-inf"))
                    row[kept] = values
            if renormalize:
                row.copy_(row.log_softmax(dim=-1))
            sequence.append(token)
        result.append(scores)
    return result


def by_step(rows: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Rows of [its new tokens, V] as one [B, V] a step, zeros where a row has ended."""
    steps = max(map(len, rows), default=0)
    out = torch.zeros(steps, len(rows), rows[0].shape[1], device=device)
    for i, row in enumerate(rows):
        out[: len(row), i] = row
    return tuple(out)
