"""``gemcut train``: pretraining and distillation in JAX."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import stop_request
from gemcut.cli.options import Debug, flag, option
from gemcut.cli.train_fit import fit
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.training.driver import Driver
    from gemcut.training.runfile import RunFile

app = typer.Typer(
    name="train",
    help="Train Gemma in JAX: from text or shards to a checkpoint folder.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFilePath = Annotated[Path, typer.Argument(metavar="RUN.toml", help="A run file.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.", show_default=False)]
AsJson = Annotated[bool, flag("One JSON object a line of progress.", "--json")]
DriverName = Annotated[
    str,
    option("How processes find each other: auto, host, controllers, pathways. Else auto.", "--driver", metavar="NAME"),
]
Steps = Annotated[int | None, option("Save and end after so many steps in all.", "--until", metavar="N")]


@app.command()
def run(
    file: RunFilePath,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the run.", show_default=False)],
    *,
    until: Steps = None,
    resume: Annotated[bool, flag("Go on where DIR is a run of this file already.", "--resume")] = False,
    driver: DriverName = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Begin a run: train to its last step, then write the model as a checkpoint folder.

    DIR gets run.toml, metrics.jsonl, checkpoints/, best/ and in the end model/.
    Ctrl-C saves and ends; `gemcut train resume DIR` goes on.
    docs/training.md describes run files.
    """
    _needs_jax()
    from gemcut.training.rundir import begin
    from gemcut.training.runfile import read_run_file

    read = read_run_file(file)
    _check_until(until, read)
    started = _start(driver)
    with begin(out, read, started, resume=resume):
        _train(out, read, started, until, as_json)


@app.command()
def resume(
    out: Folder, *, until: Steps = None, driver: DriverName = "auto", as_json: AsJson = False, debug: Debug = False
) -> None:
    """Go on with a run from its last checkpoint, with the very next batch."""
    _needs_jax()
    from gemcut.training.rundir import locked, run_file_of

    read = run_file_of(out)
    _check_until(until, read)
    started = _start(driver)
    with locked(out, started):
        _train(out, read, started, until, as_json)


@app.command()
def preview(
    file: RunFilePath,
    *,
    windows: Annotated[int, option("Windows shown of each source. Else 2.", "--windows", "-n", metavar="N")] = 2,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a run will learn from: its size, its share of each source, windows as the network sees them."""
    _needs_jax()
    from gemcut.training.runfile import read_run_file

    if not 1 <= windows <= 100:
        raise ParameterError(f"--windows is {windows}; expected 1 to 100")
    read = read_run_file(file)
    _start("host")
    from gemcut.training.preview import preview as look

    found = look(read, windows)
    if as_json:
        output.print_json(found)
        return
    model, run = found["model"], found["run"]
    print(f"model: {output.count(model['parameters'])} weights, {model['layers']} layers, "
          f"vocabulary {model['vocabulary']:,}")  # fmt: skip
    print(f"run: {run['steps']:,} steps of {run['tokens_a_step']:,} tokens = {run['tokens']:,}; "
          f"{run['flops']:.2g} model FLOPs")  # fmt: skip
    for source in found["sources"]:
        print(
            f"\nsource {output.safe(source['name'])}: {source['windows']:,} windows, {source['share']:.0%} of the "
            f"batch, {source['epochs']:.1f} times over; {source['held_out']} held out"
        )
        for window in source["shown"]:
            for document in window:
                print(
                    output.styled(f"  [{document['tokens']} tokens] ", "dim", sys.stdout)
                    + output.safe(document["text"])
                )


@app.command()
def plot(
    out: Folder,
    *,
    picture: Annotated[
        Path | None, option("File to write. Else DIR/metrics.png.", "--plot", "-o", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a run's curves: loss, held-out loss by source, gradient norm, rate, tokens a second."""
    from gemcut.picture import check_plot

    path = picture or out / "metrics.png"
    check_plot(path)
    from gemcut.training.curves import plot as draw

    draw(out, path)
    print(output.safe(str(path)))


@app.command("teacher-logits")
def teacher_logits(
    file: RunFilePath,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The name of a source.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    *,
    model: Annotated[Path, option("The teacher: a checkpoint folder.", "--model", "-m", metavar="FOLDER")],
    top: Annotated[int, option("Words kept for each token. Else 64.", "--top", metavar="K")] = 64,
    batch: Annotated[int, option("Windows at once. Else 1.", "--batch", metavar="N")] = 1,
    debug: Debug = False,
) -> None:
    """Store a teacher's likeliest words for a source, to distil from without the teacher.

    Name OUT as the source's `teacher` in the run file, and give it a [teacher] table.
    """
    _needs_jax()
    from gemcut.training.runfile import read_run_file

    if not 1 <= batch <= 4096:
        raise ParameterError(f"--batch is {batch}; expected 1 to 4096")
    read = read_run_file(file)
    _start("host")
    from gemcut.cli.eval_progress import RowProgress
    from gemcut.training.answers import answer_source

    with RowProgress() as bar:
        count = answer_source(read, source, out, model, top=top, batch=batch,
                              watch=lambda done, total: bar.count("teacher", done, total))  # fmt: skip
    print(f"{count:,} windows: {output.safe(str(out))}")


app.command()(fit)


def _needs_jax() -> None:
    """Raise ParameterError where the extra is not installed."""
    missing = [name for name in ("jax", "optax", "orbax.checkpoint", "grain") if not _installed(name)]
    if missing:
        raise ParameterError(
            f"gemcut train needs {', '.join(missing)}: pip install 'gemcut[train]' (in the clone: pip install -e "
            "'.[train]')"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _start(name: str) -> Driver:
    from gemcut.training.driver import start

    return start(name)


def _check_until(until: int | None, file: RunFile) -> None:
    if until is not None and not 1 <= until <= file.run.steps:
        raise ParameterError(f"--until is {until}; expected 1 to {file.run.steps:,}, the steps of the run")


def _train(out: Path, file: RunFile, driver: Driver, until: int | None, as_json: bool) -> None:
    from gemcut.cli.train_progress import TrainProgress
    from gemcut.training.trainer import Trainer

    trainer = Trainer(out, file, driver)
    with stop_request() as stop, TrainProgress(trainer, as_json, silent=not driver.leads) as progress:
        trainer.stopping = lambda: stop.pressed
        model = trainer.run(progress, until)
    if not driver.leads:
        return
    if model is None:
        output.note(f"saved; `gemcut train resume {out}` goes on")
        if stop.pressed:
            raise KeyboardInterrupt
    elif as_json:
        output.print_json({"model": str(model)})
    else:
        print(f"model: {output.safe(str(model))}")
