"""A list of words and phrases, found in a text by their hashes, whole words only and in any case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut.errors import ParameterError
from gemcut.safety.judge import check_policy
from gemcut.text.document import Document
from gemcut.text.measures import Batch, Column, ngrams_by_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Hits for each hundred words at which the score is 1/2.
HALF = 1.0
LONGEST = 8  # terms of an entry


class Lexicon:
    """Entries of a list, by the number of their terms. Score: hits for each hundred terms, x / (x + HALF)."""

    def __init__(self, entries: Iterable[str], policy: str = "lexicon") -> None:
        """Raises ParameterError where no entry has a letter or digit, or one has more than LONGEST words."""
        self.policies = (policy,)
        found: dict[int, set[int]] = {}
        documents = [Document("", "", entry) for entry in dict.fromkeys(entries) if entry.strip()]
        if documents:
            terms = Batch(documents).terms
            for size in np.unique(terms.count[terms.count > 0]).tolist():
                if size > LONGEST:
                    at = int(np.flatnonzero(terms.count == size)[0])
                    raise ParameterError(f"entry {at + 1} of the lexicon has {size} words; expected at most {LONGEST}")
                hashes, _ = ngrams_by_place(terms, size)
                found[size] = set(hashes[terms.begin[:-1][terms.count == size]].tolist())
        if not found:
            raise ParameterError("the lexicon is empty; expected a word or phrase a line")
        self._entries = {size: np.array(sorted(hashes), np.uint64) for size, hashes in found.items()}

    @classmethod
    def read(cls, path: Path, policy: str = "lexicon") -> Lexicon:
        """From a file with an entry a line, ``#`` for comments. Raises ParameterError where it cannot be read."""
        try:
            lines = path.read_text("utf-8").splitlines()
        except OSError as error:
            raise ParameterError(f"cannot read the lexicon {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ParameterError(f"the lexicon {path} is not UTF-8") from None
        try:
            return cls((line for line in lines if not line.startswith("#")), policy)
        except ParameterError as error:
            raise ParameterError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def hits(self, terms: Column) -> NDArray[np.int64]:
        """For each document how many entries stand in it."""
        total = np.zeros(len(terms.count), np.int64)
        for size, known in self._entries.items():
            hashes, valid = ngrams_by_place(terms, size)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            total += terms.sums((known[places] == hashes) & valid)
        return total

    def scores(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """The score of each document."""
        terms = Batch(documents).terms
        rate = 100 * self.hits(terms) / np.maximum(terms.count, 1)
        found: NDArray[np.float64] = rate / (rate + HALF)
        return found

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``."""
        check_policy(policy, self.policies)
        return float(self.scores([Document("", "", text)])[0])
