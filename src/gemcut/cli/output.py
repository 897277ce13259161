"""What commands print with: text made safe for a terminal, styles, sizes, JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from gemcut.engine.results import Completion
    from gemcut.gemma import Gemma
    from gemcut.sampling_defaults import ResolvedSampling

# Everything a terminal may obey: C0 (without tab and line feed), DEL and C1. A carriage return can hide a line too.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CODES = {"bold": "1", "dim": "2", "red": "31", "cyan": "36", "prompt": "1;36", "gone": "31;9", "new": "32"}


def safe(text: str) -> str:
    """``text`` without control characters: a model must not steer the terminal."""
    return _CONTROL.sub("", text)


def console(**options: Any) -> Console:
    """rich's console, but a reader who has left is ours to answer: rich would end the process with exit code 1."""
    import rich.console

    class Ours(rich.console.Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls this while it handles the BrokenPipeError

    return Ours(highlight=False, **options)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at ``stream``."""
    try:
        return stream is not None and stream.isatty()  # Python has None for a stream closed before it began
    except ValueError:  # closed
        return False


def styled(text: str, style: str, stream: TextIO) -> str:
    """``text`` in a style where ``stream`` shows styles (a terminal, and NO_COLOR is not set)."""
    plain = not is_terminal(stream) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def note(text: str) -> None:
    """One line of remark on standard error."""
    print(styled(safe(text), "dim", sys.stderr), file=sys.stderr, flush=True)


def write_pieces(pieces: Iterable[str], tidy: Callable[[str], str] = str, *, begun: bool = False) -> None:
    """Write a text to standard output as it comes, each piece ``tidy``, and end its line.

    After an error in the middle the line is ended, too, so that the error stands in one of its own. ``begun``: there
    is something in the line already.
    """
    try:
        for piece in pieces:
            sys.stdout.write(tidy(piece))
            sys.stdout.flush()
            begun = True
    except BaseException:
        if begun:
            print(flush=True)
        raise
    print(flush=True)


def print_json(data: Any) -> None:
    """One JSON object, indented for people only on a terminal."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(data, ensure_ascii=not unicode, indent=2 if is_terminal(sys.stdout) else None))


def gigabytes(count: int) -> str:
    """Bytes as people compare them: GB, MB or kB of powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def count(number: int) -> str:
    """A number of parameters: 27.2B, 268M."""
    if number >= 10**9:
        return f"{number / 10**9:.1f}B"
    return f"{number / 10**6:.0f}M" if number >= 10**6 else f"{number:,}"


def timings(gemma: Gemma, completion: Completion) -> dict[str, float]:
    """The times of one answer, for --json."""
    stats = completion.stats
    return {
        "load_seconds": round(gemma.load_seconds, 4),
        "prefill_seconds": round(stats.prefill_seconds, 4),
        "decode_seconds": round(stats.decode_seconds, 4),
        "prefill_tokens_per_second": round(stats.prefill_tokens_per_second, 2),
        "decode_tokens_per_second": round(stats.decode_tokens_per_second, 2),
    }


def print_stats(gemma: Gemma, completion: Completion, sampling: ResolvedSampling) -> None:
    """The times of one answer, and what it was sampled with, on standard error, after an empty line."""
    lines = stats_lines(gemma, completion, sampling)
    print("", *(styled(line, "dim", sys.stderr) for line in lines), sep="\n", file=sys.stderr)


def stats_lines(gemma: Gemma, completion: Completion, sampling: ResolvedSampling) -> list[str]:
    """The times of one answer, and where its sampling parameters came from, for people: one aligned line each."""
    stats = completion.stats
    device = str(gemma.device)
    dtype = str(gemma.dtype).removeprefix("torch.")
    name = gemma.source.name if gemma.source is not None else "model"
    cached = f" ({stats.cached_tokens} more from the cache)" if stats.cached_tokens else ""
    rows = [
        ("model", f"{name}, {count(gemma.config.num_parameters())} parameters, {dtype} on {device}"),
        ("load", f"{gemma.load_seconds:.2f} s"),
        (
            "prefill",
            f"{stats.prefill_tokens_per_second:,.1f} tok/s   {stats.prefill_tokens} tokens in "
            f"{stats.prefill_seconds:.2f} s{cached}",
        ),
        (
            "decode",
            f"{stats.decode_tokens_per_second:,.1f} tok/s   {stats.generated_tokens} tokens in "
            f"{stats.decode_seconds:.2f} s",
        ),
        ("finish", _finish(completion)),
        ("sampling", sampling.words()),
    ]
    return [f"{name:<8} {value}" for name, value in rows]


def _finish(completion: Completion) -> str:
    if completion.finish_reason == "length":
        return "length (all tokens asked for; --max-new-tokens allows more)"
    if completion.finish_reason == "stop" and isinstance(completion.stop_reason, str):
        return f"stop (the text {completion.stop_reason!r})"
    return str(completion.finish_reason)
