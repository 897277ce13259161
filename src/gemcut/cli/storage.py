"""``gemcut list`` and ``rm``: what is kept on this machine."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.options import Debug, flag
from gemcut.errors import ParameterError


def list_(as_json: Annotated[bool, flag("One JSON object.", "--json")] = False, debug: Debug = False) -> None:
    """List the models and caches on this machine, with their sizes.

    Hub models are in the cache that all programs share; the others are
    gemcut's own. What is called a cache is made again where it is missed.
    """
    from gemcut.storage import entries

    found = entries()
    total = sum(entry.size for entry in found)
    if as_json:
        rows = [{"name": e.name, "kind": e.kind, "bytes": e.size, "used": e.used, "path": str(e.path)} for e in found]
        output.print_json({"entries": rows, "bytes": total})
        return
    if not found:
        print("nothing is kept")
        return
    width = max(len(entry.name) for entry in found)
    for entry in found:
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d}" if entry.used else "-"
        row = f"{entry.name:<{width}}  {entry.kind:<9}  {output.gigabytes(entry.size):>9}  {used}"
        print(output.safe(row))
    print(f"{'in all':<{width}}  {'':<9}  {output.gigabytes(total):>9}")


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What gemcut list calls it.", show_default=False)],
    yes: Annotated[bool, flag("Do not ask.", "--yes", "-y")] = False,
    debug: Debug = False,
) -> None:
    """Remove one of what gemcut list shows, after asking."""
    from gemcut.storage import entries, find, remove

    entry = find(name, entries())
    what = f"{entry.name}, {output.gigabytes(entry.size)} in {entry.path}"
    if not yes:
        if not output.is_terminal(sys.stdin):
            raise ParameterError(f"there is nobody to ask whether to remove {what}; add --yes")
        print(output.safe(f"Remove {what}? [y/N] "), end="", flush=True)
        try:
            answer = input()
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("kept")
            return
    remove(entry)
    print(output.safe(f"removed {what}"))
