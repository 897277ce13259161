"""The errors a person can meet. Each message is one line: what happened, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class GemcutError(Exception):
    """Base of every error gemcut raises on purpose. The command line prints its message and exits with 2."""


class ConfigError(GemcutError, ValueError):
    """A checkpoint's configuration is missing, contradictory, or of a model gemcut does not know."""


class CheckpointError(GemcutError):
    """A checkpoint cannot be found, read or written."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint by that name: not a folder, not a GGUF file, not a bundled name, not on the hub."""


class GatedRepositoryError(CheckpointError):
    """The hub refuses access (HTTP 401 or 403): the licence is not accepted or the token is missing."""


class TokenizerError(GemcutError, ValueError):
    """A tokenizer is missing, damaged or of an unknown kind."""


class MissingTokenizerError(TokenizerError):
    """A checkpoint has no tokenizer files. Its model still takes token ids."""


class ChatTemplateError(GemcutError, ValueError):
    """A dialogue the chat template cannot express (wrong role order, unknown role, no text)."""


class ParameterError(GemcutError, ValueError):
    """A parameter is out of range, unknown, or contradicts another."""


class ContextLengthError(GemcutError, ValueError):
    """Prompt and requested tokens do not fit the model's context."""


@dataclass(frozen=True)
class MemoryOption:
    """Another form of the same weights: ``dtype`` or ``quantization``, its value, and bytes needed and there."""

    option: Literal["dtype", "quantization"]
    value: str
    nbytes: int
    available: int


Door = Literal["python", "facade", "command"]
_WORDS: dict[Door, dict[str, str]] = {
    "python": {"dtype": 'dtype="{}"', "quantization": 'quantization="{}"'},
    "facade": {
        "dtype": "dtype=torch.{}",
        "int8": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        "nf4": 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    },
    "command": {"dtype": "--dtype {}", "quantization": "--quantization {}"},
}


class CapacityError(GemcutError):
    """The memory there is cannot hold what was asked for. The message names both numbers.

    Where smaller forms of the weights are known, ``options`` holds them, and the message ends with them in the words of
    the front door it is read at: ``at`` gives those of another one.
    """

    def __init__(self, problem: str, *, options: Sequence[MemoryOption] = (), door: Door = "python") -> None:
        self.problem, self.options, self.door = problem, tuple(options), door
        super().__init__(problem + self._advice())

    def at(self, door: Door) -> CapacityError:
        """The same error in the words of another front door."""
        return CapacityError(self.problem, options=self.options, door=door) if self.options else self

    def _advice(self) -> str:
        if not self.options:
            return ""
        words = _WORDS[self.door]
        fits = [option for option in self.options if option.nbytes <= option.available]
        ways = [
            f"{words.get(o.value, words.get(o.option, '')).format(o.value)} ({o.nbytes / 1e9:.1f} GB)"
            for o in fits or self.options[-1:]
        ]
        what = f"choose {', or '.join(ways)}" if fits else f"even {ways[0]} is too much: choose a smaller model"
        return f": {what}; `gemcut plan` shows what fits"


class CommunicationError(GemcutError):
    """One of several devices, or the process that works for it, is gone or broken; the message says which and why."""


class RecipeError(GemcutError, ValueError):
    """A recipe for data is missing, no TOML, or asks for what there is not; the message names file and key."""


class DataError(GemcutError):
    """Documents cannot be read, a step broke its contract, or the run's folder holds something else."""


class RequestError(GemcutError):
    """One request ended with finish reason "error"; the message says why. The others are not concerned."""


class RefusedError(GemcutError):
    """A guard refused a prompt. The message names the policies, never the text."""

    def __init__(self, message: str, refusal: str = "") -> None:
        """``refusal``: what the guard file has an assistant say."""
        super().__init__(message)
        self.refusal = refusal


class UnsupportedError(GemcutError, NotImplementedError):
    """A known option of another library that gemcut does not have. The message names the option."""


class MissingAttributeError(GemcutError, AttributeError):
    """An attribute that transformers has and gemcut has not. The message says what to use instead."""
