"""Prompts as files: those in ``prompts/``, or a file of the user's in the place of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gemcut import files
from gemcut.errors import ParameterError

MAX_BYTES = 64 << 10
_PLACE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Template:
    """A prompt with places such as {text}."""

    words: str

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt with its places filled. What a value has in braces stays as it is."""
        return _PLACE.sub(lambda found: values[found[1]], self.words)


def read_template(name: str, places: tuple[str, ...], path: Path | None = None) -> Template:
    """The prompt ``name`` of this package, or the one in a file.

    Args:
        name: of a file in ``prompts/``, without its ending.
        places: what it may have in braces; the first one it must have, once.
        path: a file of the user's.

    Raises:
        ParameterError: the file cannot be read, lacks the first place, or has an unknown one.
    """
    if path is None:
        words = resources.files("gemcut.uses").joinpath("prompts", f"{name}.txt").read_text("utf-8")
    else:
        try:
            words = files.read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        except files.UnreadableError as error:
            raise ParameterError(f"cannot read {path}: it {error}") from None
        except UnicodeDecodeError:
            raise ParameterError(f"{path} is not UTF-8; convert it first") from None
        except OSError as error:
            raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    found = _PLACE.findall(words)
    if unknown := next((place for place in found if place not in places), None):
        known = ", ".join(f"{{{place}}}" for place in places)
        raise ParameterError(f"the prompt in {path} has {{{unknown}}}; it may have {known}")
    if found.count(places[0]) != 1:
        raise ParameterError(f"the prompt in {path} has {{{places[0]}}} {found.count(places[0])} times; expected once")
    return Template(words.strip())
