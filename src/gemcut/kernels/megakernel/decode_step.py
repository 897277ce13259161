"""All layers of the network for one new token of one sequence, in one launch (a megakernel), on an NVIDIA GPU.

Computes: the bf16 row that the head multiplies, from a token id and a position; keys and values go into the cache
Shapes: StepShape and StepLayer: any Gemma network whose sizes `supports` takes, one sequence, one token
Runs: model/ops/cuda_megakernel.py builds a DecodeStep, which the engine's CUDA graph of one sequence captures
Schedule: a cooperative launch of one persistent block an SM; megakernel/decode_step.cu says the rest
Invariants: every block has a part of every GEMV; a DecodeStep keeps all tensors alive whose addresses the kernel has
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.errors import UnsupportedError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_of
from gemcut.kernels.linear import bf16, four_bit, int8
from gemcut.kernels.linear.cuda import Rows
from gemcut.kernels.linear.four_bit import PackedFourBit
from gemcut.kernels.linear.gemv import TILE, Storage
from gemcut.kernels.linear.int8 import PackedInt8
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

WARPS = 12  # 168 registers a thread, which the kernel needs
MAX_STAGES = 3  # a warp's ring; with more, what is waited for arrives behind more weights
_MAX_PARTIALS = 16  # partial sums of a row: decode_step.cu keeps their number, less one, in four bits
_KINDS = 4  # matrices of a layer: qkv, o, gate and up, down
_GATE_UP = 2
FEW_SPLITS = 4  # splits of a head's keys whose results stand side by side
_FORMATS: dict[str, type[ctypes.Structure]] = {
    "four_bit_gemv": four_bit.Format,
    "int8_gemv": int8.Format,
    "bf16_gemv": bf16.Format,
}
_MAX_FLOAT4S = 12  # loads of four words that a gathering thread has in flight
_SPIN_LIMIT = 1 << 23  # rounds of about half a microsecond before a wait becomes an error


@dataclass(frozen=True)
class StepShape:
    """A network's sizes; ``eps`` of its norms, ``scale`` of its scores."""

    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    eps: float
    window: int

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of a layer's four weight matrices."""
        query, qkv = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        return (qkv, self.hidden), (self.hidden, query), (2 * self.width, self.hidden), (self.hidden, self.width)


