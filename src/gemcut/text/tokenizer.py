"""Tokenizer: text to token ids and back, from a checkpoint folder's tokenizer.json or a GGUF file's vocabulary."""

from __future__ import annotations

import json
import operator
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gemcut.errors import CheckpointError, MissingTokenizerError, ParameterError, TokenizerError
from gemcut.text import files, gguf_vocab, tokenizer_json
from gemcut.text.quick_backend import QuickBackend
from gemcut.text.special import (
    END_OF_TURN,
    START_OF_TURN,
    chat_templates,
    read_config,
    special_names,
    template_tokens,
)

_SPACE = "▁"
_GGUF_IDS = {"bos": 2, "eos": 1, "pad": 0, "unk": 3}


class Tokenizer:
    """Gemma's tokenizer. Every special id is looked up by its text, since Gemma 2 and Gemma 3 number them differently.

    Safe to share between threads.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` underneath. Calling it while other threads use this object is not safe.
        chat_template: the checkpoint's own Jinja template, or None.
        chat_templates: all its templates by name, where it brings several ("default", "tool_use", …); else empty.
        template_tokens: texts of the special tokens under the names a template reads (``bos_token``, ``pad_token``, …).
        bos_id, eos_id, pad_id, unk_id: ids of the four special tokens every Gemma tokenizer has.
        start_of_turn_id, end_of_turn_id: ids of the turn markers, or None where the vocabulary lacks them.
        special_ids: ids of all special tokens; `decode` leaves them out unless told otherwise.
        vocab_size: number of tokens; ids are 0 to vocab_size - 1.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: str | None = None,
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a tokenizers backend.

        Args:
            backend: a Gemma tokenizer; cutting and padding that it may have been saved with are switched off.
            chat_template: the checkpoint's Jinja template.
            chat_templates: its templates by name, where it has several; "default" is the chat_template.
            config: content of tokenizer_config.json; names of the special tokens are read from it.

        Raises:
            TokenizerError: the backend is not a Gemma tokenizer (special tokens, byte tokens or decoder differ).
        """
        names = special_names(config or {})
        missing = [name for name in names.values() if backend.token_to_id(name) is None]
        if missing:
            raise TokenizerError(f"not a Gemma tokenizer: its vocabulary has no {' '.join(missing)}")
        ids = {role: cast(int, backend.token_to_id(name)) for role, name in names.items()}
        self.backend = backend
        self.chat_templates = dict(chat_templates or {})
        self.chat_template = self.chat_templates.get("default") if chat_template is None else chat_template
        self.template_tokens = template_tokens(config or {})
        self.bos_id = ids["bos_token"]
        self.eos_id = ids["eos_token"]
        self.pad_id = ids["pad_token"]
        self.unk_id = ids["unk_token"]
        self.start_of_turn_id: int | None = backend.token_to_id(START_OF_TURN)
        self.end_of_turn_id: int | None = backend.token_to_id(END_OF_TURN)
        self._config = dict(config or {})
        self._names = names
        self._lock = threading.Lock()
        self._texts: dict[int, str] = {}
        # A checkpoint saved with truncation or padding would silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self._mark_special([*names.values(), START_OF_TURN, END_OF_TURN])
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._bytes = _byte_tokens(backend)
        self._check_decoder()

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={len(self.special_ids)})"

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json of a folder, and tokenizer_config.json and chat_template.jinja where present.

        Raises:
            TokenizerError: the file is missing, damaged, or of another family of models.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            hint = "; tokenizer.model alone is not enough" if (folder / "tokenizer.model").is_file() else ""
            raise MissingTokenizerError(
                f"no tokenizer.json in {folder}{hint}; download the checkpoint's tokenizer files"
            )
        config = read_config(folder)
        templates = chat_templates(folder, config)
        try:
            backend = tokenizer_json.read_backend(files.read_bytes(file))
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}; download it again") from error
        try:
            several = templates if set(templates) != {"default"} else {}
            return cls(backend, chat_template=templates.get("default"), chat_templates=several, config=config)
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from error

    @classmethod
    def from_gguf_vocab(
        cls,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        merges: Sequence[str] | None = None,
        chat_template: str | None = None,
        add_space_prefix: bool = False,
        bos_id: int = 2,
        eos_id: int = 1,
        pad_id: int = 0,
        unk_id: int = 3,
        cache_key: str | None = None,
    ) -> Tokenizer:
        """Build the tokenizer a GGUF file's SentencePiece vocabulary describes.

        Args:
            tokens, scores, types: ``tokenizer.ggml.tokens``, ``.scores`` and ``.token_type``, one entry a token.
            merges: ``tokenizer.ggml.merges``, where the file has them.
            chat_template: ``tokenizer.chat_template`` of the file, if any.
            add_space_prefix: ``tokenizer.ggml.add_space_prefix``; Gemma's is False and True is refused.
            bos_id, eos_id, pad_id, unk_id: the file's special ids.
            cache_key: names this vocabulary (a digest of the file, say). With it the result is kept in the user's
                cache folder, and the next call with the same key reads that instead of deriving the merges again.

        Raises:
            TokenizerError: the vocabulary is inconsistent or not Gemma's.
        """
        if cache_key is not None:
            cached = cls.from_gguf_cache(cache_key)
            if cached is not None and cached.vocab_size == len(tokens):
                return cached
        if add_space_prefix:
            raise TokenizerError("the GGUF vocabulary asks for a space prefix (add_space_prefix); Gemma's has none")
        special = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id, "unk_token": unk_id}
        backend, names = gguf_vocab.build(tokens, scores, types, special, merges)
        config: dict[str, Any] = dict(names)
        tokenizer = cls(backend, chat_template=chat_template, config=config)
        if cache_key is not None:
            try:
                tokenizer.save(gguf_vocab.folder_of(cache_key))
            except CheckpointError as error:  # a full or read-only disk costs the next start a second, nothing else
                warnings.warn(f"the tokenizer is not cached: {error}", stacklevel=2)
        return tokenizer

    @classmethod
    def quick_from_gguf_vocab(
        cls, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], **more: Any
    ) -> Tokenizer:
        """As `from_gguf_vocab`, ready twenty times sooner: the real backend is built when something needs it.

        Arguments and errors are `from_gguf_vocab`'s. A vocabulary with merges of its own is built at once.
        """
        if more.get("merges") is not None or more.get("add_space_prefix"):
            return cls.from_gguf_vocab(tokens, scores, types, **more)
        special = {f"{role}_token": more.get(f"{role}_id", default) for role, default in _GGUF_IDS.items()}

        def full() -> Backend:
            return cls.from_gguf_vocab(tokens, scores, types, **more).backend

        backend = QuickBackend(tokens, scores, types, special, full)
        names = {role: tokens[token_id] for role, token_id in special.items()}
        return cls(cast(Backend, backend), chat_template=more.get("chat_template"), config=names)

    def prepare(self) -> None:
        """Build what a quick start left for later, so that every text is encoded at full speed from now on.

        One that encodes thousands of texts (a server) calls it before the first. It holds Python's lock for a second.
        """
        backend: object = self.backend
        if isinstance(backend, QuickBackend):
            backend.real()

    @classmethod
    def from_gguf_cache(cls, cache_key: str) -> Tokenizer | None:
        """What an earlier `from_gguf_vocab` with this key kept, or None where there is nothing or it is damaged."""
        try:
            return cls.from_folder(gguf_vocab.folder_of(cache_key))
        except (TokenizerError, CheckpointError):  # CheckpointError: no home folder
            return None

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; it is not stripped and gets no space in front.
            add_bos: put ``<bos>`` in front. A text that already begins with it keeps exactly one, with a warning.
            parse_special: read ``<bos>``, ``<end_of_turn>`` and their like in the text as special tokens. With False
                they are plain characters, so text of a stranger cannot end a turn.

        Raises:
            ParameterError: not a str, or a str that holds half of a surrogate pair and so has no UTF-8 form.
        """
        _check_text(text)
        with self._lock:
            self.backend.encode_special_tokens = not parse_special
            try:
                ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            finally:
                self.backend.encode_special_tokens = False
        if not add_bos:
            return ids
        own = next((i for i, token_id in enumerate(ids) if token_id != self.bos_id), len(ids))
        if own:
            name = self._names["bos_token"]
            warnings.warn(f"the text already begins with {name}; one is kept and none added", stacklevel=2)
        return [self.bos_id, *ids[own:]]

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, special tokens read as such and no ``<bos>`` added, and where each stands in it.

        Raises:
            ParameterError: see `encode`.
        """
        _check_text(text)
        with self._lock:
            found = self.backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. A run of byte tokens that is not valid UTF-8 becomes one U+FFFD per byte.

        An id that the vocabulary lacks adds nothing: a model's embedding may have rows that stand for no token.

        Raises:
            ParameterError: an id is not a whole number, or negative or beyond 32 bits.
        """
        checked = [self._checked(token_id) for token_id in ids]
        with self._lock:
            return str(self.backend.decode(checked, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text that one token adds when decoded (spaces as spaces; for a byte token its name, ``<0x0A>``).

        "" for an id that the vocabulary lacks.
        """
        text = self._texts.get(token_id)
        if text is None:
            name = self.backend.id_to_token(self._checked(token_id))
            text = "" if name is None else str(name).replace(_SPACE, " ")
            self._texts[token_id] = text
        return text

    def byte_value(self, token_id: int) -> int | None:
        """The byte a byte-fallback token stands for; None for every other token."""
        return self._bytes.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes one token adds: of a byte token that byte, of a special token its name."""
        byte = self._bytes.get(token_id)
        return self.token_text(token_id).encode() if byte is None else bytes([byte])

    def all_token_bytes(self) -> list[bytes]:
        """`token_bytes` of every id of the vocabulary, without keeping what is made on the way."""
        texts: list[bytes] = []
        for token_id in range(self.vocab_size):
            byte = self._bytes.get(token_id)
            name = self.backend.id_to_token(token_id) if byte is None else None
            texts.append(bytes([byte]) if byte is not None else (name or "").replace(_SPACE, " ").encode())
        return texts

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's spelling of a token (``▁`` for a space).

        Raises:
            ParameterError: the id is not in the vocabulary.
        """
        name = self.backend.id_to_token(self._checked(token_id))
        if name is None:
            raise ParameterError(f"token id {token_id} is not in the vocabulary (0 to {self.vocab_size - 1})")
        return str(name)

    def token_name(self, token_id: int) -> str:
        """`id_to_token`, and "" for an id that the vocabulary lacks: a model may give it a probability."""
        return self.id_to_token(token_id) if self.token_text(token_id) else ""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its exact spelling in the vocabulary, or None."""
        _check_text(token)
        found: int | None = self.backend.token_to_id(token)
        return found

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template), which transformers reads too.

        Raises:
            CheckpointError: the folder cannot be written; nothing half-written is left.
        """
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "GemmaTokenizer",
            **self._config,
            **self._names,
        }
        config.pop("chat_template", None)
        if self.chat_templates:
            default = {} if self.chat_template is None else {"default": self.chat_template}
            named = self.chat_templates | default
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with self._lock:
            tokenizer_json = self.backend.to_str()
        # tokenizer.json last: where it is, everything is.
        files.write_text(Path(folder) / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        files.write_text(Path(folder) / "tokenizer.json", tokenizer_json)

    def _checked(self, token_id: int) -> int:
        try:
            value = operator.index(token_id)
        except TypeError:
            raise ParameterError(f"token id is {token_id!r}; expected a whole number") from None
        if not 0 <= value < 1 << 32:
            raise ParameterError(f"token id {value} is not in the vocabulary (0 to {self.vocab_size - 1})")
        return value

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: everything but the lock, which belongs to this process."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _mark_special(self, names: Iterable[str]) -> None:
        """Make sure the named tokens are special: one that is not could be typed by a user into a chat.

        Some GGUF converters, for one, marked the turn markers as user-defined tokens.
        """
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        unmarked = [name for name in names if name not in special and self.backend.token_to_id(name) is not None]
        if unmarked:
            self.backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unmarked])

    def _check_decoder(self) -> None:
        """The detokenizer relies on how Gemma decodes, so a tokenizer that decodes otherwise is refused here."""
        euro = {byte: token_id for token_id, byte in self._bytes.items()}
        space = self.backend.token_to_id(_SPACE)
        if space is None or self.backend.decode([space, euro[0xE2], euro[0x82], euro[0xAC], space]) != " € ":
            raise TokenizerError("not a Gemma tokenizer: it does not decode ▁ as a space and byte tokens as UTF-8")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise ParameterError(f"text is of type {type(text).__name__}; expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ParameterError(
            f"text holds half of a surrogate pair (U+{code:04X}) at character {error.start}; "
            "decode its source as UTF-8, or drop it with text.encode('utf-8', 'ignore').decode()"
        ) from None


def _byte_tokens(backend: Backend) -> dict[int, int]:
    """Byte of each byte token, by token id. Gemma 2's own tokenizer.json has a plain tab in place of <0x09>."""
    found: dict[int, int] = {}
    missing: list[str] = []
    for byte in range(256):
        name = f"<0x{byte:02X}>"
        token_id = backend.token_to_id(name)
        if token_id is not None:
            found[token_id] = byte
        elif byte >= 128 or backend.token_to_id(chr(byte)) is None:
            missing.append(name)
    if missing:
        raise TokenizerError(f"not a Gemma tokenizer: {len(missing)} of 256 byte tokens are missing ({missing[0]} …)")
    return found
