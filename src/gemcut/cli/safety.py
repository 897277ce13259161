"""``gemcut safety``: judges of texts, their policies and thresholds; train the one model that gemcut trains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output, safety_log
from gemcut.cli.options import Debug, option
from gemcut.cli.safety_judges import calibrate, policies
from gemcut.errors import ParameterError

app = typer.Typer(
    name="safety",
    help="Judges of texts, their policies and thresholds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def safety() -> None:
    """Judges of texts, their policies and thresholds."""


app.command()(calibrate)
app.add_typer(safety_log.app)
app.command()(policies)


@app.command()
def train(
    positive: Annotated[Path, typer.Argument(metavar="POSITIVE", help="Texts of the policy.", show_default=False)],
    negative: Annotated[Path, typer.Argument(metavar="NEGATIVE", help="Other texts.", show_default=False)],
    model: Annotated[Path, typer.Argument(metavar="FILE", help="The .npz file to write.", show_default=False)],
    *,
    policy: Annotated[str, option("What it scores, by name. Else quality.", "--policy", metavar="NAME")] = "quality",
    bits: Annotated[int, option("2^N weights. Else 18.", "--bits", metavar="N")] = 18,
    epochs: Annotated[int, option("Times over the texts. Else 5.", "--epochs", metavar="N")] = 5,
    debug: Debug = False,
) -> None:
    """Train a linear model that tells two sets of texts apart, in seconds.

    POSITIVE and NEGATIVE are JSON lines with a text under "text" (.jsonl,
    .jsonl.gz, .jsonl.zst), or plain text with one a line. A tenth of each is
    held out, and the model's accuracy on it printed.
    """
    import numpy as np

    from gemcut.safety.linear import Training
    from gemcut.safety.linear import train as fit
    from gemcut.text.document import Document

    if model.suffix != ".npz":
        raise ParameterError(f"FILE is {str(model)!r}; expected a name that ends in .npz")
    sets = [_texts(path) for path in (positive, negative)]
    held = [texts[9::10] for texts in sets]
    used = [[text for i, text in enumerate(texts) if i % 10 != 9] for texts in sets]
    judge = fit(used[0], used[1], policy, Training(bits=bits, epochs=epochs))
    judge.save(model)
    print(f"{len(used[0]):,} and {len(used[1]):,} texts: {output.safe(str(model))}")
    if all(held):
        scores = [judge.scores([Document("", "", text) for text in texts], policy) for texts in held]
        right = (np.mean(scores[0] >= 0.5) + np.mean(scores[1] < 0.5)) / 2
        print(f"held out: {len(held[0]):,} and {len(held[1]):,} texts, {right:.1%} on the right side of 0.5")


def _texts(path: Path) -> list[str]:
    """The texts of a file. Raises ParameterError where there are none."""
    from gemcut.data.readers.base import File, open_plain, read_lines
    from gemcut.data.readers.jsonl import JsonlReader
    from gemcut.text.document import Document

    name = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith((".jsonl", ".ndjson")):
            items = list(JsonlReader().read(File(str(path), 0, path.name), "", ""))
            found = [item.text for item in items if isinstance(item, Document)]
            if len(found) < len(items):
                output.note(f"{len(items) - len(found)} lines of {path} hold no text")
        else:
            with open_plain(str(path)) as file:
                lines = [line.decode("utf-8", "replace") for _, line in read_lines(file) if line is not None]
            found = [line for line in lines if line.strip()]
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror or error}") from None
    if not found:
        raise ParameterError(f"{path} holds no text; expected JSON lines with a text each, or a text a line")
    return found
