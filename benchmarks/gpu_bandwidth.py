"""How fast this GPU reads its memory: the limit that decoding is measured against."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from gemcut.kernels.runtime.nvrtc import compile_kernel


class _Buffer(ctypes.Structure):
    _fields_ = (("source", ctypes.c_void_p), ("sink", ctypes.c_void_p), ("count", ctypes.c_ulonglong))


def read_bandwidth(nbytes: int = 4 << 30, repetitions: int = 10) -> float:
    """Bytes a second, the best of `repetitions` reads of `nbytes` on the current GPU, over several grid sizes."""
    device = torch.cuda.current_device()
    source = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    kernel = compile_kernel(source, "read_all", (), device)
    data = torch.randint(0, 1 << 30, (nbytes // 4,), dtype=torch.int32, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    buffer = _Buffer(data.data_ptr(), sink.data_ptr(), data.numel() // 4)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    best = float("inf")
    for blocks in (2, 3, 4, 64):
        for _ in range(repetitions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            kernel.launch((sms * blocks, 1), 512, 0, (buffer,))
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1000)
    return data.numel() * 4 / best
