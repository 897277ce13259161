"""The library bm25s: what is imported of it, and how its tables are kept as bytes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from gemcut.errors import UnsupportedError

_TABLES = ("data", "indices", "indptr")


class Ranking:
    """BM25 scores (Lucene's, k1 1.5, b 0.75) of passages for words."""

    def __init__(self, tables: dict[str, Any], vocabulary: dict[str, int], count: int) -> None:
        self._engine = _library().BM25()
        self._engine.scores = {**tables, "num_docs": count}
        self._engine.vocab_dict = vocabulary
        self._engine.nonoccurrence_array = None  # only other kinds of BM25 have one
        self.vocabulary, self.count = vocabulary, count

    @classmethod
    def build(cls, passages: Sequence[Sequence[str]]) -> Ranking:
        """From the words of each passage; at least one of them must have a word."""
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words] for words in passages]
        engine = _library().BM25()
        engine.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls({name: np.asarray(engine.scores[name]) for name in _TABLES}, vocabulary, len(ids))

    def scores(self, words: Sequence[str]) -> np.ndarray:
        """fp32 [passages]: 0 where a passage has none of the words."""
        ids = [self.vocabulary[word] for word in words if word in self.vocabulary]
        if not ids:
            return np.zeros(self.count, np.float32)
        found: np.ndarray = self._engine.get_scores_from_ids(ids)
        return found

    def to_bytes(self) -> bytes:
        """All of it, without a pickle."""
        file = io.BytesIO()
        words = np.frombuffer(json.dumps(self.vocabulary).encode(), np.uint8)
        tables = {name: self._engine.scores[name] for name in _TABLES}
        np.savez(file, allow_pickle=False, words=words, count=np.int64(self.count), **tables)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Ranking:
        """What `to_bytes` gave. Raises ValueError, KeyError, OSError or zipfile.BadZipFile where it is damaged."""
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            tables = {name: found[name] for name in _TABLES}
            return cls(tables, json.loads(found["words"].tobytes()), int(found["count"]))


@cache
def stop_words() -> list[frozenset[str]]:
    """The common words of each language that there is a list of; English first."""
    _library()
    from bm25s import stopwords

    names = sorted(name for name in dir(stopwords) if name.startswith("STOPWORDS_") and "_EN" not in name)
    lists = [stopwords.STOPWORDS_EN_PLUS, *(getattr(stopwords, name) for name in names)]
    return [frozenset(word.casefold() for word in own) for own in lists]


@cache
def _library() -> Any:
    try:
        with _without_jax():
            import bm25s
    except ImportError:
        raise UnsupportedError("an index of documents needs bm25s: pip install 'gemcut[uses]'") from None
    return bm25s


@contextmanager
def _without_jax() -> Iterator[None]:
    """bm25s would start JAX where it is installed, and so wake a TPU's runtime, for a sort that is not used here."""
    if "jax" in sys.modules:
        yield
        return
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["jax"]
