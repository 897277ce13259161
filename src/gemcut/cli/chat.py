"""``gemcut chat``: talk to a model, at a terminal or in a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemcut
from gemcut.cli import output
from gemcut.cli.conversation import Conversation
from gemcut.cli.generate import answer_report, decode, note_closed, read_schema, read_stdin
from gemcut.cli.interrupt import quiet_keyboard
from gemcut.cli.options import (
    MODEL_HELP,
    Debug,
    LoadOptions,
    SamplingOptions,
    Schema,
    flag,
    need_model,
    option,
    with_options,
)
from gemcut.errors import ChatTemplateError, ParameterError
from gemcut.names import tuned
from gemcut.uses.persona import Persona, read_persona

if TYPE_CHECKING:
    from gemcut.gemma import Gemma
    from gemcut.uses.room import Full


# A base model's likeliest tokens make some sense as an answer; what is drawn far from them does not.
BASE_LEVEL = ("base model", {"temperature": 0.3})


@with_options
def chat(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    *,
    model_option: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="The same as MODEL, as in generate.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="Instructions for the model.")
    ] = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this one message and exit.")] = None,
    load_chat: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    persona: Annotated[
        Path | None, typer.Option("--persona", metavar="FILE", help="Instructions, examples, sampling in TOML.")
    ] = None,
    when_full: Annotated[
        str, typer.Option("--when-full", metavar="HOW", help="Context nearly full: ask, drop, summarise, stop.")
    ] = "ask",
    as_json: Annotated[bool, flag("With one message: the answer as one JSON object.", "--json")] = False,
    stats: Annotated[bool, flag("With one message: times and tokens, on standard error.", "--stats")] = False,
    schema: Schema = None,
    guard: Annotated[
        Path | None, option("A guard file: judges that look at messages and answers.", "--guard", metavar="FILE")
    ] = None,
    no_markdown: Annotated[bool, flag("Show answers as plain text.", "--no-markdown")] = False,
    no_history: Annotated[bool, flag("Keep no file of what is typed.", "--no-history")] = False,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Talk to a model. In the conversation, /help lists what you can do.

    Example: [cyan]gemcut chat 2b-it --system "Answer in one sentence."[/]

    Without a terminal, standard input is one message: [cyan]gemcut chat 2b-it < question.txt[/]

    A base model (one without a chat template, and without -it in its name) is
    not tuned to answer; it talks at temperature 0.3 if nothing else is set.
    """
    if model is not None and model_option is not None:
        raise ParameterError("the model was given twice, as an argument and as --model; drop one")
    name = need_model(model if model is not None else model_option, "gemcut chat MODEL")
    instructions = decode(os.fsencode(system), "--system", trim=False) if system is not None else None
    conversation = Conversation() if load_chat is None else Conversation.load(load_chat)
    who = Persona() if persona is None else read_persona(persona)
    conversation.examples = who.examples
    if instructions is not None or who.system:
        conversation.system = who.system if instructions is None else instructions
    question = _question(once, partial(load.most_bytes, name))
    if question is None and (stats or as_json):
        given, how = ("--stats", "type /stats") if stats else ("--json", "type /save FILE")
        raise ParameterError(f"{given} is for one message (--once or a pipe); in the conversation, {how}")
    if question is None and schema is not None:
        raise ParameterError("--schema is for one message (--once or a pipe)")
    fields, levels = sampling.fields(grammar=read_schema(schema)), sampling.levels()
    if persona is not None:
        levels.insert(0, (persona.name, who.sampling))
    with _orderly_end():
        with quiet_keyboard():  # what is typed meanwhile is dropped: it would stand in the progress bar
            from gemcut.safety.guard_file import GuardFile
            from gemcut.uses.room import parse_full

            full = parse_full(when_full, "--when-full")
            gemma = load.load(name, guard=None if guard is None else GuardFile.read(guard))
        base = _check_format(gemma)
        gemma.sampling_levels[:] = [*levels, *gemma.sampling_levels, *([BASE_LEVEL] if base else [])]
        if question is None:
            _talk(gemma, fields, conversation, markdown=not no_markdown, history=not no_history, base=base, full=full)
        else:
            from gemcut.cli.chat_full import make_room

            most = fields.get("max_new_tokens")
            make_room(gemma, conversation, question, full, most=most, ask=None, say=output.note)
            messages = conversation.messages(question)
            _answer(gemma, fields, messages, stats=stats, markdown=not no_markdown, as_json=as_json)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """A request to end (SIGTERM, a terminal that is closed) ends by an exception, so that the keyboard is restored."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    before = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _question(once: str | None, most_bytes: Callable[[], int]) -> str | None:
    """The one message to answer, or None for a conversation."""
    if once is not None:
        text = decode(os.fsencode(once), "--once", trim=False)
    elif output.is_terminal(sys.stdin):
        if not output.is_terminal(sys.stdout):
            raise ParameterError("a conversation needs a terminal to write to; for one answer use --once TEXT")
        return None
    else:
        text = decode(read_stdin(most_bytes), "standard input")
    if not text.strip():
        raise ParameterError("the message is empty; give some text to answer")
    return text


def _check_format(gemma: Gemma) -> bool:
    """Refuse what cannot chat; say in one line what will chat badly. Gives whether it is a base model."""
    from gemcut.text import uses_gemma_format

    # A checkpoint with a format of its own brings what it needs; Gemma's format needs Gemma's markers.
    markers = (gemma.tokenizer.start_of_turn_id, gemma.tokenizer.end_of_turn_id)
    if uses_gemma_format(gemma.tokenizer) and None in markers:
        raise ChatTemplateError(
            "this model's tokenizer has no turn markers, so it cannot chat; use gemcut generate, or an "
            "instruction-tuned checkpoint such as 2b-it"
        )
    base = gemma.source is not None and not tuned(gemma.source, gemma.tokenizer)
    if base and gemma.source is not None:
        output.note(
            f"note: {gemma.source.name} is a base model: it continues text and is not tuned to answer; "
            "gemcut generate suits it better"
        )
    return base


def _talk(
    gemma: Gemma,
    fields: dict[str, Any],
    conversation: Conversation,
    *,
    markdown: bool,
    history: bool,
    base: bool,
    full: Full,
) -> None:
    from gemcut.cli.chat_input import history_file
    from gemcut.cli.chat_session import ChatSession

    name = gemma.source.name if gemma.source is not None else "model"
    dtype = str(gemma.dtype).removeprefix("torch.")
    where = history_file() if history else None
    session = ChatSession(
        gemma, fields, conversation=conversation, markdown=markdown, history=where, base=base, full=full
    )
    output.note(
        f"gemcut {gemcut.__version__} · {name} · {dtype} on {gemma.device} · loaded in {gemma.load_seconds:.1f} s"
    )
    output.note("Enter sends · Alt-Enter adds a line · Ctrl-C stops · Ctrl-D leaves · /help")
    if conversation.turns:
        output.note(f"going on after {len(conversation.turns) // 2} exchanges, {session.used:,} tokens")
    session.run()


def _answer(
    gemma: Gemma,
    fields: dict[str, Any],
    messages: list[dict[str, str]],
    *,
    stats: bool,
    markdown: bool,
    as_json: bool,
) -> None:
    """One message, one answer."""
    from gemcut.safety.watch import said

    ids = gemma.encode_messages(messages)
    used = gemma.resolve_sampling(len(ids), fields, chat=True)
    watch = gemma.watch(said(messages)) or False
    with gemma.stream_ids(ids, used.params, watch=watch) as stream:
        if as_json:
            completion = stream.result.checked()
            output.print_json(answer_report(gemma, completion, used))
        elif output.is_terminal(sys.stdout):
            from rich.console import Console

            from gemcut.cli.chat_view import MarkdownView, PlainView

            console = Console(highlight=False)
            with MarkdownView(console) if markdown else PlainView(console) as view:
                for piece in stream:
                    view.write(piece)
        else:
            output.write_pieces(stream)
        completion = stream.result
        if not as_json:
            note_closed(completion, used)
    if stats:
        output.print_stats(gemma, completion, used)
