"""Batches from shards of ``gemcut data`` or from a folder of text, through grain: packed, mixed, shuffled, resumable.

Documents stand one after another, each with its <bos>, and are cut into windows of the context's length. Windows are
shuffled by the seed, anew in each epoch; a mixture takes from each source by weight. An iterator's state is a few
numbers, so a run goes on with the very next batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.data.tokens.reader import INDEX, ShardReader
from gemcut.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXTS = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True)
class Source:
    """One source of a mixture: a folder of shards or of text, and its share by weight."""

    path: Path
    weight: float = 1.0


class Windows:
    """A source of windows of ``length`` tokens for grain: ``tokens``, ``segments``, ``positions``, ``document``.

    ``segments`` count a window's documents from 1, ``positions`` count from 0 in each, ``document`` is
    the number of the first. What does not fill a last window is left out.
    """

    def __init__(self, tokens: Sequence[NDArray[Any]], begins: NDArray[np.int64], length: int, name: str) -> None:
        self._parts, self._begins, self._length, self.name = list(tokens), begins, length, name
        self._offsets = np.cumsum([0, *(len(part) for part in tokens)])
        if len(self) == 0:
            raise DataError(f"{name} holds {self._offsets[-1]:,} tokens; expected at least one window of {length:,}")

    def __len__(self) -> int:
        return int(self._offsets[-1]) // self._length

    def __repr__(self) -> str:
        return f"Windows({self.name!r}, {self._length})"

    def __getitem__(self, number: int) -> dict[str, NDArray[np.int32]]:
        start, stop = number * self._length, (number + 1) * self._length
        pieces, at = [], start
        while at < stop:
            part = int(np.searchsorted(self._offsets, at, "right")) - 1
            inner = at - int(self._offsets[part])
            pieces.append(self._parts[part][inner : inner + stop - at])
            at += len(pieces[-1])
        first = int(np.searchsorted(self._begins, start, "right")) - 1
        last = int(np.searchsorted(self._begins, stop, "left"))
        inside = np.maximum(self._begins[first:last] - start, 0)
        place = np.arange(self._length)
        segment = np.searchsorted(inside, place, "right")
        return {
            "tokens": np.concatenate(pieces).astype(np.int32),
            "segments": segment.astype(np.int32),
            "positions": (place - inside[segment - 1]).astype(np.int32),
            "document": np.asarray(first, np.int32),
        }


def shard_windows(folder: Path, length: int, *, vocabulary: int, bos: int, tokenizer_sha256: str = "") -> Windows:
    """The windows of a folder of shards.

    Raises DataError where the shards are of another tokenizer, hold ids beyond ``vocabulary``, have a document without
    its one <bos>, or a file's hash is not the index's.
    """
    reader = ShardReader(folder)
    index = reader.index
    if tokenizer_sha256 and index["tokenizer_sha256"] != tokenizer_sha256:
        raise DataError(f"{folder} was made with another tokenizer; make the shards anew with the model's own")
    if index["vocabulary"] > vocabulary:
        raise DataError(f"{folder} has a vocabulary of {index['vocabulary']:,}, the model one of {vocabulary:,}")
    parts, begins, offset = [], [], 0
    for shard in index["shards"]:
        path = folder / shard["tokens_file"]
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise DataError(f"{path} is damaged: its hash is not the index's; copy it again or make it anew")
        tokens = np.memmap(path, index["dtype"], "r") if shard["tokens"] else np.zeros(0, index["dtype"])
        begin = np.load(folder / shard["begin_file"]).astype(np.int64)
        if len(tokens) and int(tokens.max()) >= vocabulary:
            raise DataError(f"{path} holds the id {int(tokens.max())}; the model's vocabulary ends at {vocabulary - 1}")
        _check_bos(tokens, begin[:-1], bos, str(path))
        parts.append(tokens)
        begins.append(begin[:-1] + offset)
        offset += len(tokens)
    joined = np.concatenate(begins) if begins else np.zeros(0, np.int64)
    return Windows(parts, joined, length, str(folder))


def text_windows(folder: Path, length: int, *, tokenizer: Any, vocabulary: int, bos: int) -> Windows:
    """The windows of a text file, or of all text files below a folder, a document each, in the order of their names."""
    documents = [[bos, *tokenizer.encode(text, add_special_tokens=False).ids] for text in read_texts(folder)]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in documents])
    if int(tokens.max()) >= vocabulary:
        raise DataError(f"{folder}: the tokenizer gives the id {int(tokens.max())}, the model has {vocabulary:,}")
    begins = np.cumsum([0, *(len(ids) for ids in documents)])[:-1].astype(np.int64)
    return Windows([tokens], begins, length, str(folder))


def read_texts(folder: Path) -> list[str]:
    """The texts below ``folder``. Raises DataError where there are none, or one is not UTF-8."""
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix in TEXTS and p.is_file())
    texts = []
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from None
        if text.strip():
            texts.append(text)
    if not texts:
        raise DataError(f"{folder} has no text; expected shards ({INDEX}) or files ending in {', '.join(TEXTS)}")
    return texts


def batches(
    sources: Sequence[tuple[Any, float]],
    batch: int,
    *,
    seed: int,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Any:
    """A grain iterator of batches of ``batch`` rows of this process: endless, with ``get_state`` and ``set_state``.

    ``sources`` are (windows, weight). ``workers`` are threads that read ahead; the order does not depend on them.
    Raises DataError for an empty mixture, ParameterError for weights that are none.
    """
    import grain

    if not sources:
        raise DataError("the mixture is empty; name at least one source")
    weights = [weight for _, weight in sources]
    if not all(np.isfinite(weights)) or min(weights) < 0 or sum(weights) == 0:
        raise ParameterError(f"the weights of the mixture are {weights}; expected numbers of 0 or more, not all 0")
    kept = [(windows, weight) for windows, weight in sources if weight]
    sets = [grain.MapDataset.source(w).shuffle(seed + i).repeat() for i, (w, _) in enumerate(kept)]
    mixed = sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, [weight for _, weight in kept])
    own = mixed[process::processes].batch(batch, drop_remainder=True)
    threads = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(own.to_iter_dataset(threads))


def _check_bos(tokens: NDArray[Any], begins: NDArray[np.int64], bos: int, name: str) -> None:
    starts = begins[begins < len(tokens)]
    if len(starts) and not (tokens[starts] == bos).all():
        raise DataError(f"{name} has a document without <bos> (id {bos}) at its start; make it with gemcut data")
    if int((tokens == bos).sum()) != len(starts):
        raise DataError(f"{name} has <bos> (id {bos}) inside a document; expected exactly one, at its start")
