"""``gemcut card``: a model's own card, from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.eval import write_text
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, flag, option, with_options


@with_options
def card(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    *,
    runs: Annotated[Path | None, option("Folder with runs of gemcut eval.", "--runs", metavar="DIR")] = None,
    data: Annotated[Path | None, option("The report.json of gemcut data.", "--data", metavar="REPORT")] = None,
    training: Annotated[
        Path | None, option("Folder with a training.json: hardware, tokens, time.", "--training", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None, option("Write it there: .md, or .json. Else shown.", "--out", "-o", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    hub: HubOptions,
) -> None:
    """Write a model's card from its files, its data report and what was run.

    Example: [cyan]gemcut card gemma-3-270m --runs RUNS --out README.md[/]

    A statement without a run behind it says: not measured. Reads no weights.
    """
    from gemcut.data.report import read_report
    from gemcut.errors import DataError, MissingTokenizerError, ParameterError
    from gemcut.evaluation.card_text import card_text, check_metadata
    from gemcut.evaluation.model_card import make_card, read_runs, read_training
    from gemcut.names import tuned

    if out is not None and out.suffix not in (".md", ".json"):
        raise ParameterError(f"--out is {str(out)!r}; expected a name that ends in .md or .json")
    report: dict[str, Any] | None = None
    if data is not None:
        if data.is_file() and data.name != "report.json":
            raise DataError(f"--data is {str(data)!r}; expected a report.json of gemcut data, or its folder")
        report = read_report(data.parent if data.name == "report.json" else data)
    record = None if training is None else read_training(training)
    source = hub.find(model)
    try:
        chats = tuned(source, source.tokenizer())
    except MissingTokenizerError:
        chats = False
    found = make_card(
        source,
        runs=None if runs is None else read_runs(runs, source.name),
        data=report,
        training=record,
        tuned=chats,
    )
    text = card_text(found)
    check_metadata(text)
    as_json = as_json or (out is not None and out.suffix == ".json")
    shown = json.dumps(found, indent=1, ensure_ascii=False) + "\n" if as_json else text
    if out is None:
        print(output.safe(shown), end="")
    else:
        write_text(out, shown)
        print(output.safe(str(out)))
