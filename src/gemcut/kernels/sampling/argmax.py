"""The likeliest token of each row of logits on an NVIDIA GPU; the first of equal ones.

Computes: the launch of argmax.cu: the likeliest token of each row
Shapes: logits fp32 [m, V] -> ids int32 [m]; positions int32 [m] advance by one
Runs: engine/decode_graph.py, captured at a decode step's end, for greedy requests
Schedule: two-stage reduction, 64 parts a row
Invariants: a row with a logit that is not finite gets position -1 and id 0
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

PARTS = 64


class _Argmax(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "best", "place", "arrivals", "ids", "positions")),
        ("softcap", ctypes.c_float),
        ("vocabulary", ctypes.c_int),
    )


@functools.cache
def _kernel(device: int) -> CudaKernel:
    return compile_kernel(read_sources("runtime/launch.cuh", "sampling/argmax.cu"), "argmax", (), device)


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32, device=device)


def argmax(logits: Tensor, ids: Tensor, positions: Tensor | None = None, *, softcap: float | None = None) -> None:
    """Writes the place of each row's largest logit (fp32 [m, V], contiguous) to ``ids`` int32 [m].

    ``positions`` int32 [m], where given, move on by one; negative ones stay, and one becomes -1 where a row holds a
    logit that is not finite (its id is 0). ``softcap`` is applied first.
    """
    m, vocabulary = logits.shape
    best = torch.empty((m, PARTS), dtype=torch.float32, device=logits.device)
    place = torch.empty((m, PARTS), dtype=torch.int32, device=logits.device)
    task = _Argmax(
        logits.data_ptr(), best.data_ptr(), place.data_ptr(), _arrivals(logits.device).data_ptr(), ids.data_ptr(),
        positions.data_ptr() if positions is not None else None, softcap or 0.0, vocabulary,
    )  # fmt: skip
    _kernel(logits.device.index or 0).launch((PARTS, m), 256, 0, (task,))
