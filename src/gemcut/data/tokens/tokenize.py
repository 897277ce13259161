"""Documents into token ids by any tokenizer.json; each begins with <bos> and ends with <eos>."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcut.data.document import Document
from gemcut.data.steps import batches
from gemcut.data.tokens.train import PIECES
from gemcut.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOS, EOS = "<bos>", "<eos>"
_SPACE = "▁"
#: White space and the word behind it. A text is encoded word by word where no piece spans the end of a word, which is
#: a space or a line break: pieces such as "}\r" there are.
_WORD = re.compile(r"\s*\S+(?:[^\S \n]\s*\S*)*|\s+")
_SPANS = re.compile(rf"[^\s{_SPACE}][ \n{_SPACE}]")
_CACHED, _LONGEST = 1 << 18, 64  # words that are kept, and their characters


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
        self._words: dict[str, list[int]] | None = {} if _by_words(json.loads(data)) else None

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
            for found in self._encode([d.text for d in batch]):
                ids = np.empty(len(found) + 2, self.dtype)
                ids[0], ids[1:-1], ids[-1] = self.bos, found, self.eos
                pieces.append(ids)
                sizes.append(len(ids))
            check_bos(pieces[len(pieces) - len(batch) :], self.bos)
        begin = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=begin[1:])
        return (np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)), begin

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Words are encoded once, where that gives the same: the library does some MB/s."""
        if self._words is None:
            return self._whole(texts)
        divided = [None if _SPACE in text else _WORD.findall(text) for text in texts]
        if len(self._words) > _CACHED:
            self._words.clear()
        new = list({word for words in divided if words for word in words} - self._words.keys())
        known = self._words | dict(zip(new, self._whole(new), strict=True)) if new else self._words
        self._words.update((word, known[word]) for word in new if len(word) <= _LONGEST)
        whole = iter(self._whole([text for text, words in zip(texts, divided, strict=True) if words is None]))
        return [
            next(whole) if words is None else list(chain.from_iterable(map(known.__getitem__, words)))
            for words in divided
        ]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _by_words(spec: dict[str, Any]) -> bool:
    """Whether a text's ids are those of its words one after another.

    So it is for byte-pair tokenizers such as Gemma's, with ▁ for each space and bytes for what has no piece, of which
    no piece goes on behind a word into white space: no merge then joins what stands on two sides of the end of a word.
    """
    model = spec.get("model") or {}
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return False
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    spelled = bool(model.get("byte_fallback")) and all(
        f"<0x{byte:02X}>" in vocabulary or (byte < 128 and chr(byte) in vocabulary) for byte in range(256)
    )
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = spec.get("pre_tokenizer")
    own = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    nothing = isinstance(before, dict) and before.get("type") == "Split" and before.get("pattern") == {"String": " "}
    added = [token for token in spec.get("added_tokens") or [] if not token.get("special")]
    return (
        plain
        and spelled
        and spec.get("normalizer") == replaces
        and (before is None or before == own or nothing)
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        and not any(_SPANS.search(piece) for piece in (*vocabulary, *(token["content"] for token in added)))
    )


def check_bos(documents: list[NDArray[Any]], bos: int) -> None:
    """Raises DataError unless each document holds exactly one <bos>, at its beginning."""
    for ids in documents:
        if len(ids) == 0 or ids[0] != bos or np.count_nonzero(ids == bos) != 1:
            raise DataError(f"a document would have {np.count_nonzero(ids == bos)} <bos> marks or begin without one")
