"""``gemcut config``: each setting and where it came from, and the file that keeps them."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from gemcut import settings
from gemcut.cli import output
from gemcut.cli.options import DEBUG_HELP, Debug, flag
from gemcut.errors import ParameterError

app = typer.Typer(
    name="config",
    invoke_without_command=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def config(
    context: typer.Context,
    *,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Annotated[bool, flag(DEBUG_HELP, "--debug")] = False,
) -> None:
    """Show each setting and where it came from, or change the file that keeps them.

    Example: [cyan]gemcut config set model gemma-3-270m[/]

    The first of these that names a value decides: a command's option, the
    variable GEMCUT_… of the same name, the file ~/.config/gemcut/config.toml,
    the checkpoint, what is built in. Python's Gemma reads no variables and no file.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise ParameterError(
                f"--json is for gemcut config alone, not for gemcut config {context.invoked_subcommand}"
            )
        return
    found, path = settings.read_settings(), settings.config_file()
    if as_json:
        output.print_json(_report(found))
        return
    for name, key in settings.KEYS.items():
        value = found.get(name)
        shown, origin = (
            (key.built_in or str(key.default), "built-in") if value is None else (_text(value.value), value.origin)
        )
        print(f"{name:<18}  {output.safe(shown):<20}  {output.safe(origin)}")
    missing = "" if path is not None and path.exists() else " (does not exist)"
    there = "no home folder, so no file" if path is None else f"{path}{missing}"
    print(f"\nfile: {output.safe(there)}")
    print("What is built in gives way to a checkpoint's own sampling (gemcut info MODEL shows it).")


@app.command("path")
def show_path(debug: Debug = False) -> None:
    """Print where the file is, whether or not it exists."""
    path = settings.config_file()
    if path is None:
        raise ParameterError("there is no home folder to keep a configuration in; set HOME or XDG_CONFIG_HOME")
    print(path)


# A negative number is a value here, not an unknown option.
@app.command("set", context_settings={"ignore_unknown_options": True})
def set_value(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A name that gemcut config lists.")],
    value: Annotated[list[str], typer.Argument(metavar="VALUE", help="Its value; several texts for stop.")],
    debug: Debug = False,
) -> None:
    """Write a setting into the file; everything else in it stays.

    Example: [cyan]gemcut config set temperature 0.3[/]
    """
    from gemcut.settings_file import set_key

    name = settings.known(key)
    if len(value) > 1 and settings.KEYS[name].kind != "texts":
        raise ParameterError(f"{name} takes one value, {len(value)} were given; put a text with spaces in quotes")
    parsed = [settings.parse(name, text, name) for text in value]
    whole = [text for texts in parsed for text in texts] if settings.KEYS[name].kind == "texts" else parsed[0]
    path = set_key(name, settings.check(name, whole, "gemcut config set"))
    output.note(f"{name} = {_text(whole)} in {path}")
    _overruled(name)


@app.command("unset")
def unset_value(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A name that the file holds.")], debug: Debug = False
) -> None:
    """Take a setting out of the file; everything else in it stays."""
    from gemcut.settings_file import unset_key

    path = unset_key(key)
    if path is None:
        name = settings.known(key)  # for a name that is none, the error says so
        path = unset_key(name)
        if path is None:
            raise ParameterError(f"{settings.config_file()} does not set {name}")
    output.note(f"{key} is no longer in {path}")
    if key in settings.KEYS:
        _overruled(key)


def _overruled(name: str) -> None:
    variable = settings.KEYS[name].variable
    if os.environ.get(variable):
        output.note(f"the variable {variable} is set and comes before the file")


def _report(found: settings.Settings) -> dict[str, Any]:
    path = settings.config_file()
    values = {}
    for name, key in settings.KEYS.items():
        value = found.get(name)
        values[name] = {
            "value": key.default if value is None else value.value,
            "origin": "built-in" if value is None else value.origin,
            "variable": key.variable,
            "expected": key.expected,
            "help": key.help,
        }
    return {
        "file": None if path is None else str(path),
        "file_exists": path is not None and path.exists(),
        "settings": values,
    }


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(repr(text) for text in value)
    return str(value)
