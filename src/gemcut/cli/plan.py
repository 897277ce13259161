"""``gemcut plan``: what a model needs and what fits, from its configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.interrupt import import_torch
from gemcut.cli.options import Debug, HubOptions, QuantizationOptions, flag, need_model, with_options
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CheckpointError, ParameterError
from gemcut.names import family_member
from gemcut.paths import expand
from gemcut.placement.plan import CHUNK, MemoryPlan
from gemcut.placement.sizes import parse_size
from gemcut.quantization.spec import DTYPE_BYTES, DTYPE_NAMES, Quantization

if TYPE_CHECKING:
    from rich.table import Table


_PUBLISHED = "published shape"


@with_options
def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="2b-it, 9b, 27b-it, gemma-3-270m, a folder, a .gguf file or a hub id."),
    ] = None,
    *,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32; several formats if not given.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit into, 24GB or 22.5GiB; what is free here if not.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of one request; the model's limit if not given.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Requests at the same time.")] = 1,
    gpus: Annotated[
        int, typer.Option(metavar="N", help="Split every layer over N GPUs, each with so much memory.")
    ] = 1,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
    cut: QuantizationOptions,
    hub: HubOptions,
) -> None:
    """Show what memory a model takes and what fits, before anything is downloaded.

    Example: [cyan]gemcut plan 27b-it --memory 80GB --batch 8[/]

    KV are the keys and values kept of each token: of all tokens in full layers,
    of the last 4096 (Gemma 2) in sliding ones.
    """
    name = need_model(model, "gemcut plan MODEL")
    if dtype is not None and DTYPE_NAMES.get(dtype, dtype) not in DTYPE_BYTES:
        raise ParameterError(f"dtype is {dtype!r}; expected bfloat16, float16 or float32")
    formats = _formats(None if dtype is None else DTYPE_NAMES.get(dtype, dtype), cut.specification())
    limit = _limit(device, memory)
    label, config, source, stored, expanded = _shape(name, hub)
    if stored is not None:  # the files decide
        if cut.quantization not in (None, stored.format):
            raise CheckpointError(
                f"{label} is quantized already ({stored.format}) and cannot be loaded in {cut.quantization}; plan for "
                "it without --quantization, or for the whole weights"
            )
        formats = [(formats[0][0] if dtype else "bfloat16", stored.replace(head=cut.head or stored.head))]
    if gpus < 1:
        raise ParameterError(f"--gpus is {gpus}; expected a whole number from 1 on")
    whole = [
        MemoryPlan.make(
            config,
            dtype=each,
            quantization=spec,
            context=context,
            batch=batch,
            chunk=CHUNK[limit.kind],
            memory=limit.memory,
        )
        for each, spec in formats
    ]
    plans = whole if gpus == 1 else _of_one(whole, gpus)
    held = None if gpus == 1 else _held(config, gpus)
    if as_json:
        several = {} if held is None else {"gpus": gpus, "each_gpu_holds": held}
        reports = [_report(each, config) for each in plans]
        output.print_json({"model": label, "config_from": source, "device": limit.kind, **several, "plans": reports})
        return
    from rich.markup import escape

    console = output.console()
    layers = f"{len(config.full_layers)} full + {len(config.sliding_layers)} sliding layers"
    console.print(
        f"[bold]{escape(label)}[/]: {output.count(config.num_parameters())} parameters, {layers}", soft_wrap=True
    )
    if source != _PUBLISHED:
        console.print(f"[dim]{escape(source)}[/]", soft_wrap=True)
    if expanded:
        console.print(
            f"[dim]Its {_join(expanded)} weights are expanded to one of these formats while they are read.[/]",
            soft_wrap=True,
        )
    if held is not None:
        console.print(f"Each of {gpus} GPUs holds {held}; the table is of one of them.", soft_wrap=True)
    for part in _beside(plans, console.width, limit):
        console.print(_table(part, limit))
    for line in _verdict(plans, limit, gpus):
        console.print(line, soft_wrap=True)


def _of_one(plans: list[MemoryPlan], gpus: int) -> list[MemoryPlan]:
    """The same plans for one of several GPUs; those formats that cannot be split so are left out.

    Raises ParameterError where none can be.
    """
    from gemcut.parallel.shape import check_split, refusal
    from gemcut.placement.split_plan import rank_plan

    found = [rank_plan(plan, gpus) for plan in plans if refusal(plan.config, gpus, plan.quantization) is None]
    if not found:
        check_split(plans[0].config, gpus, plans[0].quantization)
    return found


def _held(config: GemmaConfig, gpus: int) -> str:
    from gemcut.placement.split_plan import holds

    return holds(config, gpus)


def _over_several(plan: MemoryPlan) -> str | None:
    """The fewest GPUs of this size over which ``plan`` fits, in words; None: 8 are too few, or none divide it."""
    from gemcut.placement.split_plan import place

    for count in range(2, 9):
        found = place(plan, [plan.memory or 0] * count, 0)
        if found is not None and found.kind == "tensor":
            size = output.gigabytes(max(found.bytes_by_device.values()))
            return f"Split over {count} such GPUs it fits, with {size} on each: --gpus {count}."
    return None


def _formats(dtype: str | None, asked: Quantization | None) -> list[tuple[str, Quantization | None]]:
    """What to plan for: (dtype, how weights are quantized); a choice of formats where none is named."""
    if asked is not None or dtype is not None:
        return [(dtype or "bfloat16", asked)]
    specs = Quantization("int8"), Quantization("nf4"), Quantization("nf4", head="int8")
    return [("float32", None), ("bfloat16", None), *(("bfloat16", spec) for spec in specs)]


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "22.5 GiB", "800MB"; raises ParameterError."""
    size = parse_size(text)
    if size is None or size < 1:
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        raise ParameterError(f"memory is {shown!r}; expected a size such as 24GB, 22.5GiB or 800MB")
    return size


