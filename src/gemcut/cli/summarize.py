"""``gemcut summarize``: summaries of files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, SamplingOptions, flag, need_model, option, with_options
from gemcut.errors import ParameterError


@with_options
def summarize(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE…", help="Text, Markdown, HTML, PDF; - or nothing: the input.")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    length: Annotated[str, option("short, medium or long. Else medium.", "--length", metavar="LENGTH")] = "medium",
    style: Annotated[str, option("prose, bullets or headline. Else prose.", "--style", metavar="STYLE")] = "prose",
    prompt: Annotated[Path | None, option("A prompt of your own, with {text}.", "--prompt", metavar="FILE")] = None,
    as_json: Annotated[bool, flag("One JSON object a file.", "--json")] = False,
    no_cache: Annotated[bool, flag("Neither read nor keep summaries of chunks.", "--no-cache")] = False,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Summarize files, however long.

    A text that does not fit the context is cut before headings, paragraphs or
    sentences; its chunks are summarized together, then their summaries. What
    a summary quotes is looked for in the text, and marked where it is not there.
    """
    name = need_model(model, "--model NAME")
    fields, levels = sampling.fields(), sampling.levels()
    from gemcut.paths import cache_folder
    from gemcut.uses.reading import MAX_BYTES, document_text, read_document
    from gemcut.uses.summarize import LENGTHS, PLACES, STYLES, Summarizer
    from gemcut.uses.templates import read_template

    for what, value, known in (("--length", length, LENGTHS), ("--style", style, STYLES)):
        if value not in known:
            raise ParameterError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    read_template("summarize", PLACES, prompt)  # before a model is loaded for nothing
    names, texts = [], []
    for path in paths or [Path("-")]:
        names.append(str(path))
        if str(path) != "-":
            texts.append(read_document(path))
            continue
        if names.count("-") > 1:
            raise ParameterError("standard input (-) is named twice; name it once")
        if sys.stdin is None or output.is_terminal(sys.stdin):
            raise ParameterError("no text: name a file, or pipe a text in")
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ParameterError(f"standard input has more than {MAX_BYTES // 10**6} MB; cut it into parts first")
        texts.append(document_text(data, "standard input"))
    gemma = load.load(name)
    gemma.sampling_levels[:0] = levels
    drawn = output.is_terminal(sys.stderr)

    def heard(done: int, known: int) -> None:
        if drawn:
            print(f"\r{done:,} of {known:,} chunks ", end="\n" if done == known else "", file=sys.stderr, flush=True)

    cache = None if no_cache else cache_folder("summaries")
    summarizer = Summarizer(gemma, length=length, style=style, prompt=prompt, cache=cache, heard=heard, **fields)
    tidy = output.safe if output.is_terminal(sys.stdout) else str
    for place, (own, found) in enumerate(zip(names, summarizer(texts), strict=True)):
        if as_json:
            output.print_json({"file": own, **dataclasses.asdict(found)})
        else:
            if len(names) > 1:
                print(("\n" if place else "") + f"{tidy(own)}:")
            print(tidy(found.text), flush=True)
        if missing := sum(quote.line is None for quote in found.quotes):
            output.note(f"{own}: {missing} of {len(found.quotes)} quotes are not in the text")
        if found.cut:
            output.note(f"{own}: a summary was ended by its length; --max-new-tokens gives it more")
