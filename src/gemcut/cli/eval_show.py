"""``gemcut eval view`` and ``compare``, which look at runs, and ``needle``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.eval import AsJson, Model, RunFolder, Seed, scored, write_text
from gemcut.cli.eval import app as eval_app
from gemcut.cli.eval_progress import RowProgress
from gemcut.cli.options import Debug, LoadOptions, need_model, option, with_options
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


@eval_app.command()
@with_options
def needle(
    *,
    model: Model = None,
    lengths: Annotated[
        str, option("Tokens of texts, with commas. Else 512 to 8192.", "--lengths", metavar="N,N")
    ] = "512,1024,2048,4096,8192",
    depths: Annotated[str, option("Depths from 0 to 1. Else 0,0.25,0.5,0.75,1.", "--depths", metavar="D,D")] = (
        "0,0.25,0.5,0.75,1"
    ),
    trials: Annotated[int, option("Texts of each length and depth. Else 5.", "--trials", metavar="N")] = 5,
    text: Annotated[Path | None, option("A long text for the position curve.", "--text", metavar="FILE")] = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, option("Write a picture (needs matplotlib).", "--plot", metavar="FILE.png")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """How far back a model finds a sentence, by the text's length and the sentence's depth.

    Ten numbers are offered, one of which stands in the text: chance is 10 %.
    --text adds what tokens cost at each place of a text of your own.
    """
    import dataclasses

    from gemcut.cli.score import read_text
    from gemcut.picture import check_plot

    name = need_model(model, "--model NAME")
    sizes = _numbers(lengths, int, "--lengths")
    places = _numbers(depths, float, "--depths")
    if trials < 1:
        raise ParameterError(f"--trials is {trials}; expected at least 1")
    if plot is not None:
        check_plot(plot)
    long = read_text(text) if text is not None else None
    gemma = load.load(name)
    from gemcut.evaluation import needle as room
    from gemcut.evaluation.tables import aligned

    with RowProgress() as bar:
        progress = functools.partial(bar.count, "needle")
        cells = room.measure_needle(gemma, lengths=sizes, depths=places, trials=trials, seed=seed, progress=progress)
    curve = room.position_curve(gemma, long, max(sizes)) if long is not None else []
    if plot is not None:
        room.plot(plot, cells, curve, name)
    if as_json:
        output.print_json(
            {"cells": [dataclasses.asdict(cell) for cell in cells], "curve": [list(point) for point in curve]}
        )
        return
    table = [["depth", *(f"{size:,}" for size in sizes)]]
    for depth in places:
        own = {cell.length: f"{cell.found / cell.trials:.0%}" for cell in cells if cell.depth == depth}
        table.append([f"{depth:.0%}", *(own[size] for size in sizes)])
    print("\n".join(aligned(table, numbers=range(len(sizes) + 1))))
    if curve:
        print()
        print(
            "\n".join(aligned([["place", "nats"], *([f"{p:,}", f"{cost:.3f}"] for p, cost in curve)], numbers=(0, 1)))
        )


def _numbers(text: str, kind: Callable[[str], Any], name: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(f"{name} is {text!r}; expected numbers with commas between") from None
    return list(dict.fromkeys(found))
