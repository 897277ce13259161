"""``gemcut train fit``: a training step compiled for chips that are not there."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.cli import output
from gemcut.cli.options import Debug, flag, option
from gemcut.errors import ParameterError

if TYPE_CHECKING:
    from gemcut.training.fit import Fit

ATTENTIONS = ("auto", "xla", "splash")
REMATS = ("auto", "none", "dots", "names", "full")


def fit(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="2b, 9b, 27b, or a Gemma 3.", show_default=False)],
    *,
    pod: Annotated[str | None, option("Kind and shape of a TPU pod: v5p:16x16x24.", "--pod", metavar="POD")] = None,
    slices: Annotated[int, option("Pods of that shape, joined. Else 1.", "--slices", metavar="N")] = 1,
    gpu: Annotated[str | None, option("Instead of a pod: h100 or h200, one of them.", "--gpu", metavar="GPU")] = None,
    mesh: Annotated[
        str | None, option("replica,data,model; else one that suits the size.", "--mesh", metavar="R,D,M")
    ] = None,
    batch: Annotated[int | None, option("Sequences a step; else one a group of chips.", "--batch", metavar="N")] = None,
    seq: Annotated[int, option("Tokens a sequence. Else 8192.", "--seq", metavar="N")] = 8192,
    remat: Annotated[
        str, option("none, dots, names, full, or auto: computes least again and fits.", "--remat", metavar="NAME")
    ] = "full",
    attention: Annotated[
        str, option("xla or splash. Else splash on TPUs, xla on a GPU.", "--attention", metavar="NAME")
    ] = "auto",
    pieces: Annotated[
        int | None, option("Pieces of the length in the loss; else by size.", "--loss-pieces", metavar="N")
    ] = None,
    teacher: Annotated[
        str | None, option("Distil from this size in the same step.", "--teacher", metavar="SIZE")
    ] = None,
    mfu: Annotated[float, option("Share of the peak assumed for days. Else 0.5.", "--mfu", metavar="X")] = 0.5,
    as_json: Annotated[bool, flag("One JSON object.", "--json")] = False,
    debug: Debug = False,
) -> None:
    """Compile a training step for a pod (or GPU) that is not there: memory of a chip, collectives, days.

    It says whether the step fits and compiles, not how fast it runs.
    docs/training-pods.md tells more.
    """
    checked(seq=seq, slices=slices, batch=batch, pieces=pieces, mfu=mfu, remat=remat, attention=attention)
    from gemcut.training.topology import Pod, parse_mesh, prepare_environment

    if (pod is None) == (gpu is None):
        raise ParameterError("say what to compile for: --pod v5p:16x16x24 or --gpu h200, one of the two")
    where = Pod.parse(pod, slices) if pod is not None else None
    if where is None and slices != 1:
        raise ParameterError("--slices is for pods; leave it out with --gpu")
    if where is not None:
        prepare_environment()
    if importlib.util.find_spec("jax") is None:
        extra = "tpu" if where is not None else "train"
        raise ParameterError(f"gemcut train needs jax: pip install 'gemcut[{extra}]'")
    if where is None:  # before jax is loaded: the plugin reads its environment then
        from gemcut.training.topology import gpu_mesh

        gpu_mesh(str(gpu))
    from gemcut.training import fit as fitting

    name, config = fitting.family(size)
    if where is None:
        shape = parse_mesh(mesh) if mesh else (1, 1, 1)
    else:
        shape = parse_mesh(mesh) if mesh else fitting.default_mesh(config, where)
    chosen = fitting.Plan(
        size=name,
        config=config,
        mesh=shape,
        batch=batch or shape[0] * shape[1],
        seq=seq,
        remat=remat,
        attention=attention if attention != "auto" else "splash" if where is not None else "xla",
        pieces=pieces or (1 if shape[2] > 1 else 8),
        teacher=fitting.family(teacher)[1] if teacher else None,
    )
    found = fitting.fit(chosen, where, gpu)
    if as_json:
        output.print_json(fitting.report(found, mfu))
    else:
        show(found, mfu)


def checked(**values: Any) -> None:
    """Raise ParameterError for a number or a name that cannot be."""
    for name, most in (("seq", 1 << 20), ("slices", 1024), ("batch", 1 << 24), ("pieces", 1 << 12)):
        value = values[name]
        if value is not None and not 1 <= value <= most:
            raise ParameterError(f"--{name.replace('pieces', 'loss-pieces')} is {value}; expected 1 to {most:,}")
    if not 0 < values["mfu"] <= 1:
        raise ParameterError(f"--mfu is {values['mfu']}; expected a share of the peak above 0 and at most 1")
    for name, known in (("remat", REMATS), ("attention", ATTENTIONS)):
        if values[name] not in known:
            raise ParameterError(f"--{name} is {values[name]!r}; expected one of {', '.join(known)}")


def show(fit: Fit, mfu: float) -> None:
    """Print a fit for a person."""
    from gemcut.training import program
    from gemcut.training.fit import CARD_TOKENS

    plan, memory, gib = fit.plan, fit.memory, 2**30
    mesh = " × ".join(f"{name} {n}" for name, n in zip(("replica", "data", "model"), plan.mesh, strict=True))
    print(f"{plan.size} on {fit.target}: {fit.chips:,} chips, {mesh}")
    print(
        f"step: {plan.batch:,} sequences of {plan.seq:,} tokens = {fit.tokens:,}; remat {plan.remat}, {plan.attention}"
    )
    print(
        f"fits: {memory.needed / gib:.2f} of {fit.capacity / gib:.2f} GiB a chip "
        f"(state {memory.arguments / gib:.2f}, temporary {memory.temporary / gib:.2f}, code {memory.code / gib:.2f}; "
        f"peak {memory.peak / gib:.2f})"
    )
    for kind, moved in program.traffic(list(fit.collectives)).items():
        if moved.count:
            print(f"{kind}: {moved.count} in the program, {moved.calls:,} a step, {moved.nbytes / gib:.2f} GiB a chip")
    most = program.largest(list(fit.collectives))
    if most is not None:
        print(f"largest collective: {most.kind} of {most.nbytes / 2**20:,.1f} MiB")
    print(f"model FLOPs: {fit.model_flops / fit.chips / 1e12:,.1f} TFLOP a chip and step")
    tokens = CARD_TOKENS.get(plan.size)
    if tokens is not None:
        days = fit.days(tokens, mfu)
        print(f"{tokens / 1e12:g}T tokens: {days:,.1f} days at {mfu:.0%} MFU (assumed, not measured)")
