"""Does a run fit a pod? The whole step compiled for chips that are not there, and what the program says.

The step is a training run's: bf16 operands, fp32 master weights and AdamW moments, rematerialized layers, the loss in
pieces of the length so that no logits of the whole batch exist, gradients left where the moments lie. Speed is not said
by a compiled program: days are arithmetic, from the model's FLOPs and a stated share of the chips' peak.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CapacityError, ParameterError
from gemcut.files import shown
from gemcut.training import flops, program
from gemcut.training.topology import CHIPS, GPUS, Pod, gpu_mesh, pod_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

#: Tokens the card's models were trained on.
CARD_TOKENS = {"gemma-2-2b": 2e12, "gemma-2-9b": 8e12, "gemma-2-27b": 13e12}
REMATS = ("none", "dots", "names", "full")


@dataclass(frozen=True)
class Plan:
    """What is to be compiled: ``batch`` sequences of ``seq`` tokens a step over (replica, data, model) ``mesh``."""

    size: str
    config: GemmaConfig
    mesh: tuple[int, int, int]
    batch: int
    seq: int
    remat: str
    attention: str
    pieces: int
    teacher: GemmaConfig | None = None


@dataclass(frozen=True)
class Fit:
    """What a compiled step says. Bytes are of one chip."""

    plan: Plan
    target: str
    chips: int
    capacity: int
    memory: program.Memory
    collectives: tuple[program.Collective, ...]
    model_flops: float  # of one step, all chips
    peak_flops: float  # of one chip, a second
    remats: tuple[tuple[str, int], ...] = ()  # tried by auto: name, bytes needed

    @property
    def fits(self) -> bool:
        return self.memory.needed <= self.capacity

    @property
    def tokens(self) -> int:
        return self.plan.batch * self.plan.seq

    def days(self, tokens: float, utilization: float) -> float:
        """Days to train on ``tokens`` at a share of the peak."""
        return flops.days(tokens, self.model_flops / self.tokens, self.chips, self.peak_flops, utilization)


def family(name: str) -> tuple[str, GemmaConfig]:
    """A published size by its short name ("27b") or its whole one. Raises ParameterError."""
    for full in (name.lower(), f"gemma-2-{name.lower()}"):
        if full in FAMILY:
            return full, FAMILY[full]
    sizes = ", ".join(full.removeprefix("gemma-2-") for full in FAMILY)
    raise ParameterError(f"size is {shown(name)}; expected one of {sizes}")


def default_mesh(config: GemmaConfig, pod: Pod) -> tuple[int, int, int]:
    """A mesh that keeps reduce-scatter: heads over at most 8 chips, the width over at most 16 (parts of a few columns
    would make XLA sum whole gradients on every chip), and copies for the rest."""
    model = math.gcd(8, config.num_key_value_heads, pod.chips) if config.hidden_size > 2304 else 1
    inside = pod.chips // pod.slices // model
    data = max(n for n in range(1, 17) if inside % n == 0 and config.hidden_size % n == 0)
    return pod.chips // (data * model), data, model


def fit(plan: Plan, pod: Pod | None = None, gpu: str | None = None) -> Fit:
    """Compile ``plan`` for a pod, or one GPU. ``remat`` "auto" takes the policy that computes least again and fits.

    Raises:
        ParameterError: the plan does not divide, or the compiler for such chips is not here.
        CapacityError: it does not fit; by how much, and what to change.
    """
    if (pod is None) == (gpu is None):
        raise ParameterError(
            "say what to compile for: a pod (--pod v5p:16x16x24) or a GPU (--gpu h200), one of the two"
        )
    mesh = pod_mesh(pod, plan.mesh) if pod is not None else gpu_mesh(str(gpu))
    capacity = pod.chip.memory if pod is not None else GPUS[str(gpu)].memory
    kind = pod.chip.device_kind if pod is not None else GPUS[str(gpu)].device_kind
    target = str(pod) if pod is not None else f"one {kind}"
    tried: list[tuple[str, int]] = []
    names = REMATS if plan.remat == "auto" else (plan.remat,)
    for name in names:
        chosen = dataclasses.replace(plan, remat=name)
        compiled, needed = _compiled(chosen, mesh, capacity)
        tried.append((name, needed))
        if compiled is not None and needed <= capacity:
            break
    else:
        raise CapacityError(_too_large(chosen, target, needed, capacity))
    tokens = plan.batch * plan.seq
    work = flops.flops_per_token(plan.config, plan.seq) * tokens
    if plan.teacher is not None:  # forward alone: a third
        work += flops.flops_per_token(plan.teacher, plan.seq) * tokens / 3
    peak = flops.peak_flops(kind)
    assert peak is not None
    return Fit(
        chosen,
        target,
        mesh.size,
        capacity,
        program.Memory.of(compiled),
        tuple(program.collectives(compiled.as_text())),
        work,
        peak,
        tuple(tried),
    )


def _compiled(plan: Plan, mesh: Mesh, capacity: int) -> tuple[Any, int]:
    """(the program, bytes a chip needs); no program where XLA refuses it for its size."""
    import jax

    from gemcut.training.fit_step import lower

    lowered = lower(plan, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _asked(str(error), capacity)
    return compiled, program.Memory.of(compiled).needed


def _asked(message: str, capacity: int) -> int:
    """Bytes that XLA's refusal names; at least more than there are."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return max([int(size) for size in sizes if size > capacity], default=capacity + 1)


