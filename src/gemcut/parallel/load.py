"""Load a checkpoint over several devices: this process is rank 0, and each other rank gets a process of its own."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch

from gemcut.checkpoint.source import Source
from gemcut.errors import ParameterError
from gemcut.model import Model
from gemcut.parallel.messages import Job
from gemcut.parallel.shape import check_split
from gemcut.parallel.team import Team


def rank_devices(device: torch.device, size: int) -> list[torch.device]:
    """The devices of the ranks: the first GPUs, or the CPU for each (to try things out: it is not faster).

    Raises ParameterError where ``device`` is a GPU but the first one.
    """
    if device.type == "cpu":
        return [device] * size
    if device.index not in (None, 0):
        raise ParameterError(
            f"device {str(device)!r} and {size} GPUs contradict each other: they are counted from cuda:0; choose which "
            "they are by CUDA_VISIBLE_DEVICES"
        )
    return [torch.device("cuda", rank) for rank in range(size)]


def load_team(source: Source, size: int, load: partial[Model]) -> tuple[Model, Team, int]:
    """Rank 0's network, the team of the others, and the least memory that one of the others has left, in bytes.

    Args:
        source: the checkpoint, on this machine.
        size: how many devices.
        load: gemcut.loading.load_network with its arguments, for one device; the others load theirs meanwhile.

    Raises ParameterError, CommunicationError.
    """
    dtype, device, quantization = (load.keywords[name] for name in ("dtype", "device", "quantization"))
    attention, kernels = load.keywords["attention"], load.keywords["kernels"]
    check_split(source.config(), size, quantization, dtype)
    devices = rank_devices(device, size)
    threads = max(1, torch.get_num_threads() // size) if device.type == "cpu" else 1
    spec = None if quantization is None else asdict(quantization)
    name = str(dtype).removeprefix("torch.")
    jobs = [
        Job(
            rank, size, "nccl" if device.type == "cuda" else "gloo", "", str(devices[rank]), source.kind,
            str(source.path), name, spec, attention, kernels, threads,
        )
        for rank in range(1, size)
    ]  # fmt: skip
    team = Team.start(jobs, source.config(), device)
    try:
        assert team.split is not None
        model = load(split=team.split)
        free = team.loaded()
    except BaseException:
        team.close()
        raise
    return model, team, free
