"""Which documents of which source go into the shards, how often and in which order: by counts and seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gemcut.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """How sources are mixed.

    ``tokens`` (0: all there are, once) is the size of the whole; a source's share is its weight, by ``weights``, else
    its size, to the power 1 / ``temperature``. ``epochs`` bounds how often a source may be read, by ``max_epochs`` for
    those it does not name; ``budgets`` are upper bounds in tokens.
    """

    tokens: int = 0
    temperature: float = 1.0
    max_epochs: float = 4.0
    weights: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.temperature <= 0 or self.max_epochs <= 0:
            raise ParameterError("mixture: tokens must be at least 0, temperature and max_epochs more than 0")
        for name, table in (("weights", self.weights), ("epochs", self.epochs), ("budgets", self.budgets)):
            for source, value in table.items():
                if value < 0:
                    raise ParameterError(f"mixture: {name}.{source} is {value:g}; expected at least 0")

    def shares(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Tokens of each source, from the tokens it has.

        What a source cannot give, since its epochs or its budget bound it, goes to the others in proportion.
        """
        for table in (self.weights, self.epochs, self.budgets):
            for name in table:
                if name not in sizes:
                    raise DataError(f"mixture names the source {name}, which the recipe has not")
        most = {name: int(size * self.epochs.get(name, self.max_epochs)) for name, size in sizes.items()}
        for name, budget in self.budgets.items():
            most[name] = min(most[name], budget)
        if not self.tokens:
            return {name: min(most[name], int(size * self.epochs.get(name, 1))) for name, size in sizes.items()}
        weights = {name: self.weights.get(name, size) ** (1 / self.temperature) for name, size in sizes.items()}
        out = dict.fromkeys(sizes, 0)
        free = {name for name in sizes if weights[name] > 0 and most[name] > 0}
        while free:
            left = self.tokens - sum(out[name] for name in sizes if name not in free)
            total = sum(weights[name] for name in free)
            wanted = {name: left * weights[name] / total for name in free}
            full = {name for name in free if wanted[name] >= most[name]}
            for name in full or free:
                out[name] = most[name] if name in full else int(wanted[name])
            free -= full or free
        return out


def order(
    lengths: Mapping[str, NDArray[np.int64]], shares: Mapping[str, int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(number of the document within its source, number of the source) for each place of the shards, in order.

    Each source is read as a whole, shuffled, as often as its share holds; then as many of its documents, in a random
    order, as the rest of the share. All are then shuffled together.
    """
    numbers, owners = [], []
    for i, (name, sizes) in enumerate(lengths.items()):
        draw = np.random.Generator(np.random.PCG64([seed, i]))
        left, total = shares[name], int(sizes.sum())
        while total and left > 0:
            chosen = draw.permutation(len(sizes))
            if left < total:
                ends = np.cumsum(sizes[chosen])
                chosen = chosen[: int(np.searchsorted(ends, left, "right"))]
            if not len(chosen):
                break
            numbers.append(chosen.astype(np.int64))
            owners.append(np.full(len(chosen), i, np.int32))
            left -= int(sizes[chosen].sum())
            if len(chosen) < len(sizes):
                break
    if not numbers:
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    number, owner = np.concatenate(numbers), np.concatenate(owners)
    together = np.random.Generator(np.random.PCG64([seed, len(lengths)])).permutation(len(number))
    return number[together], owner[together]