def _too_large(plan: Plan, target: str, needed: int, capacity: int) -> str:
    groups = plan.mesh[0] * plan.mesh[1]
    ways = []
    if plan.remat != "full":
        ways.append("--remat full")
    if plan.batch > groups:
        ways.append(f"--batch {groups}")
    if plan.seq > 1024:
        ways.append(f"--seq {plan.seq // 2}")
    if plan.mesh[0] > 1:
        ways.append("a mesh with more data or model and less replica")
    elif math.prod(plan.mesh) > 1 or not ways:
        ways.append("more chips")
    return (
        f"the step of {plan.size} needs {needed / 2**30:.1f} GiB on each chip of {target}, which has "
        f"{capacity / 2**30:.1f}: {(needed - capacity) / 2**30:.1f} GiB too many; try {', or '.join(ways)}"
    )


def report(fit: Fit, utilization: float) -> dict[str, Any]:
    """Everything a fit says, as JSON."""
    plan, memory, found = fit.plan, fit.memory, list(fit.collectives)
    most = program.largest(found)
    tokens = CARD_TOKENS.get(plan.size)
    return {
        "size": plan.size,
        "parameters": plan.config.num_parameters(),
        "target": fit.target,
        "chips": fit.chips,
        "mesh": dict(zip(("replica", "data", "model"), plan.mesh, strict=True)),
        "batch": plan.batch,
        "sequence": plan.seq,
        "remat": plan.remat,
        "remats_tried": dict(fit.remats),
        "attention": plan.attention,
        "bytes_per_chip": {**dataclasses.asdict(memory), "needed": memory.needed, "capacity": fit.capacity},
        "collectives": {kind: dataclasses.asdict(t) for kind, t in program.traffic(found).items()},
        "largest_collective": None
        if most is None
        else {"kind": most.kind, "bytes": most.nbytes, "arrays": [f"{d}{list(s)}" for d, s in most.arrays]},
        "tokens_per_step": fit.tokens,
        "model_flops_per_step": fit.model_flops,
        "model_flops_per_chip_and_step": fit.model_flops / fit.chips,
        "utilization_assumed": utilization,
        "card_tokens": tokens,
        "days_to_card_tokens": None if tokens is None else fit.days(tokens, utilization),
    }


__all__ = ["CHIPS", "Fit", "Plan", "default_mesh", "family", "fit", "report"]
