"""A checkpoint's special tokens and chat templates, which stand in a few lines of its files.

`SpecialTokens` holds what the stop set and the chat format ask of a tokenizer, without the second or two that a
tokenizer of 262,144 pieces takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.errors import TokenizerError
from gemcut.text import files

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
#: The special tokens every Gemma tokenizer has, and how they are spelled where nothing says otherwise.
ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')


@dataclass(frozen=True)
class SpecialTokens:
    """Attributes as `Tokenizer`'s; ``texts`` are the spellings of the tokens that are known, by id."""

    bos_id: int
    eos_id: int
    start_of_turn_id: int | None
    end_of_turn_id: int | None
    chat_template: str | None
    chat_templates: Mapping[str, str]
    template_tokens: Mapping[str, str]
    texts: Mapping[int, str]

    @classmethod
    def make(
        cls,
        texts: Mapping[int, str],
        config: Mapping[str, Any],
        templates: Mapping[str, str],
    ) -> SpecialTokens | None:
        """From spellings, tokenizer_config.json and templates by name; None where they lack a token of ROLES."""
        ids = {text: token_id for token_id, text in texts.items()}
        names = special_names(config)
        if not ids.keys() >= set(names.values()):
            return None  # only the vocabulary can tell
        return cls(
            bos_id=ids[names["bos_token"]],
            eos_id=ids[names["eos_token"]],
            start_of_turn_id=ids.get(START_OF_TURN),
            end_of_turn_id=ids.get(END_OF_TURN),
            chat_template=templates.get("default"),
            chat_templates=templates if set(templates) != {"default"} else {},
            template_tokens=template_tokens(config),
            texts=texts,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> SpecialTokens | None:
        """What a folder's files say; None where only its tokenizer can tell, or say what is wrong with it.

        Raises TokenizerError for a damaged small file.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        config = read_config(folder)
        data = files.read_bytes(file)
        match = _ADDED.search(data)
        if match is None or not data.rstrip().endswith(b"}"):  # cut short
            return None
        try:
            added, _ = json.JSONDecoder().raw_decode(data[match.end() :].decode("utf-8"))
            texts = {token["id"]: token["content"] for token in added}
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not all(type(token_id) is int and isinstance(text, str) for token_id, text in texts.items()):
            return None
        return cls.make(texts, config, chat_templates(folder, config))

    def knows(self, token_ids: Iterable[int]) -> bool:
        """Whether all of these have a known spelling."""
        return self.texts.keys() >= set(token_ids)

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's spelling of a token that `knows` knows."""
        return self.texts[token_id]

    def token_name(self, token_id: int) -> str:
        """As `id_to_token`; "" for a token that is not known."""
        return self.texts.get(token_id, "")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json, with the special tokens that older checkpoints name in a file of their own.

    Raises TokenizerError where one of them is damaged.
    """
    config = files.read_json_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= named_tokens(files.read_json_object(folder / "special_tokens_map.json"))
    return config


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens of ROLES, as tokenizer_config.json names them."""
    return {role: token_name(config, role, default) for role, default in ROLES.items()}


def template_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of special tokens under the names a template reads."""
    return {"mask_token": "<mask>"} | named_tokens(config) | special_names(config)


def token_name(config: Mapping[str, Any], role: str, default: str) -> str:
    """A special token's text: tokenizer_config.json holds a str, or an object with ``content``."""
    value = config.get(role)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else default


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every special token a file names, by its name: ``bos_token``, ``sep_token``, a model's own ``image_token``."""
    extra = config.get("extra_special_tokens")
    found = {**config, **extra} if isinstance(extra, Mapping) else config
    return {
        name: text
        for name in found
        if isinstance(name, str) and name.endswith("_token") and (text := token_name(found, name, ""))
    }


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A checkpoint's templates by name; one without a name is "default". Files come before the configuration."""
    found = {
        file.stem: files.read_text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = files.read_text(file)
    if found:
        return found
    template = config.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    entries = template if isinstance(template, list) else []
    for entry in entries:
        name, text = (entry.get(key) if isinstance(entry, Mapping) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: chat_template lists an entry without a name or a template; "
                'expected {"name": …, "template": …}'
            )
        found[name] = text
    if template is not None and not isinstance(template, list):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is of type {type(template).__name__}; expected a text "
            "or a list of named templates"
        )
    return found