@dataclass(frozen=True)
class StepLayer:
    """One layer's tensors.

    Attributes:
        matrices: qkv, o, gate and up, down.
        norms: fp32 [hidden] after attention, before and after the MLP, and of what follows the layer.
        head_norms: fp32 [head_dim] of queries and of keys, or None.
        storage: keys and values, bf16 [2, blocks, block size, kv_heads, head_dim].
        sliding: whether it attends to the window only.
    """

    matrices: tuple[Rows, ...]
    norms: tuple[Tensor, Tensor, Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    storage: Tensor
    sliding: bool


class _Layer(ctypes.Structure):
    _fields_ = (("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("sliding", ctypes.c_longlong))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("formats", "layers", "norms", "head_norms", "table")),
        *((name, ctypes.c_void_p) for name in ("absmax", "ids", "positions")),
        ("block_tables", ctypes.c_void_p * 2),
        ("ropes", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("qkv", "attended", "lse", "activated")),
        ("partials", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("partial", "residual", "epoch", "x")),
        *((name, ctypes.c_float) for name in ("embed_scale", "eps", "scale", "softcap")),
        *((name, ctypes.c_int) for name in ("layer_count", "hidden", "kv_heads", "block_shift", "x_bytes")),
        ("windows", ctypes.c_int * 2),
        ("tiles", ctypes.c_int * _KINDS),
        ("k_blocks", ctypes.c_int * _KINDS),
    )


@dataclass(frozen=True)
class _Plan:
    """How the work is split; names as in work_split.cuh and decode_step.cu."""

    blocks: int
    tiles: tuple[int, ...]
    k_blocks: tuple[int, ...]
    stages: int
    hidden_float4s: int
    split_float4s: int
    width_float4s: int
    slots: int
    most_tiles: int
    partials: int
    x_bytes: int
    shared_bytes: int


def storage_of(rows: Rows) -> Storage:
    """The storage format of a weight."""
    if isinstance(rows, PackedFourBit):
        return four_bit.NESTED if rows.nested else four_bit.FLAT
    return int8.STORAGE if isinstance(rows, PackedInt8) else bf16.STORAGE


@dataclass(frozen=True)
class StepCase:
    """A network's sizes, the format of its layers' weights, tokens of a block of the cache."""

    shape: StepShape
    storage: Storage
    block_size: int


def supports(case: StepCase, gpu: Gpu | None) -> str | None:
    """None where the launch serves ``case``, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    shape, block_size, shared_limit = case.shape, case.block_size, gpu.shared_memory
    if shape.head_dim not in (16, 32, 64, 128, 256) or shape.heads // shape.kv_heads not in (1, 2, 4):
        return (
            "one launch a step takes heads of 16 to 256 values, a power of two, and 1, 2 or 4 query heads a key head, "
            f"not {shape.heads}/{shape.kv_heads} of {shape.head_dim}"
        )
    if shape.hidden % TILE or shape.width % TILE:
        return f"one launch a step takes sizes that are multiples of {TILE}, not {shape.hidden} and {shape.width}"
    if block_size & (block_size - 1):
        return f"one launch a step needs cache blocks of a power of two tokens, not {block_size}"
    if shape.hidden > WARPS * 32 * 4 * 8:
        return f"one launch a step takes at most {WARPS * 32 * 4 * 8} values a row, not {shape.hidden}"
    plan = _plan(shape, case.storage, gpu.sms, shared_limit)
    if plan.stages < 2:
        return f"one launch a step needs more than the {shared_limit >> 10} KB of shared memory a block has here"
    if plan.partials > _MAX_PARTIALS:
        would = plan.partials
        return f"one launch a step shares rows between {_MAX_PARTIALS} blocks at most, and would between {would} here"
    if plan.blocks < shape.kv_heads:
        return f"one launch a step needs a block for each of the {shape.kv_heads} key heads and has {plan.blocks}"
    return None


@functools.lru_cache(maxsize=64)
def _plan(shape: StepShape, storage: Storage, sms: int, shared_limit: int) -> _Plan:
    tiles = tuple(-(-rows // TILE) for rows, _ in shape.matrices)
    k_blocks = tuple(-(-columns // storage.k_block) for _, columns in shape.matrices)
    units = tuple(  # what a block takes whole: tiles of qkv, pairs of gate and up, single stages
        t if kind == 0 else t // 2 if kind == _GATE_UP else t * s
        for kind, (t, s) in enumerate(zip(tiles, k_blocks, strict=True))
    )
    blocks = min(sms, *units)  # every block has a part of every GEMV
    slots = most_tiles = partials = 1
    for kind in range(_KINDS):
        unit = tiles[kind] * k_blocks[kind] // units[kind]
        ranges = [(b * units[kind] // blocks * unit, (b + 1) * units[kind] // blocks * unit) for b in range(blocks)]
        owners = [0] * tiles[kind]
        for begin, end in ranges:
            most_tiles = max(most_tiles, (end - 1) // k_blocks[kind] - begin // k_blocks[kind] + 1)
            for tile in range(begin // k_blocks[kind], (end - 1) // k_blocks[kind] + 1):
                owners[tile] += 1
            per_warp = -(-(end - begin) // WARPS)
            slots = max(slots, (per_warp + k_blocks[kind] - 2) // k_blocks[kind] + 1)
        partials = max(partials, *owners)
    group = shape.heads // shape.kv_heads
    states = 4 * ((WARPS + 1) * group * shape.head_dim + shape.head_dim + 2 * group * WARPS) + 16 * WARPS * 32 + 16
    x_bytes = -(-max(states, *(2 * s * storage.k_block for s in k_blocks)) // 128) * 128
    fixed = (
        storage.codebook_bytes
        + x_bytes
        + shape.layers * (_KINDS * ctypes.sizeof(_FORMATS[storage.kernel]) + ctypes.sizeof(_Layer))
    )
    slots = 1 << (slots - 1).bit_length()
    room = shared_limit - _static_bytes(shape, slots, most_tiles) - fixed
    stages = min(room // (WARPS * storage.stage_bytes), MAX_STAGES)
    hidden_float4s, split_float4s, width_float4s = (
        -(-n // (WARPS * 128)) for n in (shape.hidden, shape.heads * shape.head_dim, shape.width)
    )
    return _Plan(
        blocks, tiles, k_blocks, stages, hidden_float4s, min(split_float4s, _MAX_FLOAT4S // FEW_SPLITS),
        min(width_float4s, _MAX_FLOAT4S), slots, most_tiles, partials, x_bytes,
        fixed + stages * WARPS * storage.stage_bytes,
    )  # fmt: skip


def _static_bytes(shape: StepShape, slots: int, most_tiles: int) -> int:
    """What struct Shared of work_split.cuh takes at most."""
    group = shape.heads // shape.kv_heads
    unit = 32 // (shape.head_dim // 8) * _loads(group)  # tokens a warp reads at a time
    split = 48 + 4 * shape.head_dim + 4 * WARPS * unit
    work = 1024 + _KINDS * (12 * WARPS + 2 * most_tiles)  # sums and the like are less than 1 KB
    return work + WARPS * slots * TILE * 4 + 2 * split


def _loads(group: int) -> int:
    """Groups of tokens that a warp has registers for; see attention.cuh."""
    return 2 if group > 2 else 4


@functools.cache
def _kernel(storage: Storage, plan: _Plan, head_dim: int, group: int, device: int) -> CudaKernel:
    defines = (
        *storage.defines,
        ("BLOCK_WARPS", WARPS),
        ("BLOCK_STAGES", plan.stages),
        ("HIDDEN_FLOAT4S", plan.hidden_float4s),
        ("FEW_SPLITS", FEW_SPLITS),
        ("SPLIT_FLOAT4S", plan.split_float4s),
        ("WIDTH_FLOAT4S", plan.width_float4s),
        ("SLOTS", plan.slots),
        ("MOST_TILES", plan.most_tiles),
        ("HEAD_DIM", head_dim),
        ("GROUP", group),
        ("LOADS", _loads(group)),
        ("SPIN_LIMIT", _SPIN_LIMIT),
    )
    sources = read_sources(
        "runtime/launch.cuh",
        "linear/gemv.cuh",
        f"linear/{storage.kernel}.cu",
        "rowwise/rope.cuh",
        "attention/attention.cuh",
        "megakernel/flags.cuh",
        "megakernel/attention.cuh",
        "megakernel/work_split.cuh",
        "megakernel/residual.cuh",
        "megakernel/decode_step.cu",
    )
    return compile_kernel(sources, "decode_step", defines, device)


def _format(rows: Rows) -> ctypes.Structure:
    """The kernel's struct Format of a weight."""
    if isinstance(rows, PackedFourBit):
        return rows.argument
    if isinstance(rows, PackedInt8):
        return int8.Format(rows.codes.data_ptr(), rows.scales.data_ptr(), *rows.codes.shape)
    return bf16.Format(rows.data_ptr(), *rows.shape)


class DecodeStep:
    """The layers of one network over one cache, bound to their inputs; calling it queues a step.

    Args:
        shape: the sizes; ``supports`` has taken them.
        layers: every layer's tensors, weights of one format.
        first_norm: fp32 [hidden], the first layer's input norm.
        table: the embedding, bf16 or int8 [vocabulary, hidden], with fp32 ``absmax`` [vocabulary] where it is int8.
        embed_scale: what its rows are multiplied by.
        ids, positions: int32 [1], the token and its position; a negative position: nothing is done.
        block_tables: int32 [1, most blocks] of full and of sliding layers.
        ropes: fp32 [positions, head_dim] of full and of sliding layers: cosines, then sines.
    """

    def __init__(
        self,
        shape: StepShape,
        layers: Sequence[StepLayer],
        first_norm: Tensor,
        table: Tensor,
        absmax: Tensor | None,
        embed_scale: float,
        ids: Tensor,
        positions: Tensor,
        block_tables: tuple[Tensor, Tensor],
        ropes: tuple[Tensor, Tensor],
    ) -> None:
        device = ids.device
        (storage,) = {storage_of(rows) for layer in layers for rows in layer.matrices}
        block_size = layers[0].storage.shape[2]
        gpu = gpu_of(device.index or 0)
        reason = supports(StepCase(shape, storage, block_size), gpu)
        if reason is not None:
            raise UnsupportedError(reason)
        plan = self._plan = _plan(shape, storage, gpu.sms, gpu.shared_memory)
        group = shape.heads // shape.kv_heads
        self._kernel = _kernel(storage, plan, shape.head_dim, group, device.index or 0)

        def zeros(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        def on_device(structures: Any) -> Tensor:
            return torch.frombuffer(bytearray(structures), dtype=torch.uint8).to(device)

        formats = [_format(rows) for layer in layers for rows in layer.matrices]
        kind = type(formats[0])
        caches = (_Layer * len(layers))(
            *(_Layer(la.storage[0].data_ptr(), la.storage[1].data_ptr(), int(la.sliding)) for la in layers)
        )
        head_norms = None
        if layers[0].head_norms is not None:
            head_norms = torch.stack([n for la in layers if la.head_norms is not None for n in la.head_norms])
        tensors: dict[str, Tensor | None] = {
            "formats": on_device((kind * len(formats))(*formats)),
            "layers": on_device(caches),
            "norms": torch.stack([first_norm, *(norm for layer in layers for norm in layer.norms)]),
            "head_norms": head_norms,
            "table": table,
            "absmax": absmax,
            "ids": ids,
            "positions": positions,
            "qkv": zeros(shape.matrices[0][0]),
            "attended": zeros(FEW_SPLITS * shape.heads * shape.head_dim),
            "lse": zeros(32 * shape.heads * max(1, shape.head_dim // 128)),
            "activated": zeros(shape.width),
            "partial": zeros(plan.blocks // shape.kv_heads * shape.heads * (shape.head_dim + 1), torch.int64),
            "residual": torch.zeros((plan.blocks, shape.hidden), device=device),
            "epoch": torch.ones(1, dtype=torch.int32, device=device),
        }
        #: bf16 [1, hidden]: the layers' result, normalised for the head.
        self.x = torch.zeros((1, shape.hidden), dtype=torch.bfloat16, device=device)
        partials = zeros(2 * plan.partials * shape.hidden).view(2, -1)
        self._kept = (tensors, partials, tuple(layers), block_tables, ropes)  # the kernel has only their addresses
        self._argument = _Step(
            x=self.x.data_ptr(), embed_scale=embed_scale, eps=shape.eps, scale=shape.scale,
            softcap=shape.softcap or 0.0, layer_count=len(layers), hidden=shape.hidden, kv_heads=shape.kv_heads,
            block_shift=block_size.bit_length() - 1, x_bytes=plan.x_bytes,
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        )  # fmt: skip
        for i in range(2):
            self._argument.block_tables[i] = block_tables[i].data_ptr()
            self._argument.ropes[i] = ropes[i].data_ptr()
            self._argument.partials[i] = partials[i].data_ptr()
        self._argument.windows[1] = shape.window
        self._argument.tiles[:] = plan.tiles
        self._argument.k_blocks[:] = plan.k_blocks

    def __call__(self) -> Tensor:
        """Queues a step on torch's current stream; ``x`` holds its result then."""
        plan = self._plan
        self._kernel.launch((plan.blocks, 1), WARPS * 32, plan.shared_bytes, (self._argument,), cooperative=True)
        return self.x
