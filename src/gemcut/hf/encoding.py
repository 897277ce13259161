"""BatchEncoding: what a tokenizer returns; and how rows of ids become one."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemcut.errors import ParameterError
from gemcut.hf.common import find_device, warn_once
from gemcut.hf.missing import missing
from gemcut.hf.public_names import ENCODING

#: What transformers says where a checkpoint names no limit; the engine refuses what passes the context.
NO_LIMIT = int(1e30)


class BatchEncoding(UserDict[str, Any]):
    """A mapping with ``input_ids`` and ``attention_mask``, also as attributes: lists, or int64 tensors [B, T]."""

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        if name.startswith("_") or name in ENCODING:
            raise missing(self, name, ENCODING)
        held = ", ".join(map(str, data))
        raise AttributeError(f"BatchEncoding has no {name!r}; it holds {held or 'nothing'}")

    @property
    def is_fast(self) -> bool:
        """Always True: the tokenizers library split the text."""
        return True

    @property
    def n_sequences(self) -> int:
        """Always 1: Gemma has no pairs of texts."""
        return 1

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Make arrays of the lists, in place: ``tensor_type`` "pt" or "np"; None leaves them.

        Raises:
            ParameterError: another type, or rows of different lengths.
        """
        if tensor_type is not None:
            for name, value in list(self.data.items()):
                if isinstance(value, list):
                    many = prepend_batch_axis or bool(value and isinstance(value[0], list))
                    rows = [value] if prepend_batch_axis or not many else value
                    tensor = to_tensors(rows, tensor_type)
                    self.data[name] = tensor if many else tensor[0]
        return self

    def to(self, device: str | int | torch.device, *, non_blocking: bool = False) -> BatchEncoding:
        """Move the tensors, in place, and return this object.

        "cuda" on a machine without a GPU warns once and leaves them on the CPU.
        """
        if isinstance(device, torch.dtype):
            raise ParameterError(f"BatchEncoding.to takes a device; token ids stay int64, not {device}")
        where = find_device(device)
        for name, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[name] = value.to(where, non_blocking=non_blocking)
        return self


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int, side: str) -> list[list[int]]:
    """Rows of one width: ``fill`` is put at their ``side``, "left" or "right"."""
    padded = []
    for row in rows:
        extra = [fill] * (width - len(row))
        padded.append([*extra, *row] if side == "left" else [*row, *extra])
    return padded


def to_tensors(rows: list[list[int]], kind: str) -> Any:
    """Rows as one int64 array [B, T]: ``kind`` "pt" gives a torch tensor, "np" a numpy array.

    Raises:
        ParameterError: another kind, or rows of different lengths.
    """
    if kind not in ("pt", "np"):
        raise ParameterError(f"return_tensors is {kind!r}; expected 'pt', 'np' or None")
    if len({len(row) for row in rows}) > 1:
        raise ParameterError("the texts have different numbers of tokens; pass padding=True to put them in one tensor")
    tensor = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1 if rows and rows[0] else 0)
    return tensor if kind == "pt" else tensor.numpy()


def id_lists(ids: Any) -> Any:
    """Token ids from a tensor, array, number or sequence of these, as plain lists (nested as they were)."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, (list, tuple)):
        return [id_lists(i) if isinstance(i, (list, tuple)) or hasattr(i, "tolist") else i for i in ids]
    return [ids]


def length_limit(
    truncation: bool | str | None, max_length: int | None, padding: bool | str, model_max_length: int
) -> int | None:
    """How many tokens a text may have; None for no limit. The rules are transformers'."""
    if truncation not in (None, True, False, "longest_first", "only_first", "do_not_truncate"):
        raise ParameterError(f"truncation is {truncation!r}; expected True, False, 'longest_first' or 'only_first'")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ParameterError(f"max_length is {max_length!r}; expected a whole number of at least 1")
    if truncation in (False, "do_not_truncate") or (truncation is None and (max_length is None or padding)):
        if max_length is not None and padding != "max_length":
            warn_once("max_length has no effect without truncation=True or padding='max_length'")
        return None
    limit = max_length if max_length is not None else model_max_length
    return limit if limit < NO_LIMIT else None


def padded_width(
    rows: Sequence[Sequence[int]],
    padding: bool | str,
    max_length: int | None,
    model_max_length: int,
    multiple: int | None,
) -> int | None:
    """The width to pad rows to; None where no padding is asked for. A longer row stays as long as it is."""
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise ParameterError(f"padding is {padding!r}; expected True, False, 'longest' or 'max_length'")
    if padding in (False, "do_not_pad"):
        return None
    width = max((len(row) for row in rows), default=0)
    if padding == "max_length":
        given = max_length if max_length is not None else model_max_length
        if given >= NO_LIMIT:
            raise ParameterError("padding='max_length' needs max_length: this tokenizer sets no limit")
        width = max(width, given)
    return -(-width // (multiple or 1)) * (multiple or 1)


_PADDED = ("input_ids", "attention_mask", "special_tokens_mask")


def read_encoded(encoded: Any) -> tuple[dict[str, list[list[int]]], bool, str | None]:
    """(rows by name, whether it was one text, "pt" or "np" where it held arrays) of what ``pad`` is given.

    Raises:
        ParameterError: there is no ``input_ids``, another key, or the keys hold rows of different lengths.
    """
    if isinstance(encoded, (list, tuple)) and encoded and all(isinstance(one, Mapping) for one in encoded):
        if any(one.keys() != encoded[0].keys() for one in encoded):
            raise ParameterError("pad: the encoded texts do not all hold the same keys")
        encoded = {key: [one[key] for one in encoded] for key in encoded[0]}
    if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
        held = (
            f"holds {', '.join(map(str, encoded))}" if isinstance(encoded, Mapping) else f"is {type(encoded).__name__}"
        )
        raise ParameterError(
            f"pad: the input {held}; expected input_ids and attention_mask, or a list of such mappings"
        )
    for name in encoded:
        if name not in _PADDED:
            raise ParameterError(
                f"pad: how {name!r} is padded is not known; pad it yourself ({', '.join(_PADDED)} are)"
            )
    first = encoded["input_ids"]
    inner = first[0] if isinstance(first, (list, tuple)) and len(first) else first
    kind = "pt" if isinstance(inner, torch.Tensor) else "np" if hasattr(inner, "tolist") else None
    lists = {name: id_lists(value) for name, value in encoded.items()}
    single = not any(isinstance(row, list) for row in lists["input_ids"])
    rows = {name: [value] if single else value for name, value in lists.items()}
    for name, value in rows.items():
        if [len(row) for row in value] != [len(row) for row in rows["input_ids"]]:
            raise ParameterError(f"pad: {name} and input_ids differ in length")
    return rows, single, kind
