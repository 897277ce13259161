"""What comes between the network's logits and the choice: penalties, bias, a least length, a request's own edit.

All rows of a step are changed together, by the operations that any of them asks for; nothing waits for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.request import RowError, Sequence
from gemcut.engine.tensors import indices, upload
from gemcut.errors import ParameterError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one row of logits over a vocabulary of V tokens. The tensors may lie on any device.

    Attributes:
        allowed: int32 [ceil(V / 32)]: bit ``i % 32`` of word ``i // 32`` is set where token i may come; what stands
            behind token V - 1 means nothing. None: every token may come.
        bias: fp32 [V], added to the logits; minus infinity forbids a token. None: nothing is added.
    """

    allowed: Tensor | None = None
    bias: Tensor | None = None


class LogitsEdit(Protocol):
    """Asked before each choice of a token what to change: a grammar, a guard, a watermark. See ``Request.edit``."""

    def __call__(self, tokens: Many[int], prompt_length: int, /) -> Edit | None:
        """The edit for the token that comes behind ``tokens``; None changes nothing.

        ``tokens`` are the prompt's ``prompt_length`` and those generated since; they may be read during the call alone.
        It may be asked again for the same place, and must then answer the same. What it raises ends its request, and no
        other. It is called by whoever runs the engine's steps, and every request waits for it.
        """


class AheadEdit(LogitsEdit, Protocol):
    """A LogitsEdit that works while the network does."""

    def begin(self, tokens: Many[int], prompt_length: int, /) -> None:
        """Told each token as soon as it was chosen, behind ``tokens``' others: the call for the next one is to come.

        It must not wait. It may be told the same place again, or none.
        """


def begin_next(sequence: Sequence) -> None:
    """Let a sequence's edit begin with its next place, where it can."""
    begin = getattr(sequence.request.edit, "begin", None)
    if begin is not None:
        with contextlib.suppress(Exception):  # the call itself then says what is wrong
            begin(sequence.tokens, sequence.prompt_length)


def was_shortened(sequence: Sequence) -> bool:
    """Whether a sequence's edit has ended the answer because its tokens run out."""
    return bool(getattr(sequence.request.edit, "shortened", False))


def changes_logits(sequence: Sequence) -> bool:
    """Whether penalties, a bias, a least length or an edit come between the network's logits and the choice."""
    p = sequence.request.params
    return bool(
        sequence.request.edit is not None
        or p.logit_bias
        or p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or sequence.output_length < p.min_new_tokens
    )


def change_logits(rows: Tensor, sequences: Many[Sequence]) -> dict[int, RowError]:
    """Apply penalties, bias, least length and edits to rows of logits in place; they come in this order.

    Repetition penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied
    (Keskar et al. 2019). Presence and frequency penalties: OpenAI's formula, on generated tokens.

    Args:
        rows: fp32 [n, V], contiguous.
        sequences: the n sequences; their parameters and tokens so far decide.

    Returns:
        What went wrong, by row: parameters that cannot be applied, an edit that raised. Such a row holds anything.
    """
    errors: dict[int, RowError] = {}
    for change in (_repetition, _frequency, _bias, _least_length):
        change(rows, sequences, errors)
    _own_edits(rows, sequences, errors)
    return errors


