"""The ``gemcut`` command: its subcommands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import gemcut
from gemcut.cli.ask import ask
from gemcut.cli.batch import batch
from gemcut.cli.bench import app as bench_app
from gemcut.cli.bench_model import model as bench_model
from gemcut.cli.card import card
from gemcut.cli.chat import chat
from gemcut.cli.config import app as config_app
from gemcut.cli.convert import convert
from gemcut.cli.data import app as data_app
from gemcut.cli.eval_memorize import eval_app
from gemcut.cli.failures import explain, one_line
from gemcut.cli.generate import generate
from gemcut.cli.info import info
from gemcut.cli.interrupt import imports_interrupted
from gemcut.cli.options import DEBUG_HELP, flag
from gemcut.cli.plan import plan
from gemcut.cli.quantize import quantize
from gemcut.cli.research import embed, next_, probe
from gemcut.cli.safety import app as safety_app
from gemcut.cli.score import score
from gemcut.cli.serve import serve
from gemcut.cli.storage import list_, rm
from gemcut.cli.summarize import summarize
from gemcut.cli.train import app as train_app
from gemcut.cli.tutor import app as tutor_app
from gemcut.cli.watermark import app as watermark_app
from gemcut.cli.write import write

app = typer.Typer(
    name="gemcut",
    help="Google's Gemma 2, made usable: generate, chat, and see what fits your machine. "
    "A model can be cut, that is quantized: its weights kept in 8 or 4 bits instead of 16.",
    # The bundled model is a base model: it continues a text, and makes most sense where nothing is drawn at random.
    epilog="Try first, in the clone (make demo installs what it needs):\n\n"
    'gemcut generate -m gemma-3-270m -t 0 "The capital of France is"',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(score)
app.command("next")(next_)
app.command()(embed)
app.command()(probe)
app.command()(batch)
app.command()(summarize)
app.command()(write)
app.command()(ask)
app.command()(info)
app.command()(plan)
app.command("list")(list_)
app.command()(rm)
app.command()(quantize)
app.command()(convert)
app.command()(card)
app.add_typer(config_app)
app.add_typer(data_app)
app.add_typer(eval_app)
app.add_typer(safety_app)
app.add_typer(watermark_app)
app.add_typer(tutor_app)
app.add_typer(train_app)
bench_app.command("model")(bench_model)
app.add_typer(bench_app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gemcut {gemcut.__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, flag(DEBUG_HELP, "--debug")] = False,
) -> None:
    """Options before the command. ``debug`` is read by main(), so that errors of parsing are covered too."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 1 for a bug, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in itertools.takewhile(lambda argument: argument != "--", arguments)
    _prepare_output(debug)
    try:
        with imports_interrupted():
            code = _run(arguments)
        sys.stdout.flush()  # here, where a reader that left can still be met quietly
        return code
    except (Exception, KeyboardInterrupt) as error:
        failure = explain(error)
        _settle_output()
        if debug:
            traceback.print_exc()
        if failure.message:
            print(failure.message, file=sys.stderr)
        return failure.code


def _run(arguments: list[str]) -> int:
    # Not app(): typer would print its own errors over several lines and swallow Ctrl-C.
    command = typer.main.get_command(app)
    try:
        with command.make_context("gemcut", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `gemcut` alone: its message is the help
            print(error)
            return 0
        raise
    return 0


def _prepare_output(debug: bool) -> None:
    """Characters the terminal's encoding lacks are replaced, not fatal; warnings take one line."""
    for name in ("stdout", "stderr"):  # closed with >&- : what is said there goes nowhere, and quietly
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")
    if not debug:
        warnings.formatwarning = lambda message, *rest, **more: f"warning: {one_line(str(message))}\n"


def _settle_output() -> None:
    """Let out what was printed. Where that fails (the reader left, the disk is full) the interpreter's own last flush
    must not fail again: standard output then leads nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
