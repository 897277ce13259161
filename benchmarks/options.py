"""Types of the benchmarks' options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def names_of(what: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: comma-separated names out of ``known``; the error names ``what`` there is."""
    known = tuple(known)

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}; there are {', '.join(known)}")
        return chosen

    return names


def row_counts(text: str) -> list[int]:
    """A type for argparse: comma-separated numbers from 1 on."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"takes numbers from 1 on, comma-separated, not {text!r}")
    return [int(part) for part in text.split(",")]
