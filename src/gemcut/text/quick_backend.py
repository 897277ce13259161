"""A SentencePiece vocabulary at work without building a tokenizer: ready in a tenth of a second, for start-up.

``tokenizers`` needs over a second for a vocabulary of 262,144 pieces and its 513,976 merges. A prompt needs a few
hundred of them. `QuickBackend` encodes short texts itself, in the order of `gguf_vocab.build`'s merges, which it works
out pair by pair; for long texts, and for everything else that a backend can do, it builds the real one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gemcut.errors import TokenizerError
from gemcut.text import gguf_vocab

_LONG = 8192  # characters from which on building the real tokenizer is worth its second
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: (not a run of spaces, minus the score, piece, left, right): sorts as the merges of `gguf_vocab.build` do.
_Rank = tuple[bool, float, int, int, int]


@dataclass(frozen=True)
class _Ids:
    ids: list[int]


class QuickBackend:
    """What `Tokenizer` asks of a ``tokenizers.Tokenizer``, with the same answers.

    Attributes:
        encode_special_tokens: read special tokens in a text as plain text.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        special: Mapping[str, int],
        full: Callable[[], Tokenizer],
    ) -> None:
        """``full`` builds the real backend of the same vocabulary. Raises TokenizerError as `gguf_vocab.build`."""
        parts = gguf_vocab.parts(tokens, scores, types, special)
        self.encode_special_tokens = False
        self._pieces, self._ids, self._scores, self._usable = parts.pieces, parts.vocab, scores, parts.usable
        self._space_runs = parts.space_runs
        self._added = {parts.pieces[i]: i for i in parts.added}
        self._special = {i: i in parts.special for i in parts.added}
        self._starts: dict[str, int] = {}  # first character of an added token -> the longest one's length
        for content in self._added:
            self._starts[content[:1]] = max(self._starts.get(content[:1], 0), len(content))
        self._merges: dict[tuple[int, int], tuple[_Rank, int] | None] = {}
        self._more: list[AddedToken] = []
        self._full, self._real = full, None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the real backend's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> Any:
        """The real backend, built on first use."""
        if self._real is None:
            backend: Any = self._full()
            if self._more:
                backend.add_special_tokens(self._more)
            self._real = backend
        return self._real

    def no_truncation(self) -> None:
        """There is none."""

    def no_padding(self) -> None:
        """There is none."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The piece of an id."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """How many pieces there are; every added token is one of them."""
        return len(self._pieces)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are matched whole, by id."""
        return {
            i: AddedToken(self._pieces[i], special=special, normalized=False)
            for i, special in sorted(self._special.items())
        }

    def add_special_tokens(self, tokens: Iterable[AddedToken]) -> int:
        """Make pieces of the vocabulary special."""
        for token in tokens:
            token_id = self._ids.get(token.content)
            if token_id is None:
                raise TokenizerError(f"the vocabulary has no token {token.content!r}")
            self._added[token.content], self._special[token_id] = token_id, True
            first = token.content[:1]
            self._starts[first] = max(self._starts.get(first, 0), len(token.content))
            self._more.append(token)
        return 0

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Any:
        """Token ids of a text, as ``.ids``."""
        if add_special_tokens or len(text) > _LONG or self._real is not None:
            real = self.real()
            real.encode_special_tokens = self.encode_special_tokens
            return real.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        start = at = 0
        while at < len(text):
            found = self._added_at(text, at)
            if not found:
                at += 1
            elif self.encode_special_tokens and self._special[self._added[found]]:
                at += len(found)  # stays part of the text around it
            else:
                self._encode_plain(text[start:at], ids)
                ids.append(self._added[found])
                start = at = at + len(found)
        self._encode_plain(text[start:], ids)
        return _Ids(ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; a run of byte pieces that is no UTF-8 becomes one U+FFFD per byte."""
        out: list[str] = []
        run: list[int] = []

        def flush() -> None:
            try:
                out.append(bytes(run).decode())
            except UnicodeDecodeError:
                out.append(_REPLACEMENT * len(run))
            run.clear()

        for token_id in ids:
            piece = self.id_to_token(token_id)
            if piece is None or (skip_special_tokens and self._special.get(token_id, False)):
                continue
            byte = _byte(piece)
            if byte is not None:
                run.append(byte)
                continue
            if run:
                flush()
            out.append(piece.replace("▁", " "))
        if run:
            flush()
        return "".join(out)

    def _added_at(self, text: str, at: int) -> str:
        """The longest added token that begins at ``at``; "" for none."""
        for length in range(self._starts.get(text[at], 0), 0, -1):
            if (content := text[at : at + length]) in self._added:
                return content
        return ""

    def _encode_plain(self, text: str, out: list[int]) -> None:
        """Byte-pair encoding of a text without added tokens: the best pair first, the leftmost among equals."""
        symbols: list[int | None] = []
        for char in text.replace(" ", "▁"):
            known = self._ids.get(char)
            symbols += [self._ids[f"<0x{byte:02X}>"] for byte in char.encode()] if known is None else [known]
        following = [*range(1, len(symbols) + 1)]
        before = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[_Rank, int, int]] = []

        def offer(left: int) -> None:
            right = following[left] if left >= 0 else len(symbols)
            if right < len(symbols) and (merge := self._merge(symbols[left], symbols[right])):
                heapq.heappush(queue, (merge[0], left, merge[1]))

        for left in range(len(symbols) - 1):
            offer(left)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = following[left]
            if symbols[left] is None or right >= len(symbols):
                continue
            now = self._merge(symbols[left], symbols[right])
            if now is None or now[1] != joined:  # a neighbour has changed since
                continue
            symbols[left], symbols[right] = joined, None
            following[left] = following[right]
            if following[left] < len(symbols):
                before[following[left]] = left
            offer(before[left])
            offer(left)
        out += [symbol for symbol in symbols if symbol is not None]

    def _merge(self, left: int | None, right: int | None) -> tuple[_Rank, int] | None:
        """(rank, joint piece) of two neighbours, None where they do not join."""
        if left is None or right is None:
            return None
        pair = (left, right)
        if pair not in self._merges:
            self._merges[pair] = None
            joined = self._ids.get(self._pieces[left] + self._pieces[right])
            if joined is not None and self._usable(left) and self._usable(right) and self._usable(joined):
                run = joined in self._space_runs
                self._merges[pair] = (not run, 0.0 if run else -self._scores[joined], joined, left, right), joined
        return self._merges[pair]


def _byte(piece: str) -> int | None:
    """The byte a piece such as <0x0A> stands for."""
    if len(piece) != 6 or not piece.startswith("<0x") or piece[5] != ">":
        return None
    try:
        return int(piece[3:5], 16)
    except ValueError:
        return None
