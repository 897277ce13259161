"""Which rows there are: each module of ``gemcut.evaluation.rows`` lists its own under ``ROWS``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

from gemcut.errors import ParameterError
from gemcut.evaluation import rows
from gemcut.evaluation.row import Row

#: The card's 25 rows, in its order: 16 benchmarks, then 9 of ethics and safety.
CARD = (
    "mmlu",
    "hellaswag",
    "piqa",
    "social_iqa",
    "boolq",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "triviaqa",
    "nq_open",
    "humaneval",
    "mbpp",
    "gsm8k",
    "math",
    "agieval",
    "bbh",
    "real_toxicity",
    "crows_pairs",
    "bbq_ambig",
    "bbq_disambig",
    "winogender",
    "truthfulqa",
    "winobias_1_2",
    "winobias_2_2",
    "toxigen",
)


@cache
def all_rows() -> dict[str, Row]:
    """Every row by its id: the card's in its order, then the others by name."""
    found: dict[str, Row] = {}
    for module in sorted(pkgutil.iter_modules(rows.__path__), key=lambda each: each.name):
        for each in getattr(importlib.import_module(f"{rows.__name__}.{module.name}"), "ROWS", ()):
            if each.id in found:
                raise RuntimeError(f"two rows are called {each.id}")
            found[each.id] = each
    order = {name: place for place, name in enumerate(CARD)}
    return dict(sorted(found.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))


def row(name: str) -> Row:
    """A row by its id. Raises ParameterError where there is none."""
    known = all_rows()
    if name not in known:
        raise ParameterError(f"there is no row {name!r}; gemcut eval list shows them: {', '.join(known)}")
    return known[name]


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by ids; "card" stands for those of the card, "benchmarks" and "safety" for its two tables.

    Each once, in the order given. Raises ParameterError for an unknown one, or where none is named.
    """
    known = all_rows()
    groups = {
        "card": [name for name in CARD if name in known],
        "benchmarks": [name for name in CARD if name in known and not known[name].safety],
        "safety": [name for name in CARD if name in known and known[name].safety],
    }
    wanted = [each for name in names for each in groups.get(name.strip(), [name.strip()]) if each]
    if not wanted:
        raise ParameterError("no row is named; expected --rows with ids (gemcut eval list), or card")
    return [row(name) for name in dict.fromkeys(wanted)]
