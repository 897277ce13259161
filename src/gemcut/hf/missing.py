"""What a missing attribute says: for a name that transformers has, what to use instead of it."""

from __future__ import annotations

from collections.abc import Mapping

from gemcut.errors import MissingAttributeError


def missing(owner: object, name: str, answers: Mapping[str, str]) -> AttributeError:
    """The error that ``owner``'s ``__getattr__`` raises for ``name``.

    Names that begin with an underscore are asked for by Python's own protocols (copy, pickle, numpy …) all the time
    and get Python's usual error.
    """
    kind = type(owner).__name__
    if not name.startswith("_") and name in answers:
        return MissingAttributeError(f"{kind} has no attribute {name!r}: {answers[name]}")
    return AttributeError(f"{kind!r} object has no attribute {name!r}")
