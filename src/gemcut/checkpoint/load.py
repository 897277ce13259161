"""Fill a network on the meta device from a stream of tensors: each parameter row exactly once, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from gemcut.checkpoint.names import FUSED, split_layer
from gemcut.errors import CheckpointError

_STAGE_BYTES = 64 << 20


def load_model_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
) -> None:
    """Give ``model``, built on the meta device, its parameters: ``scale`` ones in fp32, all others in ``dtype``.

    ``tensors`` yields (our name, CPU tensor); q, k, v and gate, up go to their rows of the fused parameters. The
    ``progress`` hears (done, in all) after each tensor: bytes of parameters, scaled to ``total`` if that is given. The
    parameters are put into the module only when all are complete: after an error or Ctrl-C the model is as before.
    Raises CheckpointError naming the first tensor that is missing, unexpected, there twice, or of a wrong shape.
    """
    builder = _Builder(dict(model.named_parameters()), dtype, torch.device(device))
    whole = builder.nbytes
    for name, tensor in tensors:
        builder.add(name, tensor)
        del tensor  # before the reader moves on, so that its memory can go
        if progress:
            shown = whole if total is None else total
            progress(shown * builder.done // whole, shown)
    ready = builder.finish()
    originals = {id(parameter): name for name, parameter in model.named_parameters()}
    replaced = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in ready.items()}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, leaf, replaced[originals[id(parameter)]])


class _Builder:
    def __init__(self, targets: dict[str, nn.Parameter], dtype: torch.dtype, device: torch.device) -> None:
        self.targets, self.dtype, self.device = targets, dtype, device
        self.built: dict[str, torch.Tensor] = {}
        self.filled: dict[str, list[tuple[int, int, str]]] = {}  # parameter -> row ranges and what filled them
        self.done = 0
        self.nbytes = sum(parameter.numel() * self._dtype(name).itemsize for name, parameter in targets.items())
        self.copy = _PinnedCopier(device) if device.type == "cuda" else _plain_copy

    def add(self, name: str, tensor: torch.Tensor) -> None:
        target, start = self._place(name, tensor)
        shape = self.targets[target].shape
        stop = start + tensor.shape[0] if tensor.ndim else start
        if tensor.shape[1:] != shape[1:] or tensor.ndim != len(shape) or start < 0 or stop > shape[0]:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, which does not fit parameter {target} {list(shape)}"
            )
        if target == name and stop != shape[0]:
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}; the network needs {list(shape)}")
        ranges = self.filled.setdefault(target, [])
        for other_start, other_stop, other in ranges:
            if start < other_stop and other_start < stop:
                reason = "is there twice" if other == name else f"overlaps {other} in parameter {target}: wrong shape"
                raise CheckpointError(f"tensor {name} {list(tensor.shape)} {reason}")
        ranges.append((start, stop, name))
        if target not in self.built:
            self.built[target] = self._allocate(target)
        goal = self.built[target][start:stop]
        self.copy(goal, tensor)
        self.done += goal.numel() * goal.element_size()

    def finish(self) -> dict[str, torch.Tensor]:
        for target, parameter in self.targets.items():
            rows = sum(stop - start for start, stop, _ in self.filled.get(target, []))
            if rows != parameter.shape[0]:
                prefix, inner = split_layer(target)
                have = {name for _, _, name in self.filled.get(target, [])}
                absent = [prefix + part for part in FUSED.get(inner, (inner,)) if prefix + part not in have]
                raise CheckpointError(
                    f"tensor {(absent or [target])[0]} is missing: the checkpoint filled {rows} of "
                    f"{parameter.shape[0]} rows of parameter {target}"
                )
        if isinstance(self.copy, _PinnedCopier):
            self.copy.finish()
        return self.built

    def _place(self, name: str, tensor: torch.Tensor) -> tuple[str, int]:
        """The parameter a tensor belongs to and its first row there."""
        if name in self.targets:
            return name, 0
        prefix, inner = split_layer(name)
        for fused, parts in FUSED.items():
            if inner in parts and prefix + fused in self.targets and tensor.ndim == 2:
                # The last part ends at the last row; k and v are of one size, gate and up too.
                from_end = len(parts) - parts.index(inner)
                rows = self.targets[prefix + fused].shape[0]
                return prefix + fused, 0 if parts[0] == inner else rows - from_end * tensor.shape[0]
        raise CheckpointError(f"unexpected tensor {name}: the network has no parameter for it")

    def _dtype(self, target: str) -> torch.dtype:
        return torch.float32 if target.endswith("scale") else self.dtype

    def _allocate(self, target: str) -> torch.Tensor:
        return torch.empty(self.targets[target].shape, dtype=self._dtype(target), device=self.device)


def _plain_copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)


class _PinnedCopier:
    """Copy to a GPU through two page-locked buffers: one is filled from the file while the other is on its way."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.stages = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in self.stages]  # type: ignore[no-untyped-call]
        self.turn = 0

    def __call__(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        source, goal = tensor.reshape(-1), target.view(-1)
        step = _STAGE_BYTES // goal.element_size()
        for start in range(0, goal.numel(), step):
            count = min(step, goal.numel() - start)
            self.events[self.turn].synchronize()  # the buffer's last journey has ended
            stage = self.stages[self.turn].view(goal.dtype)[:count]
            stage.copy_(source[start : start + count])
            goal[start : start + count].copy_(stage, non_blocking=True)
            self.events[self.turn].record(self.stream)
            self.turn = 1 - self.turn

    def finish(self) -> None:
        self.stream.synchronize()
