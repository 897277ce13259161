"""``gemcut info --kernels --gpu NAME``: which kernel any GPU would run for a format and a number of rows, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gemcut.cache_blocks import BLOCK_SIZE
from gemcut.cli.kernel_cases import DTYPE, FORMATS, layer_shapes, linear_case
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.kernels.attention import decode, varlen_hopper
from gemcut.kernels.catalogue import KERNELS
from gemcut.kernels.gpu import PRESETS, Gpu
from gemcut.kernels.linear import gated
from gemcut.kernels.linear.cuda import CUDA
from gemcut.kernels.linear.gemv import plan
from gemcut.kernels.linear.routes import Route, route_of, routes
from gemcut.kernels.megakernel import decode_step
from gemcut.kernels.megakernel.decode_step import StepCase
from gemcut.model.attention import attention_case
from gemcut.model.ops.cuda_megakernel import step_shape

#: A batch's tokens in one step are fewer.
MOST_ROWS = 1 << 20


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
    report = [_linear(role, shape, asked) for role, shape in layer_shapes(config).items()]
    return [*report, *_attention(config, asked.gpu), *_step(config, asked)]


def _linear(role: str, shape: tuple[tuple[int, ...], int], asked: Asked) -> dict[str, Any]:
    gpu, rows, storage = asked.gpu, asked.rows, FORMATS[asked.format]
    case = linear_case(asked.format, shape, torch.device("meta"))
    n, k = case.shape
    part, reason = f"{role} [{n}, {k}]", CUDA.supports(case, gpu)
    if reason is not None:
        why = "every matrix is dequantized, then multiplied by cuBLAS"
        return {"part": part, "kernel": "plain PyTorch", "why": why, "not": {"cuda": reason}}
    found = routes(storage, n, k, gpu)
    chosen = route_of(found, rows)
    name, why, refused = chosen.kernel, chosen.why, dict(_others(found, chosen, gpu))
    if name.endswith("_gemv") and rows <= found[0].up_to_rows and storage.fixed_kernel is not None:  # type: ignore[operator]
        split = plan(storage, rows, n, k, gpu)
        if split is not None and split.layout.fixed:
            name = storage.fixed_kernel
            why += "; so small a matrix suits warps of fixed columns"
    if role == "mlp.gate_up_proj":
        reason = gated.supports(case, gpu)
        if reason is None and not gated.pays(rows):
            reason = f"pays from {gated.MANY_ROWS} rows on that fill its tiles"
        if reason is None:
            name, why = "gated_gemm", "both products and GeGLU in one launch"
        else:
            refused["gated_gemm"] = reason
    entry = {"part": part, "kernel": name, "why": why, "not": refused}
    return entry | _where(name, f"--formats {asked.format} --linears {_LINEARS[role]} --rows {rows}")


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
    case = attention_case(config, DTYPE, BLOCK_SIZE)
    reason = decode.supports(case, gpu)
    name = "decode_attention" if reason is None else "varlen_triton"
    refused = {} if reason is None else {"decode_attention": reason}
    entry = {"part": "attention of one token each", "kernel": name, "why": "reads each key and value once"}
    yield entry | {"not": refused} | _where(name)
    reason = varlen_hopper.supports(case, gpu)
    name = "varlen_hopper" if reason is None else "varlen_triton"
    why = "soft-capped attention by wgmma" if reason is None else "serves every shape and GPU from Ampere on"
    refused = {} if reason is None else {"varlen_hopper": reason}
    yield {"part": "attention of prompts", "kernel": name, "why": why, "not": refused} | _where(name)


def _step(config: GemmaConfig, asked: Asked) -> Iterator[dict[str, Any]]:
    case = StepCase(step_shape(config), FORMATS[asked.format], BLOCK_SIZE)
    reason = "several sequences" if asked.rows > 1 else decode_step.supports(case, asked.gpu)
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
