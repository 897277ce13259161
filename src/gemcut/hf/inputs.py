"""What a caller hands to the model: a tensor of ids and a mask, to rows of ids without padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.errors import ParameterError


@dataclass(frozen=True)
class Rows:
    """A batch without its padding.

    Attributes:
        ids: int64 [B, T], as it came.
        spans: for each row where its text begins and ends.
        rows: each row's ids within its span.
    """

    ids: Tensor
    spans: list[tuple[int, int]]
    rows: list[list[int]]


def split_mapping(inputs: Any, attention_mask: Any) -> tuple[Any, Any]:
    """(ids, mask) where a whole BatchEncoding was handed in place of ids."""
    if not isinstance(inputs, Mapping):
        return inputs, attention_mask
    unknown = set(inputs) - {"input_ids", "attention_mask"}
    if "input_ids" not in inputs or unknown:
        raise ParameterError(f"the inputs hold {', '.join(map(str, inputs))}; expected input_ids and attention_mask")
    return inputs["input_ids"], attention_mask if attention_mask is not None else inputs.get("attention_mask")


def read_rows(input_ids: Any, attention_mask: Any, *, pad_id: int | None, vocab_size: int) -> Rows:
    """Check ids [B, T] and mask [B, T] and take the padding off each row.

    Without a mask, ``pad_id`` at the start of a row is padding (None: nothing is).

    Raises:
        ParameterError: wrong types or shapes, an id outside the vocabulary, a row that is all padding, or a mask
            with a gap.
    """
    ids = _matrix("input_ids", input_ids)
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ParameterError(f"input_ids has shape {list(ids.shape)}; expected at least one token (<bos> counts)")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ParameterError(f"input_ids has token id {bad}; this model's ids go from 0 to {vocab_size - 1}")
    width = ids.shape[1]
    lists: list[list[int]] = ids.tolist()
    if attention_mask is None:
        spans = [(_leading(row, pad_id), width) for row in lists]
    else:
        mask = _matrix("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise ParameterError(f"attention_mask has shape {list(mask.shape)}; input_ids has {list(ids.shape)}")
        spans = [_span(i, row) for i, row in enumerate((mask != 0).tolist())]
    for i, (start, stop) in enumerate(spans):
        if start >= stop:
            raise ParameterError(f"row {i} of input_ids is all padding; expected at least one token (<bos> counts)")
    return Rows(ids, spans, [row[start:stop] for row, (start, stop) in zip(lists, spans, strict=True)])


def _matrix(name: str, value: Any) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ParameterError(f"{name} is of type {type(value).__name__}; expected an int64 tensor [B, T]") from None
    if (
        tensor.ndim != 2
        or tensor.is_complex()
        or (tensor.is_floating_point() and name == "input_ids" and tensor.numel())
    ):
        raise ParameterError(
            f"{name} is a {tensor.dtype} tensor of shape {list(tensor.shape)}; expected int64 [B, T]: "
            "tokenize with return_tensors='pt'"
        )
    return tensor.long() if name == "input_ids" else tensor


def _leading(row: list[int], pad_id: int | None) -> int:
    return next((i for i, token in enumerate(row) if token != pad_id), len(row)) if pad_id is not None else 0


def _span(index: int, row: list[bool]) -> tuple[int, int]:
    if True not in row:
        return 0, 0
    start, stop = row.index(True), len(row) - row[::-1].index(True)
    if not all(row[start:stop]):
        raise ParameterError(f"row {index} of attention_mask has a gap; expected zeros only before or after the text")
    return start, stop
