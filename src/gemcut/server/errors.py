"""ApiError, and the one place where any exception becomes an HTTP status and OpenAI's error object."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from gemcut.errors import (
    CapacityError,
    ChatTemplateError,
    ContextLengthError,
    GemcutError,
    ParameterError,
    TokenizerError,
)

Headers = Sequence[tuple[bytes, bytes]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable",
}
#: The words of SamplingParams for what OpenAI's API calls otherwise.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_FIRST_WORD = re.compile(r"([a-z_]+)\b(?:\[\d+\])? (?:is|has|holds|maps|of|contradicts) ")


#: Characters of an error's sentence.
MAX_MESSAGE = 480
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def scrub(text: str, limit: int = 300) -> str:
    """A text of somebody else for a log or a terminal: one line, nothing invisible, not longer than ``limit``."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isprintable():  # nearly always
        return cut
    return "".join(
        char if unicodedata.category(char) not in _INVISIBLE else char.encode("unicode_escape").decode() for char in cut
    )


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        message: one sentence for people.
        type: OpenAI's kind of error; the status decides where it is not given.
        param: the field that is wrong, if it is one.
        code: a word that programs look for, such as "model_not_found".
        headers: more headers of the answer (Retry-After, Allow, …).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        # Both may hold what somebody sent, and end in a terminal.
        self.message, self.param = scrub(message, MAX_MESSAGE), param and scrub(param, MAX_MESSAGE)
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = list(headers)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unavailable(message: str, *, retry_after: int = 1, code: str | None = None) -> ApiError:
    """503: the server cannot do it now. OpenAI's clients try again after ``retry_after`` seconds."""
    return ApiError(503, message, code=code, headers=retry_headers(retry_after))


def retry_headers(seconds: float) -> Headers:
    """Headers that tell a client to try again after so many seconds, rounded up."""
    return [(b"retry-after", b"%d" % max(1, -int(-seconds // 1))), (b"x-should-retry", b"true")]


def api_error(error: BaseException, *, request_id: str = "") -> ApiError:
    """The answer that any exception of a handler becomes. What nobody foresaw is a 500 that tells nothing of itself."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    for ours, theirs in _NAMES.items():
        message = message.replace(ours, theirs)
    if isinstance(error, ContextLengthError | CapacityError):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, ChatTemplateError):
        return ApiError(400, message, param="messages")
    if isinstance(error, ParameterError | TokenizerError):
        found = _FIRST_WORD.match(message)
        return ApiError(400, message, param=found and found[1])
    repeats: Headers = [(b"x-should-retry", b"false")]
    if isinstance(error, GemcutError):
        return ApiError(500, message, headers=repeats)
    where = f" (request {request_id})" if request_id else ""
    return ApiError(500, f"internal error{where}: the server's log says more", headers=repeats)
