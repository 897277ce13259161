"""Results as tables for people: our figures beside Google's card, several models beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemcut.evaluation.registry import CARD
from gemcut.evaluation.registry import row as find_row
from gemcut.evaluation.results import RowResult
from gemcut.evaluation.row import CardValues, Figure

FOOTNOTE = (
    "Google never published its prompts, shots and normalisations, so nobody outside can match the card's last digits. "
    '"comparable" says that the same items were asked with as many shots and in the same format.'
)


def shown(figure: Figure | None) -> str:
    """A figure with its standard error: "71.3 ± 0.4"; "" where there is none."""
    if figure is None:
        return ""
    error = "" if figure.error is None else f" ± {figure.error:.2f}"
    return f"{figure.value:.2f}{error}"


def card_values(card: CardValues) -> tuple[str, str]:
    """(Google's 9B, Google's 27B), of the models that the row's table is about."""
    nine = card.pt_9b if card.pt_9b is not None else card.it_9b
    large = card.pt_27b if card.pt_27b is not None else card.it_27b
    return tuple("" if value is None else f"{value:.2f}".rstrip("0").rstrip(".") for value in (nine, large))  # type: ignore[return-value]


def card_rows(results: Mapping[str, RowResult], refused: Mapping[str, str]) -> list[dict[str, str]]:
    """The card's 25 rows with ours beside Google's: a cell a column, as text."""
    known = [name for name in CARD if name in results or name in refused or _exists(name)]
    rows = []
    for name in [*known, *(name for name in results if name not in CARD)]:
        row, result = find_row(name), results.get(name)
        nine, large = card_values(row.card)
        cells = {"benchmark": row.title, "metric": row.setting, "ours": "", "n": "", "9B": nine, "27B": large}
        if result is not None and result.figure is not None:
            cells |= {"ours": shown(result.figure), "n": f"{result.figure.count:,}"}
            cells["comparable"] = "yes" if result.comparable else "no"
            cells["why"] = " ".join(result.differences())
            cells["recipe"] = result.log.header["recipe"]
        else:
            cells |= {"comparable": "", "why": f"not run: {refused.get(name, 'not asked for')}", "recipe": ""}
        rows.append(cells)
    return rows


def _exists(name: str) -> bool:
    from gemcut.evaluation.registry import all_rows

    return name in all_rows()


def aligned(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """Lines of a table; the first row is its head. Columns of ``numbers`` stand to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table in Markdown."""
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *body = safe
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
