"""What a network thinks at each layer: hidden states, the logit lens, and the tokens that come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemcut.errors import ContextLengthError, ParameterError, UnsupportedError
from gemcut.gemma import Gemma
from gemcut.model.dense import DenseKeyValues


@dataclass(frozen=True)
class Probe:
    """What each layer says of one text. L layers, T tokens, d hidden size, k likeliest tokens.

    Attributes:
        ids: int64 [T].
        hidden: fp32 [L + 1, T, d]: the embedding, then what each layer gives, the last one behind the final norm, as
            transformers' ``hidden_states``; None where it was not asked for.
        top_ids: int64 [L + 1, T, k]: the tokens that are likeliest next where the final norm and the head read what a
            layer gives (the logit lens), from the likeliest on; the last layer's are the model's own.
        top_logprobs: fp32 [L + 1, T, k]: their log-probabilities (natural logarithm).
        target_logprobs: fp32 [L + 1, T - 1]: those of the token that does come next.
    """

    ids: np.ndarray
    hidden: np.ndarray | None
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    target_logprobs: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What is there, by its name."""
        names = ("ids", "hidden", "top_ids", "top_logprobs", "target_logprobs")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@torch.no_grad()
def probe(gemma: Gemma, ids: Sequence[int], *, top: int = 5, hidden: bool = True) -> Probe:
    """One pass over a text, read at every layer.

    Args:
        ids: the text's tokens, ``<bos>`` included.
        top: likeliest tokens to keep at each place, at least 1.
        hidden: keep the hidden states.

    Raises:
        ParameterError: no tokens, an unknown one, or ``top`` out of range.
        ContextLengthError: more tokens than the context has.
        UnsupportedError: the model is split over several devices.
    """
    _check(gemma, ids, top)
    layers, model = _residuals(gemma, ids)
    end = len(layers) - 1
    kept = np.empty((len(layers), len(ids), gemma.config.hidden_size), np.float32) if hidden else None
    shape = (len(layers), len(ids), top)
    top_ids, top_logprobs = np.empty(shape, np.int64), np.empty(shape, np.float32)
    targets = np.empty((len(layers), len(ids) - 1), np.float32)
    following = torch.tensor(ids[1:], device=gemma.device)
    for place, residual in enumerate(layers):
        if kept is not None:
            kept[place] = (model.norm(residual) if place == end else residual).float().cpu().numpy()
        # Some rows at a time: a row of logits is a megabyte.
        for start in range(0, len(ids), 128):
            rows = slice(start, min(start + 128, len(ids)))
            logprobs = model.head(residual[rows]).log_softmax(-1)
            best = logprobs.topk(top)
            top_ids[place, rows], top_logprobs[place, rows] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            own = following[rows]
            found = logprobs[: len(own)].gather(1, own[:, None])[:, 0]
            targets[place, start : start + len(own)] = found.cpu().numpy()
    return Probe(np.asarray(ids, np.int64), kept, top_ids, top_logprobs, targets)


@torch.no_grad()
def next_tokens(gemma: Gemma, ids: Sequence[int], *, top: int = 10) -> list[tuple[int, float]]:
    """(token, log-probability) of the likeliest tokens behind a text, from the likeliest on. Arguments as `probe`'s."""
    _check(gemma, ids, top)
    layers, model = _residuals(gemma, ids)
    best = model.head(layers[-1][-1:]).log_softmax(-1)[0].topk(top)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _residuals(gemma: Gemma, ids: Sequence[int]) -> tuple[list[torch.Tensor], Any]:
    """The residual stream fp32 [T, d] before each layer and behind the last."""
    layers: list[torch.Tensor] = []
    tokens = torch.tensor(ids, device=gemma.device)
    positions = torch.arange(len(ids), device=gemma.device)
    end = gemma.model(tokens, positions, DenseKeyValues(len(ids)), watch=lambda row: layers.append(row.clone()))
    return [*layers, end], gemma.model


def _check(gemma: Gemma, ids: Sequence[int], top: int) -> None:
    size, limit = gemma.config.vocab_size, gemma.engine.max_context
    if not ids:
        raise ParameterError("the text has no tokens; expected at least one")
    if len(ids) > limit:
        raise ContextLengthError(f"the text has {len(ids):,} tokens, the context holds {limit:,}; shorten it")
    if unknown := next((i for i in ids if not 0 <= i < size), None):
        raise ParameterError(f"token {unknown} is none of the model's {size:,}")
    if isinstance(top, bool) or not 1 <= top <= size:
        raise ParameterError(f"top is {top}; expected 1 to {size:,}")
    if gemma.team is not None:
        raise UnsupportedError("hidden states of a model that is split over devices cannot be read; leave out gpus")
