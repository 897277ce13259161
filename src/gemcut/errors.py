"""The errors a person can meet. Each message is one line: what happened, what was expected, what to do."""

from __future__ import annotations


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


class ChatTemplateError(GemcutError, ValueError):
    """A dialogue the chat template cannot express (wrong role order, unknown role, no text)."""


class ParameterError(GemcutError, ValueError):
    """A parameter is out of range, unknown, or contradicts another."""


class ContextLengthError(GemcutError, ValueError):
    """Prompt and requested tokens do not fit the model's context."""


class CapacityError(GemcutError):
    """The memory there is cannot hold what was asked for. The message names both numbers."""


class RequestError(GemcutError):
    """One request ended with finish reason "error"; the message says why. The others are not concerned."""


class UnsupportedError(GemcutError, NotImplementedError):
    """A known option of another library that gemcut does not have. The message names the option."""


class MissingAttributeError(GemcutError, AttributeError):
    """An attribute that transformers has and gemcut has not. The message says what to use instead."""
