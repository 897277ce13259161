"""``gemcut eval memorize`` and ``canaries``: what a model remembers of its training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.eval import AsJson, Model, write_text
from gemcut.cli.eval_show import eval_app
from gemcut.cli.options import Debug, LoadOptions, need_model, option, with_options
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.gemma import Gemma

__all__ = ["eval_app"]
canaries_app = typer.Typer(
    name="canaries",
    help="Random secrets in training data, and how far a model remembers them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app.add_typer(canaries_app)
OutFile = Annotated[Path | None, option("Write the report as JSON, too.", "--out", "-o", metavar="FILE.json")]


@eval_app.command()
@with_options
def memorize(
    *,
    model: Model = None,
    corpus: Annotated[Path | None, option("Documents it was trained on (required).", "--corpus", metavar="DIR")] = None,
    control: Annotated[
        Path | None, option("Documents it has not seen, of the same kind.", "--control", metavar="DIR")
    ] = None,
    limit: Annotated[int, option("Documents of each source, drawn by --seed. Else all.", "--limit", metavar="N")] = 0,
    length: Annotated[int, option("Tokens of prompt and of suffix. Else 50.", "--length", metavar="N")] = 50,
    seed: Annotated[int, option("Of the drawn documents. Else 0.", "--seed", metavar="N")] = 0,
    out: OutFile = None,
    as_json: AsJson = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """How much of a corpus the model gives back when it is shown the beginning.

    The first 50 tokens of a document are the prompt. Exact: greedy decoding
    gives the next 50. Approximate: up to 10 % of them edited. Probability: of
    sampling all of them. Nothing of the texts is shown or kept.

    DIR holds .jsonl files with a text under "text", or files of text.
    """
    from gemcut.evaluation import memorize as room

    name = need_model(model, "--model NAME")
    if corpus is None:
        raise ParameterError("--corpus is missing; expected the folder of documents that the model was trained on")
    for folder in (corpus, control):
        if folder is not None:
            next(iter(room.read_documents(folder)))  # before gigabytes are read
    gemma = load.load(name)
    found: dict[str, Any] = {"format": room.FORMAT, "kind": "memorization", "model": described(gemma), "length": length}
    found["corpus"] = _measured(gemma, corpus, limit, length, seed)
    if control is not None:
        found["control"] = _measured(gemma, control, limit, length, seed)
        found["above_control"] = room.against_control(found["corpus"], found["control"])
    finish(found, out, as_json, _lines(found))


def described(gemma: Gemma) -> dict[str, Any]:
    """What a report says of the model."""
    from gemcut.evaluation.run import model_description

    return model_description(gemma)


def _measured(gemma: Gemma, folder: Path, limit: int, length: int, seed: int) -> dict[str, Any]:
    from gemcut.evaluation import memorize as room

    corpus = room.sample_corpus(gemma, folder, limit=limit, length=length, seed=seed)
    return room.report(room.measure(gemma, corpus.samples), corpus)


def _lines(found: dict[str, Any]) -> list[str]:
    from gemcut.evaluation.tables import aligned

    cells = [["documents", "samples", "exact", "95 %", "approximate", "95 %", "mean probability"]]
    for kind in ("corpus", "control"):
        if kind in found:
            named = [(kind, found[kind]), *((f"  {name}", own) for name, own in found[kind]["by_source"].items())]
            for name, own in named:
                exact, near = own["exact"], own["approximate"]
                spans = [f"{100 * share['low']:.2f} to {100 * share['high']:.2f}" for share in (exact, near)]
                values = [f"{100 * share['share']:.2f} %" for share in (exact, near)]
                mean = f"{own['probability']['mean']:.3g}"
                cells.append([name, f"{own['samples']:,}", values[0], spans[0], values[1], spans[1], mean])
    lines = aligned(cells, numbers=(1, 2, 3, 4, 5, 6))
    data = found["corpus"]["personal_data"]
    said = ", ".join(f"{data[name]['in_the_document']} of {name} severity" for name in data)
    lines += ["", f"personal data in memorised outputs: {said}"]
    if "above_control" in found:
        gap = found["above_control"]["exact"]
        span = f"{100 * gap['low']:.2f} to {100 * gap['high']:.2f}"
        lines.append(f"exact, above the control: {100 * gap['difference']:.2f} points ({span})")
    if short := found["corpus"]["too_short"]:
        lines.append(f"{short:,} of {found['corpus']['documents']:,} documents are too short")
    return lines


@canaries_app.command()
def plant(
    documents: Annotated[Path, typer.Argument(metavar="DOCUMENTS.jsonl", help="What to train on.", show_default=False)],
    key: Annotated[Path, typer.Argument(metavar="KEY.json", help="Keep it: what they are.", show_default=False)],
    *,
    times: Annotated[str, option("Repetitions. Else 0,1,4,16,64.", "--times", metavar="N,N")] = "0,1,4,16,64",
    each: Annotated[int, option("Canaries of each. Else 8.", "--each", metavar="N")] = 8,
    seed: Annotated[int, option("Of the secrets. Else 0.", "--seed", metavar="N")] = 0,
    debug: Debug = False,
) -> None:
    """Write random secrets to put into training data, and the key to them."""
    from gemcut.evaluation import canaries as room

    try:
        numbers = [int(word) for word in times.split(",")]
    except ValueError:
        raise ParameterError(f"--times is {times!r}; expected whole numbers with commas between") from None
    made = room.make_canaries(numbers, each, seed)
    lines = room.plant(made, documents, key, seed)
    print(output.safe(f"{len(made):,} canaries in {lines:,} lines: {documents}; the key: {key}"))


@canaries_app.command("report")
@with_options
def report_(
    key: Annotated[Path, typer.Argument(metavar="KEY.json", help="What plant wrote.", show_default=False)],
    *,
    model: Model = None,
    references: Annotated[
        int, option("Other secrets each is compared with. Else 255.", "--references", metavar="N")
    ] = 255,
    out: OutFile = None,
    as_json: AsJson = False,
    debug: Debug = False,
    load: LoadOptions,
) -> None:
    """Exposure of planted canaries: bits by which each stands out among secrets that were not planted."""
    from gemcut.evaluation import canaries as room
    from gemcut.evaluation.tables import aligned

    planted = room.read_key(key)
    gemma = load.load(need_model(model, "--model NAME"))
    each = room.exposures(gemma, planted, references=references)
    table = room.by_times(each)
    found = {"format": room.FORMAT, "kind": "canaries", "model": described(gemma), "by_times": table}
    cells = [["planted", "canaries", "mean exposure (bits)", f"beat all {references:,}"]]
    for times, own in table.items():
        cells.append([times, str(own["canaries"]), f"{own['mean_exposure']:.2f}", str(own["beat_all"])])
    finish(found, out, as_json, aligned(cells, numbers=(0, 1, 2, 3)))


def finish(found: dict[str, Any], out: Path | None, as_json: bool, lines: list[str]) -> None:
    """Write and show a report."""
    import json

    if out is not None:
        write_text(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        output.print_json(found)
    else:
        print(output.safe("\n".join(lines)))
