"""What the model returns: dataclasses that also behave as transformers' outputs do (mapping and tuple)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from gemcut.hf.missing import missing
from gemcut.hf.public_names import OUTPUT


class Output:
    """Fields by attribute, by name ``out["logits"]``, or by place among those that are there ``out[0]``."""

    def keys(self) -> list[str]:
        """Names of the fields that are there."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        """The fields that are there."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are there."""
        return list(zip(self.keys(), self.values(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name if it is there."""
        return getattr(self, key) if key in self.keys() else default

    def __getattr__(self, name: str) -> Any:  # only called where there is no such attribute
        raise missing(self, name, OUTPUT)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class CausalLMOutput(Output):
    """Of ``model(...)``: ``logits`` fp32 [B, T, V], zero where the mask is zero; ``loss`` where labels were given.

    ``hidden_states``, where asked for: [B, T, d] after the embedding and after each layer, the last one normed; zero
    where the mask is zero.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclass
class BaseModelOutput(Output):
    """Of ``model.model(...)``, the network without its head: the fields of `CausalLMOutput`, in the model's dtype."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclass
class GenerateOutput(Output):
    """Of ``generate(..., return_dict_in_generate=True)``.

    Attributes:
        sequences: int64 [B, prompt + new].
        scores: for each new token fp32 [B, V]: logits after penalties, temperature and filters, where asked for.
        logits: for each new token fp32 [B, V]: the network's own, where asked for.

    Rows that ended earlier hold zeros in later scores and logits.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: None = None
    attentions: None = None
    hidden_states: None = None
