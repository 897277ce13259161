"""One sequence through the network without a cache: the shortest path to logits, and the one tests compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.model.gemma import Model
from gemcut.model.key_values import KeyValues, Span


class DenseKeyValues(KeyValues):
    """Keys and values of one whole sequence, kept only while its layer runs."""

    def __init__(self, length: int) -> None:
        self.spans: Sequence[Span] = (Span(0, length, length),)
        self._key = self._value = torch.empty(0)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key, value

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, int]:
        return self._key, self._value, 0

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([self._key.shape[0]], device=self._key.device)
        return self._key[None], self._value[None], lengths


@torch.inference_mode()
def dense_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits fp32 [T, V] at every position of one sequence of token ids, int64 [T]."""
    positions = torch.arange(ids.shape[0], device=ids.device)
    return model.head(model(ids, positions, DenseKeyValues(ids.shape[0])))
