"""``gemcut watermark``: look for a key's watermark in a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.generate import read_prompt
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, flag, need_model, option, with_options
from gemcut.errors import ParameterError

app = typer.Typer(
    name="watermark",
    help="Look for a watermark in a text.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MOST = 16 << 20  # bytes


@app.callback()
def watermark() -> None:
    """Look for a watermark in a text."""


@app.command()
@with_options
def detect(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; - or nothing reads standard input.")
    ] = None,
    *,
    key: Annotated[Path | None, option("The key that marked it.", "--key", metavar="FILE")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="PATH", help="Read the text from it.")] = None,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    hub: HubOptions,
) -> None:
    """Say how likely it is that a text without the key's watermark looks as marked.

    Needs the key, and the tokenizer of the model (its weights are not read).
    Give the answer alone, without the prompt.
    """
    from gemcut.safety.watermark import Watermark

    if key is None:
        raise ParameterError("--key FILE is missing: without the key that marked a text nothing can be detected")
    mark = Watermark.read(key)
    name = need_model(model, "--model NAME")
    words = read_prompt(text, file, lambda: _MOST)
    tokens = hub.find(name).tokenizer().encode(words, add_bos=False, parse_special=False)
    found = mark.detect(tokens)
    if as_json:
        report = {"p_value": found.p_value, "mean": found.mean, "tokens": found.tokens, "z": found.z}
        output.print_json(report)
        return
    print(
        f"p = {found.p_value:.3g}: {found.tokens:,} tokens count, mean of the bits {found.mean:.4f}, z = {found.z:.2f}"
    )
    if found.tokens < 50:
        output.note("note: fewer than 50 tokens count; so short a text shows little, whatever p says")
