"""From an exception to what a person reads: one line, and the command's exit code."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from gemcut.errors import CapacityError, GemcutError, RequestError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Failure:
    """What to print on standard error ("" for nothing) and the exit code."""

    message: str
    code: int


def explain(error: BaseException) -> Failure:
    """The failure a person meets for ``error``; whatever we did not foresee is called a bug."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # the reader of our output has left: nobody to tell
        return Failure("", BROKEN_PIPE)
    if isinstance(error, RequestError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what ended the request, which may be a bug
    if isinstance(error, CapacityError):
        error = error.at("command")
    if isinstance(error, GemcutError):
        return Failure(f"error: {one_line(str(error))}", 2)
    if callable(format_message := getattr(error, "format_message", None)):  # typer's and click's own
        command = getattr(getattr(error, "ctx", None), "command_path", "gemcut")
        text = one_line(str(format_message())).rstrip(".")
        return Failure(f"error: {text[:1].lower()}{text[1:]} (see {command} --help)", 2)
    if is_out_of_memory(error):
        return Failure(
            "error: out of memory; choose a smaller model, --dtype bfloat16 or a smaller --max-context "
            "(gemcut plan MODEL shows what fits)",
            2,
        )
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        if error.errno in _NO_SPACE:
            return Failure(f"error: the disk is full{where}; free some space and try again", 2)
        return Failure(f"error: {one_line(error.strerror or str(error))}{where}", 2)
    return Failure(
        f"error: this is a bug in gemcut, {type(error).__name__}: {one_line(str(error)) or 'no message'} "
        "(run again with --debug and report the traceback)",
        1,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a GPU. By name, because torch may not be imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters, so that no message can spread or steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
