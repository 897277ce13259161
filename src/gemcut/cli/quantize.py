"""``gemcut quantize``: a checkpoint cut to 4 or 8 bits, as a folder that transformers with bitsandbytes reads too."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import import_torch
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, QuantizationOptions, flag, option, with_options
from gemcut.cli.plan import parse_memory
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.checkpoint.quantize import Cutter
    from gemcut.checkpoint.source import Source
    from gemcut.quantization.spec import Quantization

#: Tokens of a document of the sample text, one in nine of which is held out.
CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class TargetOptions(QuantizationOptions):
    """What the new folder's weights are in."""

    NAME: ClassVar[str] = "--to"

    quantization: Annotated[str | None, option("nf4 (the best 4 bits), fp4 or int8.", "--to", metavar="FORMAT")] = "nf4"
    head: Annotated[
        str | None, option("int8: quantize embedding and head when the folder is loaded.", "--head", metavar="FORMAT")
    ] = None


@with_options
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    *,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="A text file: choose codes by what it does in the model. Slower, better."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="A file is no larger than this, nor what a stopped run does again.")
    ] = "1GB",
    as_json: Annotated[bool, flag("The report as JSON on standard output.", "--json")] = False,
    debug: Debug = False,
    target: TargetOptions,
    hub: HubOptions,
) -> None:
    """Quantize a checkpoint: keep its linear layers' weights in 4 or 8 bits (gemcut calls that cutting).

    Example: [cyan]gemcut quantize gemma-3-270m gemma-3-270m-nf4 --to nf4[/]

    A few hundred MB of memory beside the largest tensor are enough. A run that was stopped goes on
    where it was when the same command is given again. OUT loads here and in transformers.
    """
    spec = target.specification()
    assert spec is not None  # there is a default
    try:
        shard = parse_memory(max_shard_size)
    except ParameterError:
        raise ParameterError(
            f"max-shard-size is {max_shard_size[:60]!r}; expected a size such as 5GB or 500MB"
        ) from None
    import_torch()
    from gemcut.checkpoint.quantize import quantize_checkpoint
    from gemcut.checkpoint.working import can_go_on, check_out, working_folder
    from gemcut.progress import LoadProgress

    if calibrate is not None and spec.format == "int8":
        raise ParameterError("--calibrate is for nf4 and fp4; int8 needs none")
    check_out(out)  # before anything is downloaded for nothing
    if calibrate is not None and (not calibrate.exists() or calibrate.is_dir()):
        what = "is a folder" if calibrate.is_dir() else "No such file"
        raise ParameterError(f"cannot read {calibrate}: {what}; expected a text file to calibrate on")
    with LoadProgress(True, f"downloading {model}") as report:
        source = hub.fetch(model, report)
    cutter, options, held_out = (None, {}, []) if calibrate is None else _calibration(source, spec, calibrate)
    with LoadProgress(True, f"quantizing {source.name}") as report:
        try:
            result = quantize_checkpoint(
                source,
                out,
                spec,
                max_shard_bytes=shard,
                cutter=cutter,
                options=options,
                examine=functools.partial(_held_out, source, spec, held_out) if held_out else None,
                progress=report,
                say=output.note,
            )
        except KeyboardInterrupt:
            if can_go_on(out):
                where = working_folder(out)
                output.note(f"stopped; the same command goes on from here, finished files wait in {where}")
            else:
                output.note("stopped before the first file was finished; nothing is left of it")
            raise
    if as_json:
        output.print_json(result)
    else:
        _show(result, out)


def _calibration(source: Source, spec: Quantization, text: Path) -> tuple[Cutter, dict[str, Any], list[list[int]]]:
    """The cutter that goes by the sample ``text``, what of it decides the result, and documents it does not see."""
    import hashlib

    from gemcut.calibration.cutter import CalibratedCutter
    from gemcut.calibration.samples import read_calibration_text

    context = min(CONTEXT, source.config().max_position_embeddings)
    every = read_calibration_text(text, source.tokenizer(), tokens=18432, context=context)
    held_out = [document for document in every[8::9] if len(document) > 1]
    if not held_out:
        output.note(
            f"perplexity and KL divergence are not measured: {text} is too short to hold a ninth of it out; "
            f"{9 * context:,} tokens are enough"
        )
    documents = [document for i, document in enumerate(every) if i % 9 != 8]
    digest = hashlib.sha256(repr(documents).encode()).hexdigest()
    options = {"calibration_sha256": digest, "calibration_tokens": sum(map(len, documents))}
    return CalibratedCutter(source, spec, documents), options, held_out


def _held_out(
    source: Source, spec: Quantization, documents: list[list[int]], folder: Path
) -> dict[str, dict[str, Any]]:
    """What the text that calibration did not see lost, and what it would lose if every value took its nearest code."""
    from gemcut.calibration.streamed import Rounded, Weights, compare_checkpoints
    from gemcut.checkpoint.resolve import resolve
    from gemcut.progress import LoadProgress

    with LoadProgress(True, "comparing with the whole model") as report:
        cuts: list[Weights] = [resolve(folder), Rounded(source, spec)]
        ours, nearest = compare_checkpoints(source, cuts, documents, progress=report)
    return {"held_out": dataclasses.asdict(ours), "held_out_nearest_codes": dataclasses.asdict(nearest)}


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = output.console()
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, entry in report["weights"].items():
        kinds.setdefault(name.split(".")[-2], []).append(entry)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column, justify in (("matrix", "left"), ("format", "left"), ("size", "right"), ("relative error", "right")):
        table.add_column(column, justify=cast("Any", justify))
    for kind, entries in kinds.items():
        errors = [entry["relative_error"] for entry in entries if "relative_error" in entry]
        if not errors and kind != "embed_tokens":
            continue
        mean = f"{sum(errors) / len(errors):.2%} (at most {max(errors):.2%})" if errors else "0"
        size = output.gigabytes(sum(entry["bytes"] for entry in entries))
        table.add_row(f"{kind} × {len(entries)}", entries[0].get("format", "whole"), size, mean)
    console.print(table)
    before, after = report["bytes_before"], report["bytes_after"]
    size = f"{output.gigabytes(after)}, was {output.gigabytes(before)} ({after / before:.0%})"
    console.print(f"[bold]{escape(str(out))}[/]: {size}", soft_wrap=True)
    if "held_out" in report:
        found = report["held_out"]
        console.print(
            f"{found['tokens']:,} tokens of the text that were held out: perplexity {found['perplexity']:.2f}, "
            f"was {found['reference_perplexity']:.2f}; KL divergence {found['kl']:.4f} nats a token, "
            f"without calibration {report['held_out_nearest_codes']['kl']:.4f}; "
            f"the same likeliest token in {found['same_top']:.1%}",
            soft_wrap=True,
        )
