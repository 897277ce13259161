"""What callers hand in as prompts: texts, token ids, arrays of them; checked once, with one clear error.

Torch's tensors, numpy's arrays and others are taken alike: an array is anything with ``tolist``, ``ndim`` and
``shape``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from gemcut.engine.sampling import SamplingParams
from gemcut.errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    pass

Prompt = str | Sequence[int]

_EXPECTED = "a prompt is a text or a list of token ids (whole numbers)"


def split_prompts(prompts: Any, *, pad_id: int | None = None) -> tuple[list[Any], bool]:
    """(the prompts, whether ``prompts`` was one alone).

    One prompt is a text, a flat sequence of token ids, or an array of one dimension. Several are a sequence of those,
    or an array of two dimensions, a prompt a row. An empty sequence holds no prompt. What is in each prompt is checked
    by `token_ids`.

    Args:
        prompts: what the caller gave.
        pad_id: rows of an array that begin or end with it are refused: padding is no part of a prompt.

    Raises:
        ParameterError: neither of these, or texts and ids mixed.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if _is_array(prompts):
        if prompts.ndim > 2 or prompts.ndim == 0:
            raise ParameterError(f"prompts is {_kind(prompts)}; expected one dimension (one prompt) or two (several)")
        values = prompts.tolist()
        if prompts.ndim == 1:
            return (values, False) if any(isinstance(value, str) for value in values) else ([prompts], True)
        _refuse_padding(values, pad_id)
        return list(prompts), False
    if isinstance(prompts, (bytes, bytearray, Mapping, set, frozenset)) or not isinstance(prompts, Iterable):
        _refuse("prompts", prompts)
    rows = list(prompts)
    numbers = sum(_is_number(row) for row in rows)
    if rows and numbers == len(rows):
        return [rows], True
    if numbers:
        raise ParameterError("prompts mixes token ids with other things; give one prompt of ids, or a list of prompts")
    return rows, False


def token_ids(prompt: Any, *, name: str = "prompt") -> list[int]:
    """The token ids of a prompt that is no text, as plain ints.

    Takes a sequence of whole numbers (numpy's too), an integer array of one dimension, or of two with one row.

    Raises:
        ParameterError: anything else; ``name`` says what the message calls it.
    """
    if _is_array(prompt):
        shape = tuple(prompt.shape)
        if len(shape) == 2 and shape[0] == 1:
            prompt = prompt[0]
        elif len(shape) != 1:
            raise ParameterError(f"{name} is {_kind(prompt)}; expected one dimension: the token ids of one prompt")
        if shape[-1] and not all(type(i) is int for i in prompt.tolist()):
            raise ParameterError(f"{name} is {_kind(prompt)}; token ids are whole numbers: use an integer dtype")
        return [int(i) for i in prompt.tolist()]
    if isinstance(prompt, (str, bytes, bytearray, Mapping, set, frozenset)) or not isinstance(prompt, Iterable):
        _refuse(name, prompt)
    ids = list(prompt)
    if all(type(i) is int for i in ids):
        return ids
    for place, value in enumerate(ids):
        if not _is_whole(value):
            nested = isinstance(value, (str, list, tuple)) or (_is_array(value) and value.ndim > 0)
            kind = "several prompts, where one is expected" if nested else f"{_kind(value)} at place {place}"
            raise ParameterError(f"{name} holds {kind}; {_EXPECTED}")
    return [operator.index(i) for i in ids]


def sampling_for_each(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams for each of ``count`` prompts, from one for all or a sequence of them.

    Raises:
        ParameterError: another number of them, or something else.
    """
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, (str, Mapping)) or not isinstance(params, Iterable):
        raise ParameterError(f"params is of type {type(params).__name__}; expected SamplingParams, or one a prompt")
    each = list(params)
    if len(each) != count:
        raise ParameterError(f"{count} prompts but {len(each)} sampling parameters")
    for one in each:
        if not isinstance(one, SamplingParams):
            raise ParameterError(f"params holds {_kind(one)}; expected SamplingParams, one a prompt")
    return each


def check_n(n: Any) -> int:
    """``n``, the number of answers a prompt, as an int. Raises ParameterError where it is none."""
    if not _is_whole(n) or operator.index(n) < 1:
        raise ParameterError(f"n is {n!r}; expected a whole number of at least 1")
    return operator.index(n)


def several(params: SamplingParams, n: int) -> list[SamplingParams]:
    """Parameters of ``n`` answers to one prompt: each has a seed of its own, the first the one that was given.

    Raises:
        ParameterError: greedy answers would all be the same.
    """
    if n > 1 and params.greedy:
        raise ParameterError(f"n={n} answers would all be the same without sampling; set a temperature above 0")
    if params.seed is None:  # the engine draws a fresh seed for each
        return [params] * n
    return [dataclasses.replace(params, seed=derived_seed(params.seed, k)) for k in range(n)]


def derived_seed(seed: int, k: int) -> int:
    """The seed of answer ``k`` of several: ``seed`` itself for the first, then steps of an odd number modulo 2**64.

    So no two of them are the same, and those of small seeds (1, 2, 3 …) do not meet. The sampler mixes the bits.
    """
    return seed if k == 0 else (seed + k * 0x9E3779B97F4A7C15) % 2**64


def refuse_pickle(what: str, instead: str) -> NoReturn:
    """Say why an object with a running engine cannot be copied to another place, and what to do."""
    raise UnsupportedError(f"{what} cannot be pickled or copied: {instead}")


def _is_array(value: object) -> bool:
    return hasattr(value, "tolist") and hasattr(value, "ndim") and hasattr(value, "shape")


def _is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number: an int, one of numpy's, or a tensor of no dimension; no bool, no float."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return False
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return value.ndim == 0 and type(value.tolist()) is int
    return hasattr(value, "__index__")


def _is_number(value: object) -> bool:
    """Whether ``value`` is one number of any kind, so that a sequence of such is one prompt (right or wrong)."""
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return bool(value.ndim == 0) and not isinstance(value, str)
    return isinstance(value, (bool, int, float, complex)) or hasattr(value, "__index__")


def _refuse_padding(rows: list[list[Any]], pad_id: int | None) -> None:
    for place, row in enumerate(rows):
        if pad_id is not None and len(row) > 1 and pad_id in (row[0], row[-1]):
            raise ParameterError(
                f"prompts[{place}] begins or ends with padding (token id {pad_id}), which would be read as text; "
                "give a list of prompts of their own lengths"
            )


def _refuse(name: str, value: object) -> NoReturn:
    hint = ""
    if isinstance(value, Mapping) and "input_ids" in value:
        hint = "; give its input_ids, or call generate of gemcut.AutoModelForCausalLM"
    elif isinstance(value, (bytes, bytearray)):
        hint = "; decode it to a text"
    raise ParameterError(f"{name} is {_kind(value)}; {_EXPECTED}{hint}")


def _kind(value: object) -> str:
    """What a message calls a value: "an int64 array of shape [2, 3]", "of type dict"."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if dtype and hasattr(value, "shape"):
        return f"of dtype {dtype} and shape {list(value.shape)}"
    if isinstance(value, (bool, int, float)):
        return f"{value!r}"
    return f"of type {type(value).__name__}"


def refuse_logprobs(sampling: Mapping[str, Any]) -> None:
    """A plain text has no place for log-probabilities; asking for them there is a mistake."""
    if sampling.get("logprobs") is not None:
        raise ParameterError("logprobs cannot be part of a text; use stream(...).result or complete(...)")