@dataclass(frozen=True)
class Limit:
    """The memory to fit into: bytes if known, how to write it, what kind of device it is on, and whose it is."""

    memory: int | None
    size: str
    kind: str
    whose: str


def _limit(device: str, given: str | None) -> Limit:
    """The memory given, or what is free on this machine. torch is asked only about this machine."""
    if given is not None:
        if device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ParameterError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
        # Another machine's memory: the larger steps of a GPU are the safe guess.
        return Limit(parse_memory(given), given.strip(), "cpu" if device == "cpu" else "cuda", "")
    import_torch()
    from gemcut.placement.devices import free_memory, parse_device

    try:
        found = parse_device(device)
    except ParameterError as error:
        raise ParameterError(f"{error} (for another machine, give its memory: --memory 80GB)") from None
    free = free_memory(found)
    return Limit(free, output.gigabytes(free or 0), found.type, f" free now on {found} of this machine")


def _shape(name: str, hub: HubOptions) -> tuple[str, GemmaConfig, str, Quantization | None, list[str]]:
    """(label, configuration, where it is from, what its weights are cut to already, types that will be expanded).

    Names of the family need no file; everything else is looked up.
    """
    member = family_member(name)
    if member is not None and hub.revision is None and not expand(name).exists():
        return member[0], member[1], _PUBLISHED, None, []
    source = hub.find(name)
    place = str(source.path) if source.has_weights else f"{source.name} on the hub"
    return source.name, source.config(), place, source.quantization, list(source.expanded)


def _beside(plans: list[MemoryPlan], width: int, limit: Limit) -> list[list[MemoryPlan]]:
    """The plans in groups whose columns stand side by side in ``width``: a number is never shortened."""
    from rich.console import Console

    wide = Console(width=10_000)
    parts: list[list[MemoryPlan]] = [[]]
    for plan in plans:
        together = [*parts[-1], plan]
        if parts[-1] and wide.measure(_table(together, limit)).minimum > width:
            parts.append([plan])
        else:
            parts[-1] = together
    return parts


