"""Fill a network on the meta device from a stream of tensors: each parameter row exactly once, nothing left over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import nn

from gemcut.checkpoint.names import FUSED, split_layer
from gemcut.errors import CheckpointError
from gemcut.progress import Report
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Incoming, Int8Weight, StoredWeight

_STAGE_BYTES = 64 << 20

#: The least and the largest value of a tensor.
Ends = tuple[torch.Tensor, torch.Tensor]
#: Makes an empty tensor of this shape and dtype where the weights are to live.
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class PackedModule(Protocol):
    """A module whose matrices arrive one by one, packed or not, and are taken all at once."""

    part_shapes: tuple[tuple[int, int], ...]
    compute_dtype: torch.dtype

    def fill(self, weights: Sequence[CheckpointWeight]) -> None:
        """Take the matrices, top to bottom."""


def load_model_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Incoming]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Report | None = None,
    total: int | None = None,
    allocate: Allocate | None = None,
) -> None:
    """Give ``model``, built on the meta device, its parameters: ``scale`` ones in fp32, all others in ``dtype``.

    ``tensors`` yields (our name, weight on the CPU, or one in its file that is read into its place); q, k, v and gate,
    up go to their rows of the fused parameters, or to the parts of a module that holds packed weights. The ``progress``
    hears (done, in all) after each tensor: bytes the parameters have when whole, scaled to ``total`` if that is given.
    ``allocate`` makes the memory; None: ``torch.empty`` on ``device``. The parameters are put into the module only when
    all are complete: after an error or Ctrl-C the model is as before.
    Raises CheckpointError naming the first tensor that is missing, unexpected, there twice, or of a wrong shape.
    """
    packed = {
        f"{name}.weight": cast(PackedModule, module)
        for name, module in model.named_modules()
        if hasattr(module, "part_shapes")
    }
    where = torch.device(device)
    make = allocate or (lambda shape, kind: torch.empty(shape, dtype=kind, device=where))
    builder = _Builder(dict(model.named_parameters()), packed, dtype, where, make)
    whole = builder.nbytes
    for name, tensor in tensors:
        builder.add(name, tensor)
        del tensor  # before the reader moves on, so that its memory can go
        if progress:
            shown = whole if total is None else total
            progress(shown * builder.done // whole, shown)
    ready = builder.finish()
    for target, holder in packed.items():
        holder.fill([builder.parts[target][i] for i in range(len(holder.part_shapes))])
    originals = {id(parameter): name for name, parameter in model.named_parameters()}
    replaced = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in ready.items()}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, leaf, replaced[originals[id(parameter)]])


class _Builder:
    def __init__(
        self,
        targets: dict[str, nn.Parameter],
        packed: dict[str, PackedModule],
        dtype: torch.dtype,
        device: torch.device,
        allocate: Allocate,
    ) -> None:
        self.targets, self.packed, self.dtype, self.allocate = targets, packed, dtype, allocate
        self.built: dict[str, torch.Tensor] = {}
        self.parts: dict[str, dict[int, CheckpointWeight]] = {name: {} for name in packed}
        self.filled: dict[str, list[tuple[int, int, str]]] = {}  # parameter -> row ranges and what filled them
        self.ranges: list[tuple[str, Ends, torch.dtype]] = []  # of what is on a GPU
        self.done = 0
        self.nbytes = sum(parameter.numel() * self._dtype(name).itemsize for name, parameter in targets.items())
        self.nbytes += sum(math.prod(shape) * dtype.itemsize for m in packed.values() for shape in m.part_shapes)
        self.copy = _PinnedCopier(device) if device.type == "cuda" else _plain_copy

    def add(self, name: str, tensor: Incoming) -> None:
        target, index = self._packed_place(name)
        if target is not None:
            self._add_part(name, tensor, target, index)
            return
        if not isinstance(tensor, (torch.Tensor, StoredWeight)):
            raise CheckpointError(f"tensor {name} is quantized, but the network was built for whole weights there")
        given = tuple(tensor.shape)
        target, start = self._place(name, given)
        shape = tuple(self.targets[target].shape)
        stop = start + given[0] if given else start
        if given[1:] != shape[1:] or len(given) != len(shape) or start < 0 or stop > shape[0]:
            raise CheckpointError(
                f"tensor {name} has shape {list(given)}, which does not fit parameter {target} {list(shape)}"
            )
        if target == name and stop != shape[0]:
            raise CheckpointError(f"tensor {name} has shape {list(given)}; the network needs {list(shape)}")
        ranges = self.filled.setdefault(target, [])
        for other_start, other_stop, other in ranges:
            if start < other_stop and other_start < stop:
                reason = "is there twice" if other == name else f"overlaps {other} in parameter {target}: wrong shape"
                raise CheckpointError(f"tensor {name} {list(given)} {reason}")
        ranges.append((start, stop, name))
        if target not in self.built:
            self.built[target] = self.allocate(shape, self._dtype(target))
        goal = self.built[target][start:stop]
        self._keep(name, goal, tensor)
        self.done += goal.numel() * goal.element_size()

    def _add_part(self, name: str, weight: Incoming, target: str, index: int) -> None:
        wanted = self.packed[target].part_shapes[index]
        if tuple(weight.shape) != wanted:
            raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}; the network needs {list(wanted)}")
        if index in self.parts[target]:
            raise CheckpointError(f"tensor {name} {list(weight.shape)} is there twice")
        self.parts[target][index] = self._stored(name, weight, self.packed[target].compute_dtype)
        self.done += math.prod(wanted) * self.dtype.itemsize

    def _stored(self, name: str, weight: Incoming, whole_dtype: torch.dtype) -> CheckpointWeight:
        """A copy of ``weight`` where weights live; a whole one in ``whole_dtype``."""

        def keep(tensor: torch.Tensor | StoredWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
            goal = self.allocate(tuple(tensor.shape), dtype or tensor.dtype)
            self._keep(name, goal, tensor)
            return goal

        if isinstance(weight, FourBitWeight):
            nested = weight.nested
            if nested is not None:
                nested = dataclasses.replace(nested, scale=keep(nested.scale))
            return dataclasses.replace(weight, codes=keep(weight.codes), absmax=keep(weight.absmax), nested=nested)
        if isinstance(weight, Int8Weight):
            return dataclasses.replace(weight, codes=keep(weight.codes), absmax=keep(weight.absmax))
        return keep(weight, whole_dtype)

    def _keep(self, name: str, goal: torch.Tensor, tensor: torch.Tensor | StoredWeight) -> None:
        """Copy ``tensor`` to ``goal``. Raises CheckpointError where it is on the CPU and not finite in its dtype there.

        A GPU's weights are looked at when they are all in place (``finish``), so that nothing waits for each.
        """
        if isinstance(tensor, torch.Tensor):
            self.copy(goal, tensor)
        elif goal.device.type == "cpu":
            tensor.read(goal)
        else:
            flat, start = goal.view(-1), 0
            for piece in tensor.pieces(_STAGE_BYTES // tensor.dtype.itemsize):
                self.copy(flat[start : start + piece.numel()], piece)
                start += piece.numel()
        if not goal.is_floating_point() or goal.numel() == 0:
            return
        if goal.device.type == "cpu":
            _require_finite(name, torch.aminmax(goal), goal.dtype, tensor)
        else:
            self.ranges.append((name, torch.aminmax(goal), goal.dtype))

    def finish(self) -> dict[str, torch.Tensor]:
        for target, module in self.packed.items():
            for index in range(len(module.part_shapes)):
                if index not in self.parts[target]:
                    prefix, inner = split_layer(target)
                    missing = prefix + FUSED.get(inner, (inner,))[index]
                    raise CheckpointError(f"tensor {missing} is missing from the checkpoint")
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
        for name, ends, dtype in self.ranges:
            _require_finite(name, ends, dtype)
        return self.built

    def _packed_place(self, name: str) -> tuple[str | None, int]:
        """The packed module's weight a tensor is a part of, and which part; (None, 0) if there is none."""
        if name in self.packed and len(self.packed[name].part_shapes) == 1:
            return name, 0
        prefix, inner = split_layer(name)
        for fused, parts in FUSED.items():
            if inner in parts and prefix + fused in self.packed:
                return prefix + fused, parts.index(inner)
        return None, 0

    def _place(self, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """The parameter that a tensor of this shape belongs to, and its first row there."""
        if name in self.targets:
            return name, 0
        prefix, inner = split_layer(name)
        for fused, parts in FUSED.items():
            if inner in parts and prefix + fused in self.targets and len(shape) == 2:
                # The last part ends at the last row; k and v are of one size, gate and up too.
                from_end = len(parts) - parts.index(inner)
                rows = self.targets[prefix + fused].shape[0]
                return prefix + fused, 0 if parts[0] == inner else rows - from_end * shape[0]
        raise CheckpointError(f"unexpected tensor {name}: the network has no parameter for it")

    def _dtype(self, target: str) -> torch.dtype:
        return torch.float32 if target.endswith("scale") else self.dtype


def _require_finite(
    name: str, ends: Ends, dtype: torch.dtype, tensor: torch.Tensor | StoredWeight | None = None
) -> None:
    """Raise CheckpointError unless both ``ends`` of a tensor are finite; ``tensor`` is what it was before its dtype."""
    if _is_finite(ends):
        return
    before = tensor.pieces(_STAGE_BYTES // 4) if isinstance(tensor, StoredWeight) else [tensor]
    if all(piece is not None and _is_finite(torch.aminmax(piece)) for piece in before):
        raise CheckpointError(
            f"tensor {name} holds magnitudes that {str(dtype).removeprefix('torch.')} does not; load it with dtype "
            "bfloat16 or float32"
        )
    raise CheckpointError(
        f"tensor {name} holds NaN or infinity: the checkpoint is damaged or its training diverged; get the file "
        "again, or start from an earlier checkpoint"
    )


def _is_finite(ends: Ends) -> bool:
    return all(math.isfinite(end.item()) for end in ends)


def _plain_copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)


class _PinnedCopier:
    """Copy to a GPU through two pinned buffers: one is filled from the file while the other is on its way."""

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
