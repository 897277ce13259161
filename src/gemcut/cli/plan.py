"""``gemcut plan``: what a model needs and what fits, from its configuration alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.names import family_member
from gemcut.cli.options import Debug, need_model
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import ParameterError
from gemcut.plan import CHUNK, DTYPE_BYTES, MemoryPlan

if TYPE_CHECKING:
    from rich.table import Table

# Spelled here as in gemcut.hardware, which imports torch.
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PUBLISHED = "published shape"


def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="2b-it, 9b, 27b-it, gemma-3-270m, a folder, a .gguf file or a hub id."),
    ] = None,
    *,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32; all three if not given.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit into, 24GB or 22.5GiB; what is free here if not.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of one request; the model's limit if not given.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Requests at the same time.")] = 1,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="Hub token; better set HF_TOKEN.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show what memory a model takes and what fits, before anything is downloaded.

    Example: [cyan]gemcut plan 27b-it --memory 80GB --batch 8[/]

    Gemma 2 keeps keys and values of every token in its full-attention layers, and of the last 4096 tokens in the
    others.
    """
    name = need_model(model, "gemcut plan MODEL")
    if dtype is not None and DTYPE_NAMES.get(dtype, dtype) not in DTYPE_BYTES:
        raise ParameterError(f"dtype is {dtype!r}; expected bfloat16, float16 or float32")
    dtypes = ["bfloat16", "float16", "float32"] if dtype is None else [DTYPE_NAMES.get(dtype, dtype)]
    given = parse_memory(memory) if memory is not None else None
    kind, available, where = _memory(device, given)
    label, config, source = _shape(name, revision, token)
    plans = [
        MemoryPlan.make(config, dtype=each, context=context, batch=batch, chunk=CHUNK[kind], memory=available)
        for each in dtypes
    ]
    if as_json:
        output.print_json(
            {"model": label, "config_from": source, "device": kind, "plans": [_report(each) for each in plans]}
        )
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(label, source, plans))
    for line in _verdict(label, plans, where):
        console.print(line, soft_wrap=True)


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "22.5 GiB", "800MB"; raises ParameterError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or (amount := int(float(match.group(1)) * unit)) < 1:
        raise ParameterError(f"memory is {text!r}; expected a size such as 24GB, 22.5GiB or 800MB")
    return amount


def _memory(device: str, given: int | None) -> tuple[str, int | None, str]:
    """(cpu or cuda, bytes, words for them). torch is asked only about this machine."""
    if given is not None:
        if device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ParameterError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
        # Another machine's memory: the larger steps of a GPU are the safe guess.
        kind = "cpu" if device == "cpu" else "cuda"
        return kind, given, f"the {output.gigabytes(given)} given"
    from gemcut.hardware import free_memory, parse_device

    try:
        found = parse_device(device)
    except ParameterError as error:
        raise ParameterError(f"{error} (for another machine, give its memory: --memory 80GB)") from None
    free = free_memory(found)
    return found.type, free, "" if free is None else f"the {output.gigabytes(free)} free now on {found} here"


def _shape(name: str, revision: str | None, token: str | None) -> tuple[str, GemmaConfig, str]:
    """(label, configuration, where it is from). Names of the family need no file; everything else is looked up."""
    from pathlib import Path

    member = family_member(name)
    if member is not None and revision is None and not Path(name).expanduser().exists():
        return member[0], member[1], _PUBLISHED
    from gemcut.checkpoint.source import resolve

    source = resolve(name, revision=revision, token=token, weights=False)
    return source.name, source.config(), str(source.path)


def _table(label: str, source: str, plans: list[MemoryPlan]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = plans[0]
    config = first.config
    layers = f"{len(config.full_layers)} full + {len(config.sliding_layers)} sliding layers"
    table = Table(
        title=Text(f"{label}: {output.count(config.num_parameters())} parameters, {layers}", style="bold"),
        caption=None if source == _PUBLISHED else Text(source, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for plan in plans:
        table.add_column(plan.dtype, justify="right")

    def row(title: str, values: list[str], style: str = "") -> None:
        table.add_row(title, *values, style=style)

    row("weights", [output.gigabytes(p.weights) for p in plans])
    row("KV a token, full layers", [output.gigabytes(p.full_kv_per_token) for p in plans])
    row(f"KV a token, sliding (≤ {config.sliding_window})", [output.gigabytes(p.sliding_kv_per_token) for p in plans])
    times = f" × {first.batch}" if first.batch > 1 else ""
    row(f"KV of {first.context} tokens{times}", [output.gigabytes(p.batch * p.kv(p.context)) for p in plans])
    row("workspace, at most", [output.gigabytes(p.workspace) for p in plans])
    row("total", [output.gigabytes(p.total) for p in plans], "bold")
    if first.memory is not None:
        table.add_section()
        fits = [Text("yes", style="green") if p.fits else Text("no", style="red") for p in plans]
        table.add_row(f"fits in {output.gigabytes(first.memory)}", *fits, style="bold")
        row("largest context, one request", [f"{p.largest_context:,}" if p.largest_context else "–" for p in plans])
        title = f"largest batch of {first.context} tokens"
        row(title, [f"{p.largest_batch:,}" if p.largest_batch else "–" for p in plans])
    return table


def _verdict(label: str, plans: list[MemoryPlan], where: str) -> list[str]:
    """The answer in words, and the nearest thing that does fit where this does not."""
    first = plans[0]
    if first.memory is None:
        return ["This system does not say how much memory is free; give --memory to see what fits."]
    batch = f", {first.batch} at a time" if first.batch > 1 else ""
    wish = f"{label} with {first.context} tokens{batch}"
    fitting = [plan.dtype for plan in plans if plan.fits]
    if fitting:
        return [f"[green]Fits:[/] {wish} in {_join(fitting)}, in {where}."]
    best = min(plans, key=lambda plan: plan.total)
    lines = [f"[red]Does not fit:[/] {wish} needs {output.gigabytes(best.total)} in {best.dtype}; more than {where}."]
    if best.largest_context:
        lines.append(f"What fits: one request of up to {best.largest_context:,} tokens (--max-context).")
    elif smaller := _smaller(best):
        lines.append(f"What fits: {smaller} in {best.dtype}.")
    return lines


def _smaller(plan: MemoryPlan) -> str | None:
    """The largest member of the family that fits where ``plan`` does not, with the same requests."""
    sizes = sorted(FAMILY.items(), key=lambda member: member[1].num_parameters(), reverse=True)
    for name, config in sizes:
        context = min(plan.context, config.max_position_embeddings)
        other = MemoryPlan.make(
            config, dtype=plan.dtype, context=context, batch=plan.batch, chunk=plan.chunk, memory=plan.memory
        )
        if config.num_parameters() < plan.config.num_parameters() and other.fits:
            return name
    return None


def _report(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "dtype": plan.dtype,
        "parameters": plan.config.num_parameters(),
        "context": plan.context,
        "batch": plan.batch,
        "weights_bytes": plan.weights,
        "full_kv_bytes_per_token": plan.full_kv_per_token,
        "sliding_kv_bytes_per_token": plan.sliding_kv_per_token,
        "sliding_window": plan.config.sliding_window,
        "kv_bytes": plan.batch * plan.kv(plan.context),
        "workspace_bytes": plan.workspace,
        "total_bytes": plan.total,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "largest_context": plan.largest_context,
        "largest_batch": plan.largest_batch,
    }


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
