"""``gemcut batch``: a file of requests, answered into a file."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import cancelled_by_ctrl_c
from gemcut.cli.options import MODEL_HELP, Debug, LoadOptions, SamplingOptions, need_model, option, with_options
from gemcut.errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    from gemcut.uses.batch import Totals


@with_options
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="The requests.", show_default=False)],
    answers: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The answers.", show_default=False)],
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)] = None,
    served_model_name: Annotated[
        list[str] | None, option('What "model" may be in a request; repeatable. Else NAME.', metavar="NAME")
    ] = None,
    debug: Debug = False,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Answer a file of requests, in OpenAI's batch shape, as many at once as fit.

    A line is {"custom_id": "1", "method": "POST", "url":
    "/v1/chat/completions", "body": {…}}; /v1/completions and /v1/embeddings
    are possible, too. Fields and errors are those of gemcut serve. Answers
    keep the order. A line that is wrong is answered with an error, and the
    rest is done. The same command again goes on where a run ended.
    """
    name = need_model(model, "--model NAME")
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"gemcut batch needs {error.name}: pip install 'gemcut[serve]' (in the clone: pip install -e '.[serve]')"
        ) from None
    if not requests.is_file():  # before gigabytes are loaded
        raise ParameterError(f"cannot read {requests}: {'it is a folder' if requests.is_dir() else 'no such file'}")
    if not answers.absolute().parent.is_dir():
        raise ParameterError(f"cannot write {answers}: there is no folder {answers.absolute().parent}")
    fields, levels = sampling.fields(), sampling.levels()
    gemma = load.load(name)
    gemma.sampling_levels[:0] = [("command line", fields), *levels]
    from gemcut.uses.batch import run_batch

    path = Path(name)
    names = tuple(served_model_name or [path.resolve().name if path.exists() else name])
    shown = Progress()

    async def run() -> Totals:
        with cancelled_by_ctrl_c():
            return await run_batch(gemma, requests, answers, names=names, heard=shown)

    try:
        totals = asyncio.run(run())
    except (asyncio.CancelledError, KeyboardInterrupt):
        shown.end()
        output.note(f"{shown.lines:,} answers are in {answers}; the same command goes on from there")
        raise KeyboardInterrupt from None
    shown.end()
    done = totals.lines - totals.kept
    before = f" ({totals.kept:,} were there)" if totals.kept else ""
    speed = f", {totals.tokens / totals.seconds:,.0f} tok/s" if totals.tokens and totals.seconds else ""
    output.note(f"{done:,} answered in {totals.seconds:.1f} s{before}: {totals.tokens:,} tokens{speed}")
    if totals.first_error is not None:
        number, message = totals.first_error
        more = f", and {totals.failed - 1:,} more" if totals.failed > 1 else ""
        output.note(f"{totals.failed:,} failed: line {number}: {message}{more}")


class Progress:
    """One line on a terminal that says how far it is; elsewhere silence."""

    def __init__(self) -> None:
        self.lines = 0
        self._drawn = False

    def __call__(self, totals: Totals) -> None:
        self.lines = totals.lines
        if output.is_terminal(sys.stderr):
            speed = totals.tokens / totals.seconds if totals.seconds else 0.0
            print(f"\r{totals.lines:,} answers, {totals.failed:,} failed, {speed:,.0f} tok/s ", end="", file=sys.stderr)
            sys.stderr.flush()
            self._drawn = True

    def end(self) -> None:
        """End the line."""
        if self._drawn:
            print(file=sys.stderr)
            self._drawn = False
