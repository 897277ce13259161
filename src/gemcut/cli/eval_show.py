"""``gemcut eval view`` and ``compare``: looking at runs. Needs no model."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.eval import AsJson, RunFolder, scored, write_text
from gemcut.cli.eval import app as eval_app
from gemcut.cli.options import Debug, option
from gemcut.errors import ParameterError

__all__ = ["eval_app"]


@eval_app.command()
def view(
    run: RunFolder,
    *,
    rows: Annotated[str, option("Ids with commas between. Else all of the run.", "--rows", metavar="A,B")] = "",
    show: Annotated[
        str, option("all, right, wrong or failed (no answer extracted).", "--show", metavar="KIND")
    ] = "all",
    count: Annotated[
        int, option("Samples; of each row on a page. Else 5, 200 on a page.", "--count", "-n", metavar="N")
    ] = 0,
    html: Annotated[Path | None, option("Write one HTML page instead.", "--html", metavar="FILE.html")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Samples of a run: what was asked, what came, and what was taken for the answer."""
    from gemcut.evaluation import view as room

    log, results = scored(run)
    names = [name.strip() for name in rows.split(",") if name.strip()]
    for name in names:
        if name not in results:
            raise ParameterError(f"{run} has no row {name!r}; it has {', '.join(results) or 'none'}")
    chosen = {name: result for name, result in results.items() if not names or name in names}
    if html is not None:
        if html.suffix.lower() not in (".html", ".htm"):
            raise ParameterError(f"--html is {str(html)!r}; expected a name that ends in .html")
        write_text(html, room.page(log.name, chosen, show, count or 200))
        print(output.safe(str(html)))
        return
    found = list(islice(room.samples(chosen, show), count or 5))
    if as_json:
        output.print_json([room.as_json(sample) for sample in found])
        return
    for sample in found:
        colour = "cyan" if sample.kind == "right" else "red"
        print(output.styled(output.safe(f"{sample.row} {sample.id}: {sample.kind}"), colour, sys.stdout))
        for name in ("prompt", "answer", "extracted", "target"):
            print(output.styled(f"  {name}", "dim", sys.stdout))
            print(output.safe("\n".join(f"    {line}" for line in getattr(sample, name).split("\n"))))
    if not found:
        output.note(f"no sample of this kind in {run}")


@eval_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs.", show_default=False)],
    *,
    plot: Annotated[Path | None, option("Write a picture (needs matplotlib).", "--plot", metavar="FILE.png")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Runs beside each other, row by row.

    Each but the first is compared with the first over the items that both
    have: the difference with a 95 % interval (bootstrap), and McNemar's exact
    test where answers are right or wrong.
    """
    from gemcut.evaluation import comparing as room
    from gemcut.evaluation.tables import aligned
    from gemcut.picture import check_plot

    if len(runs) < 2:
        raise ParameterError("one run is given; expected at least two")
    if plot is not None:
        check_plot(plot)
    found = [scored(run) for run in runs]
    room.common_rows(found)
    for line in room.notes(found):
        output.note(line)
    if plot is not None:
        room.plot(found, plot)
    if as_json:
        output.print_json(room.as_json(found))
        return
    print(output.safe("\n".join(aligned(room.table(found), numbers=range(1, len(found) + 1)))))
    for second in found[1:]:
        print(output.safe(f"\n{found[0][0].name} and {second[0].name}"))
        print(output.safe("\n".join(aligned(room.comparison_lines(found[0], second), numbers=range(1, 9)))))
