"""One rank's place in a tensor parallel network, and the layers that know of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.model.linear import EmbeddingFactory, LinearFactory, LinearLayer, TokenTable
from gemcut.parallel.communicator import Communicator
from gemcut.parallel.shape import SPLIT_BY_ROLE, Share, vocabulary_range


@dataclass(eq=False)
class Split:
    """What makes an ordinary network of a rank's own shape one of several.

    Attributes:
        config: the whole network's shape.
        share: which rank of how many.
        communicator: the way to the others.
        head: rank 0's: has the others compute the head of these rows [n, hidden] while it does, within the context; of
            the likeliest tokens alone where the second argument says so.
    """

    config: GemmaConfig
    share: Share
    communicator: Communicator
    head: Callable[[Tensor, bool], AbstractContextManager[None]] = field(default=lambda hidden, best: nullcontext())

    def linear(self, make: LinearFactory) -> LinearFactory:
        """``make``'s layers; those that hold a part of the inputs sum their results over the ranks."""

        def made(name: str, in_features: int, rows: tuple[int, ...]) -> LinearLayer:
            layer = make(name, in_features, rows)
            if SPLIT_BY_ROLE[layer.role] == "columns":
                layer.communicator = self.communicator
            return layer

        return made

    def embedding(self, make: EmbeddingFactory) -> EmbeddingFactory:
        """``make``'s table of this rank's tokens."""

        def made(name: str, vocab_size: int, hidden_size: int) -> TokenTable:
            start, stop = vocabulary_range(vocab_size, self.share)
            table = make(name, stop - start, hidden_size)
            table.part = VocabularyPart(self, start, stop, vocab_size)
            return table

        return made


class VocabularyPart:
    """Tokens ``start`` to ``stop`` of ``total``: what a table of them alone does for all."""

    def __init__(self, split: Split, start: int, stop: int, total: int) -> None:
        self._split, self.start, self.stop, self.total = split, start, stop, total
        self.communicator = split.communicator

    def look_up(self, ids: Tensor, table: Callable[[Tensor], Tensor]) -> Tensor:
        """Vectors [T, hidden] of ``ids`` int64 [T]: each rank gives those of its tokens, ``table`` of local ids."""
        local = ids - self.start
        outside = (local < 0) | (local >= self.stop - self.start)
        found = table(local.masked_fill(outside, 0)).masked_fill(outside[:, None], 0)
        return self._split.communicator.sum(found)  # one number and zeros: exact

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """fp32 [n, total] of ``hidden`` [n, hidden], from each rank's ``product`` [n, its tokens]."""
        widest = -(-self.total // self._split.share.size)
        with self._split.head(hidden, False):
            own = product(hidden)
            if own.shape[1] < widest:
                own = torch.nn.functional.pad(own, (0, widest - own.shape[1]))
            parts = self._split.communicator.gather(own)  # [ranks, n, widest]
        return parts.transpose(0, 1).reshape(len(hidden), -1)[:, : self.total].contiguous()

    def best(self, hidden: Tensor, product: Callable[[Tensor], Tensor], softcap: Callable[[Tensor], Tensor]) -> Tensor:
        """fp64 [n, 3] of ``hidden`` [n, hidden]: the likeliest token (the first of equals), its logit, the least logit.

        Each rank looks at its own tokens; three numbers of each row are exchanged instead of all logits.
        """
        with self._split.head(hidden, True):
            own = softcap(product(hidden))
            most = own.max(dim=-1)
            found = torch.stack(
                ((most.indices + self.start).double(), most.values.double(), own.amin(dim=-1).double()), dim=-1
            )
            parts = self.communicator.gather(found)
        token, value, least = parts[0].unbind(-1)
        for other in parts[1:]:
            better = other[:, 1] > value
            token, value = torch.where(better, other[:, 0], token), torch.where(better, other[:, 1], value)
            least = torch.minimum(least, other[:, 2])  # NaN comes through
        return torch.stack((token, value, least), dim=-1)
