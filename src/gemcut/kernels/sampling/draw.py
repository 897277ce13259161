"""One token drawn from each row of logits on an NVIDIA GPU, in one launch: gemcut.engine.draw is its plain twin.

Computes: the launch of draw.cu: one token drawn from each row of logits
Shapes: logits fp32 [m, V], params fp64 [m, 5] -> ids, exact int32 [m]
Runs: engine/draw_graphs.py where `supports` takes the draw; gemcut.engine.draw is its plain twin
Schedule: one launch, a block for 2048 tokens of a row
Invariants: m at most 1024; top_k at most 64; exact = 0 where logits are not numbers or a nucleus is too wide
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

# As in draw.cu.
_THREADS, _PART, _LIST, _MOST_PARTS = 1024, 2048, 64, 128


class _Draw(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "params", "lists", "sums", "arrivals", "ids", "exact")),
        ("softcap", ctypes.c_float),
        ("vocabulary", ctypes.c_int),
    )


@dataclass(frozen=True)
class DrawCase:
    """Draws of one kind.

    Attributes:
        vocabulary: tokens there are.
        top_k: how many of them may be drawn; 0: this does not say.
    """

    vocabulary: int
    top_k: int


def supports(case: DrawCase, gpu: Gpu | None) -> str | None:
    """None where such draws are served, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.vocabulary > _PART * _MOST_PARTS:
        return f"draws in one launch take vocabularies of at most {_PART * _MOST_PARTS} tokens, not {case.vocabulary}"
    if case.top_k > _LIST:
        return f"draws in one launch take a top_k of up to {_LIST}, not {case.top_k}"
    return None


@functools.cache
def _kernel(device: int) -> CudaKernel:
    return compile_kernel(read_sources("runtime/launch.cuh", "sampling/draw.cu"), "draw", (), device)


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32, device=device)


def draw_tokens(logits: Tensor, params: Tensor, ids: Tensor, exact: Tensor, *, softcap: float | None) -> None:
    """Writes a token for each of the first rows of ``ids``, as many as ``params`` has.

    Args:
        logits: fp32 [m or more, V], contiguous, before the final soft-cap.
        params: fp64 [m, 5], contiguous, m at most 1024: 1 / temperature, top_p (above 1: all), min_p, the draw's
            uniform number, top_k (0: all; ``supports`` has taken it).
        ids: int32 [m or more], gets the tokens.
        exact: int32 [m or more]: 0 where the token is any, since logits are not numbers, or since without a top_k
            more tokens than some thousand may be drawn and yet not all.
        softcap: the final one.
    """
    m, vocabulary = params.shape[0], logits.shape[1]
    parts, device = -(-vocabulary // _PART), logits.device
    lists = torch.empty((m, parts, _LIST), dtype=torch.int64, device=device)
    sums = torch.empty((m, parts, 2), dtype=torch.float32, device=device)
    task = _Draw(
        *(t.data_ptr() for t in (logits, params, lists, sums, _arrivals(device), ids, exact)),
        softcap or 0.0, vocabulary,
    )  # fmt: skip
    _kernel(device.index or 0).launch((parts, m), _THREADS, _MOST_PARTS * _LIST * 8, (task,))
