"""``gemcut chat``: talk to a model, at a terminal or in a pipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemcut
from gemcut.cli import output
from gemcut.cli.generate import decode, read_stdin
from gemcut.cli.names import tuned
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, SamplingOptions, flag, need_model, with_options
from gemcut.errors import ChatTemplateError, ParameterError

if TYPE_CHECKING:
    from gemcut.gemma import Gemma


@with_options
def chat(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    *,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="Instructions for the model.")
    ] = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this one message and exit.")] = None,
    stats: Annotated[bool, flag("With one message: times and tokens, on standard error.", "--stats")] = False,
    no_markdown: Annotated[bool, flag("Show answers as plain text.", "--no-markdown")] = False,
    no_history: Annotated[bool, flag("Keep no file of what is typed.", "--no-history")] = False,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Talk to a model. In the conversation, /help lists what you can do.

    Example: [cyan]gemcut chat 2b-it --system "Answer in one sentence."[/]

    Without a terminal, standard input is one message: [cyan]gemcut chat 2b-it < question.txt[/]
    """
    name = need_model(model, "gemcut chat MODEL")
    instructions = decode(os.fsencode(system), "--system", trim=False) if system is not None else ""
    question = _question(once)
    if question is None and stats:
        raise ParameterError("--stats is for one message (--once or a pipe); in the conversation, type /stats")
    fields = sampling.fields()
    gemma = load.load(name)
    _check_format(gemma)
    if question is None:
        _talk(gemma, fields, instructions, markdown=not no_markdown, history=not no_history)
    else:
        _answer(gemma, fields, instructions, question, stats=stats, markdown=not no_markdown)


def _question(once: str | None) -> str | None:
    """The one message to answer, or None for a conversation."""
    if once is not None:
        text = decode(os.fsencode(once), "--once", trim=False)
    elif output.is_terminal(sys.stdin):
        if not output.is_terminal(sys.stdout):
            raise ParameterError("a conversation needs a terminal to write to; for one answer use --once TEXT")
        return None
    else:
        text = decode(read_stdin(), "standard input")
    if not text.strip():
        raise ParameterError("the message is empty; give some text to answer")
    return text


def _check_format(gemma: Gemma) -> None:
    """Refuse what cannot chat; say in one line what will chat badly."""
    from gemcut.text import uses_gemma_format

    # A checkpoint with a format of its own brings what it needs; Gemma's format needs Gemma's markers.
    markers = (gemma.tokenizer.start_of_turn_id, gemma.tokenizer.end_of_turn_id)
    if uses_gemma_format(gemma.tokenizer) and None in markers:
        raise ChatTemplateError(
            "this model's tokenizer has no turn markers, so it cannot chat; use gemcut generate, or an "
            "instruction-tuned checkpoint such as 2b-it"
        )
    if gemma.source is not None and tuned(gemma.source, gemma.tokenizer) is False:
        output.note(f"note: {gemma.source.name} is a base model, not tuned to chat; it will ramble")


def _talk(gemma: Gemma, fields: dict[str, Any], system: str, *, markdown: bool, history: bool) -> None:
    from gemcut.cli.chat_input import history_file
    from gemcut.cli.chat_session import ChatSession

    name = gemma.source.name if gemma.source is not None else "model"
    dtype = str(gemma.dtype).removeprefix("torch.")
    output.note(
        f"gemcut {gemcut.__version__} · {name} · {dtype} on {gemma.device} · loaded in {gemma.load_seconds:.1f} s"
    )
    output.note("Enter sends · Alt-Enter adds a line · Ctrl-C stops · Ctrl-D leaves · /help")
    where = history_file() if history else None
    ChatSession(gemma, fields, system=system, markdown=markdown, history=where).run()


def _answer(gemma: Gemma, fields: dict[str, Any], system: str, question: str, *, stats: bool, markdown: bool) -> None:
    """One message, one answer."""
    from gemcut.cli.conversation import Conversation

    messages = Conversation(system).messages(question)
    with gemma.chat(messages, stream=True, **fields) as stream:
        if output.is_terminal(sys.stdout):
            from rich.console import Console

            from gemcut.cli.chat_view import MarkdownView, PlainView

            console = Console(highlight=False)
            with MarkdownView(console) if markdown else PlainView(console) as view:
                for piece in stream:
                    view.write(piece)
        else:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
        completion = stream.result
    if stats:
        output.print_stats(gemma, completion, gemma.resolve_sampling(completion.prompt_tokens, fields, chat=True))
