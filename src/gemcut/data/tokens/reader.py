"""Shards read at random: documents, and windows of one length for training. Needs numpy alone."""

from __future__ import annotations

import bisect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX = "index.json"


class ShardReader:
    """The documents of a folder of shards: ``reader[i]`` are the token ids of document i, ``len(reader)`` their number.

    Shards are mapped: opening costs nothing, and processes share what they read.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError where there are no shards, or a file has another size than the index says."""
        self._folder = Path(folder)
        try:
            self.index: dict[str, Any] = json.loads((self._folder / INDEX).read_bytes())
        except FileNotFoundError:
            raise DataError(f"there is no {INDEX} in {folder}; expected the folder tokens/ of a run") from None
        except ValueError as error:
            raise DataError(f"{self._folder / INDEX} is damaged ({error})") from None
        self.sources: list[str] = self.index["sources"]
        self._tokens, self._begin, self._source = [], [], []
        for shard in self.index["shards"]:
            path = self._folder / shard["tokens_file"]
            tokens = np.memmap(path, self.index["dtype"], "r") if shard["tokens"] else np.zeros(0, self.index["dtype"])
            if len(tokens) != shard["tokens"]:
                raise DataError(f"{path} holds {len(tokens):,} tokens, the index says {shard['tokens']:,}")
            self._tokens.append(tokens)
            self._begin.append(np.load(self._folder / shard["begin_file"], mmap_mode="r"))
            self._source.append(np.load(self._folder / shard["source_file"], mmap_mode="r"))
        self._first = np.cumsum([0, *(len(begin) - 1 for begin in self._begin)]).tolist()
        self._offset = np.cumsum([0, *(len(tokens) for tokens in self._tokens)]).tolist()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> NDArray[Any]:
        shard, at = self._place(number)
        begin = self._begin[shard]
        found: NDArray[Any] = self._tokens[shard][int(begin[at]) : int(begin[at + 1])]
        return found

    def source(self, number: int) -> str:
        """The name of a document's source."""
        shard, at = self._place(number)
        return self.sources[int(self._source[shard][at])]

    @property
    def tokens(self) -> int:
        """All tokens of all shards."""
        return int(self._offset[-1])

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} documents, not number {number}")
        shard = bisect.bisect_right(self._first, number) - 1
        return shard, number - self._first[shard]

    def stretch(self, start: int, length: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """(token ids, segment ids, source numbers) of ``length`` tokens from ``start`` on, over the ends of shards.

        Segments count the documents of the stretch from 1.
        """
        ids, segments, sources = (np.empty(length, np.int32) for _ in range(3))
        done, segment = 0, 0
        while done < length:
            at = start + done
            shard = bisect.bisect_right(self._offset, at) - 1
            inner = at - self._offset[shard]
            begin = self._begin[shard]
            document = int(np.searchsorted(begin, inner, "right")) - 1
            count = min(length - done, int(begin[document + 1]) - inner)
            segment += 1
            ids[done : done + count] = self._tokens[shard][inner : inner + count]
            segments[done : done + count] = segment
            sources[done : done + count] = self._source[shard][document]
            done += count
        return ids, segments, sources


class PackedReader:
    """Windows of ``length`` tokens, one after another without padding, as a grain ``RandomAccessDataSource``.

    ``reader[i]`` holds ``tokens``, ``segment_ids`` (documents of the window, from 1), ``positions`` (from 0 in each
    segment) and ``source_ids``, each an int32 array of ``length``. What does not fill a last window is left out.
    """

    def __init__(self, folder: str | Path, length: int) -> None:
        if length < 1:
            raise DataError(f"length is {length}; expected at least 1")
        self.shards, self._length = ShardReader(folder), length

    def __len__(self) -> int:
        return self.shards.tokens // self._length

    def __getitem__(self, number: int) -> dict[str, NDArray[np.int32]]:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} windows, not number {number}")
        tokens, segments, sources = self.shards.stretch(number * self._length, self._length)
        starts = np.flatnonzero(np.diff(segments, prepend=0))
        positions = np.arange(self._length) - np.repeat(starts, np.diff(np.append(starts, self._length)))
        return {
            "tokens": tokens,
            "segment_ids": segments,
            "positions": positions.astype(np.int32),
            "source_ids": sources,
        }
