"""What of an NVIDIA GPU the choice of a kernel depends on, as data: any GPU can be asked about on any machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its maker calls it.
        capability: compute capability, (major, minor).
        sms: streaming multiprocessors.
        shared_memory: bytes of shared memory that one block can have, static and dynamic together.
        memory: bytes of device memory.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    memory: int

    @property
    def wgmma_refusal(self) -> str | None:
        """None where it has Hopper's warpgroup products and copy engine (wgmma, TMA), else one line that says so."""
        if self.capability != (9, 0):
            return f"wgmma needs compute capability 9.0 (H100, H200), not {self.capability[0]}.{self.capability[1]}"
        return None


#: By the name that people type. CUDA C++ programming guide, table of compute capabilities; the makers' data sheets.
PRESETS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 227 << 10, 141 * 10**9),
    "h100": Gpu("NVIDIA H100 SXM", (9, 0), 132, 227 << 10, 80 * 10**9),
    "a100": Gpu("NVIDIA A100", (8, 0), 108, 163 << 10, 80 * 10**9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 99 << 10, 24 * 10**9),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 99 << 10, 24 * 10**9),
}


@functools.cache
def gpu_of(device: int) -> Gpu:
    """The GPU with this index here."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(
        found.name,
        (found.major, found.minor),
        found.multi_processor_count,
        int(found.shared_memory_per_block_optin),  # type: ignore[attr-defined]
        found.total_memory,
    )
