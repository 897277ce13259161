"""The vocabulary side of the tokenizer: special tokens under transformers' names, tokens to ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gemcut.errors import ParameterError, UnsupportedError
from gemcut.hf.encoding import NO_LIMIT, id_lists
from gemcut.hf.missing import missing
from gemcut.hf.public_names import TOKENIZER
from gemcut.text import Tokenizer

_SIDES = ("left", "right")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Vocabulary:
    """Names of transformers over gemcut's tokenizer.

    Attributes:
        tokenizer: gemcut's own tokenizer underneath.
        model_max_length: the length ``truncation=True`` cuts at where no max_length is given.
        add_bos_token, add_eos_token: what ``add_special_tokens=True`` adds.
    """

    model_max_length: int = NO_LIMIT
    add_bos_token: bool = True
    add_eos_token: bool = False

    def __init__(self, tokenizer: Tokenizer, padding_side: str, truncation_side: str) -> None:
        self.tokenizer = tokenizer
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self._pad_id = tokenizer.pad_id

    def __getattr__(self, name: str) -> Any:  # only called where there is no such attribute
        raise missing(self, name, TOKENIZER)

    @property
    def is_fast(self) -> bool:
        """Always True: the tokenizers library splits the text."""
        return True

    @property
    def model_input_names(self) -> list[str]:
        """What calling the tokenizer gives and the model takes."""
        return ["input_ids", "attention_mask"]

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """Always False: Gemma's spaces are exact."""
        return False

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizers library's object."""
        return self.tokenizer.backend

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
    def pad_token_type_id(self) -> int:
        """What transformers pads token types with; Gemma has none."""
        return 0

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Texts of the special tokens by role."""
        return {role: getattr(self, role) for role in _ROLES}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Texts of the special tokens that have no role: the turn markers of a dialogue."""
        return self.all_special_tokens[len(set(self.special_tokens_map.values())) :]

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens: those with a role first, in transformers' order, then the others, ascending."""
        roles = [getattr(self, f"{role}_id") for role in _ROLES]
        return list(dict.fromkeys([*roles, *sorted(self.tokenizer.special_ids)]))

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of all special tokens, in the order of ``all_special_ids``."""
        return [self.tokenizer.id_to_token(i) for i in self.all_special_ids]

    @property
    def vocab(self) -> dict[str, int]:
        """``get_vocab()``."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens (of the tokenizers library) by id; they are found in a text before it is split."""
        return dict(sorted(self.tokenizer.backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids of the added tokens by their text."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """``added_tokens_encoder``."""
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Number of tokens that had to be added, which is always 0: tokens that are there already change nothing.

        Raises:
            UnsupportedError: one is not an added token yet. The network has no row for a new one.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) or hasattr(new_tokens, "content") else list(new_tokens)
        there = self.tokenizer.special_ids if special_tokens else frozenset(self.added_tokens_decoder)
        for token in (str(getattr(token, "content", token)) for token in tokens):
            if self.tokenizer.token_to_id(token) not in there:
                raise UnsupportedError(
                    f"add_tokens: {token!r} is not among the tokenizer's {'special' if special_tokens else 'added'} "
                    "tokens, and the vocabulary does not grow; add it with transformers and load the result"
                )
        return 0

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], **others: Any) -> int:
        """Set ``pad_token``; name others that are special already. Returns 0, the number of tokens that were added.

        Raises:
            ParameterError: a role that Gemma's tokenizer has not, or a pad_token that is not in the vocabulary.
            UnsupportedError: another token in one of the other roles, or one that is not special yet.
        """
        for name in others:
            if name not in ("replace_extra_special_tokens", "replace_additional_special_tokens"):
                raise ParameterError(f"add_special_tokens has no argument {name!r}; check its spelling or leave it out")
        for role, value in special_tokens_dict.items():
            if role == "pad_token":
                self.pad_token = str(getattr(value, "content", value))
            elif role in ("additional_special_tokens", "extra_special_tokens"):
                self.add_tokens(value, special_tokens=True)
            elif role not in _ROLES:
                raise ParameterError(f"add_special_tokens: no role {role!r} here; expected one of {', '.join(_ROLES)}")
            elif str(getattr(value, "content", value)) != getattr(self, role):
                raise UnsupportedError(
                    f"add_special_tokens: {role} is {getattr(self, role)!r} and cannot be {value!r}: "
                    "the network was trained with it"
                )
        return 0

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens encoding adds to a text."""
        if pair:
            raise UnsupportedError("num_special_tokens_to_add: Gemma has no pairs of texts; join them yourself")
        return int(self.add_bos_token) + int(self.add_eos_token)

    @property
    def max_len_single_sentence(self) -> int:
        """``model_max_length`` less the special tokens that encoding adds."""
        return self.model_max_length - self.num_special_tokens_to_add()

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token and 0 for the others, of ids that hold their special tokens already."""
        if token_ids_1 is not None or not already_has_special_tokens:
            raise UnsupportedError(
                "get_special_tokens_mask takes one list of ids that holds its special tokens already: give "
                "already_has_special_tokens=True"
            )
        special = set(self.all_special_ids)
        return [int(i in special) for i in id_lists(token_ids_0)]

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

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text that tokens in the vocabulary's spelling stand for."""
        names = [tokens] if isinstance(tokens, str) else list(tokens)
        decoder = self.tokenizer.backend.decoder
        return str(decoder.decode(names)) if decoder is not None else "".join(names)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The vocabulary's spelling of an id, or of each id of a list or tensor; None where it lacks the id."""
        if isinstance(ids, int):
            return self._spelling(ids)
        skipped = self.tokenizer.special_ids if skip_special_tokens else frozenset()
        return [self._spelling(i) for i in id_lists(ids) if i not in skipped]

    def _spelling(self, token_id: int) -> str | None:
        return self.tokenizer.token_name(token_id) or None


def side_name(name: str, side: str) -> str:
    """``side`` if it is one; ParameterError naming the argument otherwise."""
    if side not in _SIDES:
        raise ParameterError(f"{name} is {side!r}; expected 'left' or 'right'")
    return side