def _table(plans: list[MemoryPlan], limit: Limit) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = plans[0]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", min_width=14)  # the longest word of its titles
    for plan in plans:
        title = plan.label.replace(" + ", "\n+ ")
        # rich takes a title for narrower than it is, and would cut it and the numbers under it
        table.add_column(title, justify="right", no_wrap=True, min_width=max(map(len, title.split("\n"))))

    def row(title: str, values: list[str], style: str = "") -> None:
        table.add_row(title, *values, style=style)

    row("weights", [output.gigabytes(p.weights) for p in plans])
    row("KV a token, full layers", [output.gigabytes(p.full_kv_per_token) for p in plans])
    row(
        f"KV a token, sliding (≤ {first.config.sliding_window})",
        [output.gigabytes(p.sliding_kv_per_token) for p in plans],
    )
    times = f" × {first.batch}" if first.batch > 1 else ""
    row(f"KV of {first.context} tokens{times}", [output.gigabytes(p.batch * p.kv(p.context)) for p in plans])
    row("workspace, at most", [output.gigabytes(p.workspace) for p in plans])
    row("total", [output.gigabytes(p.total) for p in plans], "bold")
    if first.memory is not None:
        table.add_section()
        fits = [Text("yes", style="green") if p.fits else Text("no", style="red") for p in plans]
        table.add_row(f"fits in {limit.size}", *fits, style="bold")
        row("largest context, one request", [f"{p.largest_context:,}" if p.largest_context else "–" for p in plans])
        title = f"largest batch of {first.context} tokens"
        row(title, [f"{p.largest_batch:,}" if p.largest_batch else "–" for p in plans])
    return table


def _verdict(plans: list[MemoryPlan], limit: Limit, gpus: int = 1) -> list[str]:
    """The answer in words, and the nearest thing that does fit where this does not."""
    first = plans[0]
    if first.memory is None:
        return ["This system does not say how much memory is free; give --memory to see what fits."]
    wish = f"{first.batch} × {first.context} tokens" if first.batch > 1 else f"{first.context} tokens"
    fitting = [plan.label for plan in plans if plan.fits]
    if fitting:
        each = f" on each of {gpus} GPUs" if gpus > 1 else ""
        return [f"[green]Fits:[/] {wish} in {_join(fitting)}, in {limit.size}{limit.whose}{each}."]
    best = min(plans, key=lambda plan: plan.total)
    lines = [
        f"[red]Does not fit:[/] {wish} in {best.label} take {output.gigabytes(best.total)}, there is "
        f"{limit.size}{limit.whose}."
    ]
    if best.largest_batch:
        lines.append(f"What fits: {_requests(best.largest_batch)} of {best.context:,} tokens at a time.")
    elif best.largest_context:
        lines.append(f"What fits: one request of up to {best.largest_context:,} tokens.")
    elif gpus == 1 and (smaller := _smaller(best)):
        lines.append(f"What fits: {smaller} in {best.label}.")
    if gpus == 1 and limit.kind == "cuda" and (several := _over_several(best)):
        lines.append(several)
    return lines


def _requests(number: int) -> str:
    return "one request" if number == 1 else f"{number:,} requests"


def _smaller(plan: MemoryPlan) -> str | None:
    """The largest member of the family that fits where ``plan`` does not, with the same requests."""
    sizes = sorted(FAMILY.items(), key=lambda member: member[1].num_parameters(), reverse=True)
    for name, config in sizes:
        context = min(plan.context, config.max_position_embeddings)
        other = MemoryPlan.make(
            config,
            dtype=plan.dtype,
            quantization=plan.quantization,
            context=context,
            batch=plan.batch,
            chunk=plan.chunk,
            memory=plan.memory,
        )
        if config.num_parameters() < plan.config.num_parameters() and other.fits:
            return name
    return None


def _report(plan: MemoryPlan, config: GemmaConfig) -> dict[str, Any]:
    return {
        "dtype": plan.dtype,
        "quantization": _describe(plan.quantization),
        "parameters": config.num_parameters(),
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


def _describe(cut: Quantization | None) -> dict[str, Any] | None:
    if cut is None:
        return None
    return {"format": cut.format, "double_quant": cut.double_quant, "block_size": cut.block_size, "head": cut.head}


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