class _Entries:
    """Single logits of some rows with numbers beside them, gathered on the host and used in one operation."""

    def __init__(self, rows: Tensor) -> None:
        self.flat, self.vocabulary, self.device = rows.view(-1), rows.shape[1], rows.device
        self._places: list[Array] = []
        self._values: list[Array] = []

    def add(self, row: int, ids: Array, values: Array) -> None:
        """Tokens ``ids`` of ``row``, each with one of ``values``. Raises ParameterError for an unknown id."""
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocabulary):
            bad = next(int(i) for i in ids if not 0 <= i < self.vocabulary)
            raise ParameterError(f"token id {bad}: this model's ids go from 0 to {self.vocabulary - 1}")
        self._places.append(ids.astype(np.int64) + row * self.vocabulary)
        self._values.append(values.astype(np.float32))

    def apply(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the logits by ``change(logits, values)``."""
        if sum(map(len, self._places)):
            places, values = (upload(np.concatenate(each), self.device) for each in (self._places, self._values))
            self.flat[places] = change(self.flat[places], values)


def _each(
    rows: Tensor,
    sequences: Many[Sequence],
    errors: dict[int, RowError],
    entries_of: Callable[[Sequence], tuple[Array, Array] | None],
) -> _Entries:
    """What ``entries_of`` gives for each sequence; where it fails, that row alone has an error."""
    entries = _Entries(rows)
    for row, sequence in enumerate(sequences):
        try:
            if row not in errors and (found := entries_of(sequence)) is not None:
                entries.add(row, *found)
        except Exception as error:  # whatever it is, it is this request's own
            errors[row] = RowError.of(error)
    return entries


def _repetition(rows: Tensor, sequences: Many[Sequence], errors: dict[int, RowError]) -> None:
    def seen(sequence: Sequence) -> tuple[Array, Array] | None:
        penalty = sequence.request.params.repetition_penalty
        return None if penalty == 1 else (sequence.seen, np.full(len(sequence.seen), penalty))

    entries = _each(rows, sequences, errors, seen)
    entries.apply(lambda logits, penalty: torch.where(logits > 0, logits / penalty, logits * penalty))


def _frequency(rows: Tensor, sequences: Many[Sequence], errors: dict[int, RowError]) -> None:
    def counted(sequence: Sequence) -> tuple[Array, Array] | None:
        p, counts = sequence.request.params, sequence.output_counts
        if not ((p.presence_penalty or p.frequency_penalty) and counts):
            return None
        times = np.fromiter(counts.values(), np.float32, len(counts))
        taken = np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * times
        return np.fromiter(counts, np.int64, len(counts)), taken

    _each(rows, sequences, errors, counted).apply(torch.sub)


def _bias(rows: Tensor, sequences: Many[Sequence], errors: dict[int, RowError]) -> None:
    def bias(sequence: Sequence) -> tuple[Array, Array] | None:
        return sequence.request.params.bias_arrays if sequence.request.params.logit_bias else None

    _each(rows, sequences, errors, bias).apply(torch.add)


def _least_length(rows: Tensor, sequences: Many[Sequence], errors: dict[int, RowError]) -> None:
    def stops(sequence: Sequence) -> tuple[Array, Array] | None:
        if sequence.output_length >= sequence.request.params.min_new_tokens:
            return None
        known = [i for i in sequence.request.stop_ids if 0 <= i < rows.shape[1]]  # a tokenizer may know more ids
        return np.array(known, dtype=np.int64), np.full(len(known), -np.inf)

    _each(rows, sequences, errors, stops).apply(lambda logits, minus_infinity: minus_infinity)


def _own_edits(rows: Tensor, sequences: Many[Sequence], errors: dict[int, RowError]) -> None:
    edits: dict[int, Edit] = {}
    for row, sequence in enumerate(sequences):
        try:
            if row not in errors and sequence.request.edit is not None:
                edit = sequence.request.edit(sequence.tokens, sequence.prompt_length)
                if edit is not None:
                    edits[row] = _checked(edit, rows.shape[1])
        except Exception as error:
            errors[row] = RowError.of(error)
    biases = {row: edit.bias for row, edit in edits.items() if edit.bias is not None}
    if biases:
        rows[indices(list(biases), rows.device)] += torch.stack([bias.to(rows.device) for bias in biases.values()])
    masks = {row: edit.allowed for row, edit in edits.items() if edit.allowed is not None}
    if masks:
        words = _together(list(masks.values()), rows.device)
        where = indices(list(masks), rows.device)
        rows[where] = rows[where].masked_fill_(~unpacked(words, rows.shape[1]), float("-inf"))


def _together(masks: list[Tensor], device: torch.device) -> Tensor:
    """int32 [m, words] of masks on ``device``; those of the CPU go there in one piece, and no GPU is waited for."""
    if all(mask.device.type == "cpu" for mask in masks):
        return upload(np.stack([mask.numpy() for mask in masks]), device)
    return torch.stack([mask.to(device) for mask in masks])


def _checked(edit: object, vocabulary: int) -> Edit:
    if not isinstance(edit, Edit):
        raise ParameterError(f"a LogitsEdit gave {type(edit).__name__}; expected an Edit or None")
    words = -(-vocabulary // 32)
    for name, tensor, dtype, length in (
        ("allowed", edit.allowed, torch.int32, words),
        ("bias", edit.bias, torch.float32, vocabulary),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != (length,)):
            raise ParameterError(
                f"a LogitsEdit gave {name} as {tensor.dtype} {list(tensor.shape)}; expected {dtype} [{length}]"
            )
    return edit


def unpacked(words: Tensor, vocabulary: int) -> Tensor:
    """The bits of ``words``, int32 [m, ceil(V / 32)], lowest first, as bool [m, V]."""
    octets = words.contiguous().view(torch.uint8)
    return _eight_bools(words.device)[octets.int()].view(torch.bool)[:, :vocabulary]


@functools.cache
def _eight_bools(device: torch.device) -> Tensor:
    """int64 [256]: of each byte its bits, lowest first, as eight bytes that are 0 or 1."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(bits.view(np.int64)[:, 0]).to(device)
