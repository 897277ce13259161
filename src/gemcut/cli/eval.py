"""``gemcut eval``: the model card's rows, measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.eval_progress import RowProgress
from gemcut.cli.interrupt import stop_request
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, flag, need_model, option, with_options
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.errors import GemcutError
    from gemcut.evaluation.log import RunLog
    from gemcut.evaluation.results import RowResult
    from gemcut.evaluation.row import Row, ScoreOptions
    from gemcut.evaluation.run import RunOptions

app = typer.Typer(
    name="eval",
    help="The model card's rows, measured: ours beside Google's.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)]
Data = Annotated[
    Path | None,
    option("Folder of benchmark data. Else GEMCUT_BENCHMARKS, or shared/data/benchmarks.", "--data", metavar="DIR"),
]
Out = Annotated[Path | None, option("Folder of the run. Else eval-MODEL.", "--out", "-o", metavar="DIR")]
Limit = Annotated[int, option("Items of each row, drawn by --seed. Else all.", "--limit", metavar="N")]
Seed = Annotated[int, option("Of drawn items and sampled answers. Else 0.", "--seed", metavar="N")]
AllowCode = Annotated[bool, flag("Run programs that the model wrote, in a sandbox.", "--allow-code")]
AsJson = Annotated[bool, flag("One JSON object.", "--json")]
Scorer = Annotated[str | None, option("Of toxicity: linear, FILE.npz or http://…", "--scorer", metavar="WHAT")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Workers = Annotated[int, option("Programs that run at once. Else 2.", "--workers", metavar="N")]


@app.command("list")
def list_rows(*, data: Data = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Every row: what the card says, its recipe, and whether its data are here."""
    from gemcut.errors import DataError
    from gemcut.evaluation.folder import DataFolder
    from gemcut.evaluation.registry import CARD, all_rows
    from gemcut.evaluation.row import Setup
    from gemcut.evaluation.tables import aligned, card_values

    try:
        folder: DataFolder | None = DataFolder.find(data)
    except DataError as error:
        if data is not None:
            raise
        folder, why = None, str(error)
    rows = []
    for row in all_rows().values():
        missing = None if folder is None else folder.missing(row.data)
        rows.append(
            {
                "id": row.id,
                "title": row.title,
                "setting": row.setting,
                "card": {"9b": card_values(row.card)[0], "27b": card_values(row.card)[1]},
                "on_card": row.id in CARD,
                "safety": row.safety,
                "chat": row.chat,
                "runs_code": row.code,
                "shots": row.shots,
                "metric": row.metric,
                "version": row.version,
                "recipe": row.recipe(Setup()),
                "items": row.data.count,
                "data": "unknown" if missing is None else "missing" if missing else "here",
                "source": row.data.source,
                "licence": row.data.licence,
                "differs": list(row.differs),
            }
        )
    if as_json:
        output.print_json({"folder": None if folder is None else str(folder.root), "rows": rows})
        return
    cells = [["row", "benchmark", "setting", "9B", "27B", "items", "data", "recipe"]]
    for found in rows:
        cells.append(
            [
                str(found["id"]),
                str(found["title"]),
                str(found["setting"]),
                *(str(value) for value in dict(found["card"]).values()),  # type: ignore[call-overload]
                f"{found['items']:,}" if found["items"] else "",
                str(found["data"]),
                str(found["recipe"]),
            ]
        )
    print("\n".join(aligned(cells, numbers=(3, 4, 5))))
    print(f"\ndata: {output.safe(str(folder.root))}" if folder is not None else f"\n{why}")


@app.command()
@with_options
def run(
    *,
    model: Model = None,
    rows: Annotated[str, option("Ids with commas between; card, benchmarks, safety.", "--rows", metavar="A,B")] = "",
    limit: Limit = 0,
    data: Data = None,
    out: Out = None,
    shots: Annotated[int | None, option("Shots. Else the row's own.", "--shots", metavar="N")] = None,
    fewer_shots: Annotated[bool, flag("Take fewer where they do not fit the context.", "--fewer-shots")] = False,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask in the chat format. Else as the row is.", show_default=False),
    ] = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    workers: Workers = 2,
    scorer: Scorer = None,
    as_json: AsJson = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """Ask a model the items of some rows, keep every answer, and score them.

    Example: [cyan]gemcut eval run -m gemma-3-270m --rows piqa,arc_easy --limit 200[/]

    A run that was stopped goes on with the same command.
    """
    options = _options(limit, seed, shots, fewer_shots, chat, allow_code, workers, _scorers(scorer, data))
    _, results = _carry_out(need_model(model, "--model NAME"), rows.split(","), data, out, options, load, None)
    _show(results, as_json=as_json)


