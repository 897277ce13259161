"""``gemcut info --kernels --gpu NAME``: which kernel any GPU would run for a format and a number of rows, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.kernels.attention import decode, varlen_hopper
from gemcut.kernels.catalogue import KERNELS
from gemcut.kernels.gpu import PRESETS, Gpu
from gemcut.kernels.linear import bf16, four_bit, gated, int8
from gemcut.kernels.linear.gemv import Storage, plan
from gemcut.kernels.linear.routes import Route, route_of, routes
from gemcut.kernels.megakernel import decode_step
from gemcut.model.ops.cuda_megakernel import step_shape

#: What each format's matrices are packed as; four-bit ones with double quantization.
FORMATS: dict[str, Storage] = {
    "nf4": four_bit.NESTED,
    "fp4": four_bit.NESTED,
    "int8": int8.STORAGE,
    "bf16": bf16.STORAGE,
}
#: A batch's tokens in one step are fewer.
MOST_ROWS = 1 << 20
_BLOCK_SIZE = 16  # of the cache, as the engine has it by default


@dataclass(frozen=True)
class Asked:
    """A GPU, a format of weights and a number of rows that somebody asks about."""

    gpu: Gpu
    format: str
    rows: int

    @classmethod
    def of(cls, gpu: str, format_name: str, rows: int) -> Asked:
        """From words. Raises ParameterError on an unknown GPU or format, or a number of rows that no batch has."""
        if gpu.lower() not in PRESETS:
            raise ParameterError(f"--gpu {gpu} is unknown; choose one of: {', '.join(PRESETS)}")
        if format_name not in FORMATS:
            raise ParameterError(f"--format {format_name} is unknown; choose one of: {', '.join(FORMATS)}")
        if not 1 <= rows <= MOST_ROWS:
            raise ParameterError(f"--rows is {rows}; expected a number from 1 to {MOST_ROWS}")
        return cls(PRESETS[gpu.lower()], format_name, rows)

    def __str__(self) -> str:
        return f"{self.format}, {self.rows} {'row' if self.rows == 1 else 'rows'}, {self.gpu.name}"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"gpu": self.gpu.name, "format": self.format, "rows": self.rows}


def route_report(config: GemmaConfig, asked: Asked) -> list[dict[str, Any]]:
    """For each part of a layer: its ``kernel``, why that one, why ``not`` the others, source, test, benchmark, note."""
    gpu, rows, format_name = asked.gpu, asked.rows, asked.format
    storage = FORMATS[format_name]
    attention = config.query_size + 2 * config.key_value_size
    shapes = {
        "attention.qkv_proj": (attention, config.hidden_size),
        "attention.o_proj": (config.hidden_size, config.query_size),
        "mlp.gate_up_proj": (2 * config.intermediate_size, config.hidden_size),
        "mlp.down_proj": (config.hidden_size, config.intermediate_size),
    }
    report = [_linear(role, *shape, storage, gpu, rows, format_name) for role, shape in shapes.items()]
    return [*report, *_attention(config, gpu), *_step(config, gpu, storage, rows)]


def _linear(role: str, n: int, k: int, storage: Storage, gpu: Gpu, rows: int, format_name: str) -> dict[str, Any]:
    found = routes(storage, n, k, gpu)
    chosen = route_of(found, rows)
    name, why, refused = chosen.kernel, chosen.why, dict(_others(found, chosen, gpu))
    if name.endswith("_gemv") and rows <= found[0].up_to_rows and storage.fixed_kernel is not None:  # type: ignore[operator]
        split = plan(storage, rows, n, k, gpu)
        if split is not None and split.layout.fixed:
            name = storage.fixed_kernel
            why += "; so small a matrix suits warps of fixed columns"
    if role == "mlp.gate_up_proj":
        reason = gated.supports(n // 2, k, gpu)
        if reason is None and not gated.pays(rows):
            reason = f"pays from {gated.MANY_ROWS} rows on that fill its tiles"
        if reason is None:
            name, why = "gated_gemm", "both products and GeGLU in one launch"
        else:
            refused["gated_gemm"] = reason
    entry = {"part": f"{role} [{n}, {k}]", "kernel": name, "why": why, "not": refused}
    return entry | _where(name, f"--formats {format_name} --linears {_LINEARS[role]} --rows {rows}")


#: Of benchmarks/gpu_kernels.py.
_LINEARS = {
    "attention.qkv_proj": "qkv",
    "attention.o_proj": "o",
    "mlp.gate_up_proj": "gate+up",
    "mlp.down_proj": "down",
}


def _others(found: list[Route], chosen: Route, gpu: Gpu) -> Iterator[tuple[str, str]]:
    before = 0
    for route in found:
        if route.kernel != chosen.kernel:
            passed = route.up_to_rows is not None and before < (chosen.up_to_rows or before + 1)
            yield route.kernel, f"up to {route.up_to_rows} rows" if passed else f"from {before + 1} rows on"
        before = route.up_to_rows or before
    packed = found[0].kernel.removesuffix("_gemv")
    if packed != "bf16" and gpu.wgmma_refusal is not None:
        yield f"{packed}_gemm", gpu.wgmma_refusal


def _attention(config: GemmaConfig, gpu: Gpu) -> Iterator[dict[str, Any]]:
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    reason = decode.supports(*heads, _BLOCK_SIZE)
    name = "decode_attention" if reason is None else "varlen_triton"
    refused = {} if reason is None else {"decode_attention": reason}
    entry = {"part": "attention of one token each", "kernel": name, "why": "reads each key and value once"}
    yield entry | {"not": refused} | _where(name)
    reason = varlen_hopper.supports(*heads, config.attn_logit_softcapping, gpu)
    name = "varlen_hopper" if reason is None else "varlen_triton"
    why = "soft-capped attention by wgmma" if reason is None else "serves every shape and GPU from Ampere on"
    refused = {} if reason is None else {"varlen_hopper": reason}
    yield {"part": "attention of prompts", "kernel": name, "why": why, "not": refused} | _where(name)


def _step(config: GemmaConfig, gpu: Gpu, storage: Storage, rows: int) -> Iterator[dict[str, Any]]:
    reason = "several sequences" if rows > 1 else None
    reason = reason or decode_step.supports(step_shape(config), storage, _BLOCK_SIZE, gpu.sms, gpu.shared_memory)
    if reason is None:
        entry = {"part": "a whole decode step", "kernel": "decode_step", "why": "one launch for all layers", "not": {}}
        yield entry | _where("decode_step")
    else:
        refused = {"decode_step": reason}
        yield {"part": "a whole decode step", "kernel": "", "why": "the parts above, in one CUDA graph", "not": refused}


def _where(name: str, options: str | None = None) -> dict[str, str]:
    it = KERNELS[name]
    benchmark = it.benchmark if options is None else f"python benchmarks/gpu_kernels.py {options}"
    return {"source": it.source, "tested_by": it.test, "timed_by": benchmark or "nothing of its own", "note": it.note}


def words(report: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The report as lines for people, by part."""
    found = {}
    for entry in report:
        lines = [f"{entry['kernel']}: {entry['why']}" if entry["kernel"] else entry["why"]]
        lines += [f"not {name}: {reason}" for name, reason in entry["not"].items()]
        lines += [
            f"{key.replace('_', ' ')} {entry[key]}" for key in ("source", "tested_by", "timed_by") if key in entry
        ]
        found[entry["part"]] = lines
    return found
