"""MinHash signatures of word n-grams, by rensa or by numpy. The two are not comparable; each has its own stamp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.data.document import Document
from gemcut.data.store import needs
from gemcut.text.measures import Batch, ngrams
from gemcut.text.split import HASH_VERSION, mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]
    U32 = NDArray[np.uint32]
    I64 = NDArray[np.int64]

PERMUTATIONS = 112
SEED = 1


def shingles(documents: Sequence[Document], words: int) -> tuple[U64, I64]:
    """Hashes of every n-gram of terms, each once a document and sorted, and where each document's begin."""
    batch = Batch(documents)
    hashes, owner = ngrams(batch.terms, words)
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    first = np.ones(len(hashes), np.bool_)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    counts = np.bincount(owner[first], minlength=batch.size)
    return hashes[first], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def signatures(hashes: U64, begin: I64, algorithm: str) -> U32:
    """(documents, PERMUTATIONS) of the smallest values; a document without n-grams has all ones."""
    found = np.full((len(begin) - 1, PERMUTATIONS), 0xFFFFFFFF, np.uint32)
    full = np.flatnonzero(np.diff(begin))
    if len(full):
        offsets = np.append(begin[full], begin[-1])
        found[full] = (_rensa if algorithm == "rensa" else _affine)(hashes, offsets)
    return found


def _affine(hashes: U64, offsets: I64) -> U32:
    """The smallest of (a x + b) mod 2^64 / 2^32 with odd a, for each of the permutations."""
    factors, terms = _parameters()
    out = np.empty((PERMUTATIONS, len(offsets) - 1), np.uint32)
    starts = offsets[:-1]
    for i in range(PERMUTATIONS):
        values = ((hashes * factors[i] + terms[i]) >> np.uint64(32)).astype(np.uint32)
        out[i] = np.minimum.reduceat(values, starts)
    return np.ascontiguousarray(out.T)


@cache
def _parameters() -> tuple[U64, U64]:
    numbers = mix(np.arange(2 * PERMUTATIONS, dtype=np.uint64) + np.uint64(SEED << 32))
    return numbers[:PERMUTATIONS] | np.uint64(1), numbers[PERMUTATIONS:]


def _rensa(hashes: U64, offsets: I64) -> U32:
    matrix = load_rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        np.ascontiguousarray(hashes), offsets.astype(np.uint64), PERMUTATIONS, SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def stamp(algorithm: str, words: int) -> str:
    """What signatures must have in common to be comparable."""
    version = f"rensa-R{load_rensa().RMinHash.ALGORITHM_VERSION}" if algorithm == "rensa" else "affine-1"
    return f"{version}/{PERMUTATIONS}x{words}/seed{SEED}/{HASH_VERSION}"


def load_rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise needs("rensa") from None
    return rensa


def band_keys(found: U32, first: int, rows: int) -> U64:
    """One hash a document of ``rows`` values of its signature, from the ``first`` on."""
    keys = np.zeros(len(found), np.uint64)
    for column in range(first, first + rows):
        keys = mix(keys + found[:, column].astype(np.uint64) + np.uint64(column + 1))
    return keys
