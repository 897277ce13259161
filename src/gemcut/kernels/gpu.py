"""What of an NVIDIA GPU the choice of a kernel depends on, as data: any GPU can be asked about on any machine.

Every kernel's module has ``supports(case, gpu)``: None where it serves the case on that GPU, else one line that says
why not. ``gpu`` None is a CPU. It looks at shapes, dtypes and what `Gpu` has, never at the machine it runs on: what is
missing there (a compiler, a package) is another question, the ``unavailable`` of who registers the kernel.
"""

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
        """None where it has Hopper's wgmma and TMA, else one line that says so."""
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


#: What kernels for NVIDIA GPUs say of a CPU, and the other way round.
NEEDS_GPU = "needs an NVIDIA GPU"
NEEDS_CPU = "runs on a CPU only"


def gpu_at(device: torch.device) -> Gpu | None:
    """The GPU that ``device`` is; None: it is none, but a CPU."""
    return gpu_of(device.index or 0) if device.type == "cuda" else None


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
