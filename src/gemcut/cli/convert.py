"""``gemcut convert``: a checkpoint as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import import_torch
from gemcut.cli.options import MODEL_HELP, Debug, HubOptions, flag, option, with_options
from gemcut.errors import CheckpointError, ParameterError


@with_options
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to make, OUT.gguf.")],
    *,
    to: Annotated[str, option("bf16, q8_0 or q4_0. Else bf16.", "--to", metavar="FORMAT")] = "bf16",
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    hub: HubOptions,
) -> None:
    """Write a checkpoint as one GGUF file, for llama.cpp and what is built on it.

    bf16 keeps bf16 weights as they are. Norms stay in fp32, and with q4_0
    the embedding is Q8_0. One tensor is held in memory at a time.
    """
    import_torch()
    from gemcut.checkpoint.gguf_write import FORMATS, write_gguf
    from gemcut.progress import LoadProgress

    if to not in FORMATS:
        raise ParameterError(f"--to is {to!r}; expected one of {', '.join(FORMATS)}")
    if out.suffix != ".gguf":
        raise ParameterError(f"OUT is {out}; expected a name that ends in .gguf")
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another name or remove it")
    if not out.parent.is_dir():
        raise CheckpointError(f"there is no folder {out.parent}; make it first")
    with LoadProgress(True, f"downloading {model}") as report:
        source = hub.fetch(model, report)
    if source.expanded:
        output.note(
            f"{source.name} is quantized already ({', '.join(source.expanded)}): its loss stays in the new file"
        )
    with LoadProgress(True, f"writing {out.name}") as report:
        counts = write_gguf(source, out, to, report)
    size = out.stat().st_size
    if as_json:
        output.print_json({"file": str(out), "format": to, "tensors": counts, "bytes": size})
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(output.safe(f"{out}: {output.gigabytes(size)}, tensors: {kinds}"))