@app.command()
@with_options
def card(
    *,
    model: Model = None,
    limit: Limit = 0,
    data: Data = None,
    out: Out = None,
    fewer_shots: Annotated[bool, flag("Take fewer where they do not fit the context.", "--fewer-shots")] = False,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    workers: Workers = 2,
    scorer: Scorer = None,
    markdown: Annotated[
        Path | None, option("Write the table as Markdown, too.", "--markdown", metavar="FILE.md")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """The card's 25 rows: our number beside Google's, with its standard error.

    Says of each whether the two can be compared, and why not. A row that
    cannot be run here (no data, no sandbox, no chat template) says why, and
    the others go on.
    """
    refused: dict[str, str] = {}

    def note(row: Row, error: GemcutError) -> None:
        refused[row.id] = str(error)
        output.note(f"{row.id} is left out: {error}")

    options = _options(limit, seed, None, fewer_shots, None, allow_code, workers, _scorers(scorer, data))
    log, results = _carry_out(need_model(model, "--model NAME"), ["card"], data, out, options, load, note)
    from gemcut.evaluation.results import report
    from gemcut.evaluation.tables import FOOTNOTE, aligned, card_rows
    from gemcut.evaluation.tables import markdown as as_markdown

    cells = card_rows(results, refused)
    head = ["benchmark", "metric", "ours", "n", "9B", "27B", "comparable", "why", "recipe"]
    table = [head, *([row[name] for name in head] for row in cells)]
    if markdown is not None:
        write_text(markdown, "\n".join([f"# {log.name}", "", *as_markdown(table), "", FOOTNOTE, ""]))
    if as_json:
        output.print_json({"run": log.run, "rows": {n: report(r) for n, r in results.items()}, "refused": refused})
        return
    narrow = [[cell for place, cell in enumerate(row) if place < 7] for row in table]
    print("\n".join(aligned(narrow, numbers=(3, 4, 5))))
    print()
    for row in cells:
        if row["why"]:
            print(output.safe(f"{row['benchmark']}: {row['why']}"))
    print(f"\n{FOOTNOTE}")


@app.command()
def score(
    run: RunFolder,
    *,
    rows: Annotated[str, option("Ids with commas between. Else all of the run.", "--rows", metavar="A,B")] = "",
    allow_code: AllowCode = False,
    workers: Workers = 2,
    scorer: Scorer = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score the answers of a run again, without a model and without data."""
    from gemcut.evaluation.log import read_log
    from gemcut.evaluation.results import score_run
    from gemcut.evaluation.row import ScoreOptions

    names = [name.strip() for name in rows.split(",") if name.strip()]
    options = ScoreOptions(allow_code=allow_code, workers=_workers(workers), scorers=_scorers(scorer, None))
    _show(score_run(read_log(run), options, names), as_json=as_json)


@app.command()
def fetch(
    sets: Annotated[list[str], typer.Argument(metavar="SET...", help="Names of sets.", show_default=False)],
    *,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Bring a set's files from the Hugging Face hub into the data folder. Nothing else ever downloads one.

    Needs the package pyarrow (pip install 'gemcut\\[data]').
    """
    from gemcut.evaluation.fetch import fetch_set
    from gemcut.evaluation.folder import DataFolder

    folder = DataFolder.find(data)
    for name in sets:
        for path, count in fetch_set(name, folder):
            print(output.safe(f"{path}: {count:,} records"))


# ---- what several commands do ------------------------------------------------------------------------------------


def scored(run: Path) -> tuple[RunLog, dict[str, RowResult]]:
    """A run with its results, those that were scored already as they are."""
    from gemcut.evaluation.log import read_log
    from gemcut.evaluation.results import score_run
    from gemcut.evaluation.row import ScoreOptions

    log = read_log(run)
    return log, score_run(log, ScoreOptions(), again=False)


def _workers(workers: int) -> int:
    if not 1 <= workers <= 256:
        raise ParameterError(f"--workers is {workers}; expected 1 to 256")
    return workers


def _scorers(spec: str | None, data: Path | None) -> dict[str, Any]:
    """The scorer of toxicity that a person named, by the name that rows ask for."""
    if spec is None:
        return {}
    from gemcut.evaluation import scorers
    from gemcut.evaluation.folder import DataFolder

    return {scorers.NAME: scorers.make_scorer(spec, DataFolder.find(data) if spec == "linear" else None)}


def _options(
    limit: int,
    seed: int,
    shots: int | None,
    fewer: bool,
    chat: bool | None,
    allow_code: bool,
    workers: int,
    scorers: Mapping[str, Any],
) -> RunOptions:
    from gemcut.evaluation.row import ScoreOptions, Setup

    if limit < 0:
        raise ParameterError(f"--limit is {limit}; expected at least 1")
    if shots is not None and not 0 <= shots <= 100:
        raise ParameterError(f"--shots is {shots}; expected 0 to 100")
    scoring: ScoreOptions = ScoreOptions(allow_code=allow_code, workers=_workers(workers), scorers=scorers)
    from gemcut.cli.interrupt import import_torch

    import_torch()
    from gemcut.evaluation.run import RunOptions

    setup = Setup(shots=shots, seed=seed, chat=chat)
    return RunOptions(limit=limit, setup=setup, fewer_shots=fewer, scoring=scoring)


def _carry_out(
    name: str,
    names: list[str],
    data: Path | None,
    out: Path | None,
    options: RunOptions,
    load: LoadOptions,
    refused: Any,
) -> tuple[RunLog, dict[str, RowResult]]:
    from gemcut.evaluation.folder import DataFolder
    from gemcut.evaluation.registry import find_rows
    from gemcut.evaluation.results import score_run
    from gemcut.evaluation.run import refusal, run_rows

    rows = find_rows(names)
    folder = DataFolder.find(data)
    if refused is None:  # before gigabytes are read
        for row in rows:
            if (why := refusal(row, folder, options)) is not None:
                raise why
    out = out or Path("eval-" + re.sub(r"[^\w.-]+", "-", Path(name).name or name))
    gemma = load.load(name)
    try:
        with stop_request() as request, RowProgress() as progress:
            log = run_rows(
                gemma,
                rows,
                folder,
                out,
                options,
                progress=progress,
                stopped=lambda: request.pressed,
                refused=refused,
            )
    except KeyboardInterrupt:
        output.note(f"stopped; what was answered is in {out}, and the same command goes on from there")
        raise
    except OSError as error:
        if error.filename is not None:
            output.note(f"what was answered until now is in {out}, and the same command goes on from there")
        raise
    asked = [row.id for row in rows if row.id in log.rows]
    return log, score_run(log, options.scoring, asked, again=False)


def _show(results: Mapping[str, RowResult], *, as_json: bool) -> None:
    from gemcut.evaluation.results import report
    from gemcut.evaluation.tables import aligned, card_values, shown

    if as_json:
        output.print_json({name: report(result) for name, result in results.items()})
        return
    table = [["row", "metric", "result", "items", "9B", "27B", "not extracted", "recipe"]]
    for name, result in results.items():
        for metric, figure in sorted(result.figures.items(), key=lambda pair: pair[0] != result.row.metric):
            main = metric == result.row.metric
            nine, large = card_values(result.row.card) if main else ("", "")
            failed = f"{result.failed:,}" if main and result.failed else ""
            recipe = result.log.header["recipe"] if main else ""
            cells = [name if main else "", metric, shown(figure), f"{figure.count:,}", nine, large, failed, recipe]
            table.append(cells)
    print(output.safe("\n".join(aligned(table, numbers=(3, 4, 5, 6)))))
    print()
    for name, result in results.items():
        for sentence in result.differences():
            print(output.safe(f"{name}: {sentence}"))


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all. Raises ParameterError where it cannot be written."""
    part = path.with_name(f".{path.name}.unfinished")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
