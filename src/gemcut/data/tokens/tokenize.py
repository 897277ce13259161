"""Documents into token ids by any tokenizer.json; each begins with <bos> and ends with <eos>."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.data.document import Document
from gemcut.data.steps import batches
from gemcut.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOS, EOS = "<bos>", "<eos>"


class DocumentTokenizer:
    """A tokenizer for shards. ``dtype`` is uint16 where all ids fit, else uint32."""

    def __init__(self, path: Path) -> None:
        """Raises ParameterError where it cannot be read, or has no <bos> or <eos>."""
        import tokenizers

        try:
            data = path.read_bytes()
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
        except OSError as error:
            raise ParameterError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
        except Exception as error:  # the library raises its base class
            raise ParameterError(f"{path} is no tokenizer.json: {error}") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.bos, self.eos = (self._mark(token, path) for token in (BOS, EOS))
        self.vocabulary: int = self._tokenizer.get_vocab_size()
        self.dtype: Any = np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")
        self._tokenizer.encode_special_tokens = True  # marks that stand in a text are text

    def _mark(self, token: str, path: Path) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise ParameterError(f"{path} has no {token}; expected a tokenizer with Gemma's marks")
        return found

    def encode(self, documents: Iterator[Document]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(ids of all documents one after another, where each begins and the last ends)."""
        pieces: list[NDArray[Any]] = []
        sizes: list[int] = []
        for batch in batches(documents):
            for found in self._tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False):
                ids = np.empty(len(found.ids) + 2, self.dtype)
                ids[0], ids[1:-1], ids[-1] = self.bos, found.ids, self.eos
                pieces.append(ids)
                sizes.append(len(ids))
            check_bos(pieces[len(pieces) - len(batch) :], self.bos)
        begin = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=begin[1:])
        return (np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)), begin


def check_bos(documents: list[NDArray[Any]], bos: int) -> None:
    """Raises DataError unless each document holds exactly one <bos>, at its beginning."""
    for ids in documents:
        if len(ids) == 0 or ids[0] != bos or np.count_nonzero(ids == bos) != 1:
            raise DataError(f"a document would have {np.count_nonzero(ids == bos)} <bos> marks or begin without one")
