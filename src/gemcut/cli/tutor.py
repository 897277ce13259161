"""``gemcut tutor``: corrections of what a learner wrote, and drills that come back."""

from __future__ import annotations

import dataclasses
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.files import read_text_file
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
from gemcut.uses.tutor_view import marked

app = typer.Typer(name="tutor", help="Correct what a learner wrote, and practise with drills.", no_args_is_help=True)
Deck = Annotated[Path | None, option("The file of drills. Else one of yours.", "--deck", metavar="FILE")]
Level = Annotated[str | None, option("The learner's: A1, A2, B1, B2, C1 or C2.", "--level", metavar="LEVEL")]
Language = Annotated[str | None, option("The language of the rules.", "--explain-in", metavar="LANGUAGE")]
Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)]
MAX_BYTES = 10**6


@app.command()
@with_options
def correct(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What to correct; - or nothing: the input.")
    ] = None,
    *,
    file: Annotated[Path | None, option("A text file, UTF-8, in the place of TEXT.", "--file", metavar="FILE")] = None,
    language: Language = None,
    level: Level = None,
    keep: Annotated[bool, flag("Make drills of the mistakes.", "--keep")] = False,
    deck: Deck = None,
    prompt: Annotated[Path | None, option("A prompt of your own, with {text}.", "--prompt", metavar="FILE")] = None,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    model: Model = None,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Correct a text, and say which rule each change follows.

    The changes, made in the text, always give the corrected text: that is
    checked. --keep makes a drill of each, for gemcut tutor practice.
    """
    name = need_model(model, "--model NAME")
    text = _text(text, file)
    fields, levels = sampling.fields(), sampling.levels()
    from gemcut.uses.drills import Deck as Drills
    from gemcut.uses.drills import deck_file, drills_of
    from gemcut.uses.templates import read_template
    from gemcut.uses.tutor import Corrector, learner

    learner(language, level)  # before a model is loaded for nothing
    read_template("tutor-correct", ("text", "language", "learner"), prompt)
    if deck is not None and not keep:
        raise ParameterError("--deck without --keep has no use here; add --keep")
    drills = Drills(deck or deck_file()) if keep else None
    gemma = load.load(name)
    gemma.sampling_levels[:0] = levels
    found = Corrector(gemma, language=language, level=level, prompt=prompt, **fields)(text)
    if as_json:
        output.print_json(dataclasses.asdict(found))
    else:
        tidy = output.safe if output.is_terminal(sys.stdout) else str
        plain = output.styled("", "new", sys.stdout) == ""  # no terminal, or none with colours

        def styled(words: str, style: str) -> str:
            return output.styled(tidy(words), style, sys.stdout) if style else tidy(words)

        print(marked(found, styled, plain=plain))
        for place, edit in enumerate(found.edits, 1):
            why = f"{edit.rule} ({edit.level})" if edit.rule else "no rule was given"
            print(tidy(f"{place}. {edit.before.strip()!r} → {edit.after.strip()!r}: {why}"))
    if not found.explained:
        output.note("the model's list of changes did not give its corrected text; these are the differences")
    if drills is not None:
        output.note(f"{drills.add(drills_of(found))} new drills are in {drills.path}")


@app.command()
@with_options
def practice(
    *,
    make: Annotated[int, option("First let the model write N drills.", "--make", metavar="N")] = 0,
    about: Annotated[str | None, option("What those are about.", "--about", metavar="TEXT")] = None,
    count: Annotated[int, option("Most that are asked. Else 10.", "--count", metavar="N")] = 10,
    language: Language = None,
    level: Level = None,
    deck: Deck = None,
    prompt: Annotated[Path | None, option("A prompt of your own, with {about}.", "--prompt", metavar="FILE")] = None,
    as_json: Annotated[bool, flag("Ask nothing: what is due, as one JSON object.", "--json")] = False,
    model: Model = None,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Ask the drills that are due; a right answer comes back later.

    Type what belongs into the gap, or in the place of the words in brackets.
    Ctrl-D ends; every answer is kept at once. Only --make needs a model.
    """
    from gemcut.uses.drills import Deck as Drills
    from gemcut.uses.drills import deck_file, make_drills

    if count < 1:
        raise ParameterError(f"--count is {count}; expected at least 1")
    if not 0 <= make <= 40:
        raise ParameterError(f"--make is {make}; expected 0 to 40")
    if (about is None) != (not make):
        raise ParameterError("--make and --about go together: --make 10 --about 'Spanish past tenses'")
    check_utf8(about or "", "--about")
    drills = Drills(deck or deck_file())
    if make and about is not None:
        name = need_model(model, "--model NAME")
        fields, levels = sampling.fields(), sampling.levels()
        gemma = load.load(name)
        gemma.sampling_levels[:0] = levels
        new = make_drills(gemma, about, make, language=language, level=level, prompt=prompt, **fields)
        output.note(f"{drills.add(new)} of {make} drills are new and whole; a model writes them: mistakes are possible")
    due = drills.due(datetime.now(UTC))[:count]
    if as_json:
        output.print_json({"deck": str(drills.path), "due": [dataclasses.asdict(each) for each in due]})
        return
    if not due:
        soon = drills.next_due()
        rest = (
            "tutor correct --keep and practice --make make some" if soon is None else f"the next one on {soon:%Y-%m-%d}"
        )
        output.note(f"nothing is due; {rest}")
        return
    right = asked = 0
    for place, drill in enumerate(due, 1):
        print(output.safe(f"{place} of {len(due)}: {drill.prompt}"))
        try:
            given = input("> ")
        except EOFError:
            print()
            break
        good = drills.answer(drill, given, datetime.now(UTC))
        right, asked = right + good, asked + 1
        said = output.styled("right", "new", sys.stdout) if good else output.styled("no", "red", sys.stdout)
        print(said + output.safe(f": {drill.answer}. {drill.rule}".rstrip()))
    output.note(f"{right} of {asked} right")


def _text(text: str | None, file: Path | None) -> str:
    if file is not None:
        if text is not None:
            raise ParameterError("a text and --file were given; drop one")
        return read_text_file(file)
    if text is not None and text != "-":
        check_utf8(text, "the text")
        return text
    if sys.stdin is None or output.is_terminal(sys.stdin):
        raise ParameterError("nothing to correct: give a text, --file FILE, or pipe one in")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ParameterError("standard input has more than 1 MB; give it in parts")
    try:
        return data.decode("utf-8-sig").strip("\n")
    except UnicodeDecodeError as error:
        raise ParameterError(f"standard input is not UTF-8 (byte {error.start}); convert it first") from None
