"""``gemcut safety log``: verify an audit log, and keep its retention."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import Debug, option
from gemcut.errors import ParameterError

app = typer.Typer(
    name="log",
    help="The audit log of a server or a chat.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_File = Annotated[Path, typer.Argument(metavar="FILE", help="The audit log.", show_default=False)]
_AGE = re.compile(r"([0-9]{1,6})([dhm])")


@app.callback()
def log() -> None:
    """The audit log of a server or a chat."""


@app.command()
def verify(file: _File, *, debug: Debug = False) -> None:
    """Look whether any line was changed, forged, or cut away.

    The key FILE.key must lie beside the log. The exit code is 2 where
    something is wrong.
    """
    from gemcut.safety.audit import verify

    found = verify(file)
    since = f", since {found.first}" if found.first else ""
    print(f"{output.safe(str(file))}: {found.lines:,} lines, {found.reports:,} reports{since}; none was changed")


@app.command()
def purge(
    file: _File,
    *,
    older_than: Annotated[str, option("An age: 90d, 12h or 30m.", "--older-than", metavar="AGE")],
    debug: Debug = False,
) -> None:
    """Drop the lines older than an age. What is left can be verified still."""
    from gemcut.safety.audit import AuditLog

    found = _AGE.fullmatch(older_than)
    if found is None:
        raise ParameterError(f"--older-than is {older_than[:40]!r}; expected an age such as 90d, 12h or 30m")
    unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
    if not file.exists():
        raise ParameterError(f"there is no {file}; expected an audit log")
    count = AuditLog(file).purge(timedelta(**{unit: int(found[1])}))
    print(f"{output.safe(str(file))}: {count:,} lines were dropped")
