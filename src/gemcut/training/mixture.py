"""What a run learns from: its tokenizer, the windows of its sources, and those that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.config import GemmaConfig
from gemcut.data.store import AtomicFile
from gemcut.data.tokens.reader import INDEX
from gemcut.errors import DataError, ParameterError
from gemcut.training.data import Windows, read_texts, shard_windows, text_windows
from gemcut.training.driver import Driver, wait_for_all
from gemcut.training.runfile import RunFile
from gemcut.training.teacher import StoredTeacher

TOKENIZER = "tokenizer.json"


class Stretch:
    """Windows ``start`` to ``stop`` of a source, which know their source's number and the teacher's stored answers."""

    def __init__(self, windows: Windows, start: int, stop: int, source: int, teacher: StoredTeacher | None) -> None:
        self._windows, self._start, self._stop = windows, start, stop
        self._source, self._teacher = source, teacher

    def __len__(self) -> int:
        return self._stop - self._start

    def __repr__(self) -> str:
        return f"Stretch({self._windows!r}, {self._start}, {self._stop}, {self._teacher!r})"

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = {**self._windows[self._start + number], "source": np.asarray(self._source, np.int32)}
        if self._teacher is not None:
            row |= self._teacher[self._start + number]
        return row


class Mixture:
    """The sources of a run file, with the tokenizer that reads them.

    ``own`` is where a tokenizer that the run learns is kept. Raises DataError and ParameterError for what is wrong.
    """

    def __init__(self, file: RunFile, own: Path, driver: Driver | None = None) -> None:
        self._file, self._driver = file, driver or Driver("host")
        self.tokenizer, self.tokenizer_sha256 = self._read_tokenizer(own)
        bos = self.tokenizer.token_to_id("<bos>")
        if bos is None:
            raise DataError("the tokenizer has no <bos>; expected one of Gemma's, or of `gemcut data train-tokenizer`")
        self.bos: int = bos
        self.train: list[tuple[Stretch, float]] = []
        self.held: dict[str, Stretch] = {}

    def open(self, config: GemmaConfig) -> None:
        """Open the sources for a network of ``config``."""
        run = self._file.run
        if run.length > config.max_position_embeddings:
            raise ParameterError(
                f"length is {run.length:,}; the model's context has {config.max_position_embeddings:,} tokens"
            )
        for number, source in enumerate(self._file.sources):
            windows = self.windows(self._file.path(source.path), config.vocab_size)
            stored = StoredTeacher(self._file.path(source.teacher), windows) if source.teacher else None
            kept = len(windows) - source.held_out
            if kept < 1:
                raise DataError(
                    f"source {source.name} has {len(windows)} windows of {run.length} tokens and {source.held_out} are "
                    "held out; give more text, or hold out fewer"
                )
            self.train.append((Stretch(windows, 0, kept, number, stored), source.weight))
            if source.held_out:
                self.held[source.name] = Stretch(windows, kept, len(windows), number, stored)

    def windows(self, path: Path, vocabulary: int) -> Windows:
        """The windows of a folder of shards, or of texts."""
        length = self._file.run.length
        if (path / INDEX).exists():
            return shard_windows(
                path, length, vocabulary=vocabulary, bos=self.bos, tokenizer_sha256=self.tokenizer_sha256
            )
        return text_windows(path, length, tokenizer=self.tokenizer, vocabulary=vocabulary, bos=self.bos)

    def documents(self, rows: dict[str, Any]) -> list[str]:
        """The documents of a batch, as ``source:number``."""
        found: dict[str, None] = {}
        for source, first, segments in zip(rows["source"], rows["document"], rows["segments"], strict=True):
            name = self._file.sources[int(source)].name
            found |= dict.fromkeys(f"{name}:{int(first) + i}" for i in range(int(segments.max())))
        return list(found)

    def _read_tokenizer(self, own: Path) -> tuple[Any, str]:
        import tokenizers

        model = self._file.model
        path = self._file.path(model.folder) / TOKENIZER if model.folder else self._file.path(model.tokenizer)
        if model.train_tokenizer:
            path = own
            if not own.exists() and self._driver.leads:
                self._learn_tokenizer(own)
            wait_for_all(self._driver, "tokenizer")
        try:
            data = path.read_bytes()
            return tokenizers.Tokenizer.from_str(data.decode()), hashlib.sha256(data).hexdigest()
        except Exception as error:  # the library raises plain Exceptions
            raise DataError(f"cannot read the tokenizer {path}: {' '.join(str(error).split())[:200]}") from None

    def _learn_tokenizer(self, own: Path) -> None:
        from gemcut.data.tokens.train import train

        folders = [self._file.path(source.path) for source in self._file.sources]
        shards = next((folder for folder in folders if (folder / INDEX).exists()), None)
        if shards is not None:
            raise ParameterError(
                f"{shards} holds shards, which have their tokenizer; name it in place of train_tokenizer"
            )

        def texts() -> Iterator[str]:
            return (text for folder in folders for text in read_texts(folder))

        learned = train(texts, self._file.model.train_tokenizer)
        with AtomicFile(own) as out:
            out.write(learned.to_str(pretty=True).encode())
