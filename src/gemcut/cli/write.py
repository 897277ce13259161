"""``gemcut write``: a poem, a script, an email, copy or code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import (
    MODEL_HELP,
    Debug,
    LoadOptions,
    SamplingOptions,
    check_utf8,
    flag,
    need_model,
    option,
    with_options,
)
from gemcut.errors import ParameterError, RequestError

#: A narrower column is no pleasure to read.
_COLUMN = 32


@with_options
def write(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="poem, script, email, copy or code.", show_default=False)],
    *,
    about: Annotated[str, option("What it is about.", "--about", metavar="TEXT")],
    tone: Annotated[str | None, option("How it sounds, such as warm.", "--tone", metavar="TEXT")] = None,
    variants: Annotated[int, option("How many, side by side. Else 1.", "--variants", metavar="N")] = 1,
    code: Annotated[bool, flag("Print the code in the answer alone.", "--extract", "-x")] = False,
    prompt: Annotated[Path | None, option("A prompt of your own, with {about}.", "--prompt", metavar="FILE")] = None,
    as_json: Annotated[bool, flag("One JSON object with all variants.", "--json")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Write a poem, a script, an email, copy or code.

    Variants are computed together and stand side by side on a terminal that
    is wide enough. -x prints what stands in the first block of code.
    """
    name = need_model(model, "--model NAME")
    if not 1 <= variants <= 16:
        raise ParameterError(f"--variants is {variants}; expected 1 to 16")
    if code and (variants > 1 or as_json):
        raise ParameterError(f"-x prints one text; drop {'--json' if as_json else '--variants'}")
    for what, given in (("--about", about), ("--tone", tone)):
        check_utf8(given or "", what)
    fields, levels = sampling.fields(), sampling.levels()
    from gemcut.uses.write import extract_code, write_messages

    messages = write_messages(kind, about, tone=tone, prompt=prompt)
    gemma = load.load(name)
    gemma.sampling_levels[:0] = levels
    if variants == 1 and not code and not as_json:
        tidy = output.safe if output.is_terminal(sys.stdout) else str
        with gemma.chat(messages, stream=True, **fields) as stream:
            output.write_pieces(stream, tidy)
            stream.result.checked()
        return
    texts = gemma.chat(messages, n=variants, **fields)
    if as_json:
        output.print_json({"kind": kind, "about": about, "tone": tone, "texts": texts})
    elif code:
        found = extract_code(texts[0])
        if found is None:
            raise RequestError("the answer has no block of code; run it without -x to see the answer")
        sys.stdout.write(output.safe(found) if output.is_terminal(sys.stdout) else found)
    else:
        show(texts)


def show(texts: list[str]) -> None:
    """Variants side by side on a wide terminal, else one below the other."""
    console = output.console()
    if output.is_terminal(sys.stdout) and console.width >= _COLUMN * len(texts):
        from rich.table import Table
        from rich.text import Text

        table = Table(*map(str, range(1, len(texts) + 1)), expand=True)
        table.add_row(*(Text(output.safe(text.strip())) for text in texts))
        console.print(table)
        return
    tidy = output.safe if output.is_terminal(sys.stdout) else str
    for place, text in enumerate(texts, 1):
        print(f"--- {place} of {len(texts)} ---\n{tidy(text.strip())}")
