"""``gemcut train``: pretraining and distillation in JAX."""

from __future__ import annotations

import typer

from gemcut.cli.train_fit import fit

app = typer.Typer(
    name="train",
    help="Train Gemma in JAX: does a step fit chips that are not there?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(fit)


@app.callback()
def _commands() -> None:
    """Keeps ``fit`` a command of its own while it is the only one."""
