"""The vocabulary side of the tokenizer: special tokens under transformers' names, tokens to ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gemcut.errors import ParameterError
from gemcut.hf.encoding import id_lists
from gemcut.text import Tokenizer

_SIDES = ("left", "right")


class Vocabulary:
    """Names of transformers over gemcut's tokenizer.

    Attributes:
        tokenizer: gemcut's own tokenizer underneath.
    """

    def __init__(self, tokenizer: Tokenizer, padding_side: str, truncation_side: str) -> None:
        self.tokenizer = tokenizer
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self._pad_id = tokenizer.pad_id

    @property
    def padding_side(self) -> str:
        """Where padding goes: "left" (generation needs it there) or "right"."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = side_name("padding_side", side)

    @property
    def truncation_side(self) -> str:
        """Which end of a long text is cut off."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self._truncation_side = side_name("truncation_side", side)

    @property
    def bos_token_id(self) -> int:
        """Id of ``<bos>``."""
        return self.tokenizer.bos_id

    @property
    def eos_token_id(self) -> int:
        """Id of ``<eos>``."""
        return self.tokenizer.eos_id

    @property
    def unk_token_id(self) -> int:
        """Id of ``<unk>``."""
        return self.tokenizer.unk_id

    @property
    def pad_token_id(self) -> int:
        """Id of the token that pads; it may be set to any id of the vocabulary."""
        return self._pad_id

    @pad_token_id.setter
    def pad_token_id(self, token_id: int) -> None:
        self.tokenizer.id_to_token(token_id)  # raises for an id that is not in the vocabulary
        self._pad_id = int(token_id)

    @property
    def bos_token(self) -> str:
        """Text of ``<bos>``."""
        return self.tokenizer.id_to_token(self.bos_token_id)

    @property
    def eos_token(self) -> str:
        """Text of ``<eos>``."""
        return self.tokenizer.id_to_token(self.eos_token_id)

    @property
    def unk_token(self) -> str:
        """Text of ``<unk>``."""
        return self.tokenizer.id_to_token(self.unk_token_id)

    @property
    def pad_token(self) -> str:
        """Text of the token that pads; it may be set to any token of the vocabulary."""
        return self.tokenizer.id_to_token(self._pad_id)

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ParameterError(f"pad_token is {token!r}, which is not in the vocabulary; '<pad>' is")
        self._pad_id = found

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens, ascending."""
        return sorted(self.tokenizer.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of all special tokens, by id."""
        return [self.tokenizer.id_to_token(i) for i in self.all_special_ids]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return self.tokenizer.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Id of every token, by its spelling in the vocabulary."""
        return dict(self.tokenizer.backend.get_vocab(with_added_tokens=True))

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Id of a token by its spelling in the vocabulary, or of each; the id of ``<unk>`` where there is none."""
        if isinstance(tokens, str):
            found = self.tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The vocabulary's spelling of an id, or of each id of a list or tensor."""
        if isinstance(ids, int):
            return self.tokenizer.id_to_token(ids)
        skipped = self.tokenizer.special_ids if skip_special_tokens else frozenset()
        return [self.tokenizer.id_to_token(i) for i in id_lists(ids) if i not in skipped]


def side_name(name: str, side: str) -> str:
    """``side`` if it is one; ParameterError naming the argument otherwise."""
    if side not in _SIDES:
        raise ParameterError(f"{name} is {side!r}; expected 'left' or 'right'")
    return side
