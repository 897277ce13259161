"""``gemcut ask``: answers from a folder of documents, with citations."""

from __future__ import annotations

import dataclasses
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
from gemcut.errors import ParameterError


@with_options
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    *,
    docs: Annotated[Path, option("Folder of text, Markdown, HTML, PDF.", "--docs", metavar="DIR")],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    passages: Annotated[int, option("Most that the model is shown. Else 8.", "--passages", metavar="N")] = 8,
    prompt: Annotated[Path | None, option("Your own, with {passages}, {question}.", "--prompt", metavar="FILE")] = None,
    as_json: Annotated[bool, flag("One JSON object, passages included.", "--json")] = False,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Answer a question from a folder's documents, with citations.

    The folder is indexed once, then only what has changed. Each sentence of
    the answer rests on a quote and ends with its file and line; what no
    quote supports is left out. Hidden files and links to folders are not read.
    """
    name = need_model(model, "--model NAME")
    check_utf8(question, "the question")
    fields, levels = sampling.fields(), sampling.levels()
    from gemcut.paths import cache_folder
    from gemcut.uses.ask import NOTHING, PLACES, Answer, Asker, why_nothing
    from gemcut.uses.index import DocumentIndex, index_file
    from gemcut.uses.templates import read_template
    from gemcut.uses.words import terms

    read_template("ask", PLACES, prompt)  # before a model is loaded for nothing
    if not 1 <= passages <= 100:
        raise ParameterError(f"--passages is {passages}; expected 1 to 100")
    if not terms(question):
        raise ParameterError("the question has no word in it; ask with at least one")
    drawn = output.is_terminal(sys.stderr)

    def heard(done: int, known: int) -> None:
        if drawn:
            print(f"\r{done:,} of {known:,} files ", end="\n" if done == known else "", file=sys.stderr, flush=True)

    with DocumentIndex(docs, index_file(docs, cache_folder("documents"))) as index:
        changes = index.update(heard)
        if changes.remade:
            output.note(changes.remade)
        if changes.passed:
            first, why = next(iter(changes.passed.items()))
            output.note(f"{len(changes.passed)} files without readable text were passed over, such as {first}: {why}")
        if not index.search(question, passages):  # no model can help
            answer = Answer(False, reason=why_nothing(question, index.some_text()))
        else:
            gemma = load.load(name)
            gemma.sampling_levels[:0] = levels
            answer = Asker(gemma, index, passages=passages, prompt=prompt, **fields)(question)
    if as_json:
        output.print_json({"question": question, "text": answer.text, **dataclasses.asdict(answer)})
        return
    tidy = output.safe if output.is_terminal(sys.stdout) else str
    print(tidy(answer.text), flush=True)
    if answer.text == NOTHING:
        output.note(answer.reason)
    elif answer.unsupported:
        output.note(f"{len(answer.unsupported)} sentences were left out: their quotes are not in the passages")
