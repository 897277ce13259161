"""GemmaTokenizer: gemcut's tokenizer with transformers' methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.hf.chat_template import ChatWriter, chat_options
from gemcut.hf.common import Refusal, named_folder, refuse
from gemcut.hf.encoding import (
    NO_LIMIT,
    BatchEncoding,
    id_lists,
    length_limit,
    pad_rows,
    padded_width,
    read_encoded,
    to_tensors,
)
from gemcut.hf.vocabulary import Vocabulary, side_name
from gemcut.text import Tokenizer
from gemcut.text import files as text_files

_CONFIG_FILE = "tokenizer_config.json"
_CALL: dict[str, Refusal] = {
    "text_pair": ((), "Gemma has no pairs of texts; join them yourself"),
    "text_target": ((), "tokenize the target by a call of its own"),
    "text_pair_target": ((), "tokenize the target by a call of its own"),
    "is_split_into_words": ((False,), "give whole texts"),
    "stride": ((0,), "overflowing tokens are not returned"),
    "return_token_type_ids": ((False,), "Gemma has no token types"),
    "return_overflowing_tokens": ((False,), "cut the text yourself"),
    "return_offsets_mapping": ((False,), "use tokenizer.tokenizer.backend for offsets"),
    "return_length": ((False,), "use len of the ids"),
    "split_special_tokens": ((False,), "use tokenizer.tokenizer.encode(..., parse_special=False)"),
    "verbose": ((True, False), ""),
}
_BATCH = ("pad_to_multiple_of", "padding_side", "return_attention_mask")
_DECODE: dict[str, Refusal] = {
    "clean_up_tokenization_spaces": ((False,), "Gemma's spaces are exact"),
    "spaces_between_special_tokens": ((False,), "Gemma puts none"),
}
_CHAT: dict[str, Refusal] = {
    "return_assistant_tokens_mask": ((False,), "Gemma's template marks none"),
}


class GemmaTokenizer(Vocabulary):
    """Text to token ids and back, with transformers' names.

    Two things are better than there: a text that already begins with ``<bos>`` gets no second one, and in
    ``apply_chat_template(tokenize=True)`` special tokens typed by a user stay plain text.

    Attributes:
        name_or_path: what ``from_pretrained`` was given.
        model_max_length: the length ``truncation=True`` cuts at where no max_length is given.
        add_bos_token, add_eos_token: what ``add_special_tokens=True`` adds.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name_or_path: str = "",
        padding_side: str = "left",
        truncation_side: str = "right",
        model_max_length: int = NO_LIMIT,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
    ) -> None:
        super().__init__(tokenizer, padding_side, truncation_side)
        self.name_or_path, self.model_max_length = name_or_path, model_max_length
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._chat = ChatWriter(tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: compiled templates are made again."""
        return {name: value for name, value in vars(self).items() if name != "_chat"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _chat=ChatWriter(state["tokenizer"]))

    def __repr__(self) -> str:
        return (
            f"GemmaTokenizer({self.name_or_path!r}, vocab_size={self.vocab_size}, padding_side={self.padding_side!r})"
        )

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template; it may be set. None means Gemma's format, which is built in."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.tokenizer.chat_template = template

    # ---- text to ids ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        **others: Any,
    ) -> BatchEncoding:
        """Token ids and attention mask of a text or of several.

        Args:
            text: a text, or a list of texts.
            add_special_tokens: put ``<bos>`` in front; a text that begins with it keeps exactly one.
            padding: True or "longest" pads to the longest text, "max_length" to ``max_length``.
            truncation: True cuts at ``max_length``, or at ``model_max_length``. None cuts where ``max_length`` alone
                is given.
            max_length: see above.
            pad_to_multiple_of: round the padded length up.
            padding_side: "left" or "right", for this call.
            return_tensors: "pt" or "np" for int64 [B, T]; None for lists.
            return_attention_mask: False leaves it out.
            return_special_tokens_mask: give ``special_tokens_mask`` too, 1 for each special token that was added.
            others: transformers' other arguments; refused by name unless they change nothing.

        Raises:
            ParameterError: a value is out of range, an argument is unknown, or texts differ in length in one tensor.
            UnsupportedError: an argument gemcut does not have.
        """
        refuse("the tokenizer", others, _CALL)
        texts = _texts(text)
        limit = length_limit(truncation, max_length, padding, self.model_max_length)
        rows = [self._encode(one, add_special_tokens, limit) for one in texts]
        options: dict[str, Any] = {"pad_to_multiple_of": pad_to_multiple_of, "padding_side": padding_side}
        if return_special_tokens_mask:
            options["special"] = [self._added(row, add_special_tokens) for row in rows]
        return self._batch(
            rows, isinstance(text, str), padding, max_length, return_tensors, return_attention_mask, **options
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ``input_ids`` of calling the tokenizer: a list, or with ``return_tensors="pt"`` a tensor [1, T]."""
        return self(text, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def encode_plus(self, text: str, **options: Any) -> BatchEncoding:
        """The same as calling the tokenizer (the name of transformers 4)."""
        return self(text, **options)

    def batch_encode_plus(self, texts: Sequence[str], **options: Any) -> BatchEncoding:
        """The same as calling the tokenizer with several texts (the name of transformers 4)."""
        return self(list(texts), **options)

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """The text's tokens as the vocabulary spells them."""
        ids = self._encode(_texts(text)[0], add_special_tokens, None)
        return [self.tokenizer.id_to_token(i) for i in ids]

    # ---- ids to text ---------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **others: Any) -> Any:
        """Text of token ids (a number, list or tensor); of several rows a list of texts.

        Special tokens are shown unless told otherwise, as in transformers.
        """
        refuse("decode", others, _DECODE)
        ids = id_lists(token_ids)
        if any(isinstance(row, list) for row in ids):
            return [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **others: Any) -> list[str]:
        """Text of each row."""
        return [self.decode(row, skip_special_tokens, **others) for row in sequences]

    # ---- batches -------------------------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Bring encoded texts to one length, as a collate function does.

        Args:
            encoded_inputs: a mapping with ``input_ids`` (a text or several), or a list of such mappings.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors: as in calling the tokenizer.
            return_attention_mask: False leaves it out.
            verbose: changes nothing.

        Raises:
            ParameterError: no ``input_ids``, another key (its padding is not known), or rows that differ in length.
        """
        rows, single, kind = read_encoded(encoded_inputs)
        return self._batch(
            rows["input_ids"],
            single,
            padding,
            max_length,
            return_tensors or kind,
            return_attention_mask,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            masks=rows.get("attention_mask"),
            special=rows.get("special_tokens_mask"),
            keep_single=True,
        )

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja template that `apply_chat_template` would use; there is one, with ``tools`` and without.

        Raises:
            ChatTemplateError: the checkpoint has none; Gemma's own format is built in.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ChatTemplateError("this checkpoint has no chat template; apply_chat_template writes Gemma's format")
        return template

    # ---- dialogues -----------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        system: Literal["fold", "error"] = "fold",
        sanitize_control_tokens: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Write a dialogue, or a list of dialogues, in the model's format.

        Args:
            conversation: messages ``{"role": ..., "content": ...}``; roles alternate, user first.
            tools, documents: lists of dicts, for a template that reads them; refused for one that does not. A tool may
                be a function with type hints and a docstring of Google's format, of which its JSON schema is made.
            chat_template: a Jinja template to use instead of the checkpoint's, or the name of one of the checkpoint's;
                it runs in a sandbox.
            add_generation_prompt: end with the opening of the model's turn.
            continue_final_message: leave the last turn open, for the model to continue. True means its content, a text
                another field that the template writes, such as "reasoning_content".
            tokenize: False gives the string (or strings), True token ids.
            padding, truncation, max_length, return_tensors: as in calling the tokenizer.
            return_dict: True, transformers 5's default, gives a BatchEncoding; False, transformers 4's, the ids alone.
                ``model.generate`` takes either, as ``generate(x)`` and as ``generate(**x)``.
            system: Gemma has no turn for system messages. "fold" puts them in front of the first user's text,
                "error" refuses them, as transformers does. A template that writes system turns gets them as they are.
            sanitize_control_tokens: accepted; control tokens typed in a message are always encoded as plain text.
            tokenizer_kwargs: more arguments of calling the tokenizer.
            variables: for the template, as plain text; one that the template does not read is refused.

        Raises:
            ChatTemplateError: the format cannot express the dialogue.
        """
        refuse("apply_chat_template", {key: variables.pop(key) for key in _CHAT if key in variables}, _CHAT)
        options = chat_options(
            self._chat,
            tools=tools,
            documents=documents,
            variables=variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            system=system,
            template=chat_template,
        )
        many = isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        dialogues = conversation if many else [conversation]
        if not tokenize:
            texts = [self._chat.render(dialogue, options) for dialogue in dialogues]
            return texts if many else texts[0]
        limit = length_limit(truncation, max_length, padding, self.model_max_length)
        rows = [self._cut(self._chat.encode(dialogue, options), limit) for dialogue in dialogues]
        more = dict(tokenizer_kwargs or {})
        options_of_batch = {name: more.pop(name) for name in _BATCH if name in more}
        refuse("tokenizer_kwargs", more, _CALL)
        batch = self._batch(rows, not many, padding, max_length, return_tensors, **options_of_batch)
        return batch if return_dict else batch["input_ids"]

    def save_pretrained(self, save_directory: str | Path, **others: Any) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too; return their paths."""
        refuse("save_pretrained", others, {"legacy_format": ((False,), "one file format is written")})
        folder = named_folder(save_directory)
        self.tokenizer.save(folder)
        config = text_files.read_json_object(folder / _CONFIG_FILE) | {
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "pad_token": self.pad_token,
        }
        text_files.write_text(folder / _CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2))
        return str(folder / _CONFIG_FILE), str(folder / "tokenizer.json")

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _encode(self, text: str, special: bool, limit: int | None) -> list[int]:
        """Ids of one text, at most ``limit``; ``<bos>`` and ``<eos>`` survive the cut."""
        ids = self.tokenizer.encode(text, add_bos=special and self.add_bos_token)
        before = ids[:1] if special and self.add_bos_token else []
        after = [self.eos_token_id] if special and self.add_eos_token else []
        body = ids[len(before) :]
        room = None if limit is None else max(0, limit - len(before) - len(after))
        return [*before, *self._cut(body, room), *after]

    def _added(self, ids: list[int], special: bool) -> list[int]:
        """1 where encoding added a special token, 0 elsewhere."""
        mask = [0] * len(ids)
        if special and ids:
            mask[0], mask[-1] = mask[0] or int(self.add_bos_token), mask[-1] or int(self.add_eos_token)
        return mask

    def _cut(self, ids: list[int], limit: int | None) -> list[int]:
        if limit is None or len(ids) <= limit:
            return ids
        return ids[:limit] if self.truncation_side == "right" else ids[len(ids) - limit :]

    def _batch(
        self,
        rows: list[list[int]],
        single: bool,
        padding: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        return_attention_mask: bool | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        masks: list[list[int]] | None = None,
        special: list[list[int]] | None = None,
        keep_single: bool = False,
    ) -> BatchEncoding:
        """Pad rows as asked and make lists or tensors of them.

        ``masks`` and ``special`` (1: a special token) are those of the rows, where they are known. ``keep_single``
        makes a tensor of a single text [T] and not [1, T].
        """
        width = padded_width(rows, padding, max_length, self.model_max_length, pad_to_multiple_of)
        data: dict[str, Any] = {"input_ids": rows, "attention_mask": masks or [[1] * len(row) for row in rows]}
        if special is not None:
            data["special_tokens_mask"] = special
        if width is not None:
            side = side_name("padding_side", padding_side or self.padding_side)
            fills = {"input_ids": self.pad_token_id, "special_tokens_mask": 1}
            data = {name: pad_rows(value, width, fills.get(name, 0), side) for name, value in data.items()}
        if return_attention_mask is False:
            del data["attention_mask"]
        if return_tensors is not None and single and keep_single:
            return BatchEncoding({name: to_tensors(value, return_tensors)[0] for name, value in data.items()})
        if return_tensors is not None:
            return BatchEncoding({name: to_tensors(value, return_tensors) for name, value in data.items()})
        return BatchEncoding({name: value[0] for name, value in data.items()} if single else data)


def _texts(text: object) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or any(not isinstance(one, str) for one in texts):
        raise ParameterError(f"the tokenizer was given {type(text).__name__}; expected a text or a list of texts")
    return list(texts)
